"""Views by name: get_views, compositions such as "rotate_cw+negate", and views from metadata."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import inspect
import json
import reprlib
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

from torch import Tensor

from ..errors import MAX_SEED, InputError, whole_number
from . import pixels
from .base import View
from .factorized import COMPONENTS
from .jigsaw import Jigsaw
from .turned import Reflect, Rotate

KINDS: list[type[View]] = [pixels.Identity, pixels.Flip, pixels.RotateCw, pixels.RotateCcw]
KINDS += [pixels.Rotate180, pixels.Negate, pixels.Skew, pixels.PatchPermute, pixels.PixelPermute, Jigsaw]
KINDS += [pixels.InnerCircle, pixels.SquareHinge, pixels.PermutationView, pixels.Mirror, pixels.Transpose]
KINDS += [pixels.Translate, Rotate, Reflect, *COMPONENTS]
CLASSES = {kind.name: kind for kind in KINDS}
VIEW_NAMES = tuple(CLASSES)


class Composition(View):
    """Several views in a row: the first is applied first; the inverse undoes the last one first."""

    def __init__(self, views: Sequence[View]) -> None:
        if not views or not all(isinstance(view, View) for view in views):
            raise InputError(f"views={views!r} must be a list of at least one View instance")
        self.views = list(views)
        self.name = "+".join(view.name for view in views)
        self.square = any(view.square for view in views)
        self.reduce = "sum" if any(view.reduce == "sum" for view in views) else "mean"

    def view(self, x: Tensor) -> Tensor:
        return reduce(lambda seen, view: view.view(seen), self.views, x)

    def inverse_view(self, prediction: Tensor, channels: int = 3) -> Tensor:
        return reduce(lambda x, view: view.inverse_view(x, channels), self.views[::-1], prediction)

    def show(self, x: Tensor) -> Tensor:
        return reduce(lambda seen, view: view.show(seen), self.views, x)

    def inverse_map(self, maps: Tensor) -> Tensor:
        return reduce(lambda moved, view: view.inverse_map(moved), self.views[::-1], maps)

    def allows(self, size: int) -> bool:
        return all(view.allows(size) for view in self.views)

    def check_size(self, size: int | tuple[int, int]) -> None:
        for view in self.views:
            view.check_size(size)

    def to_metadata(self) -> dict[str, Any]:
        return {"name": self.name, "views": [view.to_metadata() for view in self.views]}


def get_views(
    names: Sequence[str | View], view_args: Sequence[Any] | None = None, seed: int = 0
) -> list[View]:
    """One view per name: one of VIEW_NAMES, a composition such as "rotate_cw+negate", or a View instance.

    A name may have arguments, in their order or named: "jigsaw:6", "motion:angle=30", "rotate:135,circle".
    view_args: None, or per view None or a dict of its keyword arguments; for a composition a list of such, or a
    dict of them by component name.
    seed: 0 to 2^63 - 1. patch_permute and pixel_permute without a seed of their own draw their permutation
    from it: component j of view i (from 0) gets the first 6 bytes, big-endian, of the SHA-256 of "{seed}/{i}/{j}"
    for a seed. No global generator is read or changed.
    """
    whole_number("seed", seed, 0, MAX_SEED)
    if isinstance(names, (str, bytes)) or not isinstance(names, Sequence) or not names:
        raise InputError(f"views={names!r}: give a list of {', '.join(VIEW_NAMES)} or View instances")
    given = _entries("view_args", view_args, len(names))
    return [_view(name, given[i], f"{seed}/{i}") for i, name in enumerate(names)]


def view_from_metadata(metadata: Mapping[str, Any]) -> View:
    """The very view whose `to_metadata` this is, or InputError; your own classes must be imported before."""
    fields = set(metadata) if isinstance(metadata, Mapping) else set()
    if fields == {"name", "views"} and isinstance(metadata["views"], list):
        return Composition([view_from_metadata(part) for part in metadata["views"]])
    if not {"name"} <= fields <= {"name", "class", "arguments"}:
        raise InputError(f"view metadata {reprlib.repr(metadata)} must be as View.to_metadata gives it")
    if "class" not in fields:
        return _make(metadata["name"], metadata.get("arguments", {}))
    # A user's class is there already: nothing is imported because metadata says so.
    for kind in (kinds := View.__subclasses__()):  # which grows
        if metadata["class"] == f"{kind.__module__}.{kind.__qualname__}":
            return _make(kind, metadata.get("arguments", {}))
        kinds += kind.__subclasses__()
    raise InputError(f"view metadata needs the class {metadata['class']!r}: define or import it before")


def _view(name: object, given: Any, stream: str) -> View:
    """One view of get_views; stream: the seed and the view's index."""
    if isinstance(name, View) and not given:
        return name
    if not isinstance(name, str):
        made = "takes no view_args" if isinstance(name, View) else "must be a name, or a View instance"
        raise InputError(f"view {name!r} ({type(name).__name__}) {made}")
    named = [_named(part) for part in name.split("+")]
    parts = [part for part, _ in named]
    if len(parts) > 1 and isinstance(given, Mapping):
        if any(parts.count(key) != 1 for key in given):
            raise InputError(f"view_args of {name!r} name {list(given)}: give each component once, or a list")
        given = [given.get(part) for part in parts]
    given = [*_entries(f"view_args of {name!r}", given, len(parts))] if len(parts) > 1 else [given]
    for j, (_, own) in enumerate(named):
        mine = own if given[j] is None else given[j]
        given[j] = {**own, **mine} if isinstance(mine, Mapping) else mine
    views = [_make(part, given[j], name, f"{stream}/{j}") for j, part in enumerate(parts)]
    return views[0] if len(views) == 1 else Composition(views)


def _named(part: str) -> tuple[str, dict[str, Any]]:
    """A view's name and the arguments that follow it: "skew:2", "motion:angle=30", "rotate:135,circle"."""
    name, colon, text = (word.strip() for word in part.partition(":"))
    names = list(inspect.signature(CLASSES[name]).parameters) if name in CLASSES else []
    found: dict[str, Any] = {}
    for i, word in enumerate(text.split(",") if colon else ()):
        key, equals, value = (part.strip() for part in word.partition("="))
        if not equals:  # a flag's name, or the value of the argument in this place
            key, value = (key, "true") if key in names else (names[i] if i < len(names) else "", key)
        if name in CLASSES and (i >= len(names) or key in found):
            takes = ", ".join(names) or "no arguments"
            raise InputError(f"view {part!r}: {name!r} takes {takes}; give no more, and each once")
        found[key] = value
        with contextlib.suppress(ValueError, RecursionError):  # words are left for the view to refuse
            found[key] = json.loads(value)
    return name, found


def _entries(what: str, given: Any, count: int) -> Sequence[Any]:
    """A list of so many entries; None stands for as many None."""
    if given is None:
        return [None] * count
    if isinstance(given, (str, bytes)) or not isinstance(given, Sequence) or len(given) != count:
        raise InputError(f"{what}={reprlib.repr(given)} must be a list of {count} entries, one per view")
    return given


def _make(name: str | type[View], arguments: Any, whole: str = "", stream: str = "") -> View:
    """A view of a class or its name, which stands in `whole`; stream: what a permutation's seed is drawn from."""
    kind = name if isinstance(name, type) else CLASSES.get(str(name))
    if kind is None:
        close = difflib.get_close_matches(str(name).lower(), VIEW_NAMES, n=2, cutoff=0.5)
        guess = f"; did you mean {' or '.join(map(repr, close))}?" if close else "."
        where = f" in {whole!r}" if "+" in whole else ""
        raise InputError(f"unknown view {name!r}{where}{guess} The views are {', '.join(VIEW_NAMES)}")
    defaults: dict[str, Any] = {}
    if stream and kind in (pixels.PatchPermute, pixels.PixelPermute):
        defaults["seed"] = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:6], "big")
    try:
        return kind(**{**defaults, **arguments})
    except TypeError as error:
        takes = ", ".join(inspect.signature(kind).parameters) or "no arguments"
        needed = f"a dict of keyword arguments, or None, and {kind.name!r} takes {takes}"
        raise InputError(f"view_args={reprlib.repr(arguments)} must be {needed}: {error}") from error
