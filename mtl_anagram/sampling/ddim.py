"""Stage III's noise: the latents' DDIM steps from v predictions, and the noise on the low-resolution picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..checks import at_least_float32, flag, float_tensor, number, whole_number
from ..errors import ConfigError, InputError
from .scheduler_config import read_fields

_OWNER = "the x4 upscaler"  # of these schedulers, for errors
# Fields of which one value is implemented, and what a file that omits them means.
_FIXED_DDIM: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "thresholding": False,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
}
# The format's own defaults of these are other than ours, so that a file must spell them.
_SPELLED_DDIM = ("beta_schedule", "prediction_type", "clip_sample")
_FIXED_NOISE: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
}
# Fields that concern neither a DDIM step without clipping nor the adding of noise, whatever their value.
_UNUSED_DDIM = ("skip_prk_steps", "clip_sample_range", "sample_max_value", "dynamic_thresholding_ratio")
_UNUSED_NOISE = (
    *_UNUSED_DDIM, "clip_sample", "prediction_type", "variance_type", "thresholding", "timestep_spacing",
    "steps_offset",
)  # fmt: skip


@dataclass(frozen=True)
class NoiseLevels:
    """How much noise each of `num_train_timesteps` levels means: the root of beta grows linearly.

    As in latent diffusion (Rombach et al. 2022) from beta_start to beta_end. Derived: alphas_cumprod (T,)
    float32 on the CPU. Raises InputError for a value outside its limits.
    """

    _: KW_ONLY
    beta_start: float = 1e-4
    beta_end: float = 0.02
    num_train_timesteps: int = 1000
    alphas_cumprod: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        total = whole_number("num_train_timesteps", self.num_train_timesteps, 1, 100_000)
        start = number("beta_start", self.beta_start, above=True, high=0.999)
        end = number("beta_end", self.beta_end, low=start, high=0.999)
        # The published tables are float32 all the way, as for the pixel stages.
        betas = torch.linspace(start**0.5, end**0.5, total, dtype=torch.float32) ** 2
        object.__setattr__(self, "alphas_cumprod", torch.cumprod(1.0 - betas, dim=0))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseLevels:
        """Read a published low_res_scheduler/scheduler_config.json's content; errors as Schedule's."""
        fields = read_fields(
            config, class_name="DDPMScheduler", owner=_OWNER, fixed=_FIXED_NOISE, spelled=("beta_schedule",),
            unused=_UNUSED_NOISE, read=_TABLE,
        )  # fmt: skip
        return cls(**_checked(fields))

    def add_noise(self, x: Tensor, noise: Tensor, level: int) -> Tensor:
        """Clean x (...) and unit noise (...) mixed at a noise level, 0 to num_train_timesteps - 1.

        Level 0 is not without noise: its alpha_bar is 0.9999, a hundredth of the noise is added.
        """
        whole_number("level", level, 0, self.num_train_timesteps - 1)
        if x.shape != noise.shape:
            raise InputError(
                f"noise of shape {tuple(noise.shape)} for x of {tuple(x.shape)}: make them equal"
            )
        alpha = self.alphas_cumprod[level]
        kept, added = (alpha**0.5).item(), ((1 - alpha) ** 0.5).item()
        return kept * at_least_float32(x) + added * at_least_float32(noise)


@dataclass(frozen=True)
class LatentSchedule(NoiseLevels):
    """The timesteps of one DDIM run (Song et al. 2021) over these noise levels.

    `num_inference_steps` timesteps, evenly spaced from `steps_offset` up ("leading" spacing), from noisy to
    clean: 75 of them are 963, 950, ..., 14, 1. Where a step leads below 0, the remaining noise is that of
    timestep 0, or none with set_alpha_to_one. The defaults are the released upscaler's.
    """

    num_inference_steps: int = field(default=75, kw_only=False)
    _: KW_ONLY
    steps_offset: int = 1
    set_alpha_to_one: bool = False
    timesteps: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        total = self.num_train_timesteps
        offset = whole_number("steps_offset", self.steps_offset, 0, total - 1)
        flag("set_alpha_to_one", self.set_alpha_to_one)
        count = whole_number("num_inference_steps", self.num_inference_steps, 1, total)
        first = (count - 1) * self.stride + offset
        if first >= total:
            raise InputError(
                f"num_inference_steps={count} with steps_offset={offset} would begin at timestep {first}; there "
                f"are {total}, from 0: take a step less"
            )
        object.__setattr__(self, "timesteps", tuple(range(first, offset - 1, -self.stride)))

    @property
    def stride(self) -> int:
        """How far apart the timesteps are."""
        return self.num_train_timesteps // self.num_inference_steps

    @classmethod
    def from_config(cls, config: Mapping[str, Any], num_inference_steps: int = 75) -> LatentSchedule:
        """Read a published scheduler/scheduler_config.json's content; errors as Schedule's."""
        read = {**_TABLE, "steps_offset": 0, "set_alpha_to_one": True}
        fields = read_fields(
            config, class_name="DDIMScheduler", owner=_OWNER, fixed=_FIXED_DDIM, spelled=_SPELLED_DDIM,
            unused=_UNUSED_DDIM, read=read,
        )  # fmt: skip
        return cls(num_inference_steps, **_checked(fields))

    def alpha_bar(self, t: int) -> Tensor:
        """The kept share of the latents' power at timestep t, 0-dim float32; t < 0: after the last step."""
        if t >= 0:
            return self.alphas_cumprod[t]
        return torch.ones(()) if self.set_alpha_to_one else self.alphas_cumprod[0]


def split_v(v: Tensor, x_t: Tensor, t: int, schedule: LatentSchedule) -> tuple[Tensor, Tensor]:
    """A v prediction as the clean latents and the noise that it implies (Salimans & Ho 2022, appendix D).

    v and x_t of one shape (...). Returns x0 = sqrt(a) x - sqrt(1-a) v and eps = sqrt(a) v + sqrt(1-a) x, in
    float32 or wider.
    """
    whole_number("t", t, 0, schedule.num_train_timesteps - 1)
    if v.shape != x_t.shape:
        raise InputError(f"v of shape {tuple(v.shape)} for x_t of {tuple(x_t.shape)}: make them equal")
    kept, noisy = _roots(schedule.alpha_bar(t))
    v, x_t = at_least_float32(v), at_least_float32(x_t)
    return kept * x_t - noisy * v, kept * v + noisy * x_t


def move_clean(
    x0: Tensor, noise: Tensor, shift: Tensor, t: int, schedule: LatentSchedule
) -> tuple[Tensor, Tensor]:
    """The same noisy latents, split anew: x0 + shift, and the noise that is left, noise - sqrt(a/(1-a)) shift.

    All (...) of one shape; x0 and noise as `split_v` gives them at t.
    """
    whole_number("t", t, 0, schedule.num_train_timesteps - 1)
    kept, noisy = _roots(schedule.alpha_bar(t))
    return at_least_float32(x0) + shift, at_least_float32(noise) - (kept / noisy) * shift


def ddim_step(x0: Tensor, noise: Tensor, t: int, schedule: LatentSchedule) -> Tensor:
    """One deterministic step (Song et al. 2021, eq. 12, sigma 0): sqrt(p) x0 + sqrt(1-p) noise.

    x0 and noise (...) as `split_v` gives them at t, one of schedule.timesteps; p: what is kept after the step.
    """
    if t not in schedule.timesteps:
        raise InputError(
            f"t={t!r} is none of the schedule's {schedule.num_inference_steps} timesteps "
            f"({schedule.timesteps[0]} to {schedule.timesteps[-1]} by {schedule.stride})"
        )
    float_tensor("noise", noise, tuple(x0.shape), "noise like x0")
    kept, noisy = _roots(schedule.alpha_bar(t - schedule.stride))
    return kept * at_least_float32(x0) + noisy * at_least_float32(noise)


def _roots(alpha: Tensor) -> tuple[float, float]:
    return (alpha**0.5).item(), ((1 - alpha) ** 0.5).item()


# What a file that omits them means, in the format.
_TABLE: dict[str, Any] = {"beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": 1000}


def _checked(values: dict[str, Any]) -> dict[str, Any]:
    """A file's fields, their ranges checked."""
    total = whole_number("num_train_timesteps", values["num_train_timesteps"], 1, 100_000, error=ConfigError)
    start = number("beta_start", values["beta_start"], above=True, high=0.999, error=ConfigError)
    number("beta_end", values["beta_end"], low=start, high=0.999, error=ConfigError)
    if "steps_offset" in values:
        whole_number("steps_offset", values["steps_offset"], 0, total - 1, error=ConfigError)
        flag("set_alpha_to_one", values["set_alpha_to_one"], error=ConfigError)
    return values
