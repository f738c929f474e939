"""The one sampling loop, with its four seams: predict, combine, step, after. It knows no network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import check_result


@dataclass(frozen=True)
class Prediction:
    """What the network says of all views: what each reader was shown (B, V, C', H, W), the rest in the canonical frame.

    noise (B, V, C, H, W): guided; variance: likewise, or None; x0: clean pictures, of networks that predict them.
    """

    seen: Tensor
    noise: Tensor
    variance: Tensor | None = None
    x0: Tensor | None = None


@dataclass(frozen=True)
class Combined:
    """One prediction (B, C, H, W) made of all views'; x0: as in Prediction.

    weights (B, V), or (B, V, 1, H, W) per pixel, None = equal; scale (B,) of the noise, None = 1: shown in states.
    """

    noise: Tensor
    variance: Tensor | None = None
    weights: Tensor | None = None
    scale: Tensor | None = None
    x0: Tensor | None = None


@dataclass(frozen=True)
class StepState:
    """What one step left behind, in copies: whatever a caller does to them, the run goes on as it would.

    index: 0 first; timestep: the noise level predicted at; x (B, C, H, W) float32: the pictures after the step, in
    the last state clean and in [-1, 1]; x0: the clean pictures that this step predicts, if it tells; weights, scale:
    as Combined's; loss (B,): what `after` measured, else None; num_steps: how many states there are.
    """

    index: int
    timestep: int
    x: Tensor
    x0: Tensor | None
    weights: Tensor
    scale: Tensor
    loss: Tensor | None
    num_steps: int


Predict = Callable[[Tensor, int], Prediction]
Combine = Callable[[Prediction, int, int], Combined]
Step = Callable[[Combined, Tensor, int, int], "Tensor | tuple[Tensor, Tensor]"]
After = Callable[[Tensor, int, int], "Tensor | tuple[Tensor, Tensor | None]"]


def sample(
    x: Tensor, timesteps: Sequence[int], predict: Predict, combine: Combine, step: Step, *,
    after: After | None = None, first: int = 0,
) -> Iterator[StepState]:  # fmt: skip
    """From noise to pictures: yields a StepState per timestep; who stops asking, stops the run.

    predict(x, t) -> Prediction; combine(prediction, index, t) -> Combined;
    step(combined, x, t, t_next) -> x, or (x, x0) where it knows the clean picture; t_next is -1 at the last step;
    after(x, index, t_next) -> x, or (x, loss (B,)), follows every step. They run without gradients
    (torch.enable_grad() brings them back). first: the index to begin at, with x of the noise level timesteps[first].
    """
    for index, t in list(enumerate(timesteps))[first:]:
        t_next = timesteps[index + 1] if index + 1 < len(timesteps) else -1
        with no_gradients():
            prediction = predict(x, t)
            combined = combine(prediction, index, t)
            noise = combined.noise if isinstance(combined, Combined) else None
            check_result(noise, tuple(x.shape), "combine", "it must be Combined(noise, ...) of x's shape")
            x, x0 = pair("step", step(combined, x, t, t_next), x)
            x, loss = (x, None) if after is None else pair("after", after(x, index, t_next), x)
            images, views = prediction.noise.shape[:2]
            weights, scale = combined.weights, combined.scale
            state = StepState(
                index, t, x.clone(), None if x0 is None else x0.clone(),
                x.new_full((images, views), 1 / views) if weights is None else weights.clone(),
                x.new_ones(images) if scale is None else scale.clone(),
                None if loss is None else loss.clone(), len(timesteps),
            )  # fmt: skip
        yield state


def pair(seam: str, result: Tensor | tuple[Tensor, Tensor | None], x: Tensor) -> tuple[Tensor, Tensor | None]:
    """What a step or an after returned, with None where it gave x alone."""
    made, more = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    return check_result(made, tuple(x.shape), seam, "it must be x, or x and one tensor more"), more


@contextmanager
def no_gradients() -> Iterator[None]:
    """No graphs, also in a caller's inference mode, and no autocast of a caller's: results are the request's alone."""
    other = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    no_casts = torch.autocast(other, enabled=False)
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False), no_casts:
        yield
