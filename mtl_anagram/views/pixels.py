"""The views that move pixels or change their sign: whole turns, skew, patches, discs, hinges, your own permutation."""

from __future__ import annotations

import base64
import contextlib
import math
import operator
import random
import reprlib
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..errors import MAX_SEED, InputError, number, whole_number
from .base import IndexView, View, pixel_numbers, variant


class Identity(View):
    """The picture as it is (the tensor itself, no copy)."""

    name, square = "identity", False
    flips, turns = False, 0  # upside down; then quarter turns counter-clockwise, as torch.rot90 counts them

    def move(self, x: Tensor) -> Tensor:
        x = x.flip(-2) if self.flips else x
        return torch.rot90(x, self.turns, (-2, -1)) if self.turns else x

    def move_back(self, x: Tensor) -> Tensor:
        x = torch.rot90(x, -self.turns, (-2, -1)) if self.turns else x
        return x.flip(-2) if self.flips else x


RotateCw = variant(Identity, "rotate_cw", "A quarter turn clockwise, of squares.", square=True, turns=-1)
RotateCcw = variant(
    Identity, "rotate_ccw", "A quarter turn counter-clockwise, of squares.", square=True, turns=1
)
Rotate180 = variant(Identity, "rotate_180", "Half a turn.", turns=2)
COLOURS = "Colours inverted: all channels of a picture, the noise alone of a prediction; nothing moves."
Negate = variant(Identity, "negate", COLOURS, sign=-1)
Flip = variant(Identity, "flip", "Upside down: the rows reversed, columns kept.", flips=True)
Mirror = variant(Identity, "mirror", "As in a mirror: the columns reversed, rows kept.", flips=True, turns=2)
DIAGONAL = "Rows become columns, of squares: mirrored in the diagonal that goes down to the right."
Transpose = variant(Identity, "transpose", DIAGONAL, square=True, flips=True, turns=-1)


class Translate(View):
    """Rolled to the right and down by shares of the width and of the height, -1 to 1, to whole px."""

    name, square = "translate", False

    def __init__(self, right: float = 0.5, down: float = 0.0) -> None:
        self.right, self.down = number("right", right, low=-1, high=1), number("down", down, low=-1, high=1)

    def move(self, x: Tensor, sign: int = 1) -> Tensor:
        down, right = round(self.down * x.shape[-2]), round(self.right * x.shape[-1])
        return x.roll((sign * down, sign * right), (-2, -1))

    def move_back(self, x: Tensor) -> Tensor:
        return self.move(x, -1)


class Skew(IndexView):
    """Column i rolled down by int(factor (i - H // 2)) px, cut off towards zero; factor: -64 to 64."""

    name, square = "skew", False

    def __init__(self, factor: float = 1.5) -> None:
        self.factor = number("factor", factor, low=-64, high=64)

    def sources(self, height: int, width: int) -> Tensor:
        columns = enumerate(pixel_numbers(height, width).unbind(1))
        return torch.stack([column.roll(int(self.factor * (i - height // 2))) for i, column in columns], 1)


class PatchPermute(IndexView):
    """num_patches (1 to 256) x num_patches equal patches in an order drawn from the seed; each stays upright."""

    name, square = "patch_permute", False

    def __init__(self, num_patches: int = 8, seed: int = 0) -> None:
        self.multiple = self.num_patches = whole_number("num_patches", num_patches, 1, 256)
        self.seed = whole_number("seed", seed, 0, MAX_SEED)
        self.order = drawn_permutation(num_patches**2, random.Random(seed))

    def sources(self, height: int, width: int) -> Tensor:
        n, order = self.multiple, torch.tensor(self.order, device="cpu")
        patches = rearrange(pixel_numbers(height, width), "(a p) (b q) -> (a b) p q", a=n, b=n)
        return rearrange(patches[order], "(a b) p q -> (a p) (b q)", a=n, b=n)


class PixelPermute(PatchPermute):
    """The same on a grid so fine (64 x 64) that a picture of 64 px is shuffled pixel by pixel."""

    name = "pixel_permute"

    def __init__(self, num_patches: int = 64, seed: int = 0) -> None:
        super().__init__(num_patches, seed)


class PermutationView(PatchPermute):
    """S x S patches (at S px: pixels) in any order you give: patch k is the picture's patch permutation[k].

    permutation: a list, a tuple or a 1-D integer tensor of S^2 whole numbers, each of 0 ... S^2 - 1 once, S up
    to 1024; or {"size": S, "base64": the same as little-endian 32-bit numbers}, which `arguments` makes.
    """

    name = "permutation"

    def __init__(self, permutation: Sequence[int] | Tensor | Mapping[str, Any]) -> None:
        with contextlib.suppress(KeyError, TypeError, ValueError, RuntimeError, struct.error):
            given: Any = permutation.tolist() if isinstance(permutation, Tensor) else permutation
            if isinstance(given, Mapping):
                raw = base64.b64decode(given["base64"], validate=True)
                given = struct.unpack(f"<{len(raw) // 4}I", raw)
            self.order = [operator.index(number) for number in given]
            self.multiple = math.isqrt(len(self.order))
            if self.multiple in range(1, 1025) and sorted(self.order) == list(range(self.multiple**2)):
                return
        needed = "S^2 whole numbers, each of 0 ... S^2 - 1 once, S up to 1024, or packed ones (little-endian)"
        raise InputError(f"permutation={reprlib.repr(permutation)} must be {needed}")

    def arguments(self) -> dict[str, Any]:
        raw = struct.pack(f"<{len(self.order)}I", *self.order)
        return {"permutation": {"size": self.multiple, "base64": base64.b64encode(raw).decode("ascii")}}


class InnerCircle(IndexView):
    """The disc x^2 + y^2 < (3N/8)^2 of a square turned by half a turn, the rest kept."""

    name = "inner_circle"

    def sources(self, height: int, width: int) -> Tensor:
        pixels = pixel_numbers(height, width)
        doubled = 2 * pixels[0] - width + 1  # 2x, which is whole: pixel centres lie at x = i - N/2 + 0.5
        inside = 16 * (doubled[:, None] ** 2 + doubled**2) < 9 * width**2
        return torch.where(inside, pixels.flip(0, 1), pixels)


class SquareHinge(IndexView):
    """3 x 3 squares of N // 3 px, the first and every second turned a quarter clockwise, the others back.

    What is left over stays: the last row and column where 1 px is over, the first and the last where 2 are.
    """

    name, sizes = "square_hinge", "at least 3"

    def allows(self, size: int) -> bool:
        return size >= 3

    def sources(self, height: int, width: int) -> Tensor:
        pixels = pixel_numbers(height, width)
        side, before = width // 3, width % 3 // 2
        for i in range(9):
            top, left = before + i // 3 * side, before + i % 3 * side
            square = pixels[top : top + side, left : left + side]
            square.copy_(torch.rot90(square, 1 if i % 2 else -1))
        return pixels


def drawn_permutation(count: int, generator: random.Random) -> list[int]:
    """A permutation of range(count): what sorts the generator's next count values."""
    keys = [generator.random() for _ in range(count)]  # which are the same in every version of Python
    return sorted(range(count), key=keys.__getitem__)
