"""Steps from one noise level to the next: DDPM as published, and two deterministic solvers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import at_least_float32, float_tensor, whole_number
from .loop import Combined
from .schedule import LatentSchedule, Schedule

SOLVERS = ("ddpm", "ddim", "dpm_solver_2m")


def predict_x0(noise: Tensor, x_t: Tensor, t: int, schedule: Schedule) -> Tensor:
    """The clean picture that noise predicted of x_t, both (B, C, H, W), implies, in the schedule's range; float32."""
    whole_number("t", t, 0, schedule.num_train_timesteps - 1)
    kept, noisy = schedule.roots(t)
    return in_range((at_least_float32(x_t) - noisy * at_least_float32(noise)) / kept, schedule)


def in_range(x0: Tensor, schedule: Schedule) -> Tensor:
    """Predicted pictures (B, C, H, W) brought into the schedule's range."""
    if (largest := schedule.largest_value) is not None:
        return x0.clamp(-largest, largest)
    limit = threshold(x0, schedule)[:, None, None, None]
    return x0.clamp(-limit, limit) / limit


def threshold(x0: Tensor, schedule: Schedule) -> Tensor:
    """Dynamic thresholding's limit of every picture, (B, ...) -> (B,)."""
    limit = x0.flatten(1).abs().quantile(schedule.thresholding_ratio, dim=1)
    return limit.clamp(1.0, schedule.sample_max_value)


def ddpm_step(
    noise: Tensor, variance: Tensor | None, x_t: Tensor, t: int, schedule: Schedule, z: Tensor | None = None
) -> Tensor:
    """One ancestral step (Ho et al. 2020, eq. 6-7; learned variance: Nichol & Dhariwal 2021, eq. 15).

    noise: predicted, like x_t (B, C, H, W). variance: likewise, where between the smallest (-1) and the largest (1)
    log-variance to draw from; None for a schedule of fixed variance. t: one of schedule.timesteps. z: fresh unit
    noise like x_t, not read at the last timestep. Returns x_{t-1} in float32 (or wider); inputs are left alone.
    """
    t_next = schedule.next_timestep(t)
    shape = tuple(float_tensor("x_t", x_t, (None, None, None, None), "(B, C, H, W)").shape)
    float_tensor("noise", noise, shape, "the prediction, one value per value of x_t")
    if t_next >= 0:
        float_tensor("z", z, shape, "unit noise like x_t, which this step needs; zeros give the mean")
        if schedule.variance_type == "learned_range":
            float_tensor("variance", variance, shape, "the prediction: the schedule's variance is learned")
    z, variance = (None if t_next < 0 else z), (None if schedule.variance_type == "fixed_small" else variance)
    return ancestral(predict_x0(noise, x_t, t, schedule), variance, x_t, z, schedule.posterior(t, t_next))


def ancestral(
    x0: Tensor, variance: Tensor | None, x_t: Tensor, z: Tensor | None, numbers: Sequence[Tensor | float]
) -> Tensor:
    """A step by `Schedule.posterior`'s numbers; z None = its mean, variance None = the smallest."""
    x0_share, x_share, smallest, largest, root = numbers
    mean = x0_share * x0 + x_share * at_least_float32(x_t)
    if z is None:
        return mean
    if variance is None:
        return mean + root * z.to(mean)
    position = (at_least_float32(variance) + 1) / 2
    return mean + torch.exp(0.5 * (position * largest + (1 - position) * smallest)) * z.to(mean)


class DDPM:
    """The published step: ancestral, with the network's variance. draw() gives unit noise like x."""

    def __init__(self, schedule: Schedule, draw: Callable[[], Tensor]) -> None:
        self.schedule, self.draw = schedule, draw

    def __call__(self, combined: Combined, x: Tensor, t: int, t_next: int) -> tuple[Tensor, Tensor]:
        x0 = predict_x0(combined.noise, x, t, self.schedule)
        z = self.draw() if t_next >= 0 else None
        variance = None if self.schedule.variance_type == "fixed_small" else combined.variance
        return ancestral(x0, variance, x, z, self.schedule.posterior(t, t_next)), x0


class DDIM:
    """Song et al. 2021, eq. 12 with sigma 0: deterministic; x0 and noise agree after thresholding, too."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def __call__(self, combined: Combined, x: Tensor, t: int, t_next: int) -> tuple[Tensor, Tensor]:
        x0 = predict_x0(combined.noise, x, t, self.schedule)
        kept, noisy = self.schedule.roots(t)
        noise = (at_least_float32(x) - kept * x0) / noisy
        kept, noisy = self.schedule.roots(t_next)
        return kept * x0 + noisy * noise, x0


class DPMSolver2M:
    """DPM-Solver++(2M), Lu et al. 2022 (arXiv 2211.01095), algorithm 2: second order, but the first and last step;
    deterministic. It remembers the step before: one object for each run under way."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self._before: tuple[int, float, Tensor] | None = None  # the t that was gone to, the step's h, its x0

    def __call__(self, combined: Combined, x: Tensor, t: int, t_next: int) -> tuple[Tensor, Tensor]:
        x0 = predict_x0(combined.noise, x, t, self.schedule)
        before, self._before = self._before, None
        if t_next < 0:
            return x0, x0
        (kept, noisy), (kept_next, noisy_next) = self.schedule.roots(t), self.schedule.roots(t_next)
        h = math.log(kept_next / noisy_next) - math.log(kept / noisy)
        slope = x0
        if before is not None and before[0] == t and before[2].shape == x0.shape:
            slope = x0 + (h / (2 * before[1])) * (x0 - before[2])
        self._before = (t_next, h, x0)
        return (noisy_next / noisy) * at_least_float32(x) - kept_next * math.expm1(-h) * slope, x0


def split_v(v: Tensor, x_t: Tensor, t: int, schedule: LatentSchedule) -> tuple[Tensor, Tensor]:
    """A v prediction as the clean latents and the noise that it implies (Salimans & Ho 2022, appendix D).

    v and x_t of one shape (...). Returns x0 = sqrt(a) x - sqrt(1-a) v and eps = sqrt(a) v + sqrt(1-a) x.
    """
    whole_number("t", t, 0, schedule.num_train_timesteps - 1)
    float_tensor("v", v, tuple(x_t.shape), "the prediction, of x_t's shape")
    kept, noisy = schedule.roots(t)
    v, x_t = at_least_float32(v), at_least_float32(x_t)
    return kept * x_t - noisy * v, kept * v + noisy * x_t


def ddim_step(x0: Tensor, noise: Tensor, t: int, schedule: LatentSchedule) -> Tensor:
    """One deterministic step (Song et al. 2021, eq. 12, sigma 0): sqrt(p) x0 + sqrt(1-p) noise.

    x0 and noise (...) as `split_v` gives them at t, one of schedule.timesteps; p: what is kept after the step.
    """
    schedule.next_timestep(t)  # which checks t
    float_tensor("noise", noise, tuple(x0.shape), "noise like x0")
    kept, noisy = schedule.roots(t - schedule.stride)
    return kept * at_least_float32(x0) + noisy * at_least_float32(noise)
