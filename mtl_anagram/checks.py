"""Checks of callers' values that several parts share: what it is, its limit, the remedy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import InputError

MAX_SEED = 2**63 - 1  # of a torch generator


def whole_number(
    name: str, value: Any, low: int, high: int | None = None, *, error: type[InputError] = InputError
) -> int:
    """An int (no bool) from low to high, both included; high None = no upper limit."""
    limit = f"from {low} to {high}" if high is not None else f"of at least {low}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise error(f"{name}={value!r} ({type(value).__name__}) must be a whole number {limit}")
    if value < low or (high is not None and value > high):
        raise error(f"{name}={value} must be a whole number {limit}")
    return value


def number(
    name: str,
    value: Any,
    *,
    low: float = 0.0,
    high: float = math.inf,
    above: bool = False,
    error: type[InputError] = InputError,
) -> float:
    """A finite int or float (no bool) from low (above=True: more than low) to high, as a float."""
    limit = f"{'above' if above else 'of at least'} {low:g}"
    limit += "" if high == math.inf else f" and at most {high:g}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise error(f"{name}={value!r} ({type(value).__name__}) must be a finite number {limit}")
    try:
        real = float(value)
    except OverflowError:
        real = math.inf
    if not math.isfinite(real) or real > high or real < low or (above and real == low):
        raise error(f"{name}={value!r} must be a finite number {limit}")
    return real


def flag(name: str, value: Any, *, error: type[InputError] = InputError) -> bool:
    """True or False itself, nothing that merely counts as such."""
    if not isinstance(value, bool):
        raise error(f"{name}={value!r} ({type(value).__name__}) must be True or False")
    return value


def choice(name: str, value: Any, allowed: Sequence[str], *, error: type[InputError] = InputError) -> str:
    """One of a few words."""
    if not isinstance(value, str) or value not in allowed:
        raise error(f"{name}={value!r} must be one of {', '.join(map(repr, allowed))}")
    return value


def float_tensor(name: str, value: Any, shape: Sequence[int | None], legend: str) -> Tensor:
    """A floating tensor of this shape, None = any size of at least 1; legend is for the message."""
    if not isinstance(value, Tensor):
        raise InputError(f"{name} is {type(value).__name__}; give a floating tensor {legend}")
    fits = value.ndim == len(shape) and all(
        size >= 1 and wanted in (None, size) for size, wanted in zip(value.shape, shape, strict=True)
    )
    if not fits:
        sizes = ", ".join("any" if wanted is None else str(wanted) for wanted in shape)
        raise InputError(f"{name} has shape {tuple(value.shape)}; give {legend}, here ({sizes})")
    if not value.is_floating_point():
        raise InputError(f"{name} holds {value.dtype}; give floating numbers, {legend}")
    return value


def at_least_float32(value: Tensor) -> Tensor:
    """The tensor in float32, or as it is if its floats are wider: the precision of all sampling maths."""
    return value.to(torch.promote_types(value.dtype, torch.float32))
