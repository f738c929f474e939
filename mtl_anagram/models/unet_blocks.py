"""The parts of the UNets: embeddings, resnets, the levels and their order; the IF UNet's joint attention and text.

Shapes: R rows, C channels, H W pixels, L text tokens, D width, N heads of size d; emb (R, time width) is activated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..errors import InputError
from .attention import multi_head, random_weight, sinusoids, split
from .configs import CROSS_NORM_GROUPS, UNetConfig, UNetSizes
from .winograd import Conv3x3

Span = tuple[int, int]
Number = int | Tensor
Activation = Callable[[Tensor], Tensor]
FEW_PIXELS = 256  # of a map to double, below which its convolution is done the plain way
MIDDLE = "middle"  # the middle block's kind


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
        keys, values = ({n: x[rows] for n, x in part.items()} for part in (self.keys, self.values))
        return TextContext(self.pooled[rows], keys, values)

    def columns(self, spans: Sequence[Span] | Span) -> Tensor:
        """Which tokens each row asks the maps of, for `UNet.text_maps`: once a run, whatever the number of steps.

        spans: half-open token ranges (start, stop), one for all rows or one per row. Returns (R, L, T) float32, 1
        where token l is row r's t-th, T the longest range; `columns[a:b]` are some of the rows.
        """
        rows, tokens = len(self), next(iter(self.keys.values())).shape[2]
        one = len(spans) == 2 and all(isinstance(end, int) for end in spans)
        ranges = cast("Sequence[Span]", [spans] * rows if one else spans)
        if len(ranges) != rows or not all(0 <= start < stop <= tokens for start, stop in ranges):
            limits = f"0 <= start < stop <= {tokens} tokens"
            raise InputError(f"spans={spans!r}: give one (start, stop), or {rows}, with {limits}")
        longest = max(stop - start for start, stop in ranges)
        picked = torch.zeros(rows, tokens, longest, dtype=torch.float32, device="cpu")
        for row, (start, stop) in enumerate(ranges):
            picked[row, start:stop].fill_diagonal_(1)
        return picked.to(self.pooled.device)


@dataclass
class Recorder:
    """Collects the asked columns (R, L, T) of the wanted layers' softmax during one forward pass."""

    wanted: set[str]
    columns: Tensor
    attend: Callable[..., tuple[Tensor, Tensor]]  # `attention_with_columns` or its like
    maps: dict[str, Tensor] = field(default_factory=dict)


class TimestepEmbedding(nn.Module):
    """Two layers on the sinusoidal code of a time or a noise level, (R,) -> (R, width)."""

    def __init__(self, in_width: int, width: int, act: Activation = F.gelu) -> None:
        super().__init__()
        self.act = act
        self.linear_1 = nn.Linear(in_width, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, positions: Tensor) -> Tensor:
        code = sinusoids(positions, self.linear_1.in_features).to(self.linear_1.weight.dtype)
        return self.linear_2(self.act(self.linear_1(code)))


class AttentionPooling(nn.Module):
    """One vector of a text: its mean attends over itself and the tokens, (R, L, D) -> (R, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = random_weight(1, width, std=width**-0.5)
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)

    def forward(self, text: Tensor) -> Tensor:
        mean = text.mean(dim=1, keepdim=True) + self.positional_embedding.to(text.dtype)  # (R, 1, D)
        tokens = torch.cat([mean, text], dim=1)  # (R, 1 + L, D)
        return multi_head(self.q_proj(mean), self.k_proj(tokens), self.v_proj(tokens), self.heads)[:, 0]


class TextTimeEmbedding(nn.Module):
    """The raw text states as one addition to the time embedding, (R, L, D) -> (R, width)."""

    def __init__(self, text_width: int, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(text_width)
        self.pool = AttentionPooling(text_width, heads)
        self.proj = nn.Linear(text_width, width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, text: Tensor) -> Tensor:
        return self.norm2(self.proj(self.pool(self.norm1(text))))


def upconv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A 3x3 convolution of a map whose pixels are each repeated 2x2, (R, C, H, W) -> (R, D, 2H, 2W).

    Both together are one transposed convolution of kernel 4 and stride 2, with 16 products for an input pixel in
    place of 36. Not where there are few pixels: making its weights would cost more; nor for a wrapper (LoRA's, say).
    """
    if x.shape[-2] * x.shape[-1] < FEW_PIXELS or not isinstance(conv, nn.Conv2d):
        return conv(F.interpolate(x, scale_factor=2.0))
    last = torch.eye(3, dtype=x.dtype, device=x.device).flip(0)
    # Along one side: which of the 4 outputs that an input pixel reaches has which of the 3 weights, or two of them.
    spread = F.pad(last, (0, 0, 1, 0)) + F.pad(last, (0, 0, 0, 1))
    weight = conv.weight.transpose(0, 1).flatten(2) @ torch.kron(spread, spread).T  # (C, D, 16)
    return F.conv_transpose2d(x, weight.unflatten(2, (4, 4)), conv.bias, stride=2, padding=1)


def scaled_norm(norm: nn.GroupNorm, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """norm(x) * scale + shift; scale and shift (R, C), or (1, C) for all rows: these the norm applies itself."""
    if scale.shape[0] == 1:
        weight, bias = norm.weight * scale[0], torch.addcmul(shift[0], norm.bias, scale[0])
        return F.group_norm(x, norm.num_groups, weight, bias, norm.eps)
    return torch.addcmul(shift[:, :, None, None], norm(x), scale[:, :, None, None])


class Resnet(nn.Module):
    """Two convolutions with time's part between; resampling, where asked, happens inside.

    plain: as in Stable Diffusion, SiLU and a time that is added; else IF's, GELU and time's scale and shift.
    """

    def __init__(
        self, in_width: int, width: int, config: UNetSizes, *, out_scale: float = 1.0,
        resample: str | None = None, plain: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.out_scale, self.resample, self.plain = out_scale, resample, plain
        self.act: Activation = F.silu if plain else F.gelu
        groups, eps = config.norm_num_groups, config.norm_eps
        self.norm1 = nn.GroupNorm(groups, in_width, eps=eps)
        self.conv1 = Conv3x3(in_width, width)
        self.time_emb_proj = nn.Linear(config.time_width, width if plain else 2 * width)
        self.norm2 = nn.GroupNorm(groups, width, eps=eps)
        self.conv2 = Conv3x3(width, width)
        self.conv_shortcut = nn.Identity() if in_width == width else nn.Conv2d(in_width, width, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.act(self.norm1(x))
        if self.resample == "down":
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        if self.resample == "up":
            h, x = upconv(self.conv1, h), F.interpolate(x, scale_factor=2.0)
        else:
            h = self.conv1(h)
        time = self.time_emb_proj(emb)
        if self.plain:
            h = self.norm2(h.add_(time[:, :, None, None]))
        else:
            scale, shift = time.chunk(2, dim=1)  # each (R, C)
            h = scaled_norm(self.norm2, h, 1 + scale, shift)
        # In place: a convolution's result is this function's own, and no gradient needs it.
        h = self.conv2(self.act(h)).add_(self.conv_shortcut(x))
        return h if self.out_scale == 1 else h.div_(self.out_scale)


class NamedAttention(nn.Module):
    """An attention layer that knows its own path in the UNet, by which a text's keys and values are kept."""

    name = ""


class JointAttention(NamedAttention):
    """Pixels attend to the text's tokens and to all pixels in one softmax; the text's keys come first."""

    def __init__(self, width: int, config: UNetConfig) -> None:
        super().__init__()
        cross = config.cross_attention_dim
        self.heads = width // config.attention_head_dim
        self.group_norm = nn.GroupNorm(config.norm_num_groups, width)
        self.norm_cross = nn.GroupNorm(CROSS_NORM_GROUPS, cross)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.add_k_proj = nn.Linear(cross, width)
        self.add_v_proj = nn.Linear(cross, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def prepare(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Projected text (R, L, cross) -> keys and values (R, N, L, d).

        The norm's statistics run over a group's channels and all L tokens, padding included, as published.
        """
        text = self.norm_cross(text.transpose(1, 2)).transpose(1, 2)
        return split(self.add_k_proj(text), self.heads), split(self.add_v_proj(text), self.heads)

    def forward(self, x: Tensor, context: TextContext, recorder: Recorder | None = None) -> Tensor:
        height, width = x.shape[-2:]
        pixels = rearrange(self.group_norm(x), "r c h w -> r (h w) c")
        q, k, v = (split(layer(pixels), self.heads) for layer in (self.to_q, self.to_k, self.to_v))
        k = torch.cat([context.keys[self.name], k], dim=2)
        v = torch.cat([context.values[self.name], v], dim=2)
        if recorder is not None and self.name in recorder.wanted:
            out, chosen = recorder.attend(q, k, v, recorder.columns)
            recorder.maps[self.name] = rearrange(chosen, "r n (h w) t -> r n h w t", h=height)
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        out = self.to_out[0](rearrange(out, "r n l d -> r l (n d)"))
        return x + rearrange(out, "r (h w) c -> r c h w", h=height, w=width)


class Block(nn.Module):
    """One level: resnets, each followed by attention, the first alone in the middle block, or none by its kind.

    The resampling module, if any, is `downsamplers.0` or `upsamplers.0`. The up path hands every resnet the skip of
    its level. resnet, attend and resampler make the parts.
    """

    def __init__(
        self, in_widths: Sequence[int], kind: str, resample: str | None, *, resnet: Callable[[int], nn.Module],
        attend: Callable[[], nn.Module], resampler: Callable[[], nn.Module],
    ) -> None:  # fmt: skip
        super().__init__()
        count = 1 if kind == MIDDLE else len(in_widths) if "Attn" in kind else 0
        self.attentions = nn.ModuleList([attend() for _ in range(count)])
        self.resnets = nn.ModuleList([resnet(width) for width in in_widths])
        self.downsamplers = nn.ModuleList([resampler()] if resample == "down" else [])
        self.upsamplers = nn.ModuleList([resampler()] if resample == "up" else [])

    def layers(self) -> list[tuple[nn.Module, nn.Module | None]]:
        """The level's resnets, each with its attention or None."""
        return list(zip_longest(self.resnets, self.attentions))


class UNetBase(nn.Module):
    """What the UNets of all stages share: the levels, their order, and the checks of a call."""

    def __init__(self, config: UNetSizes) -> None:
        super().__init__()
        self.config = config
        self.conv_in = nn.Conv2d(config.in_channels, config.block_out_channels[0], 3, padding=1)

    def add_levels(
        self, layers: Sequence[int], level: Callable[[list[int], int, str, str | None], Block]
    ) -> None:
        """Everything after the embeddings; level(widths in, place, kind, resample) makes a level's block."""
        config, widths = self.config, self.config.block_out_channels
        last, h = len(widths) - 1, widths[-1]
        skips = [widths[0]]  # widths of what the down path hands over, in order
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        for i, kind in enumerate(config.down_block_types):
            inner, resample = [skips[-1]] + [widths[i]] * (layers[i] - 1), "down" if i < last else None
            self.down_blocks.append(level(inner, i, kind, resample))
            skips += [widths[i]] * (layers[i] + (resample is not None))
        for i, kind in zip(range(last, -1, -1), config.up_block_types, strict=True):
            inner = [(widths[i] if j else h) + skips.pop() for j in range(layers[i] + 1)]
            h = widths[i]
            self.up_blocks.append(level(inner, i, kind, "up" if i else None))
        self.mid_block = level([widths[-1]] * 2, last, MIDDLE, None)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)
        for name, module in self.named_modules():
            if isinstance(module, NamedAttention):
                module.name = name

    @property
    def dtype(self) -> torch.dtype:
        return self.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.conv_in.weight.device

    def steps(self) -> list[tuple[str, nn.Module, nn.Module | None]]:
        """Every resnet in order of use and its attention; "push" keeps a skip after it, "pop" takes one before it."""
        steps: list[tuple[str, nn.Module, nn.Module | None]] = []
        for path, blocks in (("push", self.down_blocks), ("", [self.mid_block]), ("pop", self.up_blocks)):
            for block in cast("Iterable[Block]", blocks):
                steps += [(path, resnet, attend) for resnet, attend in block.layers()]
                steps += [("push", resampler, None) for resampler in block.downsamplers]
                steps += [("", resampler, None) for resampler in block.upsamplers]
        return steps

    def picture(self, x: Tensor) -> Tensor:
        """A call's picture, checked, in the network's dtype."""
        channels, factor = self.config.in_channels, self.config.size_factor
        if x.ndim != 4 or x.shape[1] != channels or not all(n and n % factor == 0 for n in x.shape[-2:]):
            wanted = f"(rows, {channels}, H, W), H and W multiples of {factor}"
            raise InputError(f"x of shape {tuple(x.shape)}: expected {wanted}")
        return x.to(self.dtype)

    def numbers(self, name: str, value: Number, rows: int) -> Tensor:
        """A time or noise level: one number for all rows, as (1,), or one per row, as (R,)."""
        numbers = torch.as_tensor(value, device=self.device).reshape(-1)
        if numbers.shape[0] not in (1, rows):
            raise InputError(f"{name} of {numbers.shape[0]} numbers: give one, or {rows}, one per row")
        return numbers

    def walk(self, x: Tensor, emb: Tensor, context: object, recorder: Recorder | None = None) -> Tensor:
        """From the picture to the last step's state, or to the last layer that the recorder wants."""
        h = self.conv_in(x)
        skips = [h]
        for path, resnet, attend in self.steps():
            h = resnet(torch.cat([h, skips.pop()], dim=1) if path == "pop" else h, emb)
            if attend is not None:
                h = attend(h, context) if recorder is None else attend(h, context, recorder)
            if path == "push":
                skips.append(h)
            if recorder is not None and len(recorder.maps) == len(recorder.wanted):
                break
        return h
