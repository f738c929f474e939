"""Turns by any angle, and reflections in any axis, as exact permutations of pixels."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import flag, number
from .base import IndexView, pixel_numbers


class Rotate(IndexView):
    """Turned by `angle` degrees counter-clockwise, -360 to 360, by three integer shears with wrap-around (Paeth 1986).

    What the shears take over an edge comes back at the other: the corners change places. circle: only the inscribed
    disc turns, by the same shears; the few pixels of its rim that would leave it fill its gaps, in the order of angles.
    """

    name, mirrors = "rotate", False  # upside down, before the turn

    def __init__(self, angle: float = 135.0, circle: bool = False) -> None:
        self.angle = number("angle", angle, low=-360, high=360)
        self.turn = 2 * angle if self.mirrors else angle
        self.circle = flag("circle", circle)

    def sources(self, height: int, width: int) -> Tensor:
        pixels = pixel_numbers(height, width)
        margin = width // 2 if self.circle else 0  # in which no shear wraps what belongs to the disc
        around = F.pad(pixels, (margin,) * 4, value=-1)
        around = turned(around.flip(0) if self.mirrors else around, self.turn)
        found = around[margin : margin + height, margin : margin + width]
        if not self.circle:
            return found
        right = (2 * pixels[0] - width + 1).expand(height, width)  # twice the distance: whole numbers
        inside = right**2 + right.T**2 <= width**2
        good = inside & (found >= 0) & inside.flatten()[found.clamp(min=0)]
        result, free = torch.where(good, found, pixels), inside.flatten().clone()
        free[found[good]] = False
        angles = torch.rad2deg(torch.atan2(-right.T.double(), right.double()))
        # Where what is seen there comes from.
        before = self.turn - angles if self.mirrors else angles - self.turn
        gaps = (inside & ~good).flatten()
        result.view(-1)[_in_order(gaps, before)] = _in_order(free, angles)
        return result


class Reflect(Rotate):
    """Mirrored in the axis at `angle` degrees, counter-clockwise from the right; all else as `rotate`."""

    name, mirrors = "reflect", True

    def __init__(self, angle: float = 45.0, circle: bool = False) -> None:
        super().__init__(angle, circle)


def turned(x: Tensor, angle: float) -> Tensor:
    """A square (N, N) turned by degrees counter-clockwise: by quarter turns, and the rest, at most 45, by shears."""
    quarters = round(angle / 90)
    rest = math.radians(angle - 90 * quarters)
    x = torch.rot90(x, quarters)
    # Rounded, so that where half a pixel decides, every machine decides alike.
    across, along = round(math.tan(rest / 2), 12), round(math.sin(rest), 12)
    for dim, slope in ((0, across), (1, -along), (0, across)):
        middle = (x.shape[0] - 1) / 2
        lines = [line.roll(round(slope * (i - middle))) for i, line in enumerate(x.unbind(dim))]
        x = torch.stack(lines, dim)
    return x


def _in_order(chosen: Tensor, angles: Tensor) -> Tensor:
    """The chosen places, sorted by their angles, from 0 to 360."""
    places = chosen.nonzero()[:, 0]
    return places[angles.flatten()[places].remainder(360).round(decimals=6).argsort(stable=True)]
