"""Every number of the method in frozen objects: an ablation is one argument, a run can be repeated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar, get_type_hints

from ..errors import InputError, choice, number, read_fields
from .attention_iou import MEASURES
from .balancing import FLOOR
from .checks import Limit, check_kinds, check_limits
from .rectification import DIAGONALS
from .solvers import SOLVERS

MAX_SCALE = 1000.0  # of guidance; far above it float32 itself overflows
R = TypeVar("R", bound="Fields")


class Fields:
    """A frozen dataclass that goes through JSON, whose fields have limits."""

    _limits: ClassVar[dict[str, Limit]] = {}

    def __post_init__(self) -> None:
        check_limits(self, self._limits)

    @classmethod
    def from_dict(cls: type[R], values: Mapping[str, Any]) -> R:
        """From `to_dict`'s result, as read back from JSON; missing fields take their defaults."""
        kinds = get_type_hints(cls)
        read = {field.name: kinds[field.name] for field in fields(cls)}  # type: ignore[arg-type]
        return cls(**read_fields(values, owner=f"a {cls.__name__}", read=read))

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, fit for JSON."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


@dataclass(frozen=True)
class Recipe(Fields):
    """How stages I and II are sampled (Xu et al. 2024, arXiv 2412.02693); the defaults are as released.

    stage_2_guidance_scale: None = guidance_scale; guidance_interval: between which fractions of the steps guidance acts
    (Kynkaanniemi et al. 2024, arXiv 2404.07724); no null rows run outside. solver: "ddpm", or "ddim" and
    "dpm_solver_2m", which draw no noise. balancing: weights by the views' scores, else equal; step/horizon is added to
    the exponent, None = num_inference_steps; floor: smallest score that counts as itself; scorer_range: a scorer is
    given "half" = x/2 + 0.5, or "signed" = x. rectification: rescale the combined noise; rectify_diagonal: "unit",
    "measured". stage_2_noise_fit: rescale it by `noise_fit`, against the grain of a briefly trained stage II.
    anti_segregation: gradient steps of length guidance_rate on the token maps' overlap, in stage I up to step
    last_guided_step (0 first); overlap_measure: "overlap", "iou"; V views should overlap by overlap_target -
    overlap_slope (V - 1); map_resolution: side of the attention layers for pictures of 64 px, in proportion at other
    sizes; map_places: of "down", "mid", "up".
    """

    num_inference_steps: int = 30
    guidance_scale: float = 10.0
    stage_2_guidance_scale: float | None = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)
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
    solver: str = "ddpm"
    stage_2_noise_fit: bool = False

    _limits: ClassVar[dict[str, Limit]] = {
        **dict.fromkeys(("balancing", "rectification", "anti_segregation", "stage_2_noise_fit"), bool),
        "guidance_scale": MAX_SCALE, "overlap_slope": 0.5, "guidance_rate": 1e6,
        "num_inference_steps": range(1, 1001), "last_guided_step": range(10**9), "map_resolution": range(1, 65),
        "floor": 1.0, "overlap_target": 0.5, "scorer_range": ("half", "signed"), "rectify_diagonal": DIAGONALS,
        "overlap_measure": MEASURES, "solver": SOLVERS,
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        number("floor", self.floor, above=True)
        if self.horizon is not None:
            check_limits(self, {"horizon": range(1, 10**9 + 1)})
        if self.stage_2_guidance_scale is not None:
            check_limits(self, {"stage_2_guidance_scale": MAX_SCALE})
        interval: Any = self.guidance_interval
        if not isinstance(interval, list | tuple) or len(interval) != 2:
            wanted = "two fractions of the steps, such as (0.1, 0.8)"
            raise InputError(f"guidance_interval={interval!r} must be {wanted}")
        first = number("guidance_interval's first", interval[0], high=1.0)
        last = number("guidance_interval's last", interval[1], low=first, high=1.0)
        object.__setattr__(self, "guidance_interval", (first, last))
        check_kinds(map_places=(self.map_places, list, tuple))
        for place in self.map_places:
            choice("map_places", place, ("down", "mid", "up"))
        object.__setattr__(self, "map_places", tuple(self.map_places))

    def is_guided(self, index: int) -> bool:
        """Whether guidance acts in this step, 0 first, of `num_inference_steps`."""
        first, last = self.guidance_interval
        return self.guidance_scale != 1 and first <= index / self.num_inference_steps < last

    @classmethod
    def released(cls, **changes: Any) -> Recipe:
        """What the published code does, number for number; changes replace fields."""
        return cls.from_dict(changes)

    @classmethod
    def corrected(cls, **changes: Any) -> Recipe:
        """What the method means where the published code slips: the scorer's own input range, an exponent that
        grows over the steps there are, noise rescaled by measured power, a true intersection over union of maps."""
        meant = {"scorer_range": "signed", "horizon": None, "rectify_diagonal": "measured"}
        return cls.from_dict({**meant, "overlap_measure": "iou", **changes})

    @classmethod
    def plain(cls, **changes: Any) -> Recipe:
        """The plain average of the views' noise, the baseline: none of the three techniques."""
        off = dict.fromkeys(("balancing", "rectification", "anti_segregation"), False)
        return cls.from_dict({**off, **changes})


@dataclass(frozen=True)
class UpscaleRecipe(Fields):
    """How stage III is sampled; the defaults are the released anagram code's.

    noise_level: of the low-resolution picture; the released model is meant for at most 350. views: "first" (released):
    the first prompt alone, upright, no views; "all": the views' predicted pictures are averaged in pixels, through the
    decoder, which is right for every view; "all_latents": on the latents as if they were pixels: cheap, and only as
    right as the autoencoder is blind to the view. exchange_every: in how many steps "all" averages once; more is
    cheaper, and the last step always counts.
    """

    num_inference_steps: int = 75
    guidance_scale: float = 9.0
    noise_level: int = 0
    views: str = "first"
    exchange_every: int = 1

    _limits: ClassVar[dict[str, Limit]] = {
        "num_inference_steps": range(1, 1000), "exchange_every": range(1, 1000), "noise_level": range(1000),
        "guidance_scale": MAX_SCALE, "views": ("first", "all", "all_latents"),
    }  # fmt: skip
