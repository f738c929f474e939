"""The loops of stage I and II, as generators of steps; the network and the scorer are callables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import float_tensor, whole_number
from ..errors import InputError
from .attention_iou import anti_segregation_step, concept_maps
from .balancing import balance
from .guidance import combine, from_views, guide, to_views
from .recipe import Recipe
from .rectification import rectify
from .schedule import Schedule, ddpm_step

SCORER_SIZE = 64  # the side of the pictures that a scorer is given
Score = Callable[[Tensor, int], Tensor]
Span = tuple[int, int]


@dataclass(frozen=True)
class StepState:
    """What one step left behind.

    index: 0 first; timestep: the noise level that was predicted at; x (B, 3, H, W) float32: the pictures
    after the step, in the last state clean and in [-1, 1]; weights (B, V) and scale (B,): of the combined
    noise; loss (B,): of the anti-segregation step, None where there was none; num_steps: how many states
    there are.
    """

    index: int
    timestep: int
    x: Tensor
    weights: Tensor
    scale: Tensor
    loss: Tensor | None
    num_steps: int


def sample_stage1(
    unet: Callable[..., Tensor],
    text: Tensor,
    null: Tensor,
    views: Sequence[Any],
    *,
    score: Score | None,
    spans: Sequence[Any] | None,
    generators: Sequence[torch.Generator],
    recipe: Recipe,
    size: int = 64,
    schedule: Schedule | None = None,
) -> Iterator[StepState]:
    """Sample B pictures of size px from noise; yields a StepState per step, the last holds the pictures.

    unet(x (R, 3, H, W), t, text) -> (R, 6, H, W): noise, then variance; the R rows are first all null rows,
    then all prompt rows, each image by image, view by view. If it has a method `prepare`, it is called once
    with the text rows (R, L, D), and its result (whose rows can be sliced) is passed on in their place. For
    anti-segregation it needs a method `text_maps(x, t, text, spans, resolution=, places=)` -> {layer:
    (R, N, h, w, T)}, differentiable in x.

    text (V, L, D), the same for all images, or (B, V, L, D); null (1, L, D). Text's device and dtype are
    where and in what the network runs; all else is float32. views: V objects with view(x) and
    inverse_view(prediction) on (..., C, H, W) and inverse_map(map) on (..., h, w).

    score(pictures (B, V, 3, 64, 64) float32, t) -> (B, V) cosines, or None: all weights equal. spans: one
    (start, stop) token range per view (or B lists of such), or None: no anti-segregation.

    generators: one CPU generator per image, drawn from in float32 in this order: the initial noise (3, H, W),
    then one noise (3, H, W) per step but the last. Image b is what it would be alone.
    schedule: Schedule.stage_1 if None.

    All is checked at the call, before any network runs. Raises InputError for a value outside its limits, and
    during the loop for numbers that are not finite.
    """
    make = Schedule.stage_1 if schedule is None else schedule
    run = _Run.checked(unet, text, null, views, score, generators, recipe, size, make)
    if spans is not None:
        run.spans = _checked_spans(spans, run.count, run.views, run.tokens)
    if run.guides:
        if not callable(getattr(unet, "text_maps", None)):
            raise InputError(
                "this network has no text_maps, which anti-segregation needs: pass spans=None or a recipe "
                "with anti_segregation=False"
            )
        if run.map_resolution < 1:
            raise InputError(
                f"map_resolution={recipe.map_resolution} comes to 0 at size={size}: raise one of the two"
            )
    return run.steps()


def sample_stage2(
    unet: Callable[..., Tensor],
    low_res: Tensor,
    text: Tensor,
    null: Tensor,
    views: Sequence[Any],
    *,
    score: Score | None,
    generators: Sequence[torch.Generator],
    recipe: Recipe,
    noise_level: int = 50,
    size: int = 256,
    schedule: Schedule | None = None,
) -> Iterator[StepState]:
    """Sample B pictures of size px that sharpen low_res (B, 3, h, w), in [-1, 1]; yields as stage I does.

    As sample_stage1, except: the network's input has 6 channels, x_t and the enlarged low_res (bilinear,
    corners aligned) with noise of noise_level (0 to 999) added once; views act on all 6. It is called with
    class_labels=noise_level. The scorer sees the first 3 of the viewed channels. No anti-segregation. Each
    generator gives the initial noise (3, H, W), the noise on low_res (3, H, W), then one per step but the
    last. schedule: Schedule.stage_2 if None; it also adds the noise to low_res.
    """
    make = Schedule.stage_2 if schedule is None else schedule
    run = _Run.checked(unet, text, null, views, score, generators, recipe, size, make)
    float_tensor(
        "low_res", low_res, (run.count, 3, None, None), "(B, 3, h, w) with one picture per generator"
    )
    low_res = low_res.detach()
    peak = low_res.abs().max().item()
    if not peak <= 1.001:  # a nan fails too
        raise InputError(f"low_res has values up to {peak:g}: give pictures in [-1, 1], stage I's last x")
    run.noise_level = whole_number("noise_level", noise_level, 0, run.schedule.num_train_timesteps - 1)
    run.low_res = low_res
    return run.steps()


class _Run:
    """One sampling run's checked arguments and its loop. low_res is None in stage I."""

    noise_level: int | None = None
    low_res: Tensor | None = None
    spans: list[Span] | None = None

    def __init__(
        self,
        unet: Callable[..., Tensor],
        text: Tensor,
        null: Tensor,
        views: Sequence[Any],
        score: Score | None,
        generators: Sequence[torch.Generator],
        recipe: Recipe,
        size: int,
        schedule: Schedule,
    ) -> None:
        self.unet, self.text, self.null, self.views = unet, text, null, list(views)
        self.score, self.generators, self.recipe = score, list(generators), recipe
        self.size, self.schedule = size, schedule
        self.count = len(self.generators)  # B
        self.tokens = text.shape[2]  # L
        self.map_resolution = recipe.map_resolution * size // 64

    @classmethod
    def checked(
        cls,
        unet: Any,
        text: Any,
        null: Any,
        views: Any,
        score: Any,
        generators: Any,
        recipe: Any,
        size: Any,
        schedule: Any,
    ) -> _Run:
        """What both stages check. schedule: a Schedule, or how to make one of a number of steps."""
        if not callable(unet):
            raise InputError(f"unet is {type(unet).__name__}: give a callable unet(x, t, text)")
        if score is not None and not callable(score):
            raise InputError(f"score is {type(score).__name__}: give a callable score(pictures, t) or None")
        if not isinstance(recipe, Recipe):
            raise InputError(f"recipe is {type(recipe).__name__}: give a Recipe such as Recipe.released()")
        whole_number("size", size, 1)  # which sizes it can take, the network says itself
        generators = checked_generators(generators)
        for view in checked_views(views):
            if callable(getattr(view, "check_size", None)):
                view.check_size(size)

        legend = "(V, L, D) or (B, V, L, D)"
        if isinstance(text, Tensor) and text.ndim == 4:
            float_tensor("text", text, (len(generators), len(views), None, None), legend)
        else:
            float_tensor("text", text, (len(views), None, None), legend)
            text = text.expand(len(generators), *text.shape)
        float_tensor("null", null, (1, *text.shape[2:]), "(1, L, D) of the text's L and D")
        for name, states in (("text", text), ("null", null)):
            if not torch.isfinite(states).all():
                raise InputError(f"{name} holds numbers that are not finite: encode in float32 or bfloat16")

        if not isinstance(schedule, Schedule):
            if not callable(schedule):
                raise InputError(f"schedule is {type(schedule).__name__}: give a Schedule or None")
            schedule = schedule(recipe.num_inference_steps)
        if schedule.num_inference_steps != recipe.num_inference_steps:
            raise InputError(
                f"the schedule has {schedule.num_inference_steps} steps, the recipe "
                f"{recipe.num_inference_steps}: make them equal"
            )
        return cls(unet, text, null, views, score, generators, recipe, size, schedule)

    @property
    def guides(self) -> bool:
        """Whether any anti-segregation can happen: it takes two views, and words to look for."""
        return self.recipe.anti_segregation and self.spans is not None and len(self.views) > 1

    def steps(self) -> Iterator[StepState]:
        """Check what depends on spans, and hand out the loop."""
        if self.guides:
            for view in self.views:
                if not callable(getattr(view, "inverse_map", None)):
                    raise InputError(f"{view!r} has no inverse_map(map), which anti-segregation needs")
        return self._loop()

    def _loop(self) -> Iterator[StepState]:
        """The steps. Work is done in blocks of `no_gradients`, never around a yield."""
        with no_gradients():
            x = self._noise()
            condition = self._condition()
            context = self._context()
        for index, t in enumerate(self.schedule.timesteps):
            with no_gradients():
                x, weights, scale = self._denoise(x, condition, context, index, t)
                last = index + 1 == self.schedule.num_inference_steps
                loss = None
                if self.guides and not last and index <= self.recipe.last_guided_step:
                    x, loss = self._separate(x, context, index, self.schedule.timesteps[index + 1])
                state = StepState(index, t, x, weights, scale, loss, self.schedule.num_inference_steps)
            yield state

    def _noise(self) -> Tensor:
        """The next unit noise of every image, (B, 3, H, W): drawn on the CPU, then moved."""
        shape = (3, self.size, self.size)
        draws = [torch.randn(shape, generator=g, dtype=torch.float32) for g in self.generators]
        return torch.stack(draws).to(self.text.device)

    def _condition(self) -> Tensor | None:
        """Stage II's enlarged and noised low_res (B, 3, H, W), else None."""
        if self.low_res is None or self.noise_level is None:
            return None
        low_res = self.low_res.to(self.text.device, torch.float32)
        large = F.interpolate(low_res, (self.size, self.size), mode="bilinear", align_corners=True)
        return self.schedule.add_noise(large, self._noise(), self.noise_level)

    def _context(self) -> Any:
        """All text rows (R, L, D), null then prompts, through the network's `prepare` if it has one."""
        prompts = self.text.flatten(0, 1)  # (B V, L, D)
        null = self.null.to(prompts).expand(prompts.shape)
        rows = torch.cat([null, prompts])
        prepare = getattr(self.unet, "prepare", None)
        return prepare(rows) if callable(prepare) else rows

    def _denoise(
        self, x: Tensor, condition: Tensor | None, context: Any, index: int, t: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x_t -> x_{t-1} (B, 3, H, W), and the weights (B, V) and scale (B,) used."""
        recipe = self.recipe
        seen = to_views(x if condition is None else torch.cat([x, condition], dim=1), self.views)
        null, prompt = self._predict(seen, context, index, t)  # each (B, V, 6, H, W), canonical
        noise = guide(null[:, :, :3], prompt[:, :, :3], recipe.guidance_scale)
        weights = self._weights(seen, index, t)
        scale = torch.ones_like(weights[:, 0])
        if recipe.rectification:
            scale = rectify(noise, weights, diagonal=recipe.rectify_diagonal)
        last = index + 1 == self.schedule.num_inference_steps
        x = ddpm_step(
            combine(noise, weights, scale),
            combine(prompt[:, :, 3:], weights),
            x,
            t,
            self.schedule,
            None if last else self._noise(),
        )
        return x, weights, scale

    def _predict(self, seen: Tensor, context: Any, index: int, t: int) -> tuple[Tensor, Tensor]:
        """The network on all views (B, V, C, H, W) at once -> null's and prompts', in the canonical frame."""
        rows = seen.flatten(0, 1).to(self.text.dtype)  # (B V, C, H, W)
        labels = {} if self.noise_level is None else {"class_labels": self.noise_level}
        output = self.unet(torch.cat([rows, rows]), t, context, **labels)
        wanted = (2 * len(rows), 6, self.size, self.size)
        if not isinstance(output, Tensor) or tuple(output.shape) != wanted:
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise InputError(f"the network returned {got} instead of {wanted}: noise and variance per row")
        output = output.float()
        if not torch.isfinite(output).all():
            raise InputError(
                f"the network's prediction is not finite at step {index} (t={t}) in {self.text.dtype}: run "
                "it in bfloat16 or float32, and check its weights"
            )
        null, prompt = output.unflatten(0, (2, self.count, len(self.views)))
        return from_views(null, self.views), from_views(prompt, self.views)

    def _weights(self, seen: Tensor, index: int, t: int) -> Tensor:
        """The views' weights (B, V): by score, or all equal."""
        count = len(self.views)
        if self.score is None or not self.recipe.balancing or count == 1:
            return torch.full((self.count, count), 1 / count, device=seen.device)
        scores = self.score(for_scorer(seen, self.recipe), t)
        if not isinstance(scores, Tensor) or tuple(scores.shape) != (self.count, count):
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise InputError(f"score returned {got} instead of (B, V) = {(self.count, count)} cosines")
        try:
            return balance(
                scores.to(seen), index, horizon=self.recipe.balancing_horizon, floor=self.recipe.floor
            )
        except InputError as error:
            raise InputError(f"at step {index} (t={t}): {error}") from None

    def _separate(self, x: Tensor, context: Any, index: int, t: int) -> tuple[Tensor, Tensor]:
        """The anti-segregation step at the next timestep t, with the prompts' rows alone."""
        recipe, spans = self.recipe, self.spans
        rows = self.count * len(self.views)

        def maps_of(pictures: Tensor) -> Tensor:
            layers = self.unet.text_maps(  # type: ignore[attr-defined]
                to_views(pictures, self.views).flatten(0, 1).to(self.text.dtype),
                t,
                context[rows:],
                spans,
                resolution=self.map_resolution,
                places=recipe.map_places,
            )
            return concept_maps(layers, self.views)

        x, loss = anti_segregation_step(
            x,
            maps_of,
            rate=recipe.guidance_rate,
            measure=recipe.overlap_measure,
            target=recipe.overlap_target,
            slope=recipe.overlap_slope,
        )
        if not torch.isfinite(x).all():
            raise InputError(
                f"the anti-segregation gradient is not finite after step {index} (t={t}) in "
                f"{self.text.dtype}: run the network in bfloat16 or float32, or pass anti_segregation=False"
            )
        return x, loss


def for_scorer(seen: Tensor, recipe: Recipe) -> Tensor:
    """What a scorer is given of viewed pictures (B, V, C, H, W): the first 3 channels, (B, V, 3, 64, 64)."""
    pictures = seen[:, :, :3]
    if recipe.scorer_range == "half":
        pictures = pictures / 2 + 0.5
    if pictures.shape[-2:] != (SCORER_SIZE, SCORER_SIZE):
        pictures = F.interpolate(
            pictures.flatten(0, 1), (SCORER_SIZE, SCORER_SIZE), mode="bilinear", align_corners=False
        ).unflatten(0, seen.shape[:2])
    return pictures


@contextmanager
def no_gradients() -> Iterator[None]:
    """No graphs, also if the caller is in inference mode, whose tensors could not be differentiated later."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def checked_views(views: Any) -> list[Any]:
    """At least one object with view(x) and inverse_view(prediction), or an InputError."""
    if isinstance(views, str) or not isinstance(views, Sequence) or not views:
        raise InputError(f"views={views!r}: give a list of at least one view")
    for view in views:
        if not callable(getattr(view, "view", None)) or not callable(getattr(view, "inverse_view", None)):
            raise InputError(f"{view!r} is no view: it needs view(x) and inverse_view(prediction)")
    return list(views)


def checked_generators(generators: Any) -> list[torch.Generator]:
    """One CPU generator per image, each its own, or an InputError."""
    if isinstance(generators, torch.Generator) or not isinstance(generators, Sequence) or not generators:
        raise InputError(
            "generators must be a list with one CPU torch.Generator per image, for example "
            "[torch.Generator().manual_seed(0)]"
        )
    for generator in generators:
        if not isinstance(generator, torch.Generator) or generator.device.type != "cpu":
            kind = generator.device if isinstance(generator, torch.Generator) else type(generator).__name__
            raise InputError(f"a generator is of {kind}: noise is drawn on the CPU, give torch.Generator()")
    if len({id(generator) for generator in generators}) < len(generators):
        raise InputError("one generator is given for several images: give each image its own")
    return list(generators)


def _checked_spans(spans: Any, count: int, views: Sequence[Any], tokens: int) -> list[Span]:
    """One (start, stop) per view, or B lists of such -> B V of them, image by image, view by view."""
    remedy = f"give one (start, stop) per view, 0 <= start < stop <= {tokens} tokens"

    def one_image(row: Any) -> list[Span]:
        if not isinstance(row, (list, tuple)) or len(row) != len(views):
            raise InputError(f"spans={row!r} for {len(views)} views: {remedy}")
        for span in row:
            fits = isinstance(span, (list, tuple)) and len(span) == 2
            if not fits or any(isinstance(end, bool) or not isinstance(end, int) for end in span):
                raise InputError(f"span {span!r}: {remedy}")
            if not 0 <= span[0] < span[1] <= tokens:
                raise InputError(f"span {tuple(span)}: {remedy}")
        return [(start, stop) for start, stop in row]

    per_image = (
        isinstance(spans, (list, tuple))
        and len(spans) == count
        and all(isinstance(row, (list, tuple)) and row and isinstance(row[0], (list, tuple)) for row in spans)
    )
    return [span for row in (spans if per_image else [spans] * count) for span in one_image(row)]
