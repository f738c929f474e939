"""Views by name: get_views, compositions such as "rotate_cw+negate", and views from metadata."""

from __future__ import annotations

import difflib
import hashlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..checks import MAX_SEED, whole_number
from ..errors import InputError
from .base import View, class_path, is_built_in, short
from .jigsaw import Jigsaw
from .permutations import InnerCircle, PatchPermute, PermutationView, PixelPermute, Skew, SquareHinge
from .rigid import Flip, Identity, Negate, Rotate180, RotateCCW, RotateCW

CLASSES: dict[str, type[View]] = {
    kind.name: kind
    for kind in (
        *(Identity, Flip, RotateCW, RotateCCW, Rotate180, Negate),
        *(Skew, PatchPermute, PixelPermute, Jigsaw, InnerCircle, SquareHinge, PermutationView),
    )
}
VIEW_NAMES = tuple(CLASSES)
JOINT = "+"


class Composition(View):
    """Several views in a row: the first is applied first; the inverse undoes the last one first."""

    views: list[View]

    def __init__(self, views: Sequence[View]) -> None:
        for view in views:
            if not isinstance(view, View):
                raise InputError(f"views holds {view!r} ({type(view).__name__}); give View instances")
        self.views = [
            part for view in views for part in (view.views if isinstance(view, Composition) else [view])
        ]
        if not self.views:
            raise InputError("views=[] composes nothing: give at least one view")
        self.name = JOINT.join(view.name for view in self.views)

    def view(self, x: Tensor) -> Tensor:
        for view in self.views:
            x = view.view(x)
        return x

    def inverse_view(self, prediction: Tensor) -> Tensor:
        for view in reversed(self.views):
            prediction = view.inverse_view(prediction)
        return prediction

    def map(self, maps: Tensor) -> Tensor:
        for view in self.views:
            maps = view.map(maps)
        return maps

    def inverse_map(self, maps: Tensor) -> Tensor:
        for view in reversed(self.views):
            maps = view.inverse_map(maps)
        return maps

    def allows(self, size: int) -> bool:
        return all(view.allows(size) for view in self.views)

    def check_size(self, size: int) -> None:
        for view in self.views:
            view.check_size(size)

    def to_metadata(self) -> dict[str, Any]:
        return {"name": self.name, "views": [view.to_metadata() for view in self.views]}


def get_views(
    names: Sequence[str | View],
    view_args: Sequence[Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None] | None = None,
    seed: int = 0,
) -> list[View]:
    """One view per name.

    names: names of VIEW_NAMES; compositions such as "rotate_cw+negate", read from left to right: the picture
    is first rotated, then negated; View instances, taken as they are.
    view_args: None, or one entry per view: None, or a dict of the view's keyword arguments (skew: factor;
    patch_permute and pixel_permute: num_patches, seed; jigsaw: seed; permutation: permutation). For a
    composition: a list with one such entry per component, or a dict of such dicts by component name.
    seed: 0 to 2^63 - 1. patch_permute and pixel_permute without a seed of their own draw their permutation
    from it: component j of view i (both from 0) gets the first 6 bytes, big-endian, of the SHA-256 of
    "{seed}/{i}/{j}" for a seed; so two views of one name differ. jigsaw has its own default seed, 4522. No
    global generator is read or changed.

    Raises InputError for an unknown name (with the closest ones), arguments that a view does not take, and
    whatever else is malformed.
    """
    remedy = f'give a list such as ["identity", "rotate_cw"], of {", ".join(VIEW_NAMES)}'
    if isinstance(names, (str, bytes)) or not isinstance(names, Sequence):
        raise InputError(f"views={names!r} ({type(names).__name__}): {remedy}")
    if not names:
        raise InputError(f"views={names!r} names no view: {remedy}")
    whole_number("seed", seed, 0, MAX_SEED)
    if view_args is None:
        view_args = [None] * len(names)
    if isinstance(view_args, (str, bytes)) or not isinstance(view_args, Sequence):
        raise InputError(
            f"view_args={short(view_args)} ({type(view_args).__name__}) must be a list, one entry per "
            "view, None or a dict"
        )
    if len(view_args) != len(names):
        raise InputError(
            f"view_args has {len(view_args)} entries for {len(names)} views: give one per view, None where "
            "there is nothing to say"
        )
    return [
        _make(name, given, f"{seed}/{i}")
        for i, (name, given) in enumerate(zip(names, view_args, strict=True))
    ]


def view_from_metadata(metadata: Mapping[str, Any]) -> View:
    """The very view whose `to_metadata` this is; your own classes must be defined or imported before.

    Raises InputError for metadata of any other make. Nothing is imported because metadata says so.
    """
    if not isinstance(metadata, Mapping) or not isinstance(metadata.get("name"), str):
        raise InputError(
            f"view metadata {short(metadata)} must be a dict with a name, as View.to_metadata gives it"
        )
    unknown = set(metadata) - {"name", "class", "arguments", "views"}
    if unknown:
        raise InputError(
            f"view metadata of {metadata['name']!r} has unknown fields {sorted(map(str, unknown))}"
        )
    if "views" in metadata:
        parts = metadata["views"]
        if set(metadata) != {"name", "views"} or not isinstance(parts, list):
            raise InputError(
                f"view metadata of {metadata['name']!r}: a composition has a name and a list of views"
            )
        if any(isinstance(part, Mapping) and "views" in part for part in parts):
            raise InputError(f"view metadata of {metadata['name']!r}: compositions hold no compositions")
        return Composition([view_from_metadata(part) for part in parts])
    kind = _own_class(metadata["class"]) if "class" in metadata else _class_of(metadata["name"])
    return _construct(kind, metadata["name"], metadata.get("arguments", {}))


def _make(name: Any, given: Any, stream: str) -> View:
    """One view of get_views; stream: the seed and the view's index."""
    if isinstance(name, View):
        if given:
            raise InputError(f"view_args={short(given)} for {name!r}, which is made already: give None")
        return name
    if not isinstance(name, str):
        raise InputError(f"view {name!r} ({type(name).__name__}) must be a name, or a View instance")
    parts = [part.strip() for part in name.split(JOINT)]
    kinds = [_class_of(part, name) for part in parts]
    arguments = [given] if len(parts) == 1 else _arguments_of_parts(name, parts, given)
    views = []
    for j, (part, kind, keywords) in enumerate(zip(parts, kinds, arguments, strict=True)):
        if keywords is None:
            keywords = {}
        if issubclass(kind, PatchPermute) and isinstance(keywords, Mapping) and "seed" not in keywords:
            drawn = hashlib.sha256(f"{stream}/{j}".encode()).digest()[:6]
            keywords = {**keywords, "seed": int.from_bytes(drawn, "big")}
        views.append(_construct(kind, part, keywords))
    return views[0] if len(views) == 1 else Composition(views)


def _arguments_of_parts(name: str, parts: list[str], given: Any) -> list[Any]:
    """The arguments of a composition's components, one entry each."""
    if given is None:
        return [None] * len(parts)
    if isinstance(given, Mapping):
        for key in given:
            if key not in parts:
                raise InputError(f"view_args of {name!r} name {key!r}; its components are {', '.join(parts)}")
            if parts.count(key) > 1:
                raise InputError(
                    f"view_args of {name!r}: {key!r} occurs more than once; give a list, one per component"
                )
        return [given.get(part) for part in parts]
    if isinstance(given, Sequence) and not isinstance(given, (str, bytes)) and len(given) == len(parts):
        return list(given)
    raise InputError(
        f"view_args={short(given)} for {name!r}: give a list of {len(parts)} entries, or a dict by "
        "component name"
    )


def _class_of(part: str, whole: str | None = None) -> type[View]:
    if part in CLASSES:
        return CLASSES[part]
    close = difflib.get_close_matches(part.lower(), VIEW_NAMES, n=2, cutoff=0.5)
    guess = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
    where = f" in {whole!r}" if whole not in (None, part) else ""
    raise InputError(f"unknown view {part!r}{where}{guess} The views are {', '.join(VIEW_NAMES)}")


def _construct(kind: type[View], name: str, arguments: Any) -> View:
    """kind(**arguments), with every keyword checked first."""
    if not isinstance(arguments, Mapping):
        raise InputError(
            f"view_args={short(arguments)} for {name!r} must be a dict of keyword arguments, or None"
        )
    parameters = inspect.signature(kind).parameters
    takes = f"{name!r} takes {', '.join(parameters) or 'no arguments'}"
    open_ended = any(value.kind is inspect.Parameter.VAR_KEYWORD for value in parameters.values())
    for key in arguments:
        if not isinstance(key, str) or (key not in parameters and not open_ended):
            raise InputError(f"unknown view argument {key!r}: {takes}")
    for key, value in parameters.items():
        required = value.default is value.empty and value.kind not in (
            value.VAR_POSITIONAL,
            value.VAR_KEYWORD,
        )
        if required and key not in arguments:
            raise InputError(f"view argument {key!r} is missing: {takes}")
    return kind.from_arguments(dict(arguments))


def _own_class(path: Any) -> type[View]:
    """A user's class, found among those that exist: metadata never makes anything be imported."""
    found = next(
        (kind for kind in _descendants(View) if class_path(kind) == path and not is_built_in(kind)), None
    )
    if found is None:
        raise InputError(f"view metadata needs the class {path!r}: define it or import its module before")
    return found


def _descendants(kind: type[View]) -> Iterator[type[View]]:
    for child in kind.__subclasses__():
        yield from _descendants(child)
        yield child
