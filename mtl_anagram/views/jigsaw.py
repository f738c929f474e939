"""The jigsaw: interlocking pieces, drawn by code, that change places within their kind."""

import random

import torch
from torch import Tensor

from ..errors import MAX_SEED, whole_number
from .base import IndexView, pixel_numbers
from .pixels import drawn_permutation


class Jigsaw(IndexView):
    """Pieces with tabs; each four that lie a quarter turn apart change places, and neighbouring edges swap.

    num_pieces: 2 to 32 a side. The published code has 4 x 4 of the same kinds, but cuts them by pictures of
    fixed sizes and draws with numpy's seed 4522: its outlines and its order differ from these.
    """

    name = "jigsaw"

    def __init__(self, num_pieces: int = 4, seed: int = 4522) -> None:
        self.seed = whole_number("seed", seed, 0, MAX_SEED)
        self.multiple = self.num_pieces = whole_number("num_pieces", num_pieces, 2, 32)

    def sources(self, height: int, width: int) -> Tensor:
        n, pixels, generator = self.multiple, pixel_numbers(height, width), random.Random(self.seed)
        orders = {cell: drawn_permutation(4, generator) for cell in quarter(n)}
        edges = [(side, left) for side in range(4) for left in range(1, n - 2, 2) if generator.random() < 0.5]
        swaps = {(side, 0, left + i): left + 1 - i for side, left in edges for i in (0, 1)}
        owners, result = outlines(width, n), pixels.clone()  # an odd grid's middle piece stays
        for (row, column), order in orders.items():
            for old, new in enumerate(order):
                place = swaps.get((new, row, column), column)
                # The piece's own side is turned up, and the piece, where it swaps, moved along it.
                upright = torch.rot90(pixels, old).roll((place - column) * (width // n), 1)
                there = owners == cell_number(row, place, new, n)
                result[there] = torch.rot90(upright, -new)[there]
        return result


def quarter(n: int) -> list[tuple[int, int]]:
    """The cells of an n x n grid whose quarter turns give all others: the corner, inner ones, the upper edge."""
    cells = [(row, column) for row in range(n // 2) for column in range(row, n - 1 - row)]
    return sorted(cells, key=lambda cell: (cell != (0, 0), cell[0] == 0))


def cell_number(row: int, column: int, turns: int, n: int) -> int:
    """Where a cell of the n x n grid lies after so many clockwise quarter turns; cells counted row by row."""
    return int(torch.rot90(pixel_numbers(n, n), turns)[row, column])


def outlines(size: int, n: int) -> Tensor:
    """(size, size) long: the number of the n x n grid's cell whose piece owns each pixel.

    Tabs go to the right, and inwards, from the upper pieces of every ring; quarter turns give the others. So the
    edge pieces of a side have one outline, and may swap.
    """
    q = size // n
    owners = pixel_numbers(n, n).repeat_interleave(q, 0).repeat_interleave(q, 1)
    # What a tab from above covers of a cell: a neck, and a round head 0.34 q deep, so that tabs from two sides never
    # meet. All in whole numbers, 100 times the pixel centres' in px, so that every machine draws the same.
    twice = 2 * pixel_numbers(1, q)[0] + 1
    depth, across = 50 * twice[:, None], 50 * (twice - q)
    tab = (depth - 20 * q) ** 2 + across**2 < (14 * q) ** 2
    tab |= (depth < 20 * q) & (across.abs() < 9 * q)
    for row, column in quarter(n):
        inside = torch.zeros(n, q, n, q, dtype=torch.bool, device="cpu")
        inside[row, :, column + 1] = tab.T
        if column > row:
            inside[row + 1, :, column] = tab
        for turns in range(4):
            owners[torch.rot90(inside.reshape(size, size), -turns)] = cell_number(row, column, turns, n)
    return owners
