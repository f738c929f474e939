"""Convolutions and group norms in horizontal bands: the same numbers, without the large temporaries.

A picture of 1024 px has feature maps of 1 GiB, and a convolution done plainly holds its input three times: as it
is, normalised, and padded; convolution kernels may add workspaces of that size. Here every layer is done band by
band: a band of a convolution reads its rows and one more on either side, and a group norm's mean
and variance are taken over the whole map first. So nothing is approximated, blended or computed twice; only the
map before a layer and the one after it are whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BAND = 1 << 24  # values of a band of the wider map, 64 MiB in float32
Rows = Callable[[int, int], Tensor]  # (start, stop) -> those rows of a map, (B, C, stop - start, W)


def bands(height: int, values_per_row: int, band: int | None) -> Iterator[tuple[int, int]]:
    """Ranges of rows that cover a map, each of at most `band` values (one row at least); None = all at once."""
    rows = height if band is None else max(1, band // values_per_row)
    for start in range(0, height, rows):
        yield start, min(start + rows, height)


def normalised(norm: nn.GroupNorm, x: Tensor, *, silu: bool) -> Rows:
    """The rows of norm(x), activated or not; mean and variance are those of the whole map x (B, C, H, W)."""
    scale, shift = affine(norm, x)
    wide = scale.dtype

    def rows(start: int, stop: int) -> Tensor:
        h = torch.addcmul(shift, x[:, :, start:stop].to(wide), scale)
        return (F.silu(h) if silu else h).to(norm.weight.dtype)

    return rows


def affine(norm: nn.GroupNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """norm(x) = x scale + shift, each (B, C, 1, 1) in float32 or wider."""
    groups = x.unflatten(1, (norm.num_groups, -1))  # (B, G, C/G, H, W)
    wide = torch.promote_types(x.dtype, torch.float32)
    if wide == x.dtype:
        variance, mean = torch.var_mean(groups, dim=(2, 3, 4), correction=0)
    else:  # one group at a time: a wider copy of the whole map would be the largest thing in memory
        moments = [
            torch.var_mean(groups[:, i].to(wide), dim=(1, 2, 3), correction=0) for i in range(norm.num_groups)
        ]
        variance, mean = (torch.stack(part, dim=1) for part in zip(*moments, strict=True))  # (B, G)
    repeat = x.shape[1] // norm.num_groups
    spread = torch.rsqrt(variance + norm.eps).repeat_interleave(repeat, dim=1)  # (B, C)
    scale = norm.weight.to(wide) * spread
    shift = norm.bias.to(wide) - mean.repeat_interleave(repeat, dim=1) * scale
    return scale[:, :, None, None], shift[:, :, None, None]


def doubled(x: Tensor) -> Rows:
    """The rows of x (B, C, H, W) with every pixel repeated twice along both sides."""

    def rows(start: int, stop: int) -> Tensor:
        first = start // 2
        large = F.interpolate(x[:, :, first : (stop + 1) // 2], scale_factor=2.0)
        return large[:, :, start - 2 * first : stop - 2 * first]

    return rows


def convolve(
    conv: nn.Conv2d,
    rows: Rows,
    height: int,
    *,
    band: int | None,
    padding: tuple[int, int] = (1, 1),
    add: Rows | None = None,
) -> Tensor:
    """A 3x3 convolution of a map that `rows` gives, `height` rows high, plus what `add` gives.

    padding: zeros before and after, on both axes. Returns (B, C', H', W'), equal to the convolution of the
    whole map up to the rounding of sums.
    """
    stride, (before, after) = conv.stride[0], padding
    out_height = (height + before + after - 3) // stride + 1
    first_row = rows(0, 1)
    width = (first_row.shape[-1] + before + after - 3) // stride + 1
    widest = max(conv.out_channels * width, conv.in_channels * first_row.shape[-1] * stride)

    def part(start: int, stop: int) -> Tensor:
        top, bottom = start * stride - before, (stop - 1) * stride - before + 3
        h = rows(max(top, 0), min(bottom, height))
        h = F.pad(h, (before, after, max(-top, 0), max(bottom - height, 0)))
        h = F.conv2d(h, conv.weight, conv.bias, stride)
        return h if add is None else h + add(start, stop)

    ranges = list(bands(out_height, first_row.shape[0] * widest, band))
    if len(ranges) == 1:
        return part(*ranges[0])
    shape = (first_row.shape[0], conv.out_channels, out_height, width)
    out = first_row.new_empty(shape, dtype=conv.weight.dtype)
    for start, stop in ranges:
        out[:, :, start:stop] = part(start, stop)
    return out
