"""Every number of the method in one frozen object: an ablation is one argument, a run can be repeated."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..checks import choice, flag, number, whole_number
from ..errors import InputError
from .attention_iou import MEASURES
from .balancing import FLOOR
from .rectification import DIAGONALS

SCORER_RANGES = ("half", "signed")
PLACES = ("down", "mid", "up")


@dataclass(frozen=True)
class Recipe:
    """How stages I and II are sampled (Xu et al. 2024, arXiv 2412.02693); the defaults are as released.

    num_inference_steps: 1 to 1000. guidance_scale: of classifier-free guidance, 0 or more.

    balancing: weights by the views' scores, else all equal. horizon: step/horizon is added to the exponent;
    None = num_inference_steps. floor: smallest score that counts as itself. scorer_range: what the scorer is
    given, "half" = x/2 + 0.5 (released), "signed" = x itself, in [-1, 1] when clean.

    rectification: rescale the combined noise, else not. rectify_diagonal: "unit" (released) or "measured".

    anti_segregation: gradient steps on the token maps' overlap, in stage I up to step last_guided_step
    (0 first). guidance_rate: the step's length. overlap_measure: "overlap" (released) or "iou".
    overlap_target, overlap_slope: V views should overlap by target - slope (V - 1). map_resolution: side of
    the attention layers asked for when the picture has 64 px, in proportion at other sizes. map_places: of
    "down", "mid", "up".

    Raises InputError for a wrong type or a value outside its limits.
    """

    num_inference_steps: int = 30
    guidance_scale: float = 10.0
    balancing: bool = True
    rectification: bool = True
    anti_segregation: bool = True
    horizon: int | None = 30
    floor: float = FLOOR
    scorer_range: str = "half"
    rectify_diagonal: str = "unit"
    overlap_measure: str = "overlap"
    overlap_target: float = 0.5
    overlap_slope: float = 0.05
    guidance_rate: float = 5.0
    last_guided_step: int = 25
    map_resolution: int = 32
    map_places: tuple[str, ...] = ("down", "up")

    def __post_init__(self) -> None:
        whole_number("num_inference_steps", self.num_inference_steps, 1, 1000)
        for name in ("balancing", "rectification", "anti_segregation"):
            flag(name, getattr(self, name))
        if self.horizon is not None:
            whole_number("horizon", self.horizon, 1)
        choice("scorer_range", self.scorer_range, SCORER_RANGES)
        choice("rectify_diagonal", self.rectify_diagonal, DIAGONALS)
        choice("overlap_measure", self.overlap_measure, MEASURES)
        whole_number("last_guided_step", self.last_guided_step, 0)
        whole_number("map_resolution", self.map_resolution, 1, 64)
        checked: dict[str, Any] = {
            "guidance_scale": number("guidance_scale", self.guidance_scale),
            "floor": number("floor", self.floor, above=True, high=1.0),
            "overlap_target": number("overlap_target", self.overlap_target, high=0.5),
            "overlap_slope": number("overlap_slope", self.overlap_slope),
            "guidance_rate": number("guidance_rate", self.guidance_rate),
            "map_places": _places(self.map_places),
        }
        for name, value in checked.items():  # 10 and 10.0, a list and a tuple: one recipe, one hash
            object.__setattr__(self, name, value)

    @classmethod
    def released(cls, **changes: Any) -> Recipe:
        """What the published code does, number for number; changes replace fields."""
        return cls._changed({}, changes)

    @classmethod
    def corrected(cls, **changes: Any) -> Recipe:
        """What the method means where the published code slips; changes replace fields.

        The scorer sees its own input range, the exponent grows over the steps there are, noise is rescaled by
        measured power, and overlap is a true intersection over union of maps of equal mass.
        """
        base = {
            "scorer_range": "signed",
            "horizon": None,
            "rectify_diagonal": "measured",
            "overlap_measure": "iou",
        }
        return cls._changed(base, changes)

    @classmethod
    def plain(cls, **changes: Any) -> Recipe:
        """The plain average of the views' noise, the baseline: none of the three techniques."""
        return cls._changed({"balancing": False, "rectification": False, "anti_segregation": False}, changes)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """A recipe from `to_dict`'s result, as read back from JSON; missing fields take their defaults."""
        if not isinstance(values, Mapping):
            raise InputError(f"a recipe is a JSON object of its fields, not {type(values).__name__}")
        return cls._changed({}, values)

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, fit for JSON."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}

    @property
    def balancing_horizon(self) -> int:
        """The horizon as a number: None means the number of steps."""
        return self.num_inference_steps if self.horizon is None else self.horizon

    @classmethod
    def _changed(cls, base: Mapping[str, Any], changes: Mapping[str, Any]) -> Recipe:
        known = [f.name for f in fields(cls)]
        for name in changes:
            if name not in known:
                close = difflib.get_close_matches(str(name), known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else f"; it has {', '.join(known)}"
                raise InputError(f"a recipe has no field {name!r}{hint}")
        return cls(**{**base, **changes})


def _places(value: Any) -> tuple[str, ...]:
    limit = f"must be some of {', '.join(map(repr, PLACES))}, each at most once"
    if isinstance(value, str) or not isinstance(value, (list, tuple)):
        raise InputError(f"map_places={value!r} {limit}")
    if not value or any(p not in PLACES for p in value) or len(set(value)) != len(value):
        raise InputError(f"map_places={value!r} {limit}")
    return tuple(value)
