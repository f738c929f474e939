"""What the stages check of a call's values, at the call, and of what networks and scorers return."""

import operator
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, choice, flag, float_tensor, number, whole_number
from .guidance import ViewLike

RANGE = 1.001  # how far from 0 a picture's values may be
TOLERANCE = 1e-3  # of components' sum, on unit noise
# What a field may be: a whole number of a range, one of some words, a number from 0 to a limit, a flag.
Limit = range | tuple[str, ...] | float | type[bool]


def check_limits(owner: Any, limits: Mapping[str, Limit]) -> None:
    """A frozen dataclass's fields are within limits; numbers become floats, so that 10 and 10.0 are one."""
    for name, limit in limits.items():
        value = getattr(owner, name)
        if isinstance(limit, range):
            whole_number(name, value, limit.start, limit.stop - 1)
        elif isinstance(limit, tuple):
            choice(name, value, limit)
        elif isinstance(limit, float):
            object.__setattr__(owner, name, number(name, value, high=limit))
        else:
            flag(name, value)


def check_kinds(**arguments: tuple[Any, ...]) -> None:
    """By argument its value, then the kinds of which it may be."""
    for name, (value, *kinds) in arguments.items():
        if not isinstance(value, tuple(kinds)):
            wanted = " or ".join(kind.__name__ for kind in kinds).replace("NoneType", "None")
            raise InputError(f"{name}={value!r} ({type(value).__name__}) must be a {wanted}: give one")


def checked_views(views: Any, *sizes: tuple[int, int]) -> list[ViewLike]:
    """At least one object with view(x) and inverse_view(prediction), fit for these sizes, of one way to reduce."""
    if isinstance(views, str) or not isinstance(views, Sequence) or not views:
        raise InputError(f"views={views!r}: give a list of at least one view")
    for view in views:
        methods = [getattr(view, name, None) for name in ("view", "inverse_view")]
        if isinstance(view, type) or not all(map(callable, methods)):
            raise InputError(f"{view!r} is no view: it needs view(x) and inverse_view(prediction)")
        for height, width in sizes if hasattr(view, "check_size") else ():
            view.check_size(height if height == width else (height, width))
    if len({getattr(view, "reduce", "mean") for view in views}) > 1:
        said = "mixes views, whose predictions are averaged, with components, whose predictions add up"
        raise InputError(f"views={list(views)!r} {said}: give one kind")
    for height, width in sizes[:2] if getattr(views[0], "reduce", "mean") == "sum" else ():
        noise = unit_noise(height, width)
        total = sum(view.inverse_view(view.view(noise)) for view in views)
        if not (total - noise).abs().max() < TOLERANCE:
            said = "do not add up to the picture: give a whole family, such as low_pass, high_pass"
            raise InputError(f"views={list(views)!r} are components that {said}")
    return list(views)


def unit_noise(height: int, width: int) -> Tensor:
    """Always the same noise (1, 3, H, W): what filters are measured by."""
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(1, 3, height, width, generator=generator, dtype=torch.float32, device="cpu")


def checked_generators(generators: Any) -> list[torch.Generator]:
    """One CPU generator per image, each its own: noise is drawn on the CPU."""
    listed = list(generators) if isinstance(generators, Sequence) else []
    fit = [isinstance(one, torch.Generator) and one.device.type == "cpu" for one in listed]
    if not listed or not all(fit) or len(set(map(id, listed))) < len(listed):
        remedy = "a list with one CPU generator per image, each its own: [torch.Generator().manual_seed(0)]"
        raise InputError(f"generators={generators!r}: give {remedy}")
    return listed


def checked_spans(spans: Any, images: int, views: int, tokens: int) -> list[tuple[int, int]]:
    """One (start, stop) per view, or B lists of such -> B V of them, image by image, view by view."""
    try:
        rows = spans if isinstance(spans[0][0], list | tuple) else [spans] * images
        flat = [(operator.index(start), operator.index(stop)) for row in rows for start, stop in row]
        fit = [len(row) for row in rows] == [views] * images
        fit = fit and all(0 <= start < stop <= tokens for start, stop in flat)
    except (TypeError, ValueError, LookupError):
        fit = False
    if not fit:
        remedy = f"give one (start, stop) per view, 0 <= start < stop <= {tokens} tokens"
        raise InputError(f"spans={spans!r} for {views} views: {remedy}")
    return flat


def checked_text(name: str, states: Any, images: int, views: int, like: tuple[int, ...] = ()) -> Tensor:
    """Text rows as (B, V, L, D): given so, as (V, L, D), or, where `like` (L, D) is given, as (1, L, D) for all."""
    rows: tuple[int, ...] = (views,)
    if isinstance(states, Tensor) and states.ndim == 4:
        rows = (images, views)
    elif isinstance(states, Tensor) and like and states.shape[:1] == (1,):
        rows = (1,)
    legend = "(V, L, D) or (B, V, L, D)" + ", or (1, L, D), of the text's L and D" * bool(like)
    if not torch.isfinite(float_tensor(name, states, (*rows, *(like or (None, None))), legend)).all():
        raise InputError(f"{name} holds numbers that are not finite: encode in float32 or bfloat16")
    return states.expand(images, views, *states.shape[-2:])


def checked_picture(given: Any, images: int, name: str = "low_res", sides: Any = (None, None)) -> Tensor:
    """Pictures (B, 3, h, w) in [-1, 1], one per generator; warns where nothing is negative, as in [0, 1]."""
    legend = "(B, 3, h, w) with one picture per generator"
    given = float_tensor(name, given, (images, 3, *sides), legend).detach()
    low, high = (bound.item() for bound in given.aminmax())
    if not max(-low, high) <= RANGE:  # a nan fails too
        remedy = "give pictures in [-1, 1], the last state's x"
        raise InputError(f"{name} has values up to {max(-low, high):g}: {remedy}")
    if low >= 0:
        said = f"{name} has no negative value (the smallest is {low:g}): pictures are in [-1, 1] here"
        warnings.warn(f"{said}; one in [0, 1] is 2 * picture - 1", stacklevel=3)
    return given


def check_result(value: Any, shape: tuple[int, ...], what: str, meaning: str) -> Tensor:
    """A callable's result, if it is a tensor of this shape."""
    got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    if got != shape:
        raise InputError(f"{what} returned {got} instead of {shape}: {meaning}")
    return value
