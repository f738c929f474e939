"""Stage III's UNet: noisy latents, the low-resolution picture, time, noise level and text in; v out."""

from dataclasses import dataclass
from functools import partial
from typing import cast

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..attention import multi_head
from ..configs import UpscalerUNetConfig
from ..unet_blocks import MIDDLE, Block, NamedAttention, Number, Resnet, TimestepEmbedding, UNetBase, upconv

TRANSFORMER_NORM_EPS = 1e-6  # of the group norm before a transformer; the config has no field for it


@dataclass(frozen=True)
class UpscalerText:
    """A text's keys and values (R, L, N d) by attention layer, the same at every step; `text[a:b]` = some rows."""

    layers: dict[str, tuple[Tensor, Tensor]]

    def __getitem__(self, rows: slice) -> "UpscalerText":
        return UpscalerText({name: (k[rows], v[rows]) for name, (k, v) in self.layers.items()})


class Attention(NamedAttention):
    """Attention of pixels (R, H W, C) to each other (context None), or to the text alone."""

    def __init__(self, width: int, heads: int, context: int | None) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context or width, width, bias=False)
        self.to_v = nn.Linear(context or width, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.heads = heads
        self.reads_text = context is not None

    def project(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Text states or pixels (R, S, D) -> keys and values (R, S, N d)."""
        return self.to_k(states), self.to_v(states)

    def forward(self, pixels: Tensor, text: UpscalerText) -> Tensor:
        k, v = text.layers[self.name] if self.reads_text else self.project(pixels)
        return self.to_out[0](multi_head(self.to_q(pixels), k, v, self.heads))


class TransformerBlock(nn.Module):
    """Attention twice, the second time always to the text, and a gated feed-forward; each added to the stream."""

    def __init__(self, width: int, config: UpscalerUNetConfig, only_cross: bool) -> None:
        super().__init__()
        heads, cross = config.attention_head_dim, config.cross_attention_dim
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attn1 = Attention(width, heads, cross if only_cross else None)
        self.attn2 = Attention(width, heads, cross)
        # The empty place is a dropout's in the published module; it holds the numbers in the names.
        gated, out = nn.ModuleDict({"proj": nn.Linear(width, 8 * width)}), nn.Linear(4 * width, width)
        self.ff = nn.ModuleDict({"net": nn.ModuleList([gated, nn.Identity(), out])})

    def forward(self, x: Tensor, text: UpscalerText) -> Tensor:
        x = x + self.attn1(self.norm1(x), text)
        x = x + self.attn2(self.norm2(x), text)
        gated, _, out = cast("nn.ModuleList", self.ff["net"])
        value, gate = cast("nn.ModuleDict", gated)["proj"](self.norm3(x)).chunk(2, dim=-1)
        return x + out(value * F.gelu(gate))  # GEGLU (Shazeer 2020)


class Transformer(nn.Module):
    """A transformer block on the pixels of a map (R, C, H, W), linear layers around it, added to the map."""

    def __init__(self, width: int, config: UpscalerUNetConfig, only_cross: bool) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_num_groups, width, eps=TRANSFORMER_NORM_EPS)
        self.proj_in = nn.Linear(width, width)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, config, only_cross)])
        self.proj_out = nn.Linear(width, width)

    def forward(self, x: Tensor, text: UpscalerText) -> Tensor:
        h = self.proj_in(rearrange(self.norm(x), "r c h w -> r (h w) c"))
        h = self.proj_out(self.transformer_blocks[0](h, text))
        return x + rearrange(h, "r (h w) c -> r c h w", h=x.shape[-2])


class Resampler(nn.Module):
    """Half the side by a strided convolution, or twice the side by repetition and a convolution."""

    def __init__(self, width: int, resample: str | None) -> None:
        super().__init__()
        self.up = resample == "up"
        self.conv = nn.Conv2d(width, width, 3, padding=1, stride=1 if self.up else 2)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        return upconv(self.conv, h) if self.up else self.conv(h)


class UpscalerUNet(UNetBase):
    """The latent UNet of the Stable Diffusion x4 upscaler (the diffusers layout's names and maths).

    Levels with only_cross_attention look at the text in both of their attentions and never at each other's
    pixels: at 256 px of latents that is what keeps them affordable.
    """

    config: UpscalerUNetConfig

    def __init__(self, config: UpscalerUNetConfig) -> None:
        super().__init__(config)
        widths = config.block_out_channels
        self.time_embedding = TimestepEmbedding(widths[0], config.time_width, F.silu)
        self.class_embedding = nn.Embedding(config.num_class_embeds, config.time_width)

        def level(inner: list[int], i: int, kind: str, resample: str | None) -> Block:
            only_cross = kind != MIDDLE and config.only_cross_attention[i]
            resnet = partial(Resnet, width=widths[i], config=config, plain=True)
            attend = partial(Transformer, widths[i], config, only_cross)
            resampler = partial(Resampler, widths[i], resample)
            return Block(inner, kind, resample, resnet=resnet, attend=attend, resampler=resampler)

        self.add_levels([config.layers_per_block] * len(widths), level)

    def prepare(self, text: Tensor) -> UpscalerText:
        """Text states (R, L, cross_attention_dim) -> the keys and values of every layer that reads them."""
        text = text.to(self.dtype)
        readers = (m for m in self.modules() if isinstance(m, Attention) and m.reads_text)
        return UpscalerText({module.name: module.project(text) for module in readers})

    def forward(self, x: Tensor, t: Number, text: Tensor | UpscalerText, class_labels: Number) -> Tensor:
        """Predict v = sqrt(a) eps - sqrt(1 - a) z0 (Salimans & Ho 2022), (R, 4, H, W).

        x (R, 7, H, W): noisy latents, then the noisy low-resolution picture, H and W multiples of
        `config.size_factor`; t the timestep 0..999, one for all rows or (R,); text (R, L, D) states of the text
        tower or `prepare`'s result; class_labels: the noise level 0..999 of the low-resolution picture, one or (R,).
        """
        x = self.picture(x)
        context = text if isinstance(text, UpscalerText) else self.prepare(text)
        emb = self.time_embedding(self.numbers("t", t, x.shape[0]))  # (R or 1, time width)
        labels = self.class_embedding(self.numbers("class_labels", class_labels, x.shape[0]).long())
        # Every resnet activates the same embedding: once is enough.
        h = self.walk(x, F.silu(emb + labels), context)
        return self.conv_out(F.silu(self.conv_norm_out(h)))
