"""A request under way: the stages one after the other, batch by batch, step by step; nothing is written."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from ..models.prompts import concept_span, request_warnings
from ..sampling import LatentState, Schedule, StepState, sample_stage1, sample_stage2, sample_stage3
from ..sampling.stages import SCORER_SIZE, Score
from .models import Models
from .request import Request, Size, sides_of

log = logging.getLogger("mtl_anagram")


class CascadeStep(NamedTuple):
    """One step of a run: which seeds are in the batch, which stage (1 to 3), and what the step left behind."""

    seeds: tuple[int, ...]
    stage: int
    state: StepState

    @property
    def picture(self) -> Tensor | None:
        """The stage's pictures (B, 3, H, W) in [-1, 1], if this is its last step, else None."""
        state = self.state
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
        self._spans = list(spans) if request.segregates else None
        self._pictures: dict[Size, dict[int, Tensor]] = {size: {} for size in request.sizes}
        self._steps = self._run(hooks_by_stage(hooks))

    def __iter__(self) -> Iterator[CascadeStep]:
        return self

    def __next__(self) -> CascadeStep:
        step = next(self._steps)
        if step.picture is not None:
            made = step.picture.detach().to("cpu", torch.float32, copy=True)
            self._pictures[self.sizes[step.stage - 1]] |= dict(zip(step.seeds, made, strict=True))
        return step

    @property
    def pictures(self) -> dict[Size, Tensor]:
        for _ in self:
            pass
        if any(len(found) < len(self.seeds) for found in self._pictures.values()):
            raise InputError("this run ended by an error before its pictures were made: call sample again")
        return {size: torch.stack([made[s] for s in self.seeds]) for size, made in self._pictures.items()}

    def only(self, seeds: list[int], stages: int | None = None) -> SamplingRun:
        """The same request from its beginning, of these seeds and the first stages alone; None = all that it has."""
        request = replace(self.request, sizes=self.request.sizes[:stages])
        return SamplingRun(self.models, request, seeds, self.batch_size, self.hooks)

    def _run(self, hooks: dict[int, dict[str, Any]]) -> Iterator[CascadeStep]:
        if not self.seeds:
            return
        models, request, steps = self.models, self.request, self.recipe.num_inference_steps
        text, null = models.encode(request.prompts)
        if request.negative is not None:
            null = models.encode(request.negative)[0]
        schedules = {stage: models.schedule(stage, steps) for stage in (1, 2)[: len(self.sizes)]}
        score = self._scorer(schedules) if request.balances else None
        for stage in schedules:  # a file that is damaged shows now, not when stage I is done
            models.check_unet(stage)

        def states(stage: int, low_res: Tensor, generators: list[torch.Generator]) -> Iterator[StepState]:
            if stage == 3:
                return self._upscaled(low_res, score, generators)
            shared: dict[str, Any] = {"score": score, "generators": generators, "recipe": self.recipe}
            shared |= {"size": self.sizes[stage - 1], "schedule": schedules[stage], **hooks[stage]}
            if stage == 1:
                return sample_stage1(models.unet_1, text, null, self.views, spans=self._spans, **shared)
            shared["noise_level"] = request.noise_level
            return sample_stage2(models.unet_2, low_res, text, null, self.views, **shared)

        count = self.batch_size
        batches = [tuple(self.seeds[start : start + count]) for start in range(0, len(self.seeds), count)]
        # Where the networks cannot be in memory together, all batches pass one stage before the next is loaded.
        together = models.keeps_all or len(self.sizes) == 1
        for group in [[batch] for batch in batches] if together else [batches]:
            # One generator per image serves all stages, as in the released code.
            drawn = {batch: [torch.Generator("cpu").manual_seed(seed) for seed in batch] for batch in group}
            made = dict.fromkeys(group, text)  # the stage before's pictures; stage I takes none
            for stage in range(1, 1 + len(self.sizes)):
                for batch in group:
                    log.debug("stage %s, seeds %s", "I" * stage, batch)
                    for state in states(stage, made[batch], drawn[batch]):
                        if state.index + 1 == state.num_steps:
                            made[batch] = state.x.clone()  # the state is the caller's, who may change it
                        yield CascadeStep(batch, stage, state)

    def _scorer(self, schedules: dict[int, Schedule]) -> Score:
        """The noise-aware CLIP's; InputError for one that cannot score what the stages make."""
        clip, first = self.models.noise_clip, max(schedule.timesteps[0] for schedule in schedules.values())
        encoder = clip.image_encoder
        if encoder.image_size != SCORER_SIZE or encoder.n_timesteps <= first:
            found = f"noise-aware CLIP for {encoder.image_size} px and {encoder.n_timesteps} timesteps"
            wanted = f"{SCORER_SIZE} px and timesteps up to {first}: name another with noise_clip="
            raise InputError(f"{self.models.name} has a {found}, and needs {wanted}, or turn balancing off")
        return clip.scorer(self.prompts)

    def _upscaled(
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
