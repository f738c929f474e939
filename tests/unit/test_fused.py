"""The sampler's fast side: fused passes equal the readable functions, and a step asks its device nothing."""

import pytest
import torch

from mtl_anagram import get_views
from mtl_anagram.errors import InputError
from mtl_anagram.models.unet import UNet, UNetConfig
from mtl_anagram.models.unet_blocks import TextContext
from mtl_anagram.sampling import (
    Recipe,
    Schedule,
    combine,
    ddpm_step,
    from_views,
    guide,
    predict_x0,
    rectify,
    sample_stage1,
)
from mtl_anagram.sampling.fused import fused_step, permutations, table

from ..helpers import Operations
from .test_sampling_stages import Network, generators, score, stage1, stage2
from .tiny import STAGE_1

CPU, SIDES = torch.device("cpu"), (24, 24)
VIEWS = get_views(["identity", "rotate_cw", "negate+flip", "jigsaw"])
SCHEDULES = {
    "dynamic": Schedule.stage_1(5),
    "one": Schedule.stage_2(5),
    "clip": Schedule(5, thresholding=False, variance_type="fixed_small"),
    "free": Schedule(5, thresholding=False, clip_sample=False),
}


@pytest.fixture(params=["torch", "triton"])
def backend(request, monkeypatch):
    if request.param == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("tests/slow/test_gpu.py runs the kernels themselves")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    return request.param


def drawn(groups=2, images=2, dtype=torch.float32):
    draws = torch.Generator().manual_seed(3)
    output = torch.randn(groups, images, len(VIEWS), 6, *SIDES, generator=draws).to(dtype)
    x, z = torch.randn(2, images, 3, *SIDES, generator=draws)
    return output, x, z, torch.rand(images, len(VIEWS), generator=draws).softmax(1)


def readable(output, x, z, weights, t, scale, schedule, diagonal):
    """The same step by the readable functions."""
    output = output.float()
    noise, variance = output[-1, :, :, :3], output[-1, :, :, 3:]
    if len(output) == 2:
        noise = guide(output[0, :, :, :3], noise, scale)
    noise, variance = from_views(torch.cat([noise, variance], dim=2), VIEWS).chunk(2, dim=2)
    rectified = torch.ones(len(x)) if diagonal is None else rectify(noise, weights, diagonal=diagonal)
    noise, variance = combine(noise, weights, rectified), combine(variance, weights)
    return ddpm_step(noise, variance, x, t, schedule, z), predict_x0(noise, x, t, schedule), rectified


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize(
    "groups, diagonal, dtype",
    [(2, "unit", torch.float32), (2, "measured", torch.float16), (1, None, torch.bfloat16)],
)
def test_a_fused_step_equals_the_readable_one(backend, kind, groups, diagonal, dtype):
    output, x, z, weights = drawn(groups, dtype=dtype)
    schedule = SCHEDULES[kind]
    rows, places = table(schedule, CPU), permutations(VIEWS, SIDES, CPU)
    for row, t in zip(rows, schedule.timesteps, strict=True):
        z = torch.zeros_like(z) if t == 0 else z
        ours = fused_step(output, x, z, weights, row, *places, 7.5, schedule, diagonal, backend)
        for one, other in zip(ours, readable(output, x, z, weights, t, 7.5, schedule, diagonal), strict=True):
            assert (one - other).abs().max() <= 1e-5 * other.abs().max().clamp(min=1)


@pytest.mark.parametrize("recipe", [Recipe.released, Recipe.plain])
def test_a_fused_run_gives_the_same_states(backend, recipe):
    recipe = recipe(num_inference_steps=4, guidance_scale=3)
    slow_states, fast_states = (stage1((0, 1), recipe=recipe, size=32, fused=f) for f in (None, backend))
    for slow, fast in zip(slow_states, fast_states, strict=True):
        for name in ("x", "x0", "weights", "scale"):
            assert torch.allclose(getattr(slow, name), getattr(fast, name), atol=1e-4), name


def test_a_step_is_one_graph_whatever_the_timestep():
    """No break, and none more for the next step: what changes comes in tensors."""
    from torch._dynamo.testing import CompileCounter

    counter, schedule = CompileCounter(), SCHEDULES["dynamic"]
    step = torch.compile(fused_step, fullgraph=True, backend=counter)
    (output, x, z, weights), places = drawn(), permutations(VIEWS, SIDES, CPU)
    for row, t in zip(table(schedule, CPU), schedule.timesteps, strict=True):
        z = torch.zeros_like(z) if t == 0 else z
        ours, *_ = step(output, x, z, weights, row, *places, 7.5, schedule)
        expected, *_ = readable(output, x, z, weights, t, 7.5, schedule, "unit")
        assert torch.allclose(ours, expected, atol=1e-5)
    assert counter.frame_count == 1


def test_what_fused_refuses(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for fused, views, said in (
        ("torch", get_views(["low_pass", "high_pass"]), "more than move pixels"),
        ("triton", VIEWS, "CUDA"),
        ("cuda", VIEWS, "fused='cuda'"),
    ):
        with pytest.raises(InputError, match=said):
            stage1((0,), views=views, spans=None, fused=fused)


def test_guidance_only_inside_an_interval_of_the_steps():
    """Outside it no null rows run, and a step is that of scale 1; the whole interval is what was always done."""
    unet, changes = Network(), {"num_inference_steps": 8, "guidance_scale": 4}
    states = list(stage1((0,), unet=unet, recipe=Recipe.plain(**changes, guidance_interval=(0.25, 0.75))))
    assert [call[0][0] for call in unet.calls] == [2, 2, 4, 4, 4, 4, 2, 2]
    whole = list(stage1((0,), recipe=Recipe.plain(**changes)))
    ones = list(stage1((0,), recipe=Recipe.plain(num_inference_steps=8, guidance_scale=1)))
    assert torch.equal(states[1].x, ones[1].x)
    assert not torch.equal(states[2].x, ones[2].x)
    assert not torch.equal(states[0].x, whole[0].x)
    unet = Network()
    list(stage1((0,), unet=unet, recipe=Recipe.plain(**changes, guidance_interval=(0.5, 0.5))))
    assert {call[0][0] for call in unet.calls} == {2}


def test_stage_2_has_a_guidance_scale_of_its_own():
    def last(scale, **changes):
        recipe = Recipe.plain(num_inference_steps=2, guidance_scale=scale, **changes)
        *_, state = stage2(torch.zeros(1, 3, 16, 16) - 1, recipe=recipe, size=32)
        return state.x

    assert torch.equal(last(9, stage_2_guidance_scale=4), last(4))
    assert not torch.equal(last(9, stage_2_guidance_scale=4), last(9))


# What makes a host wait: numbers read, shapes that hang on values, numbers put on the device.
WAITS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select"}
WAITS |= {"lift_fresh", "_pin_memory"}


@pytest.mark.parametrize("fused", [None, "torch"])
def test_a_step_asks_its_device_nothing(fused, monkeypatch):
    torch.manual_seed(0)
    unet = UNet(UNetConfig.from_dict(STAGE_1)).requires_grad_(False)
    text, null = torch.randn(2, 4, 16), torch.randn(1, 4, 16)
    # A clamp in place of a quantile, which on a CPU, and there alone, reads a number.
    recipe, schedule = Recipe.released(num_inference_steps=10), Schedule.stage_2(10)

    def run():
        return sample_stage1(
            unet, text, null, get_views(["identity", "jigsaw+negate"]), score=score, spans=[(0, 2), (1, 2)],
            generators=generators(0), recipe=recipe, schedule=schedule, fused=fused,
        )  # fmt: skip

    list(run())  # a schedule's numbers are read once
    states, ran = run(), set()
    watch = Operations(lambda name, made: ran.add(name))
    next(states)
    monkeypatch.delattr(TextContext, "columns")  # what maps are asked for is put there once a run
    with watch:
        for _ in range(8):
            next(states)
    assert not ran & WAITS
    with watch:
        next(states)
    assert ran & WAITS  # the last look: the watch does see
