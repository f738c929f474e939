"""Cascade: one release's models, and the one place where a request becomes pictures."""

from __future__ import annotations

import sys
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
from .given import Picture, checked_given
from .models import Models, embedded_folder
from .request import Request, Size, check_networks, check_seeds, checked_prompts, checked_sizes, checked_texts
from .run import CascadeStep, Joined, SamplingRun

__all__ = ["Cascade", "CascadeStep", "Picture", "SamplingRun", "check_seeds", "embedded_folder"]


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
        max_batch: int | None = None,
        compile: bool | str = False,
        fused: str | None = None,
    ) -> Cascade:
        """A cascade from a release's name ("IF-M", "IF-L", "IF-XL"), a folder or a hub id; None = the embedded one.

        A folder has `stage_1/` (and `stage_2/`, `stage_3/`, `noise_clip/`, `cascade.json`), or is stage I's release
        (`unet/`, `text_encoder/`, `tokenizer/`), as a hub id is; `stage_2`, `stage_3` (the x4 upscaler), `noise_clip`
        name the other parts, "none" for none. variant: of the weight files, "fp16" or "fp32". device None = the best
        there is; dtype None = float16 on CUDA, else float32. keep: "all" networks in memory, "one" stage's, "auto": all
        that fit. text_encoder: "whole", "streamed" from its files with little memory, "auto". prompt_cache: a folder of
        prompts' states. max_batch: how many pictures of several threads' `sample(...).pictures` share a batch; None =
        each its own. fused: "torch" or "triton", the sampler in fewer passes (`sampling.fused`). These five change
        nothing (to rounding). compile: stages I and II by torch.compile, True or a backend's name; minutes at first.
        """
        parts = find_parts(
            embedded_folder() if source is None else source, variant,
            stage_2=stage_2, stage_3=stage_3, noise_clip=noise_clip,
        )  # fmt: skip
        try:
            recipe = Recipe.from_dict(parts.recipe or {})
        except InputError as error:
            raise ConfigError(f"the recipe in the cascade.json of {source}: {error}") from None
        cascade = cls(parts, recipe, device, dtype, keep, text_encoder, prompt_cache, compile, fused)
        cascade.joined = None if max_batch is None else Joined(whole_number("max_batch", max_batch, 1))
        return cascade

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
        start_from: Picture | None = None,
        strength: float | Sequence[float] | None = None,
        reference: Picture | None = None,
        reference_view: str | View | None = None,
    ) -> SamplingRun:
        """Pictures in memory: `cascade.sample(prompts, views, seeds).pictures[64]`, or step by step in a for loop.

        prompts, views: one each per reading; [brackets] may mark a prompt's concept, or `concepts` name it. style: put
        before every prompt. negative: what to lead stages I and II away from, for all or per view. seeds: 0 to 2^63-1,
        sampled batch_size at a time. recipe None = the cascade's own. size: of stage I in px, or (height, width).
        stop_after: the height after which to stop. noise_level: stage II's, 0 to 999. upscale: stage III's recipe.
        combine, step, after: instead of the recipe's (`sampling.sample`), or by stage, such as {1: f}. start_from: a
        picture (a file, or (3, H, W) in [-1, 1]) that the stages vary by `strength`, 0 to 1 (default 0.6): stage I's,
        or [I's, II's]; 0 takes it for stage I's result. reference: one whose component under reference_view (default
        "low_pass") is kept at every step of stages I and II. All is checked at the call: InputError, ConfigError,
        SourceError; a damaged weight file, WeightsError, before the first step. PromptWarning where a prompt asks for
        what cannot be read, or drawn.
        """
        none = type(None)
        check_kinds(style=(style, str), recipe=(recipe, Recipe, none), upscale=(upscale, UpscaleRecipe, none))
        whole_number("batch_size", batch_size, 1)
        whole_number("noise_level", noise_level, 0, 999)
        clean, marked, positions = checked_prompts(style, prompts, concepts)
        made = get_views(views, view_args)
        if len(clean) != len(made):
            raise InputError(f"there are {len(clean)} prompts for {len(made)} views: give one for each view")
        negatives = None if negative is None else checked_texts("negative", negative, len(made), str)
        sizes = checked_sizes(self, made, size, stop_after)
        given = checked_given(sizes, start_from, strength, reference, reference_view)
        more = (recipe or self.recipe, noise_level, sizes, upscale or UpscaleRecipe(), given)
        request = Request(style, clean, negatives, marked, positions, made, *more)
        if upscale is not None and len(request.sizes) < 3:
            said = f"upscale is given, but no stage III is to run: the sizes are {request.sizes}"
            raise InputError(f"{said}; name it with stage_3=, or leave upscale out")
        check_networks(self, request)
        hooks = {"combine": combine, "step": step, "after": after}
        run = SamplingRun(self, request, check_seeds(seeds), batch_size, hooks)
        inside = sys._getframe(1).f_globals.get("__name__", "").startswith("mtl_anagram.")  # generate_anagram
        for text in run.warnings:
            warnings.warn(text, PromptWarning, stacklevel=2 + inside)
        return run
