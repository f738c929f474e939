"""The DDPM step and the schedule against diffusers' scheduler, over whole runs."""

import json

import pytest
import torch
from diffusers import DDPMScheduler

from mtl_anagram.sampling import Schedule, ddpm_step
from tests.helpers import relative

STAGE_1 = {
    "_class_name": "DDPMScheduler", "beta_end": 0.02, "beta_schedule": "squaredcos_cap_v2", "beta_start": 0.0001,
    "clip_sample": True, "clip_sample_range": 1.0, "dynamic_thresholding_ratio": 0.95, "lambda_min_clipped": -5.1,
    "num_train_timesteps": 1000, "prediction_type": "epsilon", "sample_max_value": 1.5, "thresholding": True,
    "trained_betas": None, "variance_type": "learned_range",
}  # fmt: skip
CONFIGS = {
    "stage_1": STAGE_1,
    "stage_2": {**STAGE_1, "sample_max_value": 1.0},
    "noising": {
        **STAGE_1, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0, "thresholding": False,
        "variance_type": "fixed_small",
    },
    "unclipped": {**STAGE_1, "thresholding": False, "clip_sample": False},
    "clipped": {**STAGE_1, "thresholding": False, "clip_sample_range": 0.8},
    "bare": {"beta_schedule": "squaredcos_cap_v2"},
}  # fmt: skip


def reference_of(config, steps):
    scheduler = DDPMScheduler.from_config({k: v for k, v in config.items() if k != "lambda_min_clipped"})
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("steps", [1, 2, 10, 27, 30, 100, 999, 1000])
def test_tables_are_diffusers_tables(steps):
    reference, ours = reference_of(STAGE_1, steps), Schedule.stage_1(steps)
    assert torch.equal(ours.betas, reference.betas)
    assert torch.equal(ours.alphas_cumprod, reference.alphas_cumprod)
    assert list(ours.timesteps) == reference.timesteps.tolist()
    written = json.loads(json.dumps({**CONFIGS["stage_2"], "_diffusers_version": "0.15.0.dev0"}))
    assert [ours, Schedule.stage_2(steps)] == [Schedule.from_config(c, steps) for c in (STAGE_1, written)]


@pytest.mark.parametrize("steps", [1, 2, 10, 27, 30, 100])
@pytest.mark.parametrize("name", CONFIGS)
def test_whole_schedules_step_alike(name, steps):
    """Predictions are of a network that is roughly right, so that x stays in range."""
    reference, ours = reference_of(CONFIGS[name], steps), Schedule.from_config(CONFIGS[name], steps)
    draws = torch.Generator().manual_seed(steps)
    x = y = torch.randn(2, 3, 16, 16, generator=draws)
    clean = torch.rand(2, 3, 16, 16, generator=draws) * 3 - 1.5  # some of it beyond the thresholds
    for i, t in enumerate(ours.timesteps):
        alpha = ours.alphas_cumprod[t]
        noise = (x - alpha.sqrt() * clean) / (1 - alpha).sqrt() + 0.1 * torch.randn(x.shape, generator=draws)
        variance = torch.rand(x.shape, generator=draws) * 2 - 1
        before = [value.clone() for value in (noise, variance, y)]
        last = i + 1 == steps
        z = None if last else torch.randn(x.shape, generator=torch.Generator().manual_seed(i))
        y = ddpm_step(noise, variance, y, t, ours, z)
        assert all(torch.equal(a, b) for a, b in zip(before[:2], (noise, variance), strict=True))
        prediction = noise if ours.variance_type == "fixed_small" else torch.cat([noise, variance], dim=1)
        x = reference.step(prediction, t, x, generator=torch.Generator().manual_seed(i)).prev_sample
        assert relative(y, x) < 1e-6, f"step {i}, t={t}"


def test_variance_at_its_bounds_and_beyond_the_range():
    """The network's variance is not clamped: values outside [-1, 1] extrapolate, as published."""
    reference, ours = reference_of(STAGE_1, 30), Schedule.stage_1(30)
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for value in (-1.0, 1.0, -1.7, 2.3):
        variance = torch.full_like(x, value)
        want = reference.step(torch.cat([x, variance], 1), 957, x, generator=torch.Generator().manual_seed(1))
        z = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        assert relative(ddpm_step(x, variance, x, 957, ours, z), want.prev_sample) < 1e-6


def test_large_pictures():
    """Thresholding takes a quantile of each picture: 1024 px, and more values than torch allows one."""
    reference, ours = reference_of(STAGE_1, 30), Schedule.stage_1(30)
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, 1024, 1024, generator=draws)
    noise = torch.randn(x.shape, generator=draws)
    want = reference.step(torch.cat([noise, noise], 1), 0, x).prev_sample
    assert relative(ddpm_step(noise, noise, x, 0, ours), want) < 1e-6
    many = x.expand(6, -1, -1, -1)  # 18.9 million values
    of_many = ddpm_step(noise.expand_as(many), None, many, 0, ours)
    assert torch.equal(of_many[5:], ddpm_step(noise, None, x, 0, ours))


@pytest.mark.parametrize("t", [0, 50, 250, 999])
def test_add_noise(t):
    reference, ours = reference_of(CONFIGS["noising"], 30), Schedule.stage_2(30)
    draws = torch.Generator().manual_seed(t)
    x, noise = torch.rand(2, 3, 8, 8, generator=draws), torch.randn(2, 3, 8, 8, generator=draws)
    want = reference.add_noise(x, noise, torch.tensor([t, t]))
    assert relative(ours.add_noise(x, noise, t), want) < 1e-6
