"""Motion: a picture on its way to what a view shows of it, as rigid pieces that turn, tip over and fly."""

import math
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import float_tensor, number, whole_number
from .base import View, pixel_numbers
from .registry import Composition
from .turned import Rotate

PAPER, POINTS = 1.0, 3  # white, below the pieces; every pixel is drawn as so many points a side


@dataclass(frozen=True)
class Motion:
    """How one picture becomes another: its pieces move, or it fades into the other, or both.

    pieces (H, W) long: the number of each pixel's piece; greater ones lie on top. Of each piece, (P, ...): starts and
    ends, where its centre is, down and to the right in px; turn, degrees clockwise; mirror: it tips over like a card
    instead, about an axis at half of that angle. fade: "no", "all" the way, or at the "end". zoom: the picture goes
    away to a quarter of its size and comes back.
    """

    pieces: Tensor
    starts: Tensor
    ends: Tensor
    turn: Tensor
    mirror: Tensor
    fade: str = "no"
    zoom: bool = False

    def places(self, points: Tensor, fraction: float) -> Tensor:
        """Where points (H W, 2) of the pixels are at a fraction of the way, (H W, 2)."""
        angle, owner, squeezed = torch.deg2rad(self.turn), self.pieces.flatten(), math.cos(math.pi * fraction)
        cos, sin = torch.cos(angle * fraction), torch.sin(angle * fraction)
        c, s, across = torch.cos(angle), torch.sin(angle), (1 - squeezed) / 2
        turned = torch.stack([cos, sin, -sin, cos], 1)  # of (down, right)
        tipped = torch.stack([1 - across * (1 + c), across * s, across * s, 1 - across * (1 - c)], 1)
        linear = torch.where(self.mirror[:, None], tipped, turned).unflatten(1, (2, 2))
        linear = linear * (1 - 0.75 * math.sin(math.pi * fraction) if self.zoom else 1)
        away = (points - self.starts[owner])[:, :, None]
        return torch.lerp(self.starts, self.ends, fraction)[owner] + (linear[owner] @ away)[:, :, 0]

    def draw(self, start: Tensor, end: Tensor, fraction: float, room: int) -> Tensor:
        """Both pictures (C, H, W) -> the moment between, (C, H + 2 room, W + 2 room): each pixel's points dropped."""
        x = torch.lerp(start, end, fraction) if self.fade == "all" else start
        high, wide = x.shape[1] + 2 * room, x.shape[2] + 2 * room
        offsets = [(i + 0.5) / POINTS - 0.5 for i in range(POINTS)]
        dropped = [self.places(_grid(x) + x.new_tensor(o), fraction) for o in product(offsets, offsets)]
        down, right = (torch.cat(dropped) + room).round().long().unbind(1)
        inside = (down >= 0) & (down < high) & (right >= 0) & (right < wide)
        there, owner = (down * wide + right)[inside], self.pieces.flatten().repeat(POINTS**2)[inside]
        colours = x.flatten(1).repeat(1, POINTS**2)[:, inside]
        top = owner.new_full((high * wide,), -1).scatter_reduce(0, there, owner, "amax")
        drawn = x.new_full((len(x), high * wide), PAPER)
        for layer in (owner < top[there], owner == top[there]):
            total = torch.zeros_like(drawn).index_add_(1, there[layer], colours[:, layer])
            count = torch.bincount(there[layer], minlength=high * wide).float()
            # Points that turned do not fall evenly: a pixel that got half of its own is covered.
            drawn = torch.lerp(drawn, total / count.clamp(min=1), (2 * count / POINTS**2).clamp(max=1))
        late = max(0.0, (fraction - 0.85) / 0.15) if self.fade == "end" else 0.0
        return torch.lerp(drawn.unflatten(1, (high, wide)), F.pad(end, (room,) * 4, value=PAPER), late)


class Moving:
    """A picture (C, H, W) in [-1, 1] on its way to what a view shows of it: at(0.5) is half-way.

    Turns turn, flips tip over, permutations fly in rigid pieces, inverted colours and filters fade, hybrids go away and
    come back; compositions do one part after the other. stations: the pictures from itself to the view's; motions: from
    each to the next, none where nothing changes.
    """

    def __init__(self, view: View, picture: Tensor) -> None:
        x = float_tensor("picture", picture, (None, None, None), "(C, H, W)").detach().float().cpu()
        self.motions, self.stations = list[Motion](), [x]
        for part in _parts(view):
            for motion, station in _steps(part, self.stations[-1]):
                self.motions.append(motion)
                self.stations.append(station)
        self.stations[-1] = view.show(x)

    def at(self, fraction: float, room: int = 0) -> Tensor:
        """The picture at a fraction of the way, 0 to 1 (`view.show`'s to the bit), with room px of paper around."""
        where = number("fraction", fraction, high=1) * len(self.motions)
        index, room = int(where), whole_number("room", room, 0)
        if where == index:
            return F.pad(self.stations[index], (room,) * 4, value=PAPER)
        start, end = self.stations[index : index + 2]
        return self.motions[index].draw(start, end, where - index, room)


def _steps(view: View, x: Tensor) -> list[tuple[Motion, Tensor]]:
    """How a view that is no composition gets from x (C, H, W) to what it shows, and what is there after each step."""
    pixels, after = pixel_numbers(*x.shape[1:]), view.show(x)
    sources, sign = _permutation(view, pixels)
    fading = _turning(pixels * 0, fade="all", zoom=view.name.endswith("_pass"))  # a band of a hybrid
    if sources is None:
        return [(fading, after)]
    moves = not torch.equal(sources, pixels)
    motion = _sheared(sources, view) if isinstance(view, Rotate) else _rigid(sources)
    # What moves and inverts colours does so one after the other.
    return [(motion, sign * after)] * moves + [(fading, after)] * (sign < 0)


def _permutation(view: View, pixels: Tensor) -> tuple[Tensor | None, int]:
    """Which pixel each of (H, W) comes from, None for a view that does more than that; the sign that colours get."""
    first = pixel_numbers(3, 1)[..., None] * pixels.numel() + 1  # numbers from 1, all channels' apart
    shown = view.show((pixels + first).double())
    sign = -1 if shown.flatten()[0] < 0 else 1
    sources = (sign * shown).long() - first
    # All channels alike, in whole numbers, and each number once.
    alike = torch.equal((sources[:1] + first).double() * sign, shown)
    each = alike and torch.equal(sources[0].flatten().sort().values, pixels.flatten())
    return (sources[0] if each else None), sign


def _turning(pieces: Tensor, turn: float = 0, mirror: bool = False, **options: Any) -> Motion:
    """The last of the pieces (H, W) turns, or is mirrored, about its centre."""
    starts, last = _centres(pieces, _grid(pieces)), torch.unique(pieces) == pieces.max()
    return Motion(pieces, starts, starts, last.float() * turn, last & mirror, **options)


def _sheared(sources: Tensor, view: Rotate) -> Motion:
    """A turn or a mirror by shears, which tear a picture into more pieces than is seen; a disc alone turns, or all."""
    moved = (sources != pixel_numbers(*sources.shape)).long()
    return _turning(moved if view.circle else moved * 0, -view.turn, view.mirrors, fade="end")


def _rigid(sources: Tensor) -> Motion:
    """A permutation of pixels (H, W) as connected pieces that each make one of a square's eight movements."""
    count, places, grid = sources.numel(), torch.argsort(sources.flatten()), _grid(sources)
    best, sizes = torch.zeros_like(places), torch.zeros_like(places)
    for kind in range(8):
        cos, sin = (1, 0, -1, 0)[kind % 4], (0, 1, 0, -1)[kind % 4]
        back = [[cos, sin], [-sin, cos]] if kind < 4 else [[-cos, sin], [sin, cos]]
        # The same for all pixels that share this movement: where they come from, less where it was to be.
        away = (grid[sources.flatten()] - grid @ grid.new_tensor(back)).long()
        found = _connected((away[:, 0] * 4 * sum(sources.shape) + away[:, 1]).view_as(sources))
        size = torch.bincount(found, minlength=count)[found]
        best, sizes = torch.where(size > sizes, found + kind * count, best), torch.maximum(size, sizes)
    names, owner, amount = torch.unique(best, return_inverse=True, return_counts=True)
    order = torch.argsort(amount, descending=True, stable=True)  # the largest piece lies below all others
    pieces, kinds = torch.argsort(order)[owner][places].view_as(sources), names[order] // count
    turn = grid.new_tensor([0, 90, 180, -90])[kinds % 4]
    return Motion(pieces, _centres(pieces, grid), _centres(pieces, grid[places]), turn, kinds >= 4)


def _connected(keys: Tensor) -> Tensor:
    """For each pixel of (H, W) the least number of those that it is connected with through equal keys, (H W,)."""
    pixels, right, down = pixel_numbers(*keys.shape), keys[:, 1:] == keys[:, :-1], keys[1:] == keys[:-1]
    one = torch.cat([pixels[:, 1:][right], pixels[1:][down]])
    other = torch.cat([pixels[:, :-1][right], pixels[:-1][down]])
    least = pixels.flatten()
    while not torch.equal(a := least[one], b := least[other]):
        least = least.scatter_reduce(0, torch.maximum(a, b), torch.minimum(a, b), "amin")
        while not torch.equal(nearer := least[least], least):
            least = nearer
    return least


def _parts(view: View) -> list[View]:
    return [p for part in view.views for p in _parts(part)] if isinstance(view, Composition) else [view]


def _centres(pieces: Tensor, points: Tensor) -> Tensor:
    """The mean (P, 2) of each piece's points (H W, 2)."""
    count = torch.bincount(pieces.flatten())[:, None]
    return points.new_zeros(len(count), 2).index_add_(0, pieces.flatten(), points) / count


def _grid(x: Tensor) -> Tensor:
    """Where the pixels of (..., H, W) are, down and to the right, (H W, 2) float32."""
    pixels = pixel_numbers(*x.shape[-2:]).flatten()
    return torch.stack([pixels // x.shape[-1], pixels % x.shape[-1]], 1).to(torch.float32)
