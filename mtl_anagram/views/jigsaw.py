"""The jigsaw: 4 x 4 interlocking pieces, drawn by code, that change places within their kind."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from ..checks import MAX_SEED, whole_number
from .base import IndexView, pixel_numbers
from .permutations import drawn_permutation

GRID = 4
# The places of one quarter of the puzzle, as (row, column) of the grid; quarter turns give the other three.
PLACES = {"corner": (0, 0), "inner": (1, 1), "first edge": (0, 1), "second edge": (0, 2)}
# Of each 4 borders that quarter turns carry into each other, one: the piece with the tab, and the one with
# the hole. All three tabs along a side point the same way, and so do both tabs from a side inwards: so the
# two edge pieces of a side have one outline, and may swap.
BORDERS = (
    ((0, 0), (0, 1)),
    ((0, 1), (0, 2)),
    ((0, 2), (0, 3)),
    ((0, 1), (1, 1)),
    ((0, 2), (1, 2)),
    ((1, 1), (1, 2)),
)


class Jigsaw(IndexView):
    """16 pieces with tabs; corners, edges and inner pieces each go round by quarter turns, and edges swap.

    Drawn from the seed, in this order: where the 4 corners go (a permutation of the 4 sides; a piece turns as
    its move asks), where the 4 inner pieces go, the 4 first and the 4 second edge pieces (first and second
    clockwise), and for each side whether its two edge pieces then swap: the same order at every
    size. The released code cuts its pieces by pictures of fixed sizes and draws with numpy's seed 4522;
    these are drawn by code at every multiple of 4 px, and with 4522, their default, fall in another order.
    """

    name = "jigsaw"
    sizes = "a multiple of 4"

    def __init__(self, seed: int = 4522) -> None:
        self.seed = whole_number("seed", seed, 0, MAX_SEED)

    def allows(self, size: int) -> bool:
        return size >= 1 and size % GRID == 0

    def arguments(self) -> dict[str, Any]:
        return {"seed": self.seed}

    def sources(self, size: int) -> Tensor:
        pixels, pieces = pixel_numbers(size), outlines(size)
        result = torch.full_like(pixels, -1)
        for (kind, turns), (new_kind, new_turns) in moves(self.seed).items():
            upright = torch.rot90(pixels, turns)  # the piece's own side is now the upper one
            shift = (PLACES[new_kind][1] - PLACES[kind][1]) * (size // GRID)
            moved = torch.rot90(upright.roll(shift, 1), -new_turns)
            there = pieces == cell_number(turned(PLACES[new_kind], new_turns))
            result[there] = moved[there]
        return result


def moves(seed: int) -> dict[tuple[str, int], tuple[str, int]]:
    """Where each piece (kind, clockwise quarter turns from its place in PLACES) goes: a permutation."""
    generator = random.Random(seed)
    sides = {kind: drawn_permutation(4, generator) for kind in PLACES}
    swaps = [generator.random() < 0.5 for _ in range(4)]
    other = {"first edge": "second edge", "second edge": "first edge"}
    result = {}
    for kind, order in sides.items():
        for side, new_side in enumerate(order):
            new_kind = other.get(kind, kind) if swaps[new_side] else kind
            result[kind, side] = (new_kind, new_side)
    return result


def outlines(size: int) -> Tensor:
    """(size, size) long: the number (row by row, 0 to 15) of the grid cell whose piece owns each pixel."""
    q = size // GRID
    rows = torch.arange(size, device="cpu") // q
    owners = rows[:, None] * GRID + rows
    for giver, taker in BORDERS:
        tab = tab_pixels(q)  # depth from above
        inside = torch.zeros(size, size, dtype=torch.bool, device="cpu")
        row, column = taker
        block = tab.T if giver[0] == taker[0] else tab  # from the left, or from above
        inside[row * q : (row + 1) * q, column * q : (column + 1) * q] = block
        for turns in range(4):
            owners[torch.rot90(inside, -turns)] = cell_number(turned(giver, turns))
    return owners


def tab_pixels(q: int) -> Tensor:
    """(q, q) bool: what a tab from above covers of a cell of q px: a neck, and a round head 0.34 q deep.

    It stays so close to the middle of its side that tabs from two sides never meet. All in whole numbers, so
    that every machine draws the same.
    """
    depth = 50 * (2 * torch.arange(q, device="cpu")[:, None] + 1)  # 100 times the pixel centre's, in px
    across = 50 * (2 * torch.arange(q, device="cpu") + 1 - q)
    head = (depth - 20 * q) ** 2 + across**2 < (14 * q) ** 2
    neck = (depth < 20 * q) & (across.abs() < 9 * q)
    return head | neck


def turned(cell: tuple[int, int], turns: int) -> tuple[int, int]:
    """Where a cell of the grid comes to lie after so many clockwise quarter turns."""
    row, column = cell
    for _ in range(turns):
        row, column = column, GRID - 1 - row
    return row, column


def cell_number(cell: tuple[int, int]) -> int:
    """Cells counted row by row."""
    return cell[0] * GRID + cell[1]
