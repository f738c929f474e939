"""A request under way: the stages one after the other, batch by batch, step by step; nothing is written."""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from ..models.prompts import concept_span, request_warnings
from ..sampling import LatentState, Schedule, StepState, sample_stage1, sample_stage2, sample_stage3
from ..sampling.stages import SCORER_SIZE, Score
from ..views import View
from .models import Models
from .request import Request, Size, sides_of

Job = tuple["SamplingRun", int]  # whose picture, and its seed


class CascadeStep(NamedTuple):
    """One step of a run: which seeds are in the batch, which stage (1 to 3), and what the step left behind."""

    seeds: tuple[int, ...]
    stage: int
    state: StepState


def picture_of(state: StepState) -> Tensor | None:
    """The finished pictures of a stage's last state, else None."""
    if isinstance(state, LatentState):
        return state.picture
    return state.x if state.index + 1 == state.num_steps else None


def hooks_by_stage(hooks: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """combine, step, after in place of the recipe's, each for both stages or by stage ({1: f, 2: g}), by stage."""
    chosen: dict[int, dict[str, Any]] = {1: {}, 2: {}}
    for name, hook in hooks.items():
        functions = hook if isinstance(hook, Mapping) else {1: hook, 2: hook}
        if set(functions) - {1, 2} or not all(f is None or callable(f) for f in functions.values()):
            raise InputError(f"{name}={hook!r} must be a function, or functions by stage (1, 2), or None")
        for stage, function in functions.items():
            chosen[stage] |= {name: function} if function is not None else {}
    return chosen


class SamplingRun:
    """What `Cascade.sample` gives: an iterator of CascadeSteps, and the pictures that they lead to.

    Who stops asking, stops the run. seeds, prompts, views, recipe, sizes: of the checked request. warnings: what
    was said of it (PromptWarnings). pictures: by side in px (or (H, W)) the pictures (B, 3, H, W) in [-1, 1],
    float32 on the CPU, in the order of `seeds`; asking for them runs to the end.
    """

    def __init__(
        self, models: Models, request: Request, seeds: list[int], batch_size: int, hooks: Mapping[str, Any]
    ) -> None:
        self.models, self.request, self.seeds, self.batch_size = models, request, seeds, batch_size
        self.hooks, self.recipe, self.sizes = hooks, request.recipe, request.sizes
        self.prompts, self.views = request.prompts, request.views
        self.warnings = request_warnings(
            models.tokenizer, request.prompts, request.concepts if request.segregates else None,
            style=request.style, learnt=models.concepts, styles=models.styles, name=models.name,
            size=max(sides_of(request.sizes[0])),
            trained_size=models.unet_config(1).sample_size if models.concepts else None,
        )  # fmt: skip
        named = zip(request.prompts, request.concepts, request.positions, strict=True)
        spans = (concept_span(models.tokenizer, text, word, position=place) for text, word, place in named)
        self.spans = list(spans) if request.segregates else None
        self.made: dict[Size, dict[int, Tensor]] = {size: {} for size in request.sizes}
        self.rules, self._steps = hooks_by_stage(hooks), self._run()
        self.error: Exception | None = None  # what ended it, where requests are joined
        # By seed, stage I's picture and its generator then: where this is no None, stage I is done once for all `only`.
        self.begun: dict[int, tuple[Tensor, torch.Generator]] | None = None

    def __iter__(self) -> Iterator[CascadeStep]:
        return self

    def __next__(self) -> CascadeStep:
        return next(self._steps)

    @property
    def pictures(self) -> dict[Size, Tensor]:
        if self.models.joined is not None and not any(self.made.values()):
            self.models.joined.make(self)
            self._steps = iter(())
        for _ in self:
            pass
        if any(len(found) < len(self.seeds) for found in self.made.values()):
            raise InputError("this run ended by an error before its pictures were made: call sample again")
        return {size: torch.stack([made[s] for s in self.seeds]) for size, made in self.made.items()}

    def only(self, seeds: list[int], stages: int | None = None) -> "SamplingRun":
        """The same request, of these seeds and the first stages alone; None = all that it has."""
        given = replace(self.request.given, strengths=self.request.given.strengths[:stages])
        request = replace(self.request, sizes=self.request.sizes[:stages], given=given)
        other = SamplingRun(self.models, request, seeds, self.batch_size, self.hooks)
        other.begun = self.begun
        return other

    def _run(self) -> Iterator[CascadeStep]:
        for jobs, stage, state in sample_jobs([(self, seed) for seed in self.seeds], self.batch_size):
            keep_pictures(jobs, stage, state)
            yield CascadeStep(tuple(seed for _, seed in jobs), stage, state)

    def joins(self, other: "SamplingRun") -> bool:
        """Whether pictures of both may be in one batch: what a batch shares is the same."""
        # One table of places, and one filter's loss of power, are of all a batch's images.
        alone = self.models.fused is not None or self.views[0].reduce == "sum"
        return self is other or (not alone and self._shared() == other._shared())

    def _shared(self) -> list[Any]:
        asked = self.request
        same = [asked.recipe, asked.noise_level, asked.sizes, asked.upscale, asked.negative]
        same += [len(asked.views), asked.views[0].reduce]
        return [self.models, *same, asked.given.about, *self.hooks.values()]

    def text(self) -> tuple[Tensor, Tensor]:
        """The prompts' states (V, L, D), and those of what is to be avoided, (1 or V, L, D)."""
        text, null = self.models.encode(self.request.prompts)
        return text, null if self.request.negative is None else self.models.encode(self.request.negative)[0]

    def scorer(self, schedules: dict[int, Schedule], prompts: Sequence[Any]) -> Score:
        """The noise-aware CLIP's; InputError for one that cannot score what the stages make."""
        clip, first = self.models.noise_clip, max(schedule.timesteps[0] for schedule in schedules.values())
        encoder = clip.image_encoder
        if encoder.image_size != SCORER_SIZE or encoder.n_timesteps <= first:
            found = f"noise-aware CLIP for {encoder.image_size} px and {encoder.n_timesteps} timesteps"
            wanted = f"{SCORER_SIZE} px and timesteps up to {first}: name another with noise_clip="
            raise InputError(f"{self.models.name} has a {found}, and needs {wanted}, or turn balancing off")
        return clip.scorer(prompts)

    def upscaled(
        self, low_res: Tensor, score: Score | None, generators: list[torch.Generator]
    ) -> Iterator[LatentState]:
        models, upscale = self.models, self.request.upscale
        models.make_room("upscaler")
        upscaler = models.upscaler
        text, null = upscaler.encode(self.prompts)
        schedule, levels = models.latent_schedule(upscale.num_inference_steps)
        return sample_stage3(
            upscaler.unet, low_res, text, null, self.views, decode=upscaler.decoder.picture,
            encode=upscaler.encoder.latents if upscale.views == "all" else None, score=score,
            generators=generators, upscale=upscale, recipe=self.recipe, schedule=schedule, noise_levels=levels,
        )  # fmt: skip


class EachView:
    """In a batch of several runs' pictures each image's own view, at one of its places."""

    def __init__(self, views: Sequence[View]) -> None:
        self.views, self.reduce = views, views[0].reduce

    def view(self, x: Tensor) -> Tensor:
        return torch.stack([view.view(one) for view, one in zip(self.views, x, strict=True)])

    def inverse_view(self, prediction: Tensor) -> Tensor:
        return torch.stack([v.inverse_view(one) for v, one in zip(self.views, prediction, strict=True)])

    def inverse_map(self, maps: Tensor) -> Tensor:
        return torch.stack([view.inverse_map(one) for view, one in zip(self.views, maps, strict=True)])


def sample_jobs(jobs: Sequence[Job], batch_size: int) -> Iterator[tuple[Sequence[Job], int, StepState]]:
    """The pictures of (run, seed) pairs, batch by batch: of one run, or of several that `joins` lets into one batch.
    Yields a batch's pairs, the stage and what the step left behind.
    """
    if not jobs:
        return
    first, models = jobs[0][0], jobs[0][0].models
    request, stages = first.request, range(1, 1 + len(first.sizes))
    schedules = {stage: models.schedule(stage, request.recipe.num_inference_steps) for stage in stages[:2]}
    texts = {run: run.text() for run in dict.fromkeys(run for run, _ in jobs)}

    @cache
    def shared(runs: tuple[SamplingRun, ...]) -> tuple[Tensor, Sequence[Any], Any, Score | None]:
        """Text, views, spans and scorer: one run's, or each image's own."""
        score = partial(first.scorer, schedules) if request.balances else lambda prompts: None
        if len(runs) == 1:
            return texts[runs[0]][0], runs[0].views, runs[0].spans, score(runs[0].prompts)
        views = [EachView(column) for column in zip(*(run.views for run in runs), strict=True)]
        spans = None if first.spans is None else [run.spans for run in runs]
        text, prompts = [texts[run][0] for run in runs], [run.prompts for run in runs]
        return torch.stack(text), views, spans, score(prompts)

    def states(stage: int, batch: Sequence[Job]) -> Iterator[StepState]:
        runs = tuple(run for run, _ in batch)
        text, views, spans, score = shared(runs[:1] if len({*runs}) == 1 else runs)
        generators = [drawn[job] for job in batch]
        there = all(job in made for job in batch)
        low_res = torch.stack([made[job] for job in batch]) if there else text
        if stage == 1 and there:
            return iter([_as_given(low_res, schedules[1].num_inference_steps, len(views))])
        if stage == 3:
            return runs[0].upscaled(low_res, score, generators)
        own: dict[str, Any] = {"score": score, "generators": generators, "recipe": request.recipe}
        own |= {"size": request.sizes[stage - 1], "schedule": schedules[stage], "fused": models.fused}
        own |= first.rules[stage] | request.given.arguments(stage, request.sizes[stage - 1], len(batch))
        if stage == 1:
            return sample_stage1(models.unet_1, text, texts[first][1], views, spans=spans, **own)
        own["noise_level"] = request.noise_level
        return sample_stage2(models.unet_2, low_res, text, texts[first][1], views, **own)

    shared((first,))  # what is wrong with the scorer, or damaged, shows now, not when stage I is done
    for stage in schedules:
        models.check_unet(stage)
    batches = [jobs[start : start + batch_size] for start in range(0, len(jobs), batch_size)]
    # Where the networks cannot be in memory together, all batches pass one stage before the next is loaded.
    together = models.keeps_all or len(stages) == 1
    for group in [[batch] for batch in batches] if together else [batches]:
        drawn, made = _beginnings([job for batch in group for job in batch])
        for stage in stages:
            parts = group
            if stage == 3:  # which has one text for all its pictures
                parts = [[*part] for batch in group for _, part in groupby(batch, key=lambda job: id(job[0]))]
            for part in parts:
                for state in states(stage, part):
                    if state.index + 1 == state.num_steps:
                        made |= zip(part, state.x.clamp(-1, 1), strict=True)  # as the next stage wants them
                    yield part, stage, state
            for run, seed in drawn if stage == 1 else ():
                if run.begun is not None:
                    run.begun[seed] = made[run, seed], drawn[run, seed].clone_state()


def _beginnings(jobs: Sequence[Job]) -> tuple[dict[Job, torch.Generator], dict[Job, Tensor]]:
    """One generator per image for all stages, as in the released code; stage I's picture where it is there."""
    drawn, made = {job: torch.Generator("cpu").manual_seed(job[1]) for job in jobs}, dict[Job, Tensor]()
    for run, seed in jobs:
        given = run.request.given
        if given.strengths[:1] == (0,):
            made[run, seed] = given.arguments(1, run.sizes[0], 1)["start"][0][0]
        if run.begun is not None and seed in run.begun:
            made[run, seed], generator = run.begun[seed]
            drawn[run, seed] = generator.clone_state()
    return drawn, made


class Joined:
    """Requests of several threads at one cascade, in batches of up to `limit` pictures.

    One thread samples at a time; what the others ask meanwhile waits, and is taken together where `joins` lets it.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.sampling = limit, threading.Lock()
        self.waiting: dict[Job, None] = {}

    def make(self, run: SamplingRun) -> None:
        own, run.error = dict.fromkeys((run, seed) for seed in run.seeds), None
        self.waiting.update(own)
        try:
            while True:
                with self.sampling:  # under which all are made: what waits no more is done
                    waiting = list(self.waiting)  # to which others may add meanwhile
                    if own.keys().isdisjoint(waiting):
                        break
                    self._make([job for job in waiting if waiting[0][0].joins(job[0])][: self.limit])
        finally:
            self._drop(own)  # who is interrupted leaves nothing to others
        if run.error is not None:
            raise run.error

    def _make(self, batch: Sequence[Job]) -> None:
        self._drop(batch)
        try:
            for step in sample_jobs(batch, self.limit):
                keep_pictures(*step)
        except Exception as error:
            if len({run for run, _ in batch}) > 1:
                for job in batch:  # one request's error is no other's
                    self._make([job])
            else:
                run = batch[0][0]
                run.error = error
                self._drop([(run, seed) for seed in run.seeds])

    def _drop(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            self.waiting.pop(job, None)


def keep_pictures(jobs: Sequence[Job], stage: int, state: StepState) -> None:
    """If a stage is done, copies of its pictures on the CPU for their runs."""
    if (pictures := picture_of(state)) is not None:
        for (run, seed), picture in zip(jobs, pictures, strict=True):
            run.made[run.sizes[stage - 1]][seed] = picture.detach().to("cpu", torch.float32).clamp(-1, 1)


def _as_given(pictures: Tensor, steps: int, views: int) -> StepState:
    """The one state of a stage that is left out, whose pictures are given."""
    weights = torch.full((len(pictures), views), 1 / views, dtype=torch.float32, device="cpu")
    return StepState(steps - 1, 0, pictures.clone(), pictures.clone(), weights, weights.sum(1), None, steps)
