"""The deterministic solvers against diffusers' schedulers, over whole runs."""

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from mtl_anagram.sampling import DDIM, Combined, DPMSolver2M, Schedule
from tests.helpers import relative

COSINE = {
    "beta_schedule": "squaredcos_cap_v2", "thresholding": True, "dynamic_thresholding_ratio": 0.95,
    "sample_max_value": 1.5,
}  # fmt: skip


def ddim(schedule):
    reference = DDIMScheduler(**COSINE, set_alpha_to_one=True)
    reference.set_timesteps(schedule.num_inference_steps)
    return DDIM(schedule), reference, {"use_clipped_model_output": True}


def dpm_solver(schedule):
    reference = DPMSolverMultistepScheduler(**COSINE, solver_order=2, final_sigmas_type="zero")
    reference.set_timesteps(timesteps=list(schedule.timesteps))
    return DPMSolver2M(schedule), reference, {}


@pytest.mark.parametrize("steps", [2, 10, 27, 50])
@pytest.mark.parametrize("solver", [ddim, dpm_solver])
def test_whole_runs_step_alike(solver, steps):
    """Both on the same predictions, of a network that is roughly right."""
    schedule = Schedule.stage_1(steps)
    step, reference, options = solver(schedule)
    assert reference.timesteps.tolist() == list(schedule.timesteps)
    draws = torch.Generator().manual_seed(1)
    x = y = torch.randn(2, 3, 16, 16, generator=draws)
    clean = torch.rand(2, 3, 16, 16, generator=draws) * 3 - 1.5
    for i, t in enumerate(schedule.timesteps):
        kept, noisy = schedule.roots(t)
        noise = (x - kept * clean) / noisy + 0.1 * torch.randn(x.shape, generator=draws)
        t_next = (*schedule.timesteps, -1)[i + 1]
        x, x0 = step(Combined(noise), x, t, t_next)
        y = reference.step(noise, t, y, **options).prev_sample
        assert relative(x, y) < 1e-4, f"step {i}, t={t}"
    assert torch.equal(x, x0)
