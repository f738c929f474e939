"""View: what every view can do, and how it acts on attention maps of any size."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..checks import whole_number
from ..errors import InputError

LARGEST_WORKING_SIZE = 4096  # px; where a map's size is not allowed, an allowed one up to here is looked for


class View:
    """One way to look at a picture: a permutation of its pixels, maybe with signs, and the exact inverse.

    Subclass it to write your own view, and pass an instance to `get_views`:

        import torch
        from mtl_anagram.views import View, get_views

        class Blinds(View):
            '''Every second band of rows is mirrored left to right.'''

            name = "blinds"

            def __init__(self, bands: int = 8):
                self.bands = bands
                self.sizes = f"a multiple of {bands}"

            def allows(self, size):
                return size % self.bands == 0

            def arguments(self):
                return {"bands": self.bands}

            def move(self, x):  # (..., H, W) -> (..., H, W)
                band = torch.arange(x.shape[-2], device=x.device) * self.bands // x.shape[-2]
                return torch.where(band[:, None] % 2 == 1, x.flip(-1), x)

            move_back = move

        views = get_views(["identity", Blinds(4)])

    What a subclass gives: `name`; `move` and its inverse `move_back`, which move pixels and know nothing of
    channels; where not every size will do, `allows` and `sizes`, the same in words; where __init__ has
    arguments, `arguments`. A view that changes signs too overrides `recolor` and `recolor_back`. None of them
    writes to its input. Where a list of source pixels is easier to write, subclass `IndexView`.
    """

    name: str = "view"
    sizes: str = "at least 1"

    def move(self, x: Tensor) -> Tensor:
        """Pixels to their new places: (..., H, W) -> (..., H, W), square, of an allowed size."""
        raise NotImplementedError(f"{type(self).__name__} must define move(x)")

    def move_back(self, x: Tensor) -> Tensor:
        """The exact inverse of `move`."""
        raise NotImplementedError(f"{type(self).__name__} must define move_back(x)")

    def recolor(self, x: Tensor) -> Tensor:
        """What happens to the values, (..., C, H, W), after `move`: nothing, unless a subclass says so."""
        return x

    def recolor_back(self, prediction: Tensor) -> Tensor:
        """Undoes `recolor` in a prediction's noise (the first 3 of C channels), before `move_back`."""
        return prediction

    def allows(self, size: int) -> bool:
        """Whether `move` is exact on pictures of size px a side."""
        return size >= 1

    def arguments(self) -> dict[str, Any]:
        """__init__'s keyword arguments, JSON-able, with which the same view is made again."""
        return {}

    def view(self, x: Tensor) -> Tensor:
        """What this view's reader sees: (..., C, H, W) -> (..., C, H, W), any C, any floating dtype.

        Exact (no value is computed but signs), differentiable, x unchanged. Raises InputError where x is not
        square or has a size that the view does not allow.
        """
        self._check_picture(x)
        return self.recolor(self.move(x))

    def inverse_view(self, prediction: Tensor) -> Tensor:
        """A prediction brought back into the canonical frame: (..., C, H, W) -> (..., C, H, W).

        C = 3 of noise, or 3 of noise and 3 of variance: only the noise changes its sign where the view has
        changed signs. Raises InputError as `view` does.
        """
        self._check_picture(prediction)
        return self.move_back(self.recolor_back(prediction))

    def map(self, maps: Tensor) -> Tensor:
        """Non-negative maps (..., h, w) of any square size moved as `view` moves pixels; no sign changes.

        Exact where the view allows the size h. Elsewhere the map's mass is spread evenly (by area) over the
        pixels of the next larger allowed size (the next smaller one if none up to 4096 is), moved there, and
        gathered by area again: mass is kept, non-negative stays non-negative, `inverse_map` is the
        transpose. Raises InputError where maps are not square or, off the allowed sizes, not floating.
        """
        return self._move_map(self.move, maps)

    def inverse_map(self, maps: Tensor) -> Tensor:
        """Maps (..., h, w) of any square size brought back into the canonical frame; see `map`."""
        return self._move_map(self.move_back, maps)

    def check_size(self, size: int) -> None:
        """Raises InputError, which names the allowed sizes, where the view cannot act on size x size px."""
        whole_number("size", size, 1)
        if not self.allows(size):
            raise InputError(f"size={size} px does not suit the view {self.name!r}: it must be {self.sizes}")

    def to_metadata(self) -> dict[str, Any]:
        """What `view_from_metadata` makes exactly this view of again; JSON-able."""
        arguments = self.arguments()
        kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        taken = {
            key for key, value in inspect.signature(type(self)).parameters.items() if value.kind not in kinds
        }
        if set(arguments) != taken:
            raise InputError(
                f"{type(self).__name__}.arguments() gives {sorted(arguments)}, but __init__ takes "
                f"{sorted(taken)}: it must give them all, or the view cannot be made again"
            )
        try:
            json.dumps(arguments, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InputError(f"{type(self).__name__}.arguments() is not JSON: {error}") from error
        metadata: dict[str, Any] = {"name": self.name}
        if not is_built_in(type(self)):
            metadata["class"] = class_path(type(self))
        if arguments:
            metadata["arguments"] = arguments
        return metadata

    @classmethod
    def from_arguments(cls, arguments: dict[str, Any]) -> View:
        """The view that gave these `arguments`."""
        return cls(**arguments)

    def __repr__(self) -> str:
        return f"<view {self.name}>"

    def _check_picture(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise InputError(f"a view acts on a tensor (..., C, H, W), not on {type(x).__name__}")
        if x.ndim < 3 or x.shape[-1] != x.shape[-2]:
            raise InputError(f"shape {tuple(x.shape)}: a view needs (..., C, H, W) with H = W")
        self.check_size(x.shape[-1])

    def _move_map(self, move: Callable[[Tensor], Tensor], maps: Tensor) -> Tensor:
        if not isinstance(maps, Tensor):
            raise InputError(f"a map is a tensor (..., h, w), not {type(maps).__name__}")
        if maps.ndim < 2 or maps.shape[-1] != maps.shape[-2] or maps.shape[-1] < 1:
            raise InputError(f"shape {tuple(maps.shape)}: a map is (..., h, w) with h = w, at least 1")
        size = maps.shape[-1]
        if self.allows(size):
            return move(maps)
        if not maps.is_floating_point():
            raise InputError(
                f"a map of {size} px and {maps.dtype}: off {self.name!r}'s own sizes ({self.sizes}) "
                "it is resampled, which takes a floating map"
            )
        wide = maps.to(torch.promote_types(maps.dtype, torch.float32))
        return spread(move(spread(wide, self._working_size(size))), size).to(maps.dtype)

    def _working_size(self, size: int) -> int:
        """The smallest allowed size above size, or else the largest below."""
        candidates = (*range(size + 1, LARGEST_WORKING_SIZE + 1), *range(size - 1, 0, -1))
        for candidate in candidates:
            if self.allows(candidate):
                return candidate
        raise InputError(
            f"the view {self.name!r} allows no size up to {LARGEST_WORKING_SIZE} px: {self.sizes}"
        )


class IndexView(View):
    """A view given by its `sources`: which pixel every pixel is taken from, at each allowed size.

    A subclass defines `sources(size)`, a long CPU tensor (size, size): output pixel (r, c) is input pixel
    sources[r, c], counted row by row. A handy way: apply the view to `pixel_numbers(size)`. The tensors are
    made when first needed, and kept per size and device; a copied or pickled view leaves them behind.
    """

    def sources(self, size: int) -> Tensor:
        """Where each pixel of a size x size picture comes from, (size, size) long, each pixel once."""
        raise NotImplementedError(f"{type(self).__name__} must define sources(size)")

    def move(self, x: Tensor) -> Tensor:
        return self._take(x, back=False)

    def move_back(self, x: Tensor) -> Tensor:
        return self._take(x, back=True)

    def _take(self, x: Tensor, back: bool) -> Tensor:
        size = x.shape[-1]
        index = self._index(size, x.device, back)
        return x.flatten(-2).index_select(-1, index).unflatten(-1, (size, size))

    def _index(self, size: int, device: torch.device, back: bool) -> Tensor:
        cache: dict[tuple[int, torch.device, bool], Tensor] = self.__dict__.setdefault("_indices", {})
        key = (size, device, back)
        if key not in cache:
            # An index made inside inference_mode could not take part in a later gradient.
            with torch.inference_mode(False), torch.no_grad():
                forth = self.sources(size).flatten()
                cache[key] = (torch.argsort(forth) if back else forth).to(device)
        return cache[key]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_indices"}


def pixel_numbers(size: int) -> Tensor:
    """The pixels of a picture, counted row by row: (size, size) long, on the CPU."""
    return torch.arange(size * size, device="cpu").unflatten(0, (size, size))


def spread(maps: Tensor, size: int) -> Tensor:
    """Maps (..., h, h) resampled to (..., size, size) by area; every pixel's mass is kept, so is the sum."""
    share = _shares(maps.shape[-1], size).to(maps.dtype).to(maps.device)
    return share @ maps @ share.T


def _shares(old: int, new: int) -> Tensor:
    """(new, old): which share of old cell b lies in new cell a, both dividing one line evenly."""
    # On a line of length old x new, where all borders are whole numbers.
    a = torch.arange(new, device="cpu")[:, None] * old
    b = torch.arange(old, device="cpu")[None, :] * new
    common = torch.minimum(a + old, b + new) - torch.maximum(a, b)
    return common.clamp(min=0).double() / new


def is_built_in(kind: type[View]) -> bool:
    """Whether the class is one of this package's own."""
    return kind.__module__.startswith(__name__.rpartition(".")[0] + ".")


def class_path(kind: type[View]) -> str:
    """module.Class, by which a user's own class is found again."""
    return f"{kind.__module__}.{kind.__qualname__}"


def short(value: Any) -> str:
    """A value for an error message: its repr, cut off at 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
