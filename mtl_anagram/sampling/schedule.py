"""The noise schedule of the IF cascades and one ancestral (DDPM) step with learned variance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..checks import at_least_float32, choice, flag, float_tensor, number, whole_number
from ..cosine import cosine_alpha_bar
from ..errors import ConfigError, InputError
from .scheduler_config import read_fields

VARIANCE_TYPES = ("learned_range", "fixed_small")
# Fields of a scheduler's config of which one value is implemented, and what a file that omits them means.
# beta_schedule has no such meaning here: the format's own default is a schedule that no IF model has.
_FIXED: dict[str, Any] = {
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
}
# Fields that the cosine schedule does not use, whatever their value.
_UNUSED = ("beta_start", "beta_end", "lambda_min_clipped")
# Fields that are ours, by their name in the file: our name, and what a file that omits them means.
_READ: dict[str, tuple[str, Any]] = {
    "num_train_timesteps": ("num_train_timesteps", 1000),
    "thresholding": ("thresholding", False),
    "dynamic_thresholding_ratio": ("thresholding_ratio", 0.995),
    "sample_max_value": ("sample_max_value", 1.0),
    "clip_sample": ("clip_sample", True),
    "clip_sample_range": ("clip_sample_range", 1.0),
    "variance_type": ("variance_type", "fixed_small"),
}


@dataclass(frozen=True)
class Schedule:
    """Noise levels and timesteps of one sampling run, and how a predicted picture is kept in range.

    Cosine schedule of Nichol & Dhariwal 2021 (eq. 17) over `num_train_timesteps`; of these,
    `num_inference_steps` are used, evenly spaced and ending at 0 ("leading" spacing). thresholding: dynamic
    thresholding (Imagen, section 2.3) at quantile `thresholding_ratio`, the threshold between 1 and
    `sample_max_value`; without it the prediction is clamped to +-`clip_sample_range` if `clip_sample`.
    variance_type: "learned_range" interpolates between the two bounds as the network says, "fixed_small" is
    the lower bound.

    Derived: betas and alphas_cumprod (T,) float32 on the CPU, timesteps: ints, from noisy to clean.
    Raises InputError for a value outside its limits.
    """

    num_inference_steps: int
    _: KW_ONLY
    sample_max_value: float = 1.5
    thresholding_ratio: float = 0.95
    num_train_timesteps: int = 1000
    thresholding: bool = True
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    variance_type: str = "learned_range"
    betas: Tensor = field(init=False, repr=False, compare=False)
    alphas_cumprod: Tensor = field(init=False, repr=False, compare=False)
    timesteps: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        total = whole_number("num_train_timesteps", self.num_train_timesteps, 1, 100_000)
        count = whole_number("num_inference_steps", self.num_inference_steps, 1, total)
        number("sample_max_value", self.sample_max_value, low=1.0)
        number("thresholding_ratio", self.thresholding_ratio, high=1.0)
        number("clip_sample_range", self.clip_sample_range, above=True)
        flag("thresholding", self.thresholding)
        flag("clip_sample", self.clip_sample)
        choice("variance_type", self.variance_type, VARIANCE_TYPES)
        betas = cosine_betas(total)
        stride = total // count
        # The published tables are float32 all the way; float64 here would differ in the fifth digit.
        object.__setattr__(self, "betas", betas)
        object.__setattr__(self, "alphas_cumprod", torch.cumprod(1.0 - betas, dim=0))
        object.__setattr__(self, "timesteps", tuple(range((count - 1) * stride, -1, -stride)))

    @classmethod
    def stage_1(cls, num_inference_steps: int) -> Schedule:
        """The schedule of the released stage I models."""
        return cls(num_inference_steps, sample_max_value=1.5)

    @classmethod
    def stage_2(cls, num_inference_steps: int) -> Schedule:
        """The schedule of the released stage II models: thresholding is a clamp to [-1, 1]."""
        return cls(num_inference_steps, sample_max_value=1.0)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], num_inference_steps: int) -> Schedule:
        """Read a published scheduler_config.json's content.

        A field that is missing takes the format's default. Raises ConfigError for a field or a value that is
        not implemented, InputError for a number of steps outside 1 to num_train_timesteps.
        """
        fields = read_fields(
            config, class_name="DDPMScheduler", owner="an IF stage", fixed=_FIXED, spelled=("beta_schedule",),
            unused=_UNUSED, read={name: default for name, (_, default) in _READ.items()},
        )  # fmt: skip
        values = {ours: fields[name] for name, (ours, _) in _READ.items()}
        whole_number("num_train_timesteps", values["num_train_timesteps"], 1, 100_000, error=ConfigError)
        number("sample_max_value", values["sample_max_value"], low=1.0, error=ConfigError)
        number("dynamic_thresholding_ratio", values["thresholding_ratio"], high=1.0, error=ConfigError)
        number("clip_sample_range", values["clip_sample_range"], above=True, error=ConfigError)
        flag("thresholding", values["thresholding"], error=ConfigError)
        flag("clip_sample", values["clip_sample"], error=ConfigError)
        choice("variance_type", values["variance_type"], VARIANCE_TYPES, error=ConfigError)
        return cls(num_inference_steps, **values)

    def alpha_bar(self, t: int) -> Tensor:
        """The kept share of the picture's power at timestep t, 0-dim float32; 1 for t < 0: no noise."""
        return self.alphas_cumprod[t] if t >= 0 else torch.ones((), dtype=torch.float32)

    def next_timestep(self, t: int) -> int:
        """The timestep after t, which must be one of `timesteps`; -1 after the last."""
        if isinstance(t, bool) or not isinstance(t, int) or t not in self.timesteps:
            raise InputError(
                f"t={t!r} is none of the schedule's {self.num_inference_steps} timesteps "
                f"({self.timesteps[0]} to 0 by {self.num_train_timesteps // self.num_inference_steps})"
            )
        index = self.timesteps.index(t)
        return self.timesteps[index + 1] if index + 1 < self.num_inference_steps else -1

    def add_noise(self, x: Tensor, noise: Tensor, t: int) -> Tensor:
        """Clean x (...) and unit noise (...) mixed to noise level t, 0 to num_train_timesteps - 1."""
        whole_number("t", t, 0, self.num_train_timesteps - 1)
        if x.shape != noise.shape:
            raise InputError(
                f"noise of shape {tuple(noise.shape)} for x of {tuple(x.shape)}: make them equal"
            )
        alpha = self.alpha_bar(t)
        kept, added = (alpha**0.5).item(), ((1 - alpha) ** 0.5).item()
        return kept * at_least_float32(x) + added * at_least_float32(noise)


def cosine_betas(total: int) -> Tensor:
    """Cosine schedule's betas (total,): 1 - ab(i+1)/ab(i), at most 0.999; in doubles, then float32."""
    kept = [cosine_alpha_bar(i / total) for i in range(total + 1)]
    betas = [min(1 - after / before, 0.999) for before, after in pairwise(kept)]
    return torch.tensor(betas, dtype=torch.float32)


def predict_x0(noise: Tensor, x_t: Tensor, t: int, schedule: Schedule) -> Tensor:
    """The clean picture that a noise prediction implies, brought into range as the schedule says.

    noise and x_t (B, C, H, W), t any training timestep. Returns (B, C, H, W) in float32 (or wider).
    """
    alpha = schedule.alpha_bar(whole_number("t", t, 0, schedule.num_train_timesteps - 1))
    x_t, noise = at_least_float32(x_t), at_least_float32(noise)
    x0 = (x_t - ((1 - alpha) ** 0.5).item() * noise) / (alpha**0.5).item()
    if schedule.thresholding:
        flat = x0.flatten(1)  # (B, C H W): each picture has its own threshold
        limit = flat.abs().quantile(schedule.thresholding_ratio, dim=1).clamp(1.0, schedule.sample_max_value)
        limit = limit[:, None, None, None]
        return x0.clamp(-limit, limit) / limit
    if schedule.clip_sample:
        return x0.clamp(-schedule.clip_sample_range, schedule.clip_sample_range)
    return x0


def ddpm_step(
    noise: Tensor, variance: Tensor | None, x_t: Tensor, t: int, schedule: Schedule, z: Tensor | None = None
) -> Tensor:
    """One ancestral step (Ho et al. 2020, eq. 6-7; learned variance: Nichol & Dhariwal 2021, eq. 15).

    noise: the predicted noise (B, C, H, W). variance: where between the smallest (-1) and the largest (1)
    log-variance to draw from, (B, C, H, W); None for a schedule of fixed variance. x_t (B, C, H, W). t: one
    of schedule.timesteps. z: fresh unit noise like x_t; at the last step (t the last timestep) none is added,
    and z is not read. Returns x_{t-1} (B, C, H, W) in float32 (or wider); inputs are left alone.
    """
    previous = schedule.next_timestep(t)
    float_tensor("x_t", x_t, (None, None, None, None), "(B, C, H, W)")
    shape = tuple(x_t.shape)
    float_tensor("noise", noise, shape, "the prediction, one value per value of x_t")
    alpha_bar, alpha_bar_next = schedule.alpha_bar(t), schedule.alpha_bar(previous)
    alpha = alpha_bar / alpha_bar_next  # of the strided step, not of one training step
    beta = 1 - alpha

    x0 = predict_x0(noise, x_t, t, schedule)
    x0_share = (alpha_bar_next**0.5 * beta / (1 - alpha_bar)).item()
    x_share = (alpha**0.5 * (1 - alpha_bar_next) / (1 - alpha_bar)).item()
    mean = x0_share * x0 + x_share * at_least_float32(x_t)
    if previous < 0:
        return mean

    if z is None:
        raise InputError(f"the step at t={t} needs z, unit noise; torch.zeros_like(x_t) gives the mean")
    z = float_tensor("z", z, shape, "unit noise like x_t").to(mean)
    lowest = ((1 - alpha_bar_next) / (1 - alpha_bar) * beta).clamp(min=1e-20)  # the smallest variance
    if schedule.variance_type == "fixed_small":
        return mean + (lowest**0.5).item() * z
    if variance is None:
        raise InputError("variance=None, but the schedule's variance is learned: give the prediction")
    float_tensor("variance", variance, shape, "the prediction, one value per value of x_t")
    position = (at_least_float32(variance) + 1) / 2
    log_variance = position * beta.log().item() + (1 - position) * lowest.log().item()
    return mean + torch.exp(0.5 * log_variance) * z
