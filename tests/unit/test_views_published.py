"""The published views, pixel by pixel: where each is taken from, worked out here in plain Python."""

import hashlib
import random

import pytest
import torch

from mtl_anagram.views import get_views
from mtl_anagram.views.jigsaw import outlines

SEED = 3


def order_of(count):
    """The permutation that get_views promises for view 0, component 0."""
    drawn = random.Random(int.from_bytes(hashlib.sha256(f"{SEED}/0/0".encode()).digest()[:6], "big"))
    keys = [drawn.random() for _ in range(count)]
    return sorted(range(count), key=lambda i: keys[i])


def patches(n, per_side):
    order, side = order_of(per_side**2), n // per_side

    def source(r, c):
        patch = order[r // side * per_side + c // side]
        return patch // per_side * side + r % side, patch % per_side * side + c % side

    return source


def inner_circle(n):
    def source(r, c):
        x, y = c - n // 2 + 0.5, r - n // 2 + 0.5
        return (n - 1 - r, n - 1 - c) if x**2 + y**2 < (n * 3 // 8) ** 2 else (r, c)

    return source


def square_hinge(n):
    """The published code's turns: the first square clockwise, then by turns; the last row and column stay."""
    side = n // 3

    def source(r, c):
        (a, i), (b, j) = divmod(r, side), divmod(c, side)
        if a > 2 or b > 2:
            return r, c
        if (a + b) % 2 == 0:
            return a * side + side - 1 - j, b * side + i
        return a * side + j, b * side + side - 1 - i

    return source


PUBLISHED = {
    "identity": lambda n: lambda r, c: (r, c),
    "flip": lambda n: lambda r, c: (n - 1 - r, c),
    "rotate_cw": lambda n: lambda r, c: (n - 1 - c, r),
    "rotate_ccw": lambda n: lambda r, c: (c, n - 1 - r),
    "rotate_180": lambda n: lambda r, c: (n - 1 - r, n - 1 - c),
    "negate": lambda n: lambda r, c: (r, c),
    "skew": lambda n: lambda r, c: ((r - int(1.5 * (c - n // 2))) % n, c),
    "patch_permute": lambda n: patches(n, 8),
    "pixel_permute": lambda n: patches(n, 64),
    "inner_circle": inner_circle,
    "square_hinge": square_hinge,
}


OWN = {
    "mirror": lambda n: lambda r, c: (r, n - 1 - c),
    "transpose": lambda n: lambda r, c: (c, r),
    "translate:0.25,-0.5": lambda n: lambda r, c: ((r + n // 2) % n, (c - n // 4) % n),
    "rotate:90": PUBLISHED["rotate_ccw"],
    "rotate:-180": PUBLISHED["rotate_180"],
    "rotate:90,circle": lambda n: (
        lambda r, c: (c, n - 1 - r) if (2 * r - n + 1) ** 2 + (2 * c - n + 1) ** 2 <= n**2 else (r, c)
    ),
    "reflect:0": PUBLISHED["flip"],
    "reflect:135": lambda n: lambda r, c: (c, r),
}
SOURCES = PUBLISHED | OWN


@pytest.mark.parametrize("size", [64, 256])
@pytest.mark.parametrize("name", SOURCES)
def test_every_pixel_comes_from_where_the_published_view_takes_it(name, size):
    (view,) = get_views([name], seed=SEED)
    source, sign = SOURCES[name](size), -1 if name == "negate" else 1
    numbers = torch.arange(size * size).reshape(1, size, size).float() + 1
    cells = [[sign * (a * size + b + 1) for a, b in (source(r, c) for c in range(size))] for r in range(size)]
    assert view.view(numbers)[0].tolist() == cells
    assert torch.equal(view.inverse_view(torch.tensor([cells] * 3).float()), numbers.expand(3, -1, -1))


@pytest.mark.parametrize("circle", ["", ",circle"])
@pytest.mark.parametrize("name", ["rotate:30", "rotate:-135", "rotate:171", "reflect:80"])
def test_turns_by_any_angle_are_a_pixel_near_the_true_ones(name, circle):
    n, angle, mirrored = 64, float(name.split(":")[1]), name.startswith("reflect")
    sources = get_views([name + circle])[0].sources(n, n)
    assert torch.equal(sources.flatten().sort().values, torch.arange(n * n))
    place = torch.arange(n) - (n - 1) / 2
    seen = torch.complex(place.expand(n, n), -place[:, None].expand(n, n))
    turn = torch.polar(torch.tensor(1.0), torch.deg2rad(torch.tensor(angle)))
    true = turn**2 * seen.conj() if mirrored else seen / turn
    off, disc = (true - seen.flatten()[sources]).abs(), seen.abs() <= n / 2
    assert off[seen.abs() < 0.9 * n / 2].max() < 1.25
    if circle:  # nothing leaves the disc, or comes in; all but a few pixels of its rim are right
        assert torch.equal(sources[~disc], torch.arange(n * n).view(n, n)[~disc])
        assert (off[disc] > 1.25).float().mean() < 0.015


@pytest.mark.parametrize("size,seed,pieces", [(64, 4522, 4), (256, 1, 4), (64, 2, 2), (60, 3, 5), (96, 4, 6)])
def test_jigsaw_moves_pieces_as_the_published_one_does_but_not_to_the_same_places(size, seed, pieces):
    """Pieces whole, by quarter turns, corners to corners, edges to edges; the outlines are our own."""
    (view,) = get_views(["jigsaw"], [{"seed": seed, "num_pieces": pieces}])
    sources, owners = view.sources(size, size), outlines(size, pieces)
    assert torch.equal(sources.flatten().sort().values, torch.arange(size * size))
    came_from = []
    for place in range(pieces**2):
        r, c = (owners == place).nonzero().T
        a, b = sources[r, c] // size, sources[r, c] % size
        (taken,) = owners[a, b].unique().tolist()
        assert (owners == taken).sum() == len(r)  # the whole piece,
        turned = [(r, c), (-c, r), (-r, -c), (c, -r)]  # moved and turned by one of the four:
        assert any((a - x).unique().numel() == (b - y).unique().numel() == 1 for x, y in turned)
        assert borders(taken, pieces) == borders(place, pieces)
        came_from.append(taken)
    assert sorted(came_from) == list(range(pieces**2))
    assert came_from != sorted(came_from)


def borders(cell, pieces):
    """At how many sides of the puzzle a cell lies: 2 at a corner."""
    return sum(side in (0, pieces - 1) for side in divmod(cell, pieces))


@pytest.mark.parametrize("size,pieces", [(12, 4), (64, 4), (60, 5), (60, 2), (96, 6), (96, 32)])
def test_jigsaw_pieces_interlock(size, pieces):
    grid = torch.arange(size) // (size // pieces)
    cells, owners = grid[:, None] * pieces + grid, outlines(size, pieces)
    assert (owners != cells).any()  # there are tabs,
    for piece in range(pieces**2):
        near = {piece, piece - 1, piece + 1, piece - pieces, piece + pieces}
        assert set(cells[owners == piece].unique().tolist()) <= near  # into neighbours,
    turned = torch.tensor([cell % pieces * pieces + pieces - 1 - cell // pieces for cell in range(pieces**2)])
    assert torch.equal(turned[torch.rot90(owners, -1)], owners)  # alike on all four sides.
