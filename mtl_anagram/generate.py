"""generate_anagram(): prompts and views in, picture files out; whole files only, finished seeds skipped."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from .cascade import MAX_TOKENS, Cascade
from .checksums import combined_checksum
from .devices import resolve_device
from .errors import InputError
from .job import Job, check_networks, check_noise_level, check_seeds, check_sizes, column, parse_prompts
from .models.sources import Source, read_json
from .output import Anagram, check_folder, check_room, clear, finish, finished, folder_of, write_pictures
from .prompts import check_learnt, check_prompts, concept_span
from .sampling import LatentState, Recipe, Schedule, StepState, UpscaleRecipe, sample_stage1, sample_stage2
from .upscale import Upscaling
from .views import View, get_views, view_from_metadata

DEFAULT_STEPS, DEFAULT_GUIDANCE, DEFAULT_NOISE_LEVEL = 30, 10.0, 50
OnStep = Callable[[list[int], int, StepState | LatentState], None]


def generate_anagram(
    style: str,
    prompts: Sequence[str],
    views: Sequence[str | View],
    save_dir: str | Path,
    device: str | torch.device | None = None,
    seed: int | Sequence[int] = 0,
    num_inference_steps: int = DEFAULT_STEPS,
    guidance_scale: float = DEFAULT_GUIDANCE,
    noise_level: int = DEFAULT_NOISE_LEVEL,
    view_args: Sequence[Any] | None = None,
    *,
    model: Cascade | Source | None = None,
    recipe: Recipe | None = None,
    upscale: UpscaleRecipe | None = None,
    concepts: Sequence[str | None] | None = None,
    stop_after: int | None = None,
    size: int | None = None,
    batch_size: int = 4,
    overwrite: bool = False,
    progress: bool = False,
    on_step: OnStep | None = None,
) -> list[Anagram]:
    """Sample pictures that read as `prompts[i]` under `views[i]`, and write them: the released code's call.

    Writes SAVE_DIR/SEED (4 digits)/sample_64.png, sample_64.views.png (all views side by side) and, where the
    cascade has a stage II, sample_256.png and sample_256.views.png, and where it has a stage III too the same
    at 1024 px; metadata.json comes last and holds what is needed to make the pictures again
    (`repeat_anagram`). A seed whose folder holds all this for the same request is skipped; a folder that holds
    another request's is an error, unless `overwrite`.

    style: words put before every prompt, "" for none. prompts, views: one each per reading, 1 or more; in a
    prompt, [brackets] may mark the concept. device None = the best there is. seed: one or several, 0 to
    2^63-1; several are sampled `batch_size` at a time, each as it would be alone. num_inference_steps 1 to
    1000 and guidance_scale replace the recipe's where they differ from 30 and 10.0. noise_level: stage II's,
    0 to 999. view_args: keyword arguments per view, or None.
    model: None = the embedded cascade, a folder, a hub id of stage I, or a Cascade. recipe None = the one the
    cascade comes with. upscale: how stage III is sampled, None = as released. concepts: per prompt the words
    whose attention is kept apart, None = the last word.
    stop_after: the side in px after which to stop. size: stage I's side, None = what it was trained at.
    progress: show a bar. on_step(seeds, stage, state) is called at every step.

    Raises InputError, ConfigError, WeightsError (all ValueErrors) or SourceError (an OSError) before any
    sampling starts; warns (PromptWarning) of prompts for things that a small cascade has not learnt to draw.
    """
    job_seeds = check_seeds(seed)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"batch_size={batch_size!r} must be a whole number of at least 1")
    if recipe is not None and not isinstance(recipe, Recipe):
        raise InputError(f"recipe={recipe!r} must be a Recipe, such as Recipe.released(), or None")
    if upscale is not None and not isinstance(upscale, UpscaleRecipe):
        raise InputError(f"upscale={upscale!r} must be an UpscaleRecipe, or None")
    if not isinstance(style, str):
        raise InputError(f"style={style!r} must be a string; '' for none")
    if on_step is not None and not callable(on_step):
        raise InputError(f"on_step={on_step!r} must be a function on_step(seeds, stage, state), or None")
    clean, marked, positions = parse_prompts(style, prompts, concepts)
    made_views = get_views(views, view_args)
    check_prompts(clean, len(made_views))
    check_noise_level(noise_level)
    folder = check_folder(save_dir)
    changes: dict[str, Any] = {}
    if num_inference_steps != DEFAULT_STEPS:
        changes["num_inference_steps"] = num_inference_steps
    if guidance_scale != DEFAULT_GUIDANCE:
        changes["guidance_scale"] = guidance_scale
    dataclasses.replace(Recipe.released() if recipe is None else recipe, **changes)  # checks the values
    resolved = resolve_device(device) if device is not None else None

    cascade = _cascade(model, resolved)
    check_learnt(clean, cascade.concepts, cascade.name)
    chosen = dataclasses.replace(cascade.recipe if recipe is None else recipe, **changes)
    sizes = check_sizes(cascade, made_views, size, stop_after, chosen)
    if upscale is not None and len(sizes) < 3:
        raise InputError(
            f"upscale is given, but no stage III is to run: the sizes are {sizes}; name it with stage_3=, or leave "
            "upscale out"
        )
    job = Job(clean, marked, positions, made_views, chosen, noise_level, sizes, upscale or UpscaleRecipe())
    return list(_run(cascade, job, style, job_seeds, folder, batch_size, overwrite, progress, on_step))


def repeat_anagram(
    metadata: str | Path,
    save_dir: str | Path,
    device: str | torch.device | None = None,
    *,
    model: Cascade | Source | None = None,
    progress: bool = False,
    overwrite: bool = False,
) -> Anagram:
    """Make a picture again from its metadata.json, with the same weights, into another folder.

    model: where the weights are, None = the embedded cascade. Raises InputError where the weights are not
    those that made the picture, or the file is not metadata of ours.
    """
    if not isinstance(metadata, str | Path):
        raise InputError(f"metadata={metadata!r} must be the path of a metadata.json")
    content = read_json(Path(metadata))
    try:
        if content["format"] != 1 or type(content["seed"]) is not int:
            raise InputError(
                f"format={content['format']!r} must be 1, and seed={content['seed']!r} one number"
            )
        request, seed = content["request"], content["seed"]
        recipe = Recipe.from_dict(request["recipe"])
        views = [view_from_metadata(view) for view in column(request, "views", dict)]
        checksum = request["weights_sha256"]
        stage_3 = dict(request.get("stage_3", {}))
        checksum_3 = stage_3.pop("weights_sha256", None)
        job = Job(
            column(request, "prompts", str),
            column(request, "concepts", str, type(None), length=len(views)),
            column(request, "concept_positions", int, type(None), length=len(views)),
            views,
            recipe,
            request["noise_level"],
            column(content, "sizes", int),
            UpscaleRecipe.from_dict(stage_3),
        )
        style = request["style"]
        if not isinstance(style, str):
            raise InputError(f"style={style!r} must be a string")
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{metadata} is not metadata of this library ({type(error).__name__}: {error}); give a "
            "metadata.json that generate_anagram wrote"
        ) from error
    seeds = check_seeds(seed)
    check_noise_level(job.noise_level)
    check_prompts(job.prompts, len(views))
    folder = check_folder(save_dir)
    cascade = _cascade(model, resolve_device(device) if device is not None else None)
    found = combined_checksum(cascade.checksums())
    if found != checksum:
        raise InputError(
            f"{metadata} was made with weights of sha256 {checksum}, but {cascade.name} has {found}: name the "
            "same weights with model="
        )
    if cascade.has_stage_3 and "stage_3" in request:
        found = combined_checksum(cascade.upscaler_checksums())
        if found != checksum_3:
            raise InputError(
                f"{metadata} was made with a stage III of sha256 {checksum_3}, but {cascade.name} has {found}: name "
                "the same weights"
            )
    possible = check_sizes(cascade, views, job.sizes[0], job.sizes[-1], recipe)
    if possible != job.sizes or job.upscales != ("stage_3" in request):
        raise InputError(
            f"{metadata} has sizes={job.sizes}, but {cascade.name} makes {possible}: it is damaged"
        )
    return next(iter(_run(cascade, job, style, seeds, folder, 1, overwrite, progress, None)))


def _cascade(model: Cascade | Source | None, device: torch.device | None) -> Cascade:
    if isinstance(model, Cascade):
        places = [(place.type, place.index or 0) for place in (device or model.device, model.device)]
        if places[0] != places[1]:
            raise InputError(
                f"device={str(device)!r}, but the cascade is on {str(model.device)!r}: leave device out, or make "
                "the Cascade there"
            )
        return model
    return Cascade.from_pretrained(model, device=device)


def _run(
    cascade: Cascade,
    job: Job,
    style: str,
    seeds: list[int],
    folder: Path,
    batch_size: int,
    overwrite: bool,
    progress: bool,
    on_step: OnStep | None,
) -> Iterator[Anagram]:
    guided = job.recipe.anti_segregation and len(job.views) > 1
    cascade.check_memory(
        views=len(job.views), batch_size=min(batch_size, len(seeds)), sizes=job.sizes, guided=guided
    )
    request = job.request(style, cascade)
    done = {seed: finished(folder, seed, request, job.sizes, overwrite) for seed in seeds}
    todo = [seed for seed in seeds if done[seed] is None]
    spans = None
    if guided:
        spans = [
            concept_span(cascade.tokenizer, prompt, concept, position=position, max_length=MAX_TOKENS)
            for prompt, concept, position in zip(job.prompts, job.concepts, job.positions, strict=True)
        ]
    if job.recipe.balancing and len(job.views) > 1 and not cascade.has_noise_clip:
        raise InputError(
            f"balancing needs a noise-aware CLIP and the cascade {cascade.name} has none: name its folder with "
            "noise_clip=, or turn balancing off in the recipe"
        )
    made: dict[int, Anagram] = {}
    if todo:
        for seed in todo:
            check_room(folder_of(folder, seed), job.sizes)
        schedules = [
            cascade.schedule(stage + 1, job.recipe.num_inference_steps) for stage in range(len(job.sizes[:2]))
        ]
        text, null = cascade.encode(job.prompts)
        check_networks(cascade, job, schedules, text.shape[-1])
        score = None
        if job.recipe.balancing and len(job.views) > 1:
            score = cascade.noise_clip.scorer(job.prompts)
        upscaling = Upscaling(cascade, job, score) if job.upscales else None
        cascade.prepare(len(schedules))
        steps = len(schedules) * job.recipe.num_inference_steps
        steps += job.upscale.num_inference_steps if job.upscales else 0
        with _bar(progress, len(todo) * steps) as bar:

            def step(batch: list[int], stage: int, state: StepState | LatentState) -> None:
                bar.set_description(f"stage {'I' * stage}, seed {_span(batch)}", refresh=False)
                if isinstance(state, StepState) and state.loss is not None:
                    bar.set_postfix_str(f"overlap loss {state.loss.mean().item():.3f}", refresh=False)
                bar.update(len(batch))
                if on_step is not None:
                    on_step(batch, stage, state)

            batches = [todo[start : start + batch_size] for start in range(0, len(todo), batch_size)]
            # Where the stages' networks cannot be in memory together, all batches pass one stage before the next
            # is loaded; else a batch is finished before the next begins.
            together = cascade.keeps_all or len(job.sizes) == 1
            for group in [[batch] for batch in batches] if together else [batches]:
                runs = [
                    _stages(cascade, job, batch, text, null, spans, score, schedules, upscaling, step)
                    for batch in group
                ]
                for side in job.sizes:
                    for batch, run in zip(group, runs, strict=True):
                        stage = next(run)
                        for seed, picture in zip(batch, stage.pictures, strict=True):
                            if overwrite and stage.num == 1:
                                clear(folder_of(folder, seed))
                            write_pictures(folder_of(folder, seed), side, picture, job.views)
                for seed in (seed for batch in group for seed in batch):
                    made[seed] = finish(folder, seed, request, cascade, job.sizes)
    for seed in seeds:
        yield done[seed] or made[seed]


@dataclass(frozen=True)
class _Stage:
    num: int
    pictures: Tensor  # (B, 3, H, W)


def _stages(
    cascade: Cascade,
    job: Job,
    seeds: list[int],
    text: Tensor,
    null: Tensor,
    spans: list[tuple[int, int]] | None,
    score: Any,
    schedules: list[Schedule],
    upscaling: Upscaling | None,
    step: Callable[[list[int], int, StepState | LatentState], None],
) -> Iterator[_Stage]:
    """Stage I, then II and III where asked for; one generator per image serves all, as in the released code."""
    recipe = job.recipe
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    states = sample_stage1(
        cascade.unet_1,
        text,
        null,
        job.views,
        score=score,
        spans=spans,
        generators=generators,
        recipe=recipe,
        size=job.sizes[0],
        schedule=schedules[0],
    )
    for state in states:
        step(seeds, 1, state)
    yield _Stage(1, state.x)
    if len(job.sizes) > 1:
        states = sample_stage2(
            cascade.unet_2,
            state.x,
            text,
            null,
            job.views,
            score=score,
            generators=generators,
            recipe=recipe,
            noise_level=job.noise_level,
            size=job.sizes[1],
            schedule=schedules[1],
        )
        for state in states:
            step(seeds, 2, state)
        yield _Stage(2, state.x)
    if upscaling is not None:
        for latent_state in upscaling.sample(state.x, generators):
            step(seeds, 3, latent_state)
        yield _Stage(3, cast(Tensor, latent_state.picture))  # the last state has it


def _span(seeds: list[int]) -> str:
    return str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]}..{seeds[-1]}"


def _bar(progress: bool, total: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit="step", disable=not progress, dynamic_ncols=True)
