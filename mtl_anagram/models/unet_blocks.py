"""The parts of the IF UNet: embeddings, resnets, joint attention, the levels; and what a text becomes in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .attention import attention, attention_with_columns, sinusoids
from .configs import CROSS_NORM_GROUPS, UNetConfig

Span = tuple[int, int]


@dataclass(frozen=True)
class TextContext:
    """What a UNet makes of a text once and for all steps: `UNet.prepare`'s result, R rows.

    pooled (R, time width): the text's part of the time embedding. keys, values: by attention layer,
    (R, N, L, d). `context[a:b]` are some of the rows.
    """

    pooled: Tensor
    keys: dict[str, Tensor]
    values: dict[str, Tensor]

    def __len__(self) -> int:
        return self.pooled.shape[0]

    def __getitem__(self, rows: slice) -> TextContext:
        return TextContext(
            self.pooled[rows],
            {name: k[rows] for name, k in self.keys.items()},
            {name: v[rows] for name, v in self.values.items()},
        )

    @property
    def length(self) -> int:
        """L, the number of text tokens."""
        return next(iter(self.keys.values())).shape[2]


class Recorder:
    """Collects the asked columns of the wanted layers' softmax during one forward pass."""

    def __init__(self, wanted: set[str], spans: Sequence[Span], device: torch.device) -> None:
        self.wanted = wanted
        self.maps: dict[str, Tensor] = {}
        longest = max(stop - start for start, stop in spans)
        offsets = torch.arange(longest, device=device)
        starts = torch.tensor([start for start, _ in spans], device=device)
        stops = torch.tensor([stop for _, stop in spans], device=device)
        self.keep = (starts[:, None] + offsets < stops[:, None]).float()  # (R, T)
        self.columns = torch.minimum(starts[:, None] + offsets, stops[:, None] - 1)  # (R, T)

    @property
    def complete(self) -> bool:
        return len(self.maps) == len(self.wanted)


class TimestepEmbedding(nn.Module):
    """Two layers on the sinusoidal code of a time or a noise level, exact GELU between."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_width, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, positions: Tensor) -> Tensor:
        """(R,) numbers -> (R, width)."""
        code = sinusoids(positions, self.linear_1.in_features).to(self.linear_1.weight.dtype)
        return self.linear_2(F.gelu(self.linear_1(code)))


class AttentionPooling(nn.Module):
    """One vector of a text: its mean attends over itself and the tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(1, width) / width**0.5)
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.heads = heads

    def forward(self, text: Tensor) -> Tensor:
        """(R, L, D) -> (R, D)."""
        mean = text.mean(dim=1, keepdim=True) + self.positional_embedding.to(text.dtype)  # (R, 1, D)
        tokens = torch.cat([mean, text], dim=1)  # (R, 1 + L, D)
        q, k, v = (
            rearrange(part, "r l (n d) -> r n l d", n=self.heads)
            for part in (self.q_proj(mean), self.k_proj(tokens), self.v_proj(tokens))
        )
        return rearrange(attention(q, k, v), "r n 1 d -> r (n d)")


class TextTimeEmbedding(nn.Module):
    """The raw text states as one addition to the time embedding."""

    def __init__(self, text_width: int, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(text_width)
        self.pool = AttentionPooling(text_width, heads)
        self.proj = nn.Linear(text_width, width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, text: Tensor) -> Tensor:
        """(R, L, D) -> (R, width)."""
        return self.norm2(self.proj(self.pool(self.norm1(text))))


class Resnet(nn.Module):
    """Two convolutions with time's scale and shift between; resampling, where asked, happens inside."""

    def __init__(
        self, in_width: int, width: int, config: UNetConfig, *, out_scale: float, resample: str | None = None
    ) -> None:
        super().__init__()
        groups, eps = config.norm_num_groups, config.norm_eps
        self.norm1 = nn.GroupNorm(groups, in_width, eps=eps)
        self.conv1 = nn.Conv2d(in_width, width, 3, padding=1)
        self.time_emb_proj = nn.Linear(config.time_width, 2 * width)
        self.norm2 = nn.GroupNorm(groups, width, eps=eps)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        if in_width != width:
            self.conv_shortcut = nn.Conv2d(in_width, width, 1)
        self.has_shortcut = in_width != width
        self.out_scale = out_scale
        self.resample = resample

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x (R, C, H, W), emb (R, time width), activated -> (R, C', H', W')."""
        h = F.gelu(self.norm1(x))
        if self.resample == "down":
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        elif self.resample == "up":
            h, x = F.interpolate(h, scale_factor=2.0), F.interpolate(x, scale_factor=2.0)
        h = self.conv1(h)
        scale, shift = self.time_emb_proj(emb)[:, :, None, None].chunk(2, dim=1)  # each (R, C', 1, 1)
        h = self.conv2(F.gelu(self.norm2(h) * (1 + scale) + shift))
        if self.has_shortcut:
            x = self.conv_shortcut(x)
        h = x + h
        return h if self.out_scale == 1 else h / self.out_scale


class JointAttention(nn.Module):
    """Pixels attend to the text's tokens and to all pixels in one softmax; the text's keys come first."""

    def __init__(self, width: int, config: UNetConfig) -> None:
        super().__init__()
        cross = config.cross_attention_dim
        self.group_norm = nn.GroupNorm(config.norm_num_groups, width)
        self.norm_cross = nn.GroupNorm(CROSS_NORM_GROUPS, cross)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.add_k_proj = nn.Linear(cross, width)
        self.add_v_proj = nn.Linear(cross, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.heads = width // config.attention_head_dim
        self.name = ""  # set by the UNet: the module's own path

    def _split(self, states: Tensor) -> Tensor:
        return rearrange(states, "r l (n d) -> r n l d", n=self.heads)

    def prepare(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Projected text (R, L, cross) -> keys and values (R, N, L, d).

        The norm's statistics run over a group's channels and all L tokens, padding included, as published.
        """
        text = self.norm_cross(text.transpose(1, 2)).transpose(1, 2)
        return self._split(self.add_k_proj(text)), self._split(self.add_v_proj(text))

    def forward(self, x: Tensor, context: TextContext, recorder: Recorder | None) -> Tensor:
        """x (R, C, H, W) -> (R, C, H, W)."""
        height, width = x.shape[-2:]
        pixels = rearrange(self.group_norm(x), "r c h w -> r (h w) c")
        q = self._split(self.to_q(pixels))
        k = torch.cat([context.keys[self.name], self._split(self.to_k(pixels))], dim=2)
        v = torch.cat([context.values[self.name], self._split(self.to_v(pixels))], dim=2)
        if recorder is not None and self.name in recorder.wanted:
            out, chosen = attention_with_columns(q, k, v, recorder.columns, recorder.keep)
            recorder.maps[self.name] = rearrange(chosen, "r n (h w) t -> r n h w t", h=height)
        else:
            out = attention(q, k, v)
        out = self.to_out[0](rearrange(out, "r n l d -> r l (n d)"))
        return x + rearrange(out, "r (h w) c -> r c h w", h=height, w=width)


class Block(nn.Module):
    """One level of the down or up path: resnets, each followed by attention where the level has it.

    The resampling resnet, if any, is `downsamplers.0` or `upsamplers.0`. The up path hands every resnet the
    skip of its level.
    """

    def __init__(
        self, in_widths: Sequence[int], width: int, config: UNetConfig, *, attend: bool, resample: str | None
    ) -> None:
        super().__init__()
        out_scale = config.resnet_out_scale_factor
        if attend:
            self.attentions = nn.ModuleList([JointAttention(width, config) for _ in in_widths])
        self.resnets = nn.ModuleList([Resnet(w, width, config, out_scale=out_scale) for w in in_widths])
        if resample is not None:
            resampler = Resnet(width, width, config, out_scale=out_scale, resample=resample)
            setattr(self, f"{resample}samplers", nn.ModuleList([resampler]))
        self.attend = attend
        self.resample = resample

    def layers(self) -> Iterator[tuple[nn.Module, nn.Module | None]]:
        """The level's resnets, each with its attention or None."""
        attentions = self.attentions if self.attend else [None] * len(self.resnets)
        yield from zip(self.resnets, attentions, strict=True)

    @property
    def resampler(self) -> nn.Module | None:
        return None if self.resample is None else getattr(self, f"{self.resample}samplers")[0]


class MidBlock(nn.Module):
    """The coarsest level between the two paths: resnet, attention, resnet."""

    def __init__(self, width: int, config: UNetConfig) -> None:
        super().__init__()
        scale = config.mid_block_scale_factor
        self.attentions = nn.ModuleList([JointAttention(width, config)])
        self.resnets = nn.ModuleList([Resnet(width, width, config, out_scale=scale) for _ in range(2)])
