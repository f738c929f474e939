"""The views that shuffle pixels: skew, patches, inner circle, hinged squares, any permutation you give."""

from __future__ import annotations

import base64
import binascii
import math
import random
import struct
from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..checks import MAX_SEED, whole_number
from ..errors import InputError
from .base import IndexView, View, pixel_numbers, short

MAX_PATCHES = 256  # per side
MAX_FACTOR = 64.0
MAX_PERMUTATION_SIZE = 1024  # px a side


def drawn_permutation(count: int, seed: int | random.Random) -> list[int]:
    """A permutation of range(count): what sorts the first count values of random.Random(seed).random().

    Python promises that sequence for good, so a seed stands for the permutation, whatever the versions.
    """
    generator = seed if isinstance(seed, random.Random) else random.Random(seed)
    keys = [generator.random() for _ in range(count)]
    return sorted(range(count), key=keys.__getitem__)


def move_patches(pixels: Tensor, order: Tensor) -> Tensor:
    """(S, S) cut into n x n patches, n^2 = len(order); the result's patch k is patch order[k]."""
    n = math.isqrt(len(order))
    patches = rearrange(pixels, "(a p) (b q) -> (a b) p q", a=n, b=n)[order]
    return rearrange(patches, "(a b) p q -> (a p) (b q)", a=n, b=n)


class Skew(IndexView):
    """Column i rolled down by int(factor (i - H // 2)) px, cut off towards zero; H px a side, any size.

    factor: px per column, a finite number from -64 to 64; the released code has 1.5.
    """

    name = "skew"

    def __init__(self, factor: float = 1.5) -> None:
        if isinstance(factor, bool) or not isinstance(factor, (int, float)):
            raise InputError(f"factor={factor!r} ({type(factor).__name__}) must be a number")
        if not -MAX_FACTOR <= factor <= MAX_FACTOR:
            raise InputError(f"factor={factor!r} must be a number from {-MAX_FACTOR:g} to {MAX_FACTOR:g}")
        self.factor = float(factor)

    def arguments(self) -> dict[str, Any]:
        return {"factor": self.factor}

    def sources(self, size: int) -> Tensor:
        columns = torch.arange(size, device="cpu")
        down = torch.tensor([int(self.factor * (i - size // 2)) for i in range(size)], device="cpu")
        return (columns[:, None] - down) % size * size + columns


class PatchPermute(IndexView):
    """num_patches x num_patches square patches in an order drawn from the seed; each stays upright.

    num_patches: 1 to 256 per side; sizes are multiples of it. seed: 0 to 2^63 - 1, see `drawn_permutation`.
    """

    name = "patch_permute"

    def __init__(self, num_patches: int = 8, seed: int = 0) -> None:
        self.num_patches = whole_number("num_patches", num_patches, 1, MAX_PATCHES)
        self.seed = whole_number("seed", seed, 0, MAX_SEED)
        self.sizes = f"a multiple of {num_patches}"

    def allows(self, size: int) -> bool:
        return size >= 1 and size % self.num_patches == 0

    def arguments(self) -> dict[str, Any]:
        return {"num_patches": self.num_patches, "seed": self.seed}

    def sources(self, size: int) -> Tensor:
        order = drawn_permutation(self.num_patches**2, self.seed)
        return move_patches(pixel_numbers(size), torch.tensor(order, device="cpu"))


class PixelPermute(PatchPermute):
    """The same on a grid so fine (64 x 64) that a picture of 64 px is shuffled pixel by pixel.

    An attention map of fewer pixels is spread over the grid, shuffled there, and gathered again (`View.map`).
    """

    name = "pixel_permute"

    def __init__(self, num_patches: int = 64, seed: int = 0) -> None:
        super().__init__(num_patches, seed)


class InnerCircle(IndexView):
    """The disc of radius 3/8 of the side turned by half a turn, the rest kept; any size.

    Pixel centres lie at x = ix - N/2 + 0.5; the disc is x^2 + y^2 < (3N/8)^2. Its own inverse.
    """

    name = "inner_circle"

    def sources(self, size: int) -> Tensor:
        pixels = pixel_numbers(size)
        doubled = 2 * torch.arange(size, device="cpu") - size + 1  # 2x, whole for odd and even sizes
        inside = 16 * (doubled[:, None] ** 2 + doubled**2) < 9 * size**2
        return torch.where(inside, pixels.flip(0, 1), pixels)


class SquareHinge(IndexView):
    """3 x 3 squares turned by a quarter: corners and centre counter-clockwise, the four others clockwise.

    Their side is N // 3 px. What is left over stays as it is, at the border: 1 px over is the last row and
    column, 2 px over are the first and the last row and column. Sizes: at least 3.
    """

    name = "square_hinge"
    sizes = "at least 3"

    def allows(self, size: int) -> bool:
        return size >= 3

    def sources(self, size: int) -> Tensor:
        pixels = pixel_numbers(size)
        side, before = size // 3, size % 3 // 2
        for row in range(3):
            for column in range(3):
                top, left = before + row * side, before + column * side
                square = pixels[top : top + side, left : left + side]
                square.copy_(torch.rot90(square, 1 if (row + column) % 2 == 0 else -1))
        return pixels


class PermutationView(IndexView):
    """Any permutation you give: the view's pixel i is the picture's pixel permutation[i], row by row.

    permutation: S^2 whole numbers (a list, a tuple or a 1-D integer tensor), each of 0 ... S^2 - 1 once, S
    from 1 to 1024. At k times S px, whole k x k patches move; other picture sizes are an InputError. Maps of
    any other size are spread over the next multiple of S, moved there, and gathered again (`View.map`).
    """

    name = "permutation"

    def __init__(self, permutation: Sequence[int] | Tensor) -> None:
        self.order = checked_permutation(permutation)
        self.size = math.isqrt(len(self.order))
        self.sizes = f"a multiple of {self.size}, the side of the permutation"

    def allows(self, size: int) -> bool:
        return size >= 1 and size % self.size == 0

    def sources(self, size: int) -> Tensor:
        return move_patches(pixel_numbers(size), self.order)

    def arguments(self) -> dict[str, Any]:
        """The permutation as little-endian 32-bit numbers in base64, with its side in px."""
        raw = struct.pack(f"<{len(self.order)}I", *self.order.tolist())
        return {"permutation": {"size": self.size, "base64": base64.b64encode(raw).decode("ascii")}}

    @classmethod
    def from_arguments(cls, arguments: dict[str, Any]) -> View:
        packed = arguments.get("permutation")
        if not isinstance(packed, dict):
            return cls(**arguments)
        try:
            raw = base64.b64decode(packed["base64"], validate=True)
            count = whole_number("size", packed["size"], 1, MAX_PERMUTATION_SIZE) ** 2
            return cls(list(struct.unpack(f"<{count}I", raw)))
        except (KeyError, TypeError, binascii.Error, struct.error) as error:
            raise InputError(
                f"permutation={short(packed)} must be {{'size': S, 'base64': S^2 little-endian 32-bit "
                f"numbers}} ({type(error).__name__}: {error})"
            ) from error


def checked_permutation(value: Any) -> Tensor:
    """S^2 numbers that are a permutation -> a long CPU tensor (S^2,) of its own."""
    remedy = "give S^2 whole numbers (1-D), each of 0 ... S^2 - 1 once"
    if isinstance(value, Tensor):
        if value.ndim != 1 or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise InputError(f"permutation of shape {tuple(value.shape)} and {value.dtype}: {remedy}")
        count = len(value)
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        count = len(value)
        wrong = next(
            (x for x in value if isinstance(x, bool) or not isinstance(x, int) or not 0 <= x < count), None
        )
        if wrong is not None:
            raise InputError(f"permutation of {count} numbers holds {wrong!r}: {remedy}")
    else:
        raise InputError(f"permutation={short(value)} ({type(value).__name__}): {remedy}")
    if not 1 <= count <= MAX_PERMUTATION_SIZE**2 or math.isqrt(count) ** 2 != count:
        raise InputError(f"permutation of {count} numbers, which is no square from 1 to 1024^2: {remedy}")
    with torch.inference_mode(False), torch.no_grad():
        order = value.detach().to("cpu", torch.long, copy=True) if isinstance(value, Tensor) else None
        order = torch.tensor(list(value), dtype=torch.long, device="cpu") if order is None else order
        if not torch.equal(order.sort().values, torch.arange(count, device="cpu")):
            raise InputError(f"permutation of {count} numbers has some twice or out of range: {remedy}")
    return order
