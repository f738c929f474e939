"""Convolutions of 3x3 on a CPU with 16 products for every square of four outputs in place of 36.

Winograd's F(2x2, 3x3) with the matrices of Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2015).
Its sums are of a ninth as many products as torch's own, and its rounding was finer wherever it was measured.
"""

from typing import Any

import torch
from torch import Tensor, nn

BAND = 1 << 21  # values before and after the products, 8 MiB each: they should stay in the cache
WIDE = 160  # channels from which on the products saved are more than the sums cost
MANY = 1024  # pixels of all rows from which on the weights' own part costs less than that


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution, zeros around. Large ones of float32 on a CPU go by squares, unless the weights are trained."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__(in_width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        rows, _, height, width = x.shape
        plain = torch.compiler.is_compiling() or min(self.weight.shape[:2]) < WIDE
        if plain or rows * height * width < MANY or height % 2 or width % 2:
            return super().forward(x)
        exact = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        trained = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        if not exact or trained:
            return super().forward(x)
        return BySquares.apply(x, self.weight, self.bias, False)


class BySquares(torch.autograd.Function):
    """As a function of x alone; its gradient is a convolution with the weights turned and transposed."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, turned: bool) -> Tensor:
        found = factors(weight, turned)
        return convolve(x, found if turned else found.transpose(1, 2), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.weight, _, ctx.turned = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return BySquares.apply(gradient, ctx.weight, None, not ctx.turned), None, None, None


def factors(weight: Tensor, turned: bool = False) -> Tensor:
    """G g G^T of every 3x3 g of (D, C, 3, 3), or of g turned by 180 degrees, as (16, D, C)."""
    g = weight.new_tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
    g = g.flip(1) if turned else g
    return (torch.kron(g, g) @ weight.flatten(2).flatten(0, 1).T).unflatten(1, weight.shape[:2])


def convolve(x: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
    """x (R, C, H, W), H and W even, with `factors`, as (16, C, D) -> (R, D, H, W), in bands of rows of squares."""
    (rows, channels, height, width), out_channels = x.shape, weights.shape[2]
    padded = x.new_empty(rows, height + 2, width + 2, channels)
    padded[:, :: height + 1] = padded[:, :, :: width + 1] = 0
    padded[:, 1:-1, 1:-1] = x.permute(0, 2, 3, 1)
    shape = rows, out_channels, height, width
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    pairs = out.permute(0, 2, 3, 1).view(rows, height // 2, 2, width // 2, 2, out_channels)
    squares = max(1, BAND // (16 * max(channels, out_channels)))
    high = min(height // 2, max(1, squares // (width // 2)))
    some = max(1, squares // (height // 2 * (width // 2)))
    for row in range(0, rows, some):
        for top in range(0, height // 2, high):
            part = padded[row : row + some, 2 * top : 2 * (top + high) + 2]  # (r, 2 h + 2, W + 2, C)
            sums = _sums(_sums(part, 2), 2)  # (4, 4, r, h, W / 2, C)
            made = torch.bmm(sums.flatten(2, 4).flatten(0, 1), weights).view(*sums.shape[:-1], out_channels)
            if bias is not None:
                made[1, 1].add_(bias)  # which all four outputs of a square have once
            halves = made.new_empty(2, *made.shape[1:])
            _pairs(made, halves)
            whole = pairs[row : row + some, top : top + high].permute(2, 4, 0, 1, 3, 5)
            _pairs(halves.transpose(0, 1), whole.transpose(0, 1))
    return out


def _sums(x: Tensor, dim: int) -> Tensor:
    """B^T d of every four neighbours along a side, two apart, as a first side of 4."""
    a, b, c, d = x.unfold(dim, 4, 2).unbind(-1)
    out = x.new_empty(4, *a.shape)
    for i, (add, left, right) in enumerate(((-1, a, c), (1, b, c), (-1, c, b), (-1, b, d))):
        torch.add(left, right, alpha=add, out=out[i])
    return out


def _pairs(x: Tensor, out: Tensor) -> None:
    """A^T m of a first side of 4, into one of 2."""
    torch.add(x[0], x[1], out=out[0]).add_(x[2])
    torch.sub(x[1], x[2], out=out[1]).sub_(x[3])
