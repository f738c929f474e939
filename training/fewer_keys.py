"""The UNet of training: `mtl_anagram.models.unet`'s, with attention that looks at some of the pixels."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from mtl_anagram.models.unet import UNet
from mtl_anagram.models.unet_blocks import JointAttention, TextContext


def attend(layer: JointAttention, x: Tensor, context: TextContext, keep: Tensor | None) -> Tensor:
    """The layer's attention, with the pixels of `keep` (K,) alone as pixel keys; None = all of them.

    Each pixel kept stands for several, so its logit is raised by the log of how many: the sum over the keys
    kept then estimates the sum over all. x (B, C, H, W) -> (B, C, H, W).
    """
    if keep is None:
        return layer(x, context, None)
    height, width = x.shape[-2:]
    pixels = rearrange(layer.group_norm(x), "b c h w -> b (h w) c")
    chosen = pixels[:, keep]

    def split(states: Tensor) -> Tensor:
        return rearrange(states, "b l (n d) -> b n l d", n=layer.heads)

    k = torch.cat([context.keys[layer.name], split(layer.to_k(chosen))], dim=2)
    v = torch.cat([context.values[layer.name], split(layer.to_v(chosen))], dim=2)
    q = split(layer.to_q(pixels))
    raised = torch.zeros(k.shape[2], dtype=q.dtype, device=q.device)
    raised[-len(keep) :] = math.log(height * width / len(keep))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=raised.expand(1, 1, q.shape[2], -1))
    out = layer.to_out[0](rearrange(out, "b n l d -> b l (n d)"))
    return x + rearrange(out, "b (h w) c -> b c h w", h=height)


def forward(
    unet: UNet,
    x: Tensor,
    t: Tensor,
    context: TextContext,
    *,
    keys: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The UNet of a stage I on pictures (B, 3, H, W): (B, 6, H, W).

    keys: the most pixels that an attention layer looks at, drawn anew for every layer; None = all.
    """

    def attended(layer: JointAttention | None, h: Tensor) -> Tensor:
        if layer is None:
            return h
        pixels = h.shape[-1] * h.shape[-2]
        keep = None
        if keys is not None and pixels > keys:
            keep = torch.randperm(pixels, generator=generator, device=x.device)[:keys]
        return attend(layer, h, context, keep)

    emb = F.gelu(unet.time_embedding(t) + context.pooled)
    h = unet.conv_in(x)
    skips = [h]
    for block in unet.down_blocks:
        for resnet, layer in block.layers():
            h = attended(layer, resnet(h, emb))
            skips.append(h)
        for resampler in block.downsamplers:
            h = resampler(h, emb)
            skips.append(h)
    h = unet.mid_block.resnets[0](h, emb)
    h = attended(unet.mid_block.attentions[0], h)
    h = unet.mid_block.resnets[1](h, emb)
    for block in unet.up_blocks:
        for resnet, layer in block.layers():
            h = attended(layer, resnet(torch.cat([h, skips.pop()], dim=1), emb))
        for resampler in block.upsamplers:
            h = resampler(h, emb)
    return unet.conv_out(F.gelu(unet.conv_norm_out(h)))
