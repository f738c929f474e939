"""The views that move the picture as a whole, or only change its sign: exact at every size."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from .base import View

NOISE_CHANNELS = 3


class Identity(View):
    """The picture as it is (the tensor itself, no copy)."""

    name = "identity"

    def move(self, x: Tensor) -> Tensor:
        return x

    move_back = move


class Flip(View):
    """Upside down: the rows reversed, columns kept."""

    name = "flip"

    def move(self, x: Tensor) -> Tensor:
        return x.flip(-2)

    move_back = move


class RotateCW(View):
    """A quarter turn clockwise."""

    name = "rotate_cw"
    quarter_turns = -1  # counter-clockwise, as torch.rot90 counts them

    def move(self, x: Tensor) -> Tensor:
        return torch.rot90(x, self.quarter_turns, (-2, -1))

    def move_back(self, x: Tensor) -> Tensor:
        return torch.rot90(x, -self.quarter_turns, (-2, -1))


class RotateCCW(RotateCW):
    """A quarter turn counter-clockwise."""

    name = "rotate_ccw"
    quarter_turns = 1


class Rotate180(RotateCW):
    """Half a turn."""

    name = "rotate_180"
    quarter_turns = 2


class Negate(Identity):
    """Colours inverted: every channel changes its sign, stage II's conditioning too; nothing moves.

    A variance has no sign to lose: the inverse negates a prediction's 3 noise channels alone. Attention maps
    stay as they are.
    """

    name = "negate"

    def recolor(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise InputError(f"negate acts on floating pictures in [-1, 1], not on {x.dtype}")
        return -x

    def recolor_back(self, prediction: Tensor) -> Tensor:
        channels = prediction.shape[-3]
        if channels not in (NOISE_CHANNELS, 2 * NOISE_CHANNELS):
            raise InputError(
                f"a prediction of {channels} channels: negate needs 3 (noise) or 6 (noise, then variance)"
            )
        noise, variance = prediction[..., :NOISE_CHANNELS, :, :], prediction[..., NOISE_CHANNELS:, :, :]
        return torch.cat([self.recolor(noise), variance], dim=-3)
