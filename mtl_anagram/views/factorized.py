"""Components: linear filters that add up to the identity, each filled by a prompt of its own (factorized diffusion)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ..errors import at_least_float32, number
from .base import View, sides_of, variant

SIDE = 64  # px; lengths are given for pictures of this (shorter) side, and grow with it


class Component(View):
    """One part of a picture (Geng et al. 2024, arXiv 2404.11615): its prediction is filtered, and all are summed.

    A subclass of your own gives `name` and `filter`; the components of a request must add up to the identity. rest:
    this component is what the filter leaves. The network is shown the picture as it is. Variances are filtered as the
    noise is, so that what all readers agree on stays. A reader is shown what the filter gives, of a rest all there is.
    """

    square, rest = False, False
    reduce: Literal["mean", "sum"] = "sum"

    def filter(self, x: Tensor) -> Tensor:
        """Pictures (..., C, H, W) of any size filtered; linear in x."""
        raise NotImplementedError(f"{type(self).__name__} must define filter(x)")

    def move(self, x: Tensor) -> Tensor:
        return x

    move_back = move

    def inverse_view(self, prediction: Tensor, channels: int = 3) -> Tensor:
        """The component of a prediction: of its noise (the first `channels`), and of its variance, each alone."""
        sides_of(prediction, 3)
        parts = torch.cat([self.filter(part) for part in prediction.split(channels, dim=-3)], dim=-3)
        return prediction - parts if self.rest else parts

    def show(self, x: Tensor) -> Tensor:
        return self.view(x) if self.rest else self.filter(self.view(x))


class LowPass(Component):
    """What is seen from afar: a Gaussian blur of sigma px (at 64 px)."""

    name = "low_pass"

    def __init__(self, sigma: float = 2.0) -> None:
        self.sigma = number("sigma", sigma, above=True, high=SIDE)

    def filter(self, x: Tensor) -> Tensor:
        return blurred(x, self.sigma)


HighPass = variant(LowPass, "high_pass", "What `low_pass` leaves, seen from close by alone.", rest=True)
TripleLowPass = variant(LowPass, "triple_low_pass", "The lowest of three bands.")


class TripleMediumPass(Component):
    """The band between blurs of sigma `fine` and `coarse`; shown with what is lower, as from a middle distance."""

    name = "triple_medium_pass"

    def __init__(self, fine: float = 1.0, coarse: float = 2.0) -> None:
        self.fine = number("fine", fine, above=True, high=SIDE)
        self.coarse = number("coarse", coarse, low=fine, high=SIDE)

    def filter(self, x: Tensor) -> Tensor:
        return blurred(x, self.fine) - blurred(x, self.coarse)

    def show(self, x: Tensor) -> Tensor:
        return blurred(self.view(x), self.fine)


class TripleHighPass(LowPass):
    """The highest of three bands."""

    name, rest = "triple_high_pass", True

    def __init__(self, sigma: float = 1.0) -> None:
        super().__init__(sigma)


class Grayscale(Component):
    """What is seen in dim light: the mean of the colour channels."""

    name = "grayscale"

    def filter(self, x: Tensor) -> Tensor:
        return x.mean(dim=-3, keepdim=True).expand_as(x)


Color = variant(Grayscale, "color", "What `grayscale` leaves.", rest=True)


class Motion(Component):
    """What is seen in motion: the mean along a line of `length` px (at 64 px), `angle` degrees counter-clockwise."""

    name = "motion"

    def __init__(self, length: float = 7.0, angle: float = 135.0) -> None:
        self.length = number("length", length, low=1, high=SIDE)
        self.angle = number("angle", angle, low=-360, high=360)

    def filter(self, x: Tensor) -> Tensor:
        """The mean of an odd number of shifts along a line; edges are mirrored."""
        reach = round((self.length * min(x.shape[-2:]) / SIDE - 1) / 2)
        steps = torch.arange(-reach, reach + 1, device="cpu")
        right, down = math.cos(math.radians(self.angle)), -math.sin(math.radians(self.angle))
        longer, places = max(abs(right), abs(down)), []  # whole px along the longer
        for along, side in zip((down, right), x.shape[-2:], strict=True):
            places.append(mirrored((steps * (along / longer)).round().long(), side).to(x.device).T)
        wide = at_least_float32(x)
        moved = (wide[..., r[:, None], c] for r, c in zip(*places, strict=True))  # one at a time in memory
        return (sum(moved, torch.zeros_like(wide)) / len(steps)).to(x.dtype)


MotionRes = variant(Motion, "motion_res", "What `motion` leaves, seen at rest alone.", rest=True)


class Scale(Component):
    """The picture times `factor`, 0 to 1: one reader's share of what all see in the same way, and are shown whole."""

    name = "scale"

    def __init__(self, factor: float = 0.5) -> None:
        self.factor = number("factor", factor, high=1)

    def filter(self, x: Tensor) -> Tensor:
        return x * self.factor

    def show(self, x: Tensor) -> Tensor:
        return self.view(x)


COMPONENTS: list[type[View]] = [LowPass, HighPass, TripleLowPass, TripleMediumPass, TripleHighPass]
COMPONENTS += [Grayscale, Color, Motion, MotionRes, Scale]


def blurred(x: Tensor, sigma: float) -> Tensor:
    """Pictures (..., H, W) under a Gaussian of sigma px (at 64 px), cut off at 6 sigma; edges are mirrored."""
    wide, sigma = at_least_float32(x), sigma * min(x.shape[-2:]) / SIDE
    steps = torch.arange(-math.ceil(6 * sigma), math.ceil(6 * sigma) + 1, device="cpu")
    weights = torch.exp(-0.5 * (steps.double() / sigma) ** 2)
    matrices = []
    for side in x.shape[-2:]:
        matrix = torch.zeros(side, side, dtype=torch.float64, device="cpu")
        matrix.scatter_add_(1, mirrored(steps, side), (weights / weights.sum()).expand(side, -1))
        matrices.append(matrix.to(wide))
    return (matrices[0] @ wide @ matrices[1].T).to(x.dtype)


def mirrored(steps: Tensor, side: int) -> Tensor:
    """Where each pixel of a line of `side` px meets these whole steps, (side, steps); its ends are mirrors."""
    period = max(1, 2 * side - 2)
    places = (torch.arange(side, device="cpu")[:, None] + steps).remainder(period)
    return torch.minimum(places, period - places).clamp(max=side - 1)
