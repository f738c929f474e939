"""Stages I and II: what the loop's seams are by default, made from a Recipe; network and scorer are callables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError, whole_number
from .attention_iou import anti_segregation_step, concept_maps
from .balancing import balance
from .checks import (
    check_kinds,
    check_result,
    checked_generators,
    checked_picture,
    checked_spans,
    checked_text,
    checked_views,
)
from .guidance import ViewLike, from_views, guide, to_views
from .guidance import combine as weighted_sum
from .loop import After, Combine, Combined, Prediction, Step, StepState, no_gradients, sample
from .recipe import Recipe
from .rectification import rectify
from .schedule import Levels, Schedule
from .solvers import DDIM, DDPM, DPMSolver2M

SCORER_SIZE = 64  # the side of the pictures that a scorer is given
CHANNELS = 3
Score = Callable[[Tensor, int], Tensor]
Size = int | tuple[int, int]


def sample_stage1(
    unet: Callable[..., Tensor],
    text: Tensor,
    null: Tensor,
    views: Sequence[ViewLike],
    *,
    score: Score | None,
    spans: Sequence[Any] | None,
    generators: Sequence[torch.Generator],
    recipe: Recipe,
    size: Size = 64,
    schedule: Schedule | None = None,
    combine: Combine | None = None,
    step: Step | None = None,
    after: After | None = None,
) -> Iterator[StepState]:
    """Sample B pictures of size px (or (H, W)) from noise; yields a StepState per step, the last holds the pictures.

    unet(x (R, 3, H, W), t, text) -> (R, 6, H, W): noise, then variance; the R rows are first all null rows, then all
    prompt rows, each image by image, view by view; without guidance (scale 1) the prompt rows alone. t: a tensor of
    shape (). A method `prepare` is called once with the text rows (R, L, D); its result, whose rows can be sliced, is
    passed on. Anti-segregation needs a method `text_maps(x, t, text, spans, resolution=, places=)` -> {layer: (R, N,
    h, w, T)}, differentiable in x. text (V, L, D), or (B, V, L, D) for each image its own; null (1, L, D), or (V, L,
    D): negative prompts. Text's device and dtype are where and in what the network runs; all else is float32.
    score(pictures (B, V, 3, 64, 64) float32, t) -> (B, V) cosines, or None: all weights equal. spans: one
    (start, stop) token range per view (or B lists of such), or None: no anti-segregation. generators: one CPU
    generator per image, drawn from in float32 in this order: the initial noise (3, H, W), then one noise (3, H, W)
    per step but the last. Image b is what it would be alone (to rounding). combine, step, after: in place of what the
    recipe makes (`loop.sample`). All is checked at the call.
    """
    check_kinds(recipe=(recipe, Recipe))
    schedule = schedule or Schedule.stage_1(recipe.num_inference_steps)
    run = _Run(unet, text, null, views, score, generators, recipe, schedule, size)
    if after is None and spans is not None:
        after = run.anti_segregation(spans)
    return run.states(combine, step, after)


def sample_stage2(
    unet: Callable[..., Tensor],
    low_res: Tensor,
    text: Tensor,
    null: Tensor,
    views: Sequence[ViewLike],
    *,
    score: Score | None,
    generators: Sequence[torch.Generator],
    recipe: Recipe,
    noise_level: int = 50,
    size: Size = 256,
    schedule: Schedule | None = None,
    combine: Combine | None = None,
    step: Step | None = None,
    after: After | None = None,
) -> Iterator[StepState]:
    """Sample B pictures of size px that sharpen low_res (B, 3, h, w), in [-1, 1]; yields as stage I does.

    As sample_stage1, except: the network's input has 6 channels, x_t and the enlarged low_res (bilinear, corners
    aligned) with noise of noise_level (0 to 999) added once; views act on all 6, a scorer sees the first 3. It is
    called with class_labels=noise_level, a tensor of shape (). No anti-segregation. Each generator gives the initial
    noise (3, H, W), the noise on low_res (3, H, W), then one per step but the last. schedule: Schedule.stage_2 if None.
    """
    check_kinds(recipe=(recipe, Recipe))
    schedule = schedule or Schedule.stage_2(recipe.num_inference_steps)
    run = _Run(unet, text, null, views, score, generators, recipe, schedule, size)
    whole_number("noise_level", noise_level, 0, run.schedule.num_train_timesteps - 1)
    return run.states(combine, step, after, checked_picture(low_res, run.count), noise_level)


@dataclass
class Run:
    """What all stages share: a run's arguments, checked, and what is made of them."""

    unet: Callable[..., Tensor]
    text: Tensor
    null: Tensor
    views: Sequence[ViewLike]
    score: Score | None
    generators: Sequence[torch.Generator]
    recipe: Recipe
    schedule: Levels

    def __post_init__(self) -> None:
        check_kinds(unet=(self.unet, Callable), score=(self.score, Callable, type(None)))
        self.generators, self.views = checked_generators(self.generators), checked_views(self.views)
        self.count = len(self.generators)  # B
        self.sums = getattr(self.views[0], "reduce", "mean") == "sum"  # components, which add up

    def check_schedule(self, kind: type[Levels], wanted: int) -> None:
        check_kinds(schedule=(self.schedule, kind))
        if (found := self.schedule.num_inference_steps) != wanted:
            raise InputError(f"the schedule has {found} steps, the recipe {wanted}: make them equal")

    def draw(self, *shape: int) -> Tensor:
        """The next unit noise (B, *shape), each image's from its own generator on the CPU, then moved."""
        draws = [torch.randn(shape, generator=g, dtype=torch.float32, device="cpu") for g in self.generators]
        return torch.stack(draws).to(self.text.device)

    def number(self, value: int) -> Tensor:
        """A timestep or noise level as networks take it: a compiled one sees a tensor, not one more constant."""
        return torch.tensor(value, dtype=torch.int64, device=self.text.device)

    def prepared(self, rows: Tensor) -> Any:
        """Text rows as the network wants them: by its own `prepare`, if it has one."""
        prepare = getattr(self.unet, "prepare", None)
        return prepare(rows) if callable(prepare) else rows

    def finite(self, value: Tensor, what: str, t: int) -> Tensor:
        """The value; InputError that names the step where a network's numbers overflowed."""
        if not torch.isfinite(value).all():
            place = f"step {self.schedule.timesteps.index(t)} (t={t}) in {self.text.dtype}"
            remedy = "run the network in bfloat16 or float32, and check its weights"
            raise InputError(f"{what} is not finite at {place}: {remedy}")
        return value

    def scores(self, pictures: Tensor, t: int) -> Tensor | None:
        """The scorer's cosines (B, V) of viewed pictures (B, V, 3, h, w), None where weights are equal."""
        if self.score is None or not self.recipe.balancing or self.sums or len(self.views) == 1:
            return None
        if self.recipe.scorer_range == "half":
            pictures = pictures / 2 + 0.5
        sides = (SCORER_SIZE, SCORER_SIZE)
        if pictures.shape[-2:] != sides:
            small = F.interpolate(pictures.flatten(0, 1), sides, mode="bilinear", align_corners=False)
            pictures = small.unflatten(0, pictures.shape[:2])
        return check_result(self.score(pictures, t), (self.count, len(self.views)), "score", "(B, V) cosines")

    def scale(self, noise: Tensor, weights: Tensor) -> Tensor:
        """Rectification's scale (B,) of noise (B, V, C, H, W) in one frame, or ones."""
        if self.sums or not self.recipe.rectification:
            return torch.ones_like(weights[:, 0])
        return rectify(noise, weights, diagonal=self.recipe.rectify_diagonal)


@dataclass
class _Run(Run):
    """A run of stage I or II, and the closures that its loop is made of."""

    schedule: Schedule
    size: Size

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_schedule(Schedule, self.recipe.num_inference_steps)
        self.sides = self.size if isinstance(self.size, tuple) else (self.size, self.size)
        for side in self.sides:
            whole_number("size", side, 1)
        checked_views(self.views, self.sides)
        self.text = checked_text("text", self.text, self.count, len(self.views))
        null = checked_text("null", self.null, self.count, len(self.views), self.text.shape[2:])
        self.null = null.to(self.text)
        # Null rows are for guidance: without it, or where the network does not read the text, nobody needs them.
        self.guided = self.recipe.guidance_scale != 1 and getattr(self.unet, "reads_text", True)

    def states(
        self, combine: Combine | None, step: Step | None, after: After | None, low_res: Tensor | None = None,
        noise_level: int = 0,
    ) -> Iterator[StepState]:  # fmt: skip
        """The loop; the first draws and the text's preparation wait until the first state is asked for."""
        shape = (CHANNELS, *self.sides)
        if step is None:
            drawn = DDPM(self.schedule, lambda: self.draw(*shape))
            own: dict[str, Step] = {"ddim": DDIM(self.schedule), "dpm_solver_2m": DPMSolver2M(self.schedule)}
            step = own.get(self.recipe.solver, drawn)
        with no_gradients():
            x, condition = self.draw(*shape), None
            if low_res is not None:
                low_res = low_res.to(self.text.device, torch.float32)
                large = F.interpolate(low_res, self.sides, mode="bilinear", align_corners=True)
                condition = self.schedule.add_noise(large, self.draw(*shape), noise_level)
            rows = [self.null, self.text] if self.guided else [self.text]
            self.context = self.prepared(torch.cat([row.flatten(0, 1) for row in rows]))
            predict = self.predict(condition, noise_level)
        yield from sample(x, self.schedule.timesteps, predict, combine or self.combine, step, after=after)

    def predict(self, condition: Tensor | None, noise_level: int) -> Callable[[Tensor, int], Prediction]:
        """The default predict: all views in one call, guided in the readers' frames, then brought back once."""
        labels = {} if condition is None else {"class_labels": self.number(noise_level)}

        def predict(x: Tensor, t: int) -> Prediction:
            seen = to_views(x if condition is None else torch.cat([x, condition], dim=1), self.views)
            row = seen.flatten(0, 1).to(self.text.dtype)  # (B V, C, H, W)
            row = torch.cat([row, row]) if self.guided else row
            output = self.unet(row, self.number(t), self.context, **labels)
            wanted = (len(row), 2 * CHANNELS, *self.sides)
            output = check_result(output, wanted, "the network", "noise and variance per row").float()
            output = self.finite(output, "the network's prediction", t)
            output = output.unflatten(0, (-1, self.count, len(self.views)))
            noise, variance = output[-1, :, :, :CHANNELS], output[-1, :, :, CHANNELS:]
            if self.guided:
                noise = guide(output[0, :, :, :CHANNELS], noise, self.recipe.guidance_scale)
            noise, variance = from_views(torch.cat([noise, variance], dim=2), self.views).chunk(2, dim=2)
            return Prediction(seen, noise, variance)

        return predict

    def combine(self, prediction: Prediction, index: int, t: int) -> Combined:
        """The default combine: the mean by the scores' weights, rectified; or the sum, for views of components."""
        noise, variance, count = prediction.noise, prediction.variance, len(self.views)
        weights = noise.new_full((self.count, count), 1.0 if self.sums else 1 / count)
        scores = self.scores(prediction.seen[:, :, :CHANNELS], t)
        if scores is not None:
            scores = self.finite(scores, "the score", t).to(noise)
            horizon = self.recipe.horizon or self.recipe.num_inference_steps
            weights = balance(scores, index, horizon=horizon, floor=self.recipe.floor)
        scale = self.scale(noise, weights)
        mean = None if variance is None else weighted_sum(variance, weights)
        return Combined(weighted_sum(noise, weights, scale), mean, weights, scale)

    def anti_segregation(self, spans: Sequence[Any]) -> After | None:
        """The default after: the gradient step at the next timestep, with the prompts' rows alone; None = never."""
        recipe, views = self.recipe, self.views
        flat = checked_spans(spans, self.count, len(views), self.text.shape[2])
        if not recipe.anti_segregation or len(views) < 2 or self.sums:
            return None
        for owner, method in ((self.unet, "text_maps"), *((view, "inverse_map") for view in views)):
            if not callable(getattr(owner, method, None)):
                said = f"{type(owner).__name__} has no {method}, which anti-segregation needs"
                raise InputError(f"{said}: pass spans=None, or a recipe with anti_segregation=False")
        text_maps: Callable[..., dict[str, Tensor]] = self.unet.text_maps  # type: ignore[attr-defined]
        wanted = {"resolution": recipe.map_resolution * self.sides[0] // 64, "places": recipe.map_places}

        def after(x: Tensor, index: int, t_next: int) -> tuple[Tensor, Tensor | None]:
            if t_next < 0 or index > recipe.last_guided_step:
                return x, None
            prompts = self.context[-self.count * len(views) :]

            def maps_of(pictures: Tensor) -> Tensor:
                rows = to_views(pictures, views).flatten(0, 1).to(self.text.dtype)
                return concept_maps(text_maps(rows, self.number(t_next), prompts, flat, **wanted), views)

            x, loss = anti_segregation_step(
                x, maps_of, rate=recipe.guidance_rate, measure=recipe.overlap_measure,
                target=recipe.overlap_target, slope=recipe.overlap_slope,
            )  # fmt: skip
            return self.finite(x, "the anti-segregation gradient", t_next), loss

        return after
