"""View: what every view can do, and how it acts on attention maps of any size."""

from __future__ import annotations

import inspect
import json
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import InputError, at_least_float32, whole_number


class View:
    """One way to look at a picture: a permutation of its pixels, maybe with a sign, and the exact inverse.

    A subclass of your own (the README has one) gives `name`, `move` and its inverse `move_back`. Where not every
    size will do, it gives `multiple`, or `allows` and the same in words, `sizes`; where __init__ has arguments
    that are no attributes, `arguments`; where height and width may differ, `square = False`; where colours are
    inverted, `sign = -1`. What changes values in another way overrides `view`, `inverse_view` and the maps.
    """

    name: str = "view"
    multiple: int = 1
    sizes: str = ""  # the allowed ones in words; "" = the multiples of `multiple`
    square: bool = True
    sign: int = 1
    reduce: Literal["mean", "sum"] = "mean"  # how the predictions of all views become one

    def move(self, x: Tensor) -> Tensor:
        """Pixels to their new places: (..., H, W) -> (..., H, W), of an allowed size; x is not written to."""
        raise NotImplementedError(f"{type(self).__name__} must define move(x)")

    def move_back(self, x: Tensor) -> Tensor:
        """The exact inverse of `move`."""
        raise NotImplementedError(f"{type(self).__name__} must define move_back(x)")

    def allows(self, size: int) -> bool:
        """Whether `move` is exact on pictures of size px a side; where not square, of height and of width."""
        return size % self.multiple == 0

    def arguments(self) -> dict[str, Any]:
        """__init__'s arguments, JSON-able, with which the same view is made again: the attributes so named."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def view(self, x: Tensor) -> Tensor:
        """What this view's reader sees: (..., C, H, W) -> (..., C, H, W). InputError for a wrong H or W."""
        self.check_size(sides_of(x, 3))
        return self.move(x) if self.sign > 0 else -self.move(x)

    def inverse_view(self, prediction: Tensor, channels: int = 3) -> Tensor:
        """A prediction brought back into the canonical frame: (..., C, H, W) -> (..., C, H, W).

        Its first `channels` are noise, then come as many of variance, or none; only noise changes its sign.
        InputError for a wrong C, H or W.
        """
        self.check_size(sides_of(prediction, 3))
        if self.sign < 0:
            count = prediction.shape[-3]
            if count not in (channels, 2 * channels):
                raise InputError(f"a prediction of {count} channels must have {channels=} or twice as many")
            noise, variance = prediction[..., :channels, :, :], prediction[..., channels:, :, :]
            prediction = torch.cat([-noise, variance], dim=-3)
        return self.move_back(prediction)

    def show(self, x: Tensor) -> Tensor:
        """What a reader is shown of the finished picture, (..., C, H, W) -> (..., C, H, W)."""
        return self.view(x)

    def inverse_map(self, maps: Tensor) -> Tensor:
        """Non-negative maps (..., h, w) of any size in the canonical frame: mass is kept, no sign changes.

        Where a side is not allowed, the map is spread by area over the next that is, moved back, and gathered again.
        """
        sides = sides_of(maps, 2)
        if self.square and sides[0] != sides[1]:
            self.check_size(sides)  # which raises
        allowed = tuple(next(filter(self.allows, range(side, 4097)), side) for side in sides)  # the next ones
        if allowed == sides:
            return self.move_back(maps)
        return _spread(self.move_back(_spread(at_least_float32(maps), allowed)), sides).to(maps.dtype)

    def check_size(self, size: int | tuple[int, int]) -> None:
        """InputError, which names what is allowed, where the view cannot act on size: a side, or (H, W), in px."""
        height, width = size if isinstance(size, tuple) and len(size) == 2 else (size, size)
        allowed = [self.allows(whole_number("size", side, 1)) for side in (height, width)]
        needed = "" if all(allowed) else self.sizes or f"a multiple of {self.multiple}"
        needed = "square" if self.square and height != width else needed
        if needed:
            raise InputError(f"size={size} px does not suit the view {self.name!r}: it must be {needed}")

    def to_metadata(self) -> dict[str, Any]:
        """What `view_from_metadata` makes exactly this view of again; JSON-able."""
        kind, parts = type(self), {}
        if not kind.__module__.startswith(f"{__package__}."):
            parts["class"] = f"{kind.__module__}.{kind.__qualname__}"
        try:
            given = self.arguments()
            if arguments := {name: given[name] for name in inspect.signature(kind).parameters}:
                parts["arguments"] = json.loads(json.dumps(arguments, allow_nan=False))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            text = f"{kind.__name__}.arguments() is not JSON of __init__'s, and it must give them all"
            raise InputError(f"{text}: {error}") from error
        return {"name": self.name, **parts}

    def __repr__(self) -> str:
        return f"<view {self.name}>"


class IndexView(View):
    """A view given by its `sources`, which are made when first needed, and kept per size and device."""

    def sources(self, height: int, width: int) -> Tensor:
        """Which pixel each pixel comes from, (height, width) long on the CPU: the view of `pixel_numbers`."""
        raise NotImplementedError(f"{type(self).__name__} must define sources(height, width)")

    def move_back(self, x: Tensor) -> Tensor:
        return self.move(x, back=True)

    def move(self, x: Tensor, back: bool = False) -> Tensor:
        cache = self.__dict__.setdefault("_indices", {})
        key = (*x.shape[-2:], x.device, back)
        if key not in cache:
            # An index made inside inference_mode could not take part in a later gradient.
            with torch.inference_mode(False), torch.no_grad():
                forth = self.sources(*x.shape[-2:]).flatten()
                cache[key] = (torch.argsort(forth) if back else forth).to(x.device)
        return x.flatten(-2).index_select(-1, cache[key]).unflatten(-1, x.shape[-2:])

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_indices"}


def variant(base: type[View], name: str, about: str, **attributes: Any) -> type[View]:
    """A view's class that differs from another in attributes alone; of "rotate_cw" it is RotateCw."""
    title = "".join(word.capitalize() for word in name.split("_"))
    of_class = {"__module__": base.__module__, "__doc__": about, "name": name, **attributes}
    return type(title, (base,), of_class)


def pixel_numbers(height: int, width: int) -> Tensor:
    """The pixels of a picture, counted row by row: (height, width) long, on the CPU."""
    return torch.arange(height * width, dtype=torch.long, device="cpu").unflatten(0, (height, width))


def _spread(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    """Maps (..., h, w) resampled to (..., *size) by area; every pixel's mass is kept, so is the sum."""
    shares = []  # which of each old cell b lies in each new cell a, both dividing a line of length old x new
    for old, new in zip(maps.shape[-2:], size, strict=True):
        a, b = pixel_numbers(new, 1) * old, pixel_numbers(1, old) * new
        common = torch.minimum(a + old, b + new) - torch.maximum(a, b)
        shares.append((common.clamp(min=0).double() / new).to(maps.dtype).to(maps.device))
    return shares[0] @ maps @ shares[1].T


def sides_of(x: Tensor, dimensions: int) -> tuple[int, int]:
    """Height and width, of at least 1 px, of a floating tensor of at least so many dimensions."""
    if not isinstance(x, Tensor) or x.ndim < dimensions or 0 in x.shape[-2:] or not x.is_floating_point():
        got = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"a view acts on floating tensors of {dimensions} dimensions or more, not on {got}")
    return x.shape[-2], x.shape[-1]
