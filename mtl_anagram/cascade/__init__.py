"""Cascade: one release's models, and the one place where a request becomes pictures."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, InputError, PromptWarning, whole_number
from ..files.hub import Source
from ..files.prompt_cache import PromptCache
from ..models.releases import find_parts
from ..sampling import Recipe, UpscaleRecipe
from ..sampling.checks import check_kinds
from ..sampling.loop import After, Combine, Step
from ..views import View, get_views
from .models import Models, embedded_folder
from .request import Request, Size, check_networks, check_seeds, checked_prompts, checked_sizes, checked_texts
from .run import CascadeStep, SamplingRun

__all__ = ["Cascade", "CascadeStep", "SamplingRun", "check_seeds", "embedded_folder"]


class Cascade(Models):
    """The models of one cascade, each a lazy attribute that may be replaced, and `sample`."""

    @classmethod
    def from_pretrained(
        cls,
        source: Source | None = None,
        *,
        stage_2: Source | None = None,
        stage_3: Source | None = None,
        noise_clip: Source | None = None,
        variant: str | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        keep: str = "auto",
        text_encoder: str = "auto",
        prompt_cache: PromptCache | str | Path | None = None,
    ) -> Cascade:
        """A cascade from a release's name ("IF-M", "IF-L", "IF-XL"), a folder or a hub id; None = the embedded one.

        A folder holds either `stage_1/` (and `stage_2/`, `stage_3/`, `noise_clip/`, `cascade.json`), or one release of
        stage I (`unet/`, `text_encoder/`, `tokenizer/`), as a hub id does; `stage_2`, `stage_3` (the x4 upscaler) and
        `noise_clip` then name the other parts, "none" leaves one out. variant: of the weight files, "fp16" or "fp32".
        device None = the best there is; dtype None = float16 on CUDA, else float32. keep: "all" networks stay in
        memory, "one" stage's do, "auto": all where they fit. text_encoder: "whole", "streamed" from its files with
        little memory, or "auto". prompt_cache: a folder where prompts' states are kept. What is sampled depends on
        none of the last three. Only small JSON files are read here.
        """
        parts = find_parts(
            embedded_folder() if source is None else source, variant,
            stage_2=stage_2, stage_3=stage_3, noise_clip=noise_clip,
        )  # fmt: skip
        try:
            recipe = Recipe.from_dict(parts.recipe or {})
        except InputError as error:
            raise ConfigError(f"the recipe in the cascade.json of {source}: {error}") from None
        return cls(parts, recipe, device, dtype, keep, text_encoder, prompt_cache)

    def sample(
        self,
        prompts: Sequence[str],
        views: Sequence[str | View],
        seeds: int | Sequence[int] = 0,
        *,
        style: str = "",
        negative: str | Sequence[str] | None = None,
        concepts: Sequence[str | None] | None = None,
        view_args: Sequence[Any] | None = None,
        recipe: Recipe | None = None,
        size: Size | None = None,
        stop_after: int | None = None,
        noise_level: int = 50,
        upscale: UpscaleRecipe | None = None,
        batch_size: int = 4,
        combine: Combine | Mapping[int, Combine] | None = None,
        step: Step | Mapping[int, Step] | None = None,
        after: After | Mapping[int, After] | None = None,
    ) -> SamplingRun:
        """Pictures in memory: `cascade.sample(prompts, views, seeds).pictures[64]`, or step by step in a for loop.

        prompts, views: one each per reading; [brackets] may mark a prompt's concept, or `concepts` name it. style: put
        before every prompt. negative: what stages I and II are led away from, for all or per view. seeds: one or
        several, 0 to 2^63-1, sampled batch_size at a time. recipe None = the cascade's own. size: of stage I in px, or
        (height, width). stop_after: the height after which to stop. noise_level: stage II's, 0 to 999. upscale: how
        stage III is sampled. combine, step, after: in place of what the recipe makes (`sampling.sample`), for both
        stages or by stage, such as {1: f}. All is checked at the call: InputError, ConfigError, WeightsError,
        SourceError; PromptWarning where a prompt asks for what cannot be read, or drawn by a small cascade.
        """
        none = type(None)
        check_kinds(style=(style, str), recipe=(recipe, Recipe, none), upscale=(upscale, UpscaleRecipe, none))
        whole_number("batch_size", batch_size, 1)
        whole_number("noise_level", noise_level, 0, 999)
        clean, marked, positions = checked_prompts(style, prompts, concepts)
        made = get_views(views, view_args)
        if len(clean) != len(made):
            said = f"there are {len(clean)} prompts for {len(made)} views"
            raise InputError(f"{said}: give one prompt for each view")
        request = Request(
            style, clean, None if negative is None else checked_texts("negative", negative, len(made), str), marked,
            positions, made, recipe or self.recipe, noise_level, checked_sizes(self, made, size, stop_after),
            upscale or UpscaleRecipe(),
        )  # fmt: skip
        if upscale is not None and len(request.sizes) < 3:
            said = f"upscale is given, but no stage III is to run: the sizes are {request.sizes}"
            raise InputError(f"{said}; name it with stage_3=, or leave upscale out")
        check_networks(self, request)
        hooks = {"combine": combine, "step": step, "after": after}
        run = SamplingRun(self, request, check_seeds(seeds), batch_size, hooks)
        for text in run.warnings:
            warnings.warn(text, PromptWarning, stacklevel=3)
        return run
