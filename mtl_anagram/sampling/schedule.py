"""Noise levels and timesteps: the cosine schedule of the IF stages, the scaled-linear one of stage III."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from itertools import pairwise
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ..errors import ConfigError, InputError, at_least_float32, number, read_fields, whole_number
from .checks import check_limits

TIMESTEPS = range(1, 100_001)  # how many there may be
L = TypeVar("L", bound="Levels")
# What all schedulers' files must mean; fields of no effect without clipping; what a file without them means.
_FIXED = {"timestep_spacing": "leading", "trained_betas": None, "rescale_betas_zero_snr": False}
_UNUSED = ("skip_prk_steps", "clip_sample_range", "sample_max_value", "dynamic_thresholding_ratio")
_TABLE: dict[str, Any] = {"beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": 1000}
_LATENT = {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction", "clip_sample": False}


class Levels:
    """What all schedules share: a table of kept power, and noise mixed in by it.

    _defaults: what a published file without a field means; _published: `read_fields`' other arguments.
    """

    _defaults: ClassVar[dict[str, Any]]
    _published: ClassVar[dict[str, Any]]
    betas: Tensor
    alphas_cumprod: Tensor
    num_train_timesteps: int
    num_inference_steps: int
    timesteps: tuple[int, ...]

    @property
    def stride(self) -> int:
        """How far apart the timesteps are."""
        return self.num_train_timesteps // self.num_inference_steps

    def alpha_bar(self, t: int) -> Tensor:
        """The kept share of the picture's power at timestep t, 0-dim float32; 1 for t < 0: no noise."""
        return self.alphas_cumprod[t] if t >= 0 else torch.ones((), dtype=torch.float32, device="cpu")

    def roots(self, t: int) -> tuple[float, float]:
        """sqrt(alpha_bar) and sqrt(1 - alpha_bar) at t: what is kept of the picture, how much noise there is."""
        known = self.__dict__.setdefault("_roots", {})  # each number is asked for at every step of every run
        if t not in known:
            alpha = self.alpha_bar(t)
            known[t] = (alpha**0.5).item(), ((1 - alpha) ** 0.5).item()
        return known[t]

    def add_noise(self, x: Tensor, noise: Tensor, t: int) -> Tensor:
        """Clean x (...) and unit noise (...) mixed to noise level t, 0 to num_train_timesteps - 1."""
        whole_number("t", t, 0, self.num_train_timesteps - 1)
        if x.shape != noise.shape:
            raise InputError(f"noise has shape {tuple(noise.shape)}, x {tuple(x.shape)}: make them equal")
        kept, added = self.roots(t)
        return kept * at_least_float32(x) + added * at_least_float32(noise)

    def next_timestep(self, t: int | Tensor) -> int:
        """The timestep after t, which must be one of `timesteps`; -1 after the last."""
        try:
            return (*self.timesteps, -1)[self.timesteps.index(operator.index(t)) + 1]
        except (TypeError, ValueError):
            said = f"{self.timesteps[0]} to {self.timesteps[-1]} by {self.stride}"
            count = self.num_inference_steps
            raise InputError(f"t={t!r} is none of the schedule's {count} timesteps ({said})") from None

    def _set(self, betas: Tensor, timesteps: tuple[int, ...] = ()) -> None:
        # The published tables are float32 all the way; float64 here would differ in the fifth digit.
        kept = torch.cumprod(1.0 - betas, dim=0)
        for name, value in (("betas", betas), ("alphas_cumprod", kept), ("timesteps", timesteps)):
            object.__setattr__(self, name, value)

    @classmethod
    def from_config(cls: type[L], config: Mapping[str, Any], num_inference_steps: int | None = None) -> L:
        """Read a published scheduler_config.json's content; ConfigError for what is not implemented."""
        read = {name: type(value) for name, value in cls._defaults.items()}
        values = {**cls._defaults, **read_fields(config, read=read, **cls._published)}
        if "dynamic_thresholding_ratio" in values:
            values["thresholding_ratio"] = values.pop("dynamic_thresholding_ratio")
        if num_inference_steps is not None:
            values["num_inference_steps"] = num_inference_steps
        try:
            return cls(**values)
        except (InputError, TypeError) as error:  # a field that it needs, or does not have
            raise ConfigError(str(error)) from None


@dataclass(frozen=True)
class Schedule(Levels):
    """Noise levels and timesteps of one sampling run, and how a predicted picture is kept in range.

    Cosine schedule of Nichol & Dhariwal 2021 (eq. 17) over `num_train_timesteps`; of these, `num_inference_steps` are
    used, evenly spaced and ending at 0. thresholding: dynamic (Imagen, section 2.3) at quantile `thresholding_ratio`,
    the threshold between 1 and `sample_max_value`; without it predictions are clamped to +-`clip_sample_range` if
    `clip_sample`. variance_type: "learned_range" interpolates between two bounds as the network says, "fixed_small"
    is the lower one. Derived: betas, alphas_cumprod (T,) float32 on the CPU; timesteps, from noisy to clean.
    """

    _defaults: ClassVar = {
        "num_train_timesteps": 1000, "thresholding": False, "dynamic_thresholding_ratio": 0.995,
        "sample_max_value": 1.0, "clip_sample": True, "clip_sample_range": 1.0, "variance_type": "fixed_small",
    }  # fmt: skip
    _published: ClassVar = {
        "owner": "an IF stage", "class_name": "DDPMScheduler", "required": ("beta_schedule",),
        "fixed": {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "epsilon", "steps_offset": 0, **_FIXED},
        "unused": ("beta_start", "beta_end", "lambda_min_clipped"),
    }  # fmt: skip
    num_inference_steps: int
    _: KW_ONLY
    sample_max_value: float = 1.5
    thresholding_ratio: float = 0.95
    num_train_timesteps: int = 1000
    thresholding: bool = True
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    variance_type: str = "learned_range"

    def __post_init__(self) -> None:
        check_limits(self, {"num_train_timesteps": TIMESTEPS, "thresholding": bool, "clip_sample": bool})
        check_limits(self, {"thresholding_ratio": 1.0, "variance_type": ("learned_range", "fixed_small")})
        number("sample_max_value", self.sample_max_value, low=1.0)
        number("clip_sample_range", self.clip_sample_range, above=True)
        total = self.num_train_timesteps
        count = whole_number("num_inference_steps", self.num_inference_steps, 1, total)
        self._set(cosine_betas(total), timesteps=tuple(range((count - 1) * self.stride, -1, -self.stride)))

    def posterior(self, t: int, t_next: int) -> tuple[float, float, float, float, float]:
        """Of the step from t to t_next (-1 = clean): the shares of x0 and of x_t in its mean, the logarithms of the
        smallest and the largest variance (Nichol & Dhariwal 2021, eq. 15), and the root of the smallest."""
        known = self.__dict__.setdefault("_posterior", {})
        if (t, t_next) not in known:
            alpha_bar, alpha_bar_next = self.alpha_bar(t), self.alpha_bar(t_next)
            alpha = alpha_bar / alpha_bar_next  # of the strided step, not of one training step
            beta = 1 - alpha
            x0_share = alpha_bar_next**0.5 * beta / (1 - alpha_bar)
            x_share = alpha**0.5 * (1 - alpha_bar_next) / (1 - alpha_bar)
            smallest = ((1 - alpha_bar_next) / (1 - alpha_bar) * beta).clamp(min=1e-20)
            numbers = (x0_share, x_share, smallest.log(), beta.log(), smallest**0.5)
            known[t, t_next] = tuple(number.item() for number in numbers)
        return known[t, t_next]

    @property
    def largest_value(self) -> float | None:
        """What predicted pictures are clamped to where the limit is one for all; None where each has its own."""
        if self.thresholding:
            return 1.0 if self.sample_max_value == 1 else None
        return self.clip_sample_range if self.clip_sample else math.inf

    @classmethod
    def stage_1(cls, num_inference_steps: int) -> Schedule:
        """The schedule of the released stage I models."""
        return cls(num_inference_steps)

    @classmethod
    def stage_2(cls, num_inference_steps: int) -> Schedule:
        """The schedule of the released stage II models: thresholding is a clamp to [-1, 1]."""
        return cls(num_inference_steps, sample_max_value=1.0)


@dataclass(frozen=True)
class NoiseLevels(Levels):
    """How much noise each level means: the root of beta grows linearly (latent diffusion, Rombach et al. 2022).

    Level 0 is not without noise: its alpha_bar is 0.9999. Derived: alphas_cumprod (T,) float32 on the CPU.
    """

    _defaults: ClassVar = _TABLE
    _published: ClassVar = {
        "owner": "the x4 upscaler", "class_name": "DDPMScheduler", "required": ("beta_schedule",),
        "fixed": {"beta_schedule": "scaled_linear", **_FIXED},
        "unused": (*_UNUSED, "clip_sample", "prediction_type", "variance_type", "thresholding", "steps_offset"),
    }  # fmt: skip
    _: KW_ONLY
    beta_start: float = 1e-4
    beta_end: float = 0.02
    num_train_timesteps: int = 1000

    def __post_init__(self) -> None:
        check_limits(self, {"num_train_timesteps": TIMESTEPS})
        start = number("beta_start", self.beta_start, above=True, high=0.999)
        end = number("beta_end", self.beta_end, low=start, high=0.999)
        total = self.num_train_timesteps
        self._set(torch.linspace(start**0.5, end**0.5, total, dtype=torch.float32, device="cpu") ** 2)


@dataclass(frozen=True)
class LatentSchedule(NoiseLevels):
    """The timesteps of one DDIM run (Song et al. 2021) over these levels; the defaults are the x4 upscaler's.

    `num_inference_steps` timesteps, evenly spaced from `steps_offset` up, from noisy to clean: 75 of them are 963,
    950, ..., 14, 1. Where a step leads below 0, the noise left is that of timestep 0, or none with set_alpha_to_one.
    """

    _defaults: ClassVar = {**_TABLE, "steps_offset": 0, "set_alpha_to_one": True}
    _published: ClassVar = {
        "owner": "the x4 upscaler", "class_name": "DDIMScheduler", "required": (*_LATENT,),
        "fixed": {**_LATENT, "thresholding": False, **_FIXED}, "unused": _UNUSED,
    }  # fmt: skip
    num_inference_steps: int = 75
    _: KW_ONLY
    steps_offset: int = 1
    set_alpha_to_one: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        total, offset = self.num_train_timesteps, self.steps_offset
        check_limits(self, {"steps_offset": range(total), "set_alpha_to_one": bool})
        count = whole_number("num_inference_steps", self.num_inference_steps, 1, total)
        first = (count - 1) * self.stride + offset
        if first >= total:
            said = f"would begin at timestep {first}; there are {total}, from 0: take a step less"
            raise InputError(f"num_inference_steps={count} with steps_offset={offset} {said}")
        object.__setattr__(self, "timesteps", tuple(range(first, offset - 1, -self.stride)))

    def alpha_bar(self, t: int) -> Tensor:
        """The kept share of the latents' power at timestep t, 0-dim float32; t < 0: after the last step."""
        return super().alpha_bar(t if self.set_alpha_to_one else max(t, 0))


def cosine_alpha_bar(u: float) -> float:
    """The kept share of a picture's power at u of the way to pure noise, 0 to 1; at 0 it is 0.99984."""
    return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2


def cosine_betas(total: int) -> Tensor:
    """Cosine schedule's betas (total,): 1 - ab(i+1)/ab(i), at most 0.999; in doubles, then float32."""
    kept = [cosine_alpha_bar(i / total) for i in range(total + 1)]
    betas = [min(1 - after / before, 0.999) for before, after in pairwise(kept)]
    return torch.tensor(betas, dtype=torch.float32, device="cpu")
