"""Growing a UNet from its inner levels outwards: what is coarse is learnt on small pictures first.

At depth k the k outermost levels are left out. The picture is x_t averaged over 2^k x 2^k pixels - what the
inner levels would meet anyway, since the outer levels begin as the identity followed by averaging - and the
target is the noise averaged likewise, scaled back to unit variance. A head that exists for this alone
predicts it. A picture at 16 pixels costs a third to a quarter of one at 64 and teaches the same inner
weights the layout, the text and the time. (Widths of the levels left out must be equal, so that the entry
fits every depth.)
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mtl_anagram.models.unet import UNet
from mtl_anagram.models.unet_blocks import JointAttention, TextContext


class Head(nn.Module):
    """Norm, activation and a convolution to the three channels of noise."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width)
        self.conv = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 3, H, W)."""
        return self.conv(F.gelu(self.norm(h)))


def heads_for(widths: tuple[int, ...], groups: int, depths: int) -> nn.ModuleList:
    """The heads of depths 1..`depths`."""
    return nn.ModuleList(Head(widths[depth], groups) for depth in range(1, depths + 1))


def pooled(x: Tensor, depth: int) -> Tensor:
    """(B, C, H, W) averaged over blocks of 2^depth pixels a side."""
    return F.avg_pool2d(x, 2**depth) if depth else x


def pooled_noise(noise: Tensor, depth: int) -> Tensor:
    """The averaged noise, scaled so that white noise of unit variance stays that."""
    return pooled(noise, depth) * 2**depth


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
    raised = torch.zeros(k.shape[2], dtype=q.dtype)
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
    depth: int = 0,
    head: Head | None = None,
    keys: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The UNet without its `depth` outermost levels, on x (B, 3, H, W) that is already averaged.

    keys: the most pixels that an attention layer looks at, drawn anew for every layer; None = all. Returns
    the UNet's output (B, 6, H, W) at depth 0, else the head's (B, 3, H, W).
    """

    def attended(layer: JointAttention | None, h: Tensor) -> Tensor:
        if layer is None:
            return h
        pixels = h.shape[-1] * h.shape[-2]
        keep = None
        if keys is not None and pixels > keys:
            keep = torch.randperm(pixels, generator=generator)[:keys]
        return attend(layer, h, context, keep)

    emb = F.gelu(unet.time_embedding(t) + context.pooled)
    h = unet.conv_in(x)
    skips = [h]
    for block in list(unet.down_blocks)[depth:]:
        for resnet, layer in block.layers():
            h = attended(layer, resnet(h, emb))
            skips.append(h)
        if block.resampler is not None:
            h = block.resampler(h, emb)
            skips.append(h)
    h = unet.mid_block.resnets[0](h, emb)
    h = attended(unet.mid_block.attentions[0], h)
    h = unet.mid_block.resnets[1](h, emb)
    levels = len(unet.up_blocks) - depth
    for i, block in enumerate(list(unet.up_blocks)[:levels]):
        for resnet, layer in block.layers():
            h = attended(layer, resnet(torch.cat([h, skips.pop()], dim=1), emb))
        if i < levels - 1:
            h = block.resampler(h, emb)
    return unet.conv_out(F.gelu(unet.conv_norm_out(h))) if head is None else head(h)
