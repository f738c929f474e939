"""On a CUDA device alone: steps that never wait for it, the Triton kernels compiled, a step as a CUDA graph."""

from itertools import islice

import pytest
import torch

from benchmarks.common import random_unet
from mtl_anagram import get_views
from mtl_anagram.sampling import Recipe, Schedule, sample_stage1
from mtl_anagram.sampling.fused import fused_step, permutations, table

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
VIEWS = ["identity", "rotate_cw", "negate+jigsaw"]


def run(fused, dtype="float32"):
    unet = random_unet("tiny-I", "cuda", dtype)
    draws = torch.Generator().manual_seed(1)
    text, null = torch.randn(4, 12, 64, generator=draws).to("cuda", getattr(torch, dtype)).split((3, 1))
    return sample_stage1(
        unet, text, null, get_views(VIEWS), score=lambda x, t: 0.5 + x.mean((2, 3, 4)) / 9, fused=fused,
        spans=[(0, 2), (1, 3), (5, 6)], generators=[torch.Generator().manual_seed(s) for s in (0, 1)],
        recipe=Recipe.released(num_inference_steps=10),
    )  # fmt: skip


@pytest.mark.parametrize("fused", [None, "torch", "triton"])
def test_a_step_never_waits_for_the_device(fused):
    """torch's own watch: an error where a call of the host waits. Steps 1 to 8 have no look at the flags."""
    list(run(fused))  # views' indices, a schedule's numbers and kernels are made once
    states = run(fused)
    next(states)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(8):
            next(states)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("fused", ["torch", "triton"])
def test_a_fused_run_equals_the_readable_one(fused):
    """Its first steps: a random network with guidance 10 makes rounding grow tenfold a step."""
    for slow, fast in islice(zip(run(None), run(fused), strict=True), 3):
        for name in ("x", "x0", "scale"):
            assert torch.allclose(getattr(slow, name), getattr(fast, name), atol=1e-3), (slow.index, name)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_step_is_a_cuda_graph(backend):
    draws, schedule = torch.Generator("cuda").manual_seed(0), Schedule.stage_1(5)
    output = torch.randn(2, 2, 3, 6, 64, 64, generator=draws, device="cuda", dtype=torch.float16)
    x, z = torch.randn(2, 2, 3, 64, 64, generator=draws, device="cuda")
    weights, rows = torch.full((2, 3), 1 / 3, device="cuda"), table(schedule, x.device)
    places = permutations(get_views(VIEWS), (64, 64), x.device)
    numbers = rows[0].clone()
    arguments = (output, x, z, weights, numbers, *places, 7.0, schedule, "unit", backend)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        fused_step(*arguments)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        after, *_ = fused_step(*arguments)
    for row in rows:
        numbers.copy_(row)
        graph.replay()
        assert torch.allclose(after, fused_step(*arguments)[0], atol=1e-5)
