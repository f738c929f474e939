"""Stages I and II: what the loop's seams are by default, made from a Recipe; network and scorer are callables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError, at_least_float32, number, whole_number
from .attention_iou import anti_segregation_step, concept_maps
from .balancing import weights_of
from .checks import (
    check_kinds,
    check_result,
    checked_generators,
    checked_picture,
    checked_spans,
    checked_text,
    checked_views,
    unit_noise,
)
from .fused import Fused
from .guidance import ViewLike, from_views, guide, to_views
from .guidance import combine as weighted_sum
from .loop import After, Combine, Combined, Prediction, Step, StepState, no_gradients, pair, sample
from .recipe import Recipe
from .rectification import noise_fit, rectify, scale_of
from .schedule import Levels, Schedule
from .solvers import DDIM, DDPM, DPMSolver2M

SCORER_SIZE = 64  # the side of the pictures that a scorer is given
LOOK_EVERY = 10  # steps; each look at what a device has found makes the host wait for it
CHANNELS = 3
HOOK = Callable, type(None)
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
    start: tuple[Tensor, float] | None = None,
    reference: tuple[Tensor, ViewLike] | None = None,
    fused: str | None = None,
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
    recipe makes (`loop.sample`). start: pictures (B, 3, H, W) in [-1, 1] to begin with, under the initial noise, and
    the share of the steps, above 0, that is left then (SDEdit, Meng et al. 2021, arXiv 2108.01073). reference: pictures
    like start's, and the view whose component of x is made theirs after every step, under noise of the step's level,
    which is drawn after the step's own. fused: "torch" or "triton": the same numbers in fewer passes
    (`sampling.fused`), of views that move pixels. All is checked at the call.
    """
    check_kinds(recipe=(recipe, Recipe), combine=(combine, *HOOK), step=(step, *HOOK), after=(after, *HOOK))
    schedule = schedule or Schedule.stage_1(recipe.num_inference_steps)
    more = (schedule, size, start, reference, fused)
    run = _Run(unet, text, null, views, score, generators, recipe, *more)
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
    start: tuple[Tensor, float] | None = None,
    reference: tuple[Tensor, ViewLike] | None = None,
    fused: str | None = None,
) -> Iterator[StepState]:
    """Sample B pictures of size px that sharpen low_res (B, 3, h, w), in [-1, 1]; yields as stage I does.

    As sample_stage1, except: the network's input has 6 channels, x_t and the enlarged low_res (bilinear, corners
    aligned) with noise of noise_level (0 to 999) added once; views act on all 6, a scorer sees the first 3. It is
    called with class_labels=noise_level, a tensor of shape (). No anti-segregation. Each generator gives the initial
    noise (3, H, W), the noise on low_res (3, H, W), then one per step but the last. schedule: Schedule.stage_2 if None.
    """
    check_kinds(recipe=(recipe, Recipe), combine=(combine, *HOOK), step=(step, *HOOK), after=(after, *HOOK))
    if recipe.stage_2_guidance_scale is not None:
        recipe = replace(recipe, guidance_scale=recipe.stage_2_guidance_scale)
    schedule = schedule or Schedule.stage_2(recipe.num_inference_steps)
    more = (schedule, size, start, reference, fused)
    run = _Run(unet, text, null, views, score, generators, recipe, *more)
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
        self.flags: list[tuple[Tensor, str, int]] = []  # found finite (0-dim bool), what, at which timestep

    def check_schedule(self, kind: type[Levels], wanted: int) -> None:
        check_kinds(schedule=(self.schedule, kind))
        if (found := self.schedule.num_inference_steps) != wanted:
            raise InputError(f"the schedule has {found} steps, the recipe {wanted}: make them equal")

    def draw(self, *shape: int) -> Tensor:
        """The next unit noise (B, *shape), each image's from its own generator on the CPU, then moved."""
        draws = [torch.randn(shape, generator=g, dtype=torch.float32, device="cpu") for g in self.generators]
        drawn, waits = torch.stack(draws), self.text.device.type != "cuda"
        return (drawn if waits else drawn.pin_memory()).to(self.text.device, non_blocking=not waits)

    def number(self, value: int) -> Tensor:
        """A timestep or noise level as networks take it: a compiled one sees a tensor, not one more constant."""
        return torch.full((), value, dtype=torch.int64, device=self.text.device)  # no copy from the host

    def prepared(self, rows: Tensor) -> Any:
        """Text rows as the network wants them: by its own `prepare`, if it has one."""
        prepare = getattr(self.unet, "prepare", None)
        return prepare(rows) if callable(prepare) else rows

    def finite(self, value: Tensor, what: str, t: int) -> Tensor:
        """The value, whose device notes whether a network's numbers overflowed; `look` reads the notes."""
        self.flags.append((torch.isfinite(value).all(), what, t))
        return value

    def look(self) -> None:
        """InputError that names the first step where numbers were not finite since the last look."""
        flags, self.flags = self.flags, []
        if flags and not torch.stack([flag for flag, *_ in flags]).all():
            what, t = next((what, t) for fine, what, t in flags if not fine)
            place = f"step {self.schedule.timesteps.index(t)} (t={t}) in {self.text.dtype}"
            remedy = "run the network in bfloat16 or float32, and check its weights"
            raise InputError(f"{what} is not finite at {place}: {remedy}")

    def looked(self, states: Iterator[StepState]) -> Iterator[StepState]:
        """The states, with a look after the first step, after some, and after the last."""
        for state in states:
            if state.index % LOOK_EVERY == 0 or state.index + 1 == state.num_steps:
                self.look()
            yield state

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


@dataclass
class _Run(Run):
    """A run of stage I or II, and the closures that its loop is made of."""

    schedule: Schedule
    size: Size
    start: tuple[Tensor, float] | None
    reference: tuple[Tensor, ViewLike] | None
    fused: str | None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_schedule(Schedule, self.recipe.num_inference_steps)
        self.sides = self.size if isinstance(self.size, tuple) else (self.size, self.size)
        for side in self.sides:
            whole_number("size", side, 1)
        if len(self.sides) != 2:
            raise InputError(f"size={self.size!r} must be one side, or (height, width)")
        checked_views(self.views, self.sides)
        self.text = checked_text("text", self.text, self.count, len(self.views))
        null = checked_text("null", self.null, self.count, len(self.views), self.text.shape[2:])
        self.null = null.to(self.text)
        self.passes: Fused | None = None
        if self.fused is not None:
            own = self.views, self.sides, self.schedule, self.text.device
            self.passes = Fused(*own, self.fused, self.draw_picture)
        for name, given in (("start", self.start), ("reference", self.reference)):
            if given is not None and (not isinstance(given, tuple | list) or len(given) != 2):
                raise InputError(f"{name}={given!r}: give two, pictures and a share of the steps, or a view")
            if given is not None:
                checked_picture(given[0], self.count, name, self.sides)
        if self.reference is not None:
            checked_views([self.reference[1]])
        share = 1.0 if self.start is None else number("strength", self.start[1], above=True, high=1)
        self.first = min(round((1 - share) * (steps := self.recipe.num_inference_steps)), steps - 1)
        # Null rows are for guidance: without it, or where the network does not read the text, nobody needs them.
        reads = getattr(self.unet, "reads_text", True)
        times = enumerate(self.schedule.timesteps)
        self.guided = {t for index, t in times if reads and self.recipe.is_guided(index)}

    def draw_picture(self) -> Tensor:
        return self.draw(CHANNELS, *self.sides)

    def states(
        self, combine: Combine | None, step: Step | None, after: After | None, low_res: Tensor | None = None,
        noise_level: int = 0,
    ) -> Iterator[StepState]:  # fmt: skip
        """The loop; the first draws and the text's preparation wait until the first state is asked for."""
        if step is None:
            drawn = DDPM(self.schedule, self.draw_picture) if self.passes is None else self.passes.ddpm
            own: dict[str, Step] = {"ddim": DDIM(self.schedule), "dpm_solver_2m": DPMSolver2M(self.schedule)}
            step = own.get(self.recipe.solver, drawn)
        with no_gradients():
            x, condition = self.draw_picture(), None
            if self.start is not None:
                x = self.schedule.add_noise(self.start[0].to(x), x, self.schedule.timesteps[self.first])
            if low_res is not None:
                low_res = low_res.to(self.text.device, torch.float32)
                large = F.interpolate(low_res, self.sides, mode="bilinear", align_corners=True)
                condition = self.schedule.add_noise(large, self.draw_picture(), noise_level)
                step = partial(self.fitted, step) if self.recipe.stage_2_noise_fit else step
            rows = [self.null, self.text] if self.guided else [self.text]
            self.context = self.prepared(torch.cat([row.flatten(0, 1) for row in rows]))
            self.prompts = self.context[-self.count * len(self.views) :]
            labels = {} if condition is None else {"class_labels": self.number(noise_level)}
            predict = partial(self.predict, condition, labels)
        after = after if self.reference is None else partial(self.held, *self.reference, after)
        combine, times = combine or self.combine, self.schedule.timesteps
        yield from self.looked(sample(x, times, predict, combine, step, after=after, first=self.first))

    def fitted(
        self, step: Step, combined: Combined, x: Tensor, t: int, t_next: int
    ) -> Tensor | tuple[Tensor, Tensor]:
        """A step, with noise of the strength that x_t has."""
        fit = noise_fit(combined.noise, x, self.schedule.roots(t)[1])[:, None, None, None]
        return step(replace(combined, noise=combined.noise * fit), x, t, t_next)

    def held(
        self, picture: Tensor, view: ViewLike, after: After | None, x: Tensor, index: int, t_next: int
    ) -> tuple[Tensor, Tensor | None]:
        """An after that makes a component the reference's, once another has done its work."""
        x, loss = (x, None) if after is None else pair("after", after(x, index, t_next), x)
        known, last = picture.to(x), t_next < 0
        if not last:
            known = self.schedule.add_noise(known, self.draw_picture(), t_next)
        x = x + view.inverse_view(view.view(known - x))
        return x.clamp(-1, 1) if last else x, loss

    def predict(self, condition: Tensor | None, labels: dict[str, Tensor], x: Tensor, t: int) -> Prediction:
        """The default predict: all views in one call, guided in the readers' frames, then brought back once."""
        seen = to_views(x if condition is None else torch.cat([x, condition], dim=1), self.views)
        row, context = seen.flatten(0, 1).to(self.text.dtype), self.prompts  # (B V, C, H, W)
        if t in self.guided:
            row, context = torch.cat([row, row]), self.context
        output = self.unet(row, self.number(t), context, **labels)
        wanted = (len(row), 2 * CHANNELS, *self.sides)
        output = check_result(output, wanted, "the network", "noise and variance per row")
        output = self.finite(output, "the network's prediction", t)
        output = output.unflatten(0, (-1, self.count, len(self.views)))
        if self.passes is not None:
            return Prediction(seen, *self.passes.back(output, scale=self.recipe.guidance_scale))
        output = output.float()
        noise, variance = output[-1, :, :, :CHANNELS], output[-1, :, :, CHANNELS:]
        if t in self.guided:
            noise = guide(output[0, :, :, :CHANNELS], noise, self.recipe.guidance_scale)
        noise, variance = from_views(torch.cat([noise, variance], dim=2), self.views).chunk(2, dim=2)
        return Prediction(seen, noise, variance)

    @cached_property
    def left(self) -> Tensor:
        """The share of white noise's power that the views' filters leave, on average."""
        z = unit_noise(*self.sides)
        return from_views(to_views(z, self.views), self.views).square().mean() / z.square().mean()

    def scale(self, noise: Tensor, weights: Tensor) -> Tensor | None:
        """Rectification's scale (B,) of noise (B, V, C, H, W); None = 1."""
        if not self.recipe.rectification:
            return None
        if not self.sums:
            return rectify(noise, weights, diagonal=self.recipe.rectify_diagonal)
        # A sum loses power where filters overlap and predictions differ. It gets the predictions' own, which is the
        # parts' over what the filters leave of white noise: about what it has where predictions agree.
        target = noise.square().mean(dim=(1, 2, 3, 4)) / self.left
        return scale_of(noise.sum(dim=1).square().mean(dim=(1, 2, 3)), target)

    def combine(self, prediction: Prediction, index: int, t: int) -> Combined:
        """The default combine: the mean by the scores' weights, rectified; or the sum, for views of components."""
        noise, variance, count = prediction.noise, prediction.variance, len(self.views)
        weights = noise.new_full((self.count, count), 1.0 if self.sums else 1 / count)
        scores = self.scores(prediction.seen[:, :, :CHANNELS], t)
        if scores is not None:
            scores = at_least_float32(self.finite(scores.to(noise), "the score", t))
            horizon = self.recipe.horizon or self.recipe.num_inference_steps
            weights = weights_of(scores, index, horizon, self.recipe.floor)
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

        @cache
        def asked() -> Any:
            """What the prompts' maps are asked for, once a run if the network's own text can say it as a tensor."""
            return self.prompts.columns(flat) if hasattr(self.prompts, "columns") else flat

        def after(x: Tensor, index: int, t_next: int) -> tuple[Tensor, Tensor | None]:
            if t_next < 0 or index > recipe.last_guided_step:
                return x, None
            columns = asked()

            def maps_of(pictures: Tensor) -> Tensor:
                rows = to_views(pictures, views).flatten(0, 1).to(self.text.dtype)
                maps = text_maps(rows, self.number(t_next), self.prompts, columns, **wanted)
                return concept_maps(maps, views)

            x, loss = anti_segregation_step(
                x, maps_of, rate=recipe.guidance_rate, measure=recipe.overlap_measure,
                target=recipe.overlap_target, slope=recipe.overlap_slope,
            )  # fmt: skip
            return self.finite(x, "the anti-segregation gradient", t_next), loss

        return after


def alternate(prediction: Prediction, index: int, t: int) -> Combined:
    """A combine that follows one view a step, in turn (Geng et al. 2023, arXiv 2311.17919, their second reduction)."""
    noise, variance, turn = prediction.noise, prediction.variance, index % prediction.noise.shape[1]
    weights = torch.zeros_like(noise[:, :, 0, 0, 0])
    weights[:, turn] = 1
    return Combined(noise[:, turn], None if variance is None else variance[:, turn], weights)
