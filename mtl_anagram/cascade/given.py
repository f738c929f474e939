"""Pictures of one's own in a request: one to start from, and one whose component is kept."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError, float_tensor, number
from ..files.images import read_picture, to_uint8
from ..files.shards import bytes_of
from ..sampling.checks import checked_picture
from ..views import View, get_views

Picture = str | Path | Tensor
Size = int | tuple[int, int]
STRENGTH = 0.6  # of stage I, where none is given


@dataclass(frozen=True)
class Given:
    """pictures (3, h, w) by argument: start_from, with the first stages' strengths; reference, with its view."""

    pictures: dict[str, Tensor]
    strengths: tuple[float, ...]
    view: View | None

    def arguments(self, stage: int, size: Size, images: int) -> dict[str, Any]:
        """What `sample_stage1` and `sample_stage2` take, for so many images of this size."""
        all_of = (images, -1, -1, -1)
        batch = {n: resized(one, sides_of(size)).expand(all_of) for n, one in self.pictures.items()}
        found: dict[str, Any] = {"reference": (batch["reference"], self.view)} if self.view else {}
        if stage <= len(self.strengths):
            found["start"] = batch["start_from"], self.strengths[stage - 1]
        return found

    @cached_property
    def about(self) -> dict[str, Any]:
        """For metadata: each picture's sha256 (of its size and 8-bit values), and how it is used."""
        used: dict[str, Any] = {"start_from": {"strength": list(self.strengths)}}
        used["reference"] = {"view": self.view.to_metadata()} if self.view else {}
        contents = {n: str(tuple(p.shape)).encode() + bytes_of(to_uint8(p)) for n, p in self.pictures.items()}
        return {n: {"sha256": hashlib.sha256(c).hexdigest(), **used[n]} for n, c in contents.items()}


def checked_given(sizes: Sequence[Size], start_from: Any, strength: Any, reference: Any, view: Any) -> Given:
    """A request's own pictures for stages of these sizes, refused where they are none or do not fit."""
    strengths: list[Any] = []
    if start_from is not None:
        strength = STRENGTH if strength is None else strength
        strengths = [*strength] if isinstance(strength, list | tuple) else [strength]
        if not 1 <= len(strengths) <= len(sizes[:2]) or (strengths[0] == 0 and len(sizes) == 1):
            said = "must be stage I's, or I's and II's if both run, up to 1; 0 skips stage I, so a stage II must follow"
            raise InputError(f"strength={strength!r} {said}")
        strengths = [number("strength", value, high=1, above=i > 0) for i, value in enumerate(strengths)]
    if (strength is not None and start_from is None) or (view is not None and reference is None):
        raise InputError("strength= needs a picture, start_from=, and reference_view= needs reference=")
    (kept,) = get_views(["low_pass" if view is None else view])
    if kept.reduce != "sum":
        raise InputError(f"reference_view={view!r} must be a component, such as low_pass or grayscale")
    kept.check_size(sizes[0])
    given, (high, wide) = {"start_from": start_from, "reference": reference}, sides_of(sizes[0])
    # As large as stage II may want it, whatever runs: who goes on later, goes on with the same picture.
    largest = 4 * high, 4 * wide
    pictures = {name: _picture(name, one, largest) for name, one in given.items() if one is not None}
    return Given(pictures, tuple(strengths), None if reference is None else kept)


def _picture(name: str, given: Any, largest: tuple[int, int]) -> Tensor:
    """A file's or a tensor's picture (3, h, w), no larger than needed, in the 8 bits that its copy will have."""
    if isinstance(given, Tensor):
        float_tensor(name, given, (3, None, None), "(3, H, W), one picture, such as pictures[64][0]")
        one = checked_picture(given[None], 1, name)[0].float().cpu()
    else:
        one = read_picture(given)
    (height, width), (high, wide) = largest, one.shape[1:]
    if high * width != wide * height:
        said = f"is {wide} x {high} px (width x height), and what is made {width} x {height}"
        raise InputError(f"{name} {said}: crop it to that shape, or choose another size=")
    return to_uint8(resized(one, largest) if high > height else one) / 127.5 - 1


def sides_of(size: Size) -> tuple[int, int]:
    return size if isinstance(size, tuple) else (size, size)


def resized(picture: Tensor, sides: tuple[int, int]) -> Tensor:
    """A picture (3, h, w) at another size of its shape, averaged where that is smaller; as it is at its own."""
    if picture.shape[1:] == sides:
        return picture
    return F.interpolate(picture[None], sides, mode="bilinear", antialias=True)[0].clamp(-1, 1)
