"""The library's own errors and warnings, and the checks of callers' values; messages name value, limit and remedy."""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Collection, Mapping, Sequence
from inspect import formatannotation
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import torch
from torch import Tensor


class AnagramError(Exception):
    """Base of all errors that this library raises on purpose."""


class InputError(AnagramError, ValueError):
    """A caller's value is outside what a function accepts."""


class ConfigError(InputError):
    """A model's config holds a field or a value that is not implemented."""


class WeightsError(InputError):
    """A file's tensors do not fit the model: missing, unexpected, misshapen, or not finite."""


class CapacityError(InputError):
    """A model needs more memory, or its files more room on the disk, than this machine has."""


class SourceError(AnagramError, OSError):
    """A file, a folder or a hub repository cannot be found or read."""


class PromptWarning(UserWarning):
    """A prompt asks for what the cascade's makers do not list among the things that it has learnt to draw."""


MAX_SEED = 2**63 - 1  # of a torch generator


def whole_number(
    name: str, value: Any, low: int, high: int | None = None, *, error: type[InputError] = InputError
) -> int:
    """An int (no bool) from low to high, both included; high None = no upper limit."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < low or (high is not None and value > high):
        limit = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise error(f"{name}={value!r} must be a whole number {limit}")
    return value


def number(
    name: str, value: Any, *, low: float = 0.0, high: float = math.inf, above: bool = False,
    error: type[InputError] = InputError,
) -> float:  # fmt: skip
    """A finite int or float (no bool) from low (above=True: more than low) to high, as a float."""
    real = isinstance(value, int | float) and not isinstance(value, bool)
    finite = real and abs(value) <= sys.float_info.max
    if not finite or not low <= value <= high or (above and value == low):
        limit = f"{'above' if above else 'of at least'} {low:g}"
        limit += "" if high == math.inf else f" and at most {high:g}"
        raise error(f"{name}={value!r} must be a finite number {limit}")
    return float(value)


def flag(name: str, value: Any) -> bool:
    """True or False itself, nothing that merely counts as such."""
    if not isinstance(value, bool):
        raise InputError(f"{name}={value!r} must be True or False")
    return value


def choice(name: str, value: Any, allowed: Sequence[str]) -> str:
    """One of a few words."""
    if not isinstance(value, str) or value not in allowed:
        raise InputError(f"{name}={value!r} must be one of {', '.join(map(repr, allowed))}")
    return value


def float_tensor(name: str, value: Any, shape: Sequence[int | None], legend: str) -> Tensor:
    """A floating tensor of this shape, None = any size of at least 1; legend is for the message."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"{name} is {kind}; give a floating tensor {legend}")
    sizes = zip(value.shape, shape, strict=False)
    if value.ndim != len(shape) or not all(size and wanted in (None, size) for size, wanted in sizes):
        here = ", ".join("any" if wanted is None else str(wanted) for wanted in shape)
        raise InputError(f"{name} has shape {tuple(value.shape)}; give {legend}, here ({here})")
    return value


def at_least_float32(value: Tensor) -> Tensor:
    """The tensor in float32, or as it is if its floats are wider: the precision of all sampling maths."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def read_fields(
    config: Any, *, owner: str, read: Mapping[str, Any], class_name: str | None = None,
    fixed: Mapping[str, Any] | None = None, required: Collection[str] = (), unused: Collection[str] | None = (),
) -> dict[str, Any]:  # fmt: skip
    """The fields of a published JSON config that are read, as their types; the others are checked.

    owner: whose config, for the errors. read: name -> type. fixed: fields of which one value is implemented, which a
    file without them means. unused: fields of no effect, None = all others. "_..." are notes. Raises ConfigError.
    """
    fixed = ({} if class_name is None else {"_class_name": class_name}) | dict(fixed or {})
    if not isinstance(config, Mapping):
        raise ConfigError(f"the config of {owner} is a JSON object, not {type(config).__name__}")
    missing = [name for name in required if name not in config]
    if missing:
        raise ConfigError(f"the config lacks {', '.join(missing)}; take the whole config of {owner}")
    for name, value in config.items():
        if name in fixed:
            if value != fixed[name] or isinstance(value, bool) != isinstance(fixed[name], bool):
                raise ConfigError(f"{name}={value!r} is not implemented; {owner} has {fixed[name]!r}")
        elif not (name in read or unused is None or name in unused or str(name).startswith("_")):
            close = difflib.get_close_matches(str(name), [*read, *fixed], n=1)
            hint = f"did you mean {close[0]!r}?" if close else "remove it if it has no effect"
            raise ConfigError(f"unknown field {name!r} = {value!r}: {owner} has no such field; {hint}")
    return {name: as_type(name, config[name], kind) for name, kind in read.items() if name in config}


def as_type(name: str, value: Any, kind: Any) -> Any:
    """A JSON value as the type that an annotation names: lists become tuples, whole numbers floats. ConfigError."""
    for option in get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,):
        if get_origin(option) is tuple and isinstance(value, list | tuple):
            return tuple(as_type(f"{name}[{i}]", item, get_args(option)[0]) for i, item in enumerate(value))
        if get_origin(option) is Literal and isinstance(value, str) and value in get_args(option):
            return value
        if option is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:
            return float(value)
        if type(value) is option and option is not float:
            return value
    raise ConfigError(f"{name}={value!r} must be {formatannotation(kind)}")
