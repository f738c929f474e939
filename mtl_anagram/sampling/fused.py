"""Stages I and II around the network in as few passes as the maths allows: what the readable functions give, to
rounding (1e-5). Chosen explicitly (`fused=`), never by itself.

Between the passes stand what needs whole pictures: the views' second moments, and dynamic thresholding's quantile.
Nothing here asks the device anything, shapes are those of the step before, and a step's numbers are a row of one table:
`fused_step` is one graph for torch.compile, and can be captured as a CUDA graph. P pixels; else the house's letters.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from ..errors import InputError, at_least_float32, choice
from .guidance import ViewLike, combine, guide
from .loop import Combined
from .rectification import rectify
from .schedule import Schedule
from .solvers import ancestral, in_range


def fused_step(
    output: Tensor, x: Tensor, z: Tensor, weights: Tensor, numbers: Tensor, places: Tensor, signs: Tensor,
    scale: float, schedule: Schedule, diagonal: str | None = "unit", backend: str = "torch",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """One DDPM step from the network's rows to the next picture, all views combined.

    output (G, B, V, 6, H, W), as the network gave it, G = 2 (null, text) or 1 without guidance; x, z (B, 3, H, W) the
    picture and unit noise (zeros at the last step); weights (B, V); numbers: `table`'s row; places, signs:
    `permutations`' result; scale: guidance's; diagonal: rectification's, None = off. Returns x after the step, the
    clean picture predicted, rectification's scale (B,).
    """
    back, move = operations(backend, x.device)
    noise, variance = back(output, places, signs, scale)
    unit = torch.ones_like(weights[:, 0])
    rectified = unit if diagonal is None else rectify(noise, weights, diagonal=diagonal)
    noise, variance = combine(noise, weights, rectified), combine(variance, weights)
    return *move(noise, variance, x, z, numbers, schedule), rectified


def back(output: Tensor, places: Tensor, signs: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Guidance, then every view's inverse: noise and variance (B, V, 3, H, W), canonical, float32."""
    rows, sides = output.flatten(-2), output.shape[-2:]
    noise, variance = rows[-1, :, :, :3].float(), rows[-1, :, :, 3:]
    if len(rows) == 2:
        noise = guide(rows[0, :, :, :3].float(), noise, scale)
    at = places[:, None].expand_as(noise)
    noise, variance = noise.gather(-1, at) * signs[:, None, None], variance.gather(-1, at).float()
    return noise.unflatten(-1, sides), variance.unflatten(-1, sides)


def move(
    noise: Tensor, variance: Tensor | None, x: Tensor, z: Tensor | None, numbers: Tensor, schedule: Schedule
) -> tuple[Tensor, Tensor]:
    """The DDPM step: the next picture, the clean picture; z None = zeros; variance None = the smallest."""
    inverse, noisy, *others = numbers.unbind()
    x0 = in_range((x - noisy * noise) * inverse, schedule)
    variance = None if schedule.variance_type == "fixed_small" else variance
    return ancestral(x0, variance, x, z, others), x0


class Fused:
    """The passes of one run: what stays the same over its steps is made here, on its device."""

    def __init__(
        self, views: Sequence[ViewLike], sides: tuple[int, int], schedule: Schedule, device: torch.device,
        backend: str, draw: Callable[[], Tensor],
    ) -> None:  # fmt: skip
        back, self.move = operations(backend, device)
        places, signs = permutations(views, sides, device)
        self.back = partial(back, places=places, signs=signs)
        self.schedule, self.draw = schedule, draw
        self.rows = dict(zip(schedule.timesteps, table(schedule, device), strict=True))

    def ddpm(self, combined: Combined, x: Tensor, t: int, t_next: int) -> tuple[Tensor, Tensor]:
        """`solvers.DDPM`, fused: a step for the loop."""
        noise, z = at_least_float32(combined.noise), self.draw() if t_next >= 0 else None
        return self.move(noise, combined.variance, x, z, self.rows[t], self.schedule)


def operations(backend: str, device: torch.device) -> tuple[Callable[..., tuple[Tensor, Tensor]], ...]:
    """The two passes, `back` and `move`, of a backend; InputError where they cannot run."""
    if choice("fused", backend, ("torch", "triton")) == "torch":
        return back, move
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise InputError(f'fused="triton" runs on CUDA, not on {str(device)!r}: take "torch"')
    try:
        from . import fused_triton
    except ImportError as error:
        remedy = 'pip install triton, or take "torch"'
        raise InputError(f'fused="triton" needs Triton ({error}): {remedy}') from None
    return fused_triton.back, fused_triton.move


def permutations(
    views: Sequence[ViewLike], sides: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Where each canonical pixel lies in each view (V, P) long, and the views' signs (V,) float32."""
    numbers = torch.arange(1.0, 1 + sides[0] * sides[1], dtype=torch.float64, device="cpu")
    places, signs = [], []
    for view in views:
        back = view.inverse_view(numbers.unflatten(0, sides).expand(6, -1, -1)).flatten(1)  # (6, P)
        place, sign = back[5], 1.0 if back[0, 0] > 0 else -1.0
        right = torch.equal(back, place * torch.tensor([[sign]] * 3 + [[1.0]] * 3, device="cpu"))
        if not right or not torch.equal(place.sort().values, numbers):
            raise InputError(f"{view!r} does more than move pixels or change their sign: leave fused= out")
        places.append(place.long() - 1)
        signs.append(sign)
    return torch.stack(places).to(device), torch.tensor(signs, dtype=torch.float32, device=device)


def table(schedule: Schedule, device: torch.device) -> Tensor:
    """Every step's numbers, (steps, 7) float32: 1/sqrt(alpha_bar), sqrt(1 - alpha_bar), `Schedule.posterior`'s."""
    rows = []
    for t, t_next in pairwise((*schedule.timesteps, -1)):
        kept, noisy = schedule.roots(t)
        rows.append([1 / kept, noisy, *schedule.posterior(t, t_next)])
    return torch.tensor(rows, dtype=torch.float32, device=device)
