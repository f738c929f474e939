"""The passes of `fused` as Triton kernels, for CUDA; with TRITON_INTERPRET=1 in Triton's interpreter, for tests."""

# mypy: allow-untyped-defs, allow-incomplete-defs
import torch
import triton
import triton.language as tl
from torch import Tensor

from .schedule import Schedule
from .solvers import threshold

BLOCK = 1024  # values a program


def back(output: Tensor, places: Tensor, signs: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`fused.back`: one kernel."""
    output = output.contiguous()
    groups, images, views, _, height, width = output.shape
    pixels = height * width
    noise, variance = output.new_empty(2, images, views, 3, height, width, dtype=torch.float32)
    grid = (images * views, 3, triton.cdiv(pixels, BLOCK))
    tensors = (output[0], output[-1], places, signs, noise, variance)
    with torch.cuda.device_of(output):  # which may not be the current card
        _back[grid](*tensors, scale, views, pixels, GUIDED=groups == 2, BLOCK=BLOCK)
    return noise, variance


def move(
    noise: Tensor, variance: Tensor | None, x: Tensor, z: Tensor | None, numbers: Tensor, schedule: Schedule
) -> tuple[Tensor, Tensor]:
    """`fused.move`: one kernel; before it the quantile, where every picture has its own limit."""
    noise, x = noise.contiguous(), x.contiguous()
    largest, values = schedule.largest_value, x[0].numel()
    # One limit for all is a limit as every picture's own, by which nothing is divided.
    limits = x.new_full((len(x),), 0.0 if largest is None else largest)
    if largest is None:
        limits = threshold((x - numbers[1] * noise) * numbers[0], schedule)
    learnt = z is not None and variance is not None and schedule.variance_type == "learned_range"
    spread = variance.contiguous() if learnt and variance is not None else noise
    after, x0 = torch.empty_like(x), torch.empty_like(x)
    tensors = (noise, spread, x, x if z is None else z.contiguous(), numbers, limits, after, x0)
    kinds = {"LEARNT": learnt, "DRAWN": z is not None, "DIVIDE": largest is None, "BLOCK": BLOCK}
    with torch.cuda.device_of(x):
        _move[(len(x), triton.cdiv(values, BLOCK))](*tensors, values, **kinds)
    return after, x0


@triton.jit
def _back(
    null, text, places, signs, noise, variance, scale, views, pixels, GUIDED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, channel = tl.program_id(0), tl.program_id(1)
    at = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    there = at < pixels
    source = tl.load(places + row % views * pixels + at, mask=there, other=0)
    first = (row * 6 + channel) * pixels + source
    value = tl.load(text + first, mask=there).to(tl.float32)
    if GUIDED:
        without = tl.load(null + first, mask=there).to(tl.float32)
        value = without + scale * (value - without)
    to = (row * 3 + channel) * pixels + at
    tl.store(noise + to, value * tl.load(signs + row % views), mask=there)
    tl.store(variance + to, tl.load(text + first + 3 * pixels, mask=there).to(tl.float32), mask=there)


@triton.jit
def _move(
    noise, variance, x, z, numbers, limits, after, clean, values,
    LEARNT: tl.constexpr, DRAWN: tl.constexpr, DIVIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image, place = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there, at, limit = place < values, image * values + place, tl.load(limits + image)
    here = tl.load(x + at, mask=there)
    x0 = (here - tl.load(numbers + 1) * tl.load(noise + at, mask=there)) * tl.load(numbers)
    x0 = tl.minimum(tl.maximum(x0, -limit), limit)
    x0 = x0 / limit if DIVIDE else x0
    value = tl.load(numbers + 2) * x0 + tl.load(numbers + 3) * here
    if DRAWN:
        log = tl.load(numbers + 4)
        if LEARNT:
            log += (tl.load(variance + at, mask=there) + 1) / 2 * (tl.load(numbers + 5) - log)
        value += tl.exp(0.5 * log) * tl.load(z + at, mask=there)
    tl.store(after + at, value, mask=there)
    tl.store(clean + at, x0, mask=there)
