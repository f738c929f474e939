"""The parts of stage III's UNet: resnets, transformer blocks that read the text, the levels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..attention import attention, sinusoids
from .configs import UpscalerUNetConfig

TRANSFORMER_NORM_EPS = 1e-6  # of the group norm before a transformer; the config has no field for it


@dataclass(frozen=True)
class UpscalerText:
    """What the UNet makes of a text once and for all steps: `UpscalerUNet.prepare`'s result, R rows.

    keys, values: by attention layer, (R, N, L, d). `text[a:b]` are some of the rows.
    """

    keys: dict[str, Tensor]
    values: dict[str, Tensor]

    def __len__(self) -> int:
        return next(iter(self.keys.values())).shape[0]

    def __getitem__(self, rows: slice | Tensor) -> UpscalerText:
        return UpscalerText(
            {name: k[rows] for name, k in self.keys.items()},
            {name: v[rows] for name, v in self.values.items()},
        )


class TimestepEmbedding(nn.Module):
    """Two layers on the sinusoidal code of a timestep, SiLU between."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_width, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        """(R,) numbers -> (R, width)."""
        code = sinusoids(t, self.linear_1.in_features).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(code)))


class Resnet(nn.Module):
    """Two convolutions, the time embedding added between."""

    def __init__(self, in_width: int, width: int, config: UpscalerUNetConfig) -> None:
        super().__init__()
        groups, eps = config.norm_num_groups, config.norm_eps
        self.norm1 = nn.GroupNorm(groups, in_width, eps=eps)
        self.conv1 = nn.Conv2d(in_width, width, 3, padding=1)
        self.time_emb_proj = nn.Linear(config.time_width, width)
        self.norm2 = nn.GroupNorm(groups, width, eps=eps)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        if in_width != width:
            self.conv_shortcut = nn.Conv2d(in_width, width, 1)
        self.has_shortcut = in_width != width

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x (R, C, H, W), emb (R, time width), activated -> (R, C', H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(emb)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return (self.conv_shortcut(x) if self.has_shortcut else x) + h


class Resampler(nn.Module):
    """Half the side by a strided convolution, or twice the side by repetition and a convolution."""

    def __init__(self, width: int, *, down: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, stride=2 if down else 1)
        self.down = down

    def forward(self, x: Tensor) -> Tensor:
        """(R, C, H, W) -> (R, C, H/2, W/2) or (R, C, 2H, 2W)."""
        return self.conv(x if self.down else F.interpolate(x, scale_factor=2.0))


class Attention(nn.Module):
    """Attention of pixels to each other (context None), or to the text alone."""

    def __init__(self, width: int, heads: int, context: int | None) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context or width, width, bias=False)
        self.to_v = nn.Linear(context or width, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.heads = heads
        self.reads_text = context is not None
        self.name = ""  # set by the UNet: the module's own path

    def project(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Text states or pixels (R, S, D) -> keys and values (R, N, S, d)."""
        k, v = self.to_k(states), self.to_v(states)
        return self._split(k), self._split(v)

    def forward(self, pixels: Tensor, text: UpscalerText) -> Tensor:
        """pixels (R, H W, C) -> (R, H W, C)."""
        q = self._split(self.to_q(pixels))
        k, v = (text.keys[self.name], text.values[self.name]) if self.reads_text else self.project(pixels)
        return self.to_out[0](rearrange(attention(q, k, v), "r n l d -> r l (n d)"))

    def _split(self, states: Tensor) -> Tensor:
        return rearrange(states, "r l (n d) -> r n l d", n=self.heads)


class GEGLU(nn.Module):
    """One projection, half of it gated by the exact GELU of the other half (Shazeer 2020)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., inner)."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU of four times the width, and back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # The empty place is a dropout's in the published module; it holds the numbers in the names.
        self.net = nn.ModuleList([GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        """(R, L, D) -> (R, L, D)."""
        for layer in self.net:
            x = layer(x)
        return x


class TransformerBlock(nn.Module):
    """Attention twice, the second time always to the text, and a feed-forward; each added to the stream."""

    def __init__(self, width: int, config: UpscalerUNetConfig, *, only_cross: bool) -> None:
        super().__init__()
        heads, cross = config.attention_head_dim, config.cross_attention_dim
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, heads, cross if only_cross else None)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, heads, cross)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, text: UpscalerText) -> Tensor:
        """(R, H W, C) -> (R, H W, C)."""
        x = x + self.attn1(self.norm1(x), text)
        x = x + self.attn2(self.norm2(x), text)
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    """A transformer block on the pixels of a feature map, linear layers around it, added to the map."""

    def __init__(self, width: int, config: UpscalerUNetConfig, *, only_cross: bool) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_num_groups, width, eps=TRANSFORMER_NORM_EPS)
        self.proj_in = nn.Linear(width, width)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, config, only_cross=only_cross)])
        self.proj_out = nn.Linear(width, width)

    def forward(self, x: Tensor, text: UpscalerText) -> Tensor:
        """(R, C, H, W) -> (R, C, H, W)."""
        h = self.proj_in(rearrange(self.norm(x), "r c h w -> r (h w) c"))
        h = self.proj_out(self.transformer_blocks[0](h, text))
        return x + rearrange(h, "r (h w) c -> r c h w", h=x.shape[-2])


class Level(nn.Module):
    """One level of the down or up path: resnets, each with a transformer where the level has them."""

    def __init__(
        self,
        in_widths: Sequence[int],
        width: int,
        config: UpscalerUNetConfig,
        *,
        attend: bool,
        only_cross: bool,
        resample: str | None,
    ) -> None:
        super().__init__()
        if attend:
            self.attentions = nn.ModuleList(
                [Transformer(width, config, only_cross=only_cross) for _ in in_widths]
            )
        self.resnets = nn.ModuleList([Resnet(w, width, config) for w in in_widths])
        if resample is not None:
            resampler = Resampler(width, down=resample == "down")
            setattr(self, f"{resample}samplers", nn.ModuleList([resampler]))
        self.attend = attend
        self.resample = resample

    def layers(self) -> Iterator[tuple[nn.Module, nn.Module | None]]:
        """The level's resnets, each with its transformer or None."""
        for i, resnet in enumerate(self.resnets):
            yield resnet, self.attentions[i] if self.attend else None

    @property
    def resampler(self) -> nn.Module | None:
        return None if self.resample is None else getattr(self, f"{self.resample}samplers")[0]


class Middle(nn.Module):
    """The lowest level's resnet, transformer (on its own pixels and the text) and resnet."""

    def __init__(self, width: int, config: UpscalerUNetConfig) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Transformer(width, config, only_cross=False)])
        self.resnets = nn.ModuleList([Resnet(width, width, config), Resnet(width, width, config)])

    def forward(self, x: Tensor, emb: Tensor, text: UpscalerText) -> Tensor:
        """x (R, C, H, W), emb (R, time width) -> (R, C, H, W)."""
        x = self.attentions[0](self.resnets[0](x, emb), text)
        return self.resnets[1](x, emb)
