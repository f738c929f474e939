"""generate_anagram(): prompts and views in, picture files out; whole files only, finished seeds skipped."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .cascade import MAX_TOKENS, Cascade, combined_checksum
from .devices import resolve_device
from .errors import InputError, SourceError
from .media import encode_png, remove_leftovers, side_by_side, write_atomically
from .models.sources import Source, read_json
from .prompts import check_prompts, concept_span, parse_concept, styled
from .sampling import Recipe, Schedule, StepState, sample_stage1, sample_stage2
from .sampling.stages import SCORER_SIZE
from .views import View, get_views, view_from_metadata

DEFAULT_STEPS, DEFAULT_GUIDANCE, DEFAULT_NOISE_LEVEL = 30, 10.0, 50
MAX_SEED = 2**63 - 1
MAX_SIDE = 1024  # px, of stage I; far above it no machine has the memory
METADATA = "metadata.json"
OnStep = Callable[[list[int], int, StepState], None]


@dataclass(frozen=True)
class Anagram:
    """What one seed became: its folder, its pictures' files by side in px, and whether it was there before."""

    seed: int
    folder: Path
    pictures: dict[int, Path]
    skipped: bool


@dataclass(frozen=True)
class _Job:
    """A checked request: everything that the loops need but the models."""

    prompts: list[str]
    concepts: list[str | None]
    positions: list[int | None]
    views: list[View]
    recipe: Recipe
    noise_level: int
    sizes: list[int]

    def request(self, style: str, cascade: Cascade) -> dict[str, Any]:
        """What decides a picture besides its seed, as JSON."""
        return {
            "style": style,
            "prompts": self.prompts,
            "concepts": self.concepts,
            "concept_positions": self.positions,
            "views": [view.to_metadata() for view in self.views],
            "recipe": self.recipe.to_dict(),
            "noise_level": self.noise_level,
            "size": self.sizes[0],
            "weights_sha256": combined_checksum(cascade.checksums()),
        }


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
    cascade has a stage II, sample_256.png and sample_256.views.png; metadata.json comes last and holds what is
    needed to make the pictures again (`repeat_anagram`). A seed whose folder holds all this for the same
    request is skipped; a folder that holds another request's is an error, unless `overwrite`.

    style: words put before every prompt, "" for none. prompts, views: one each per reading, 1 or more; in a
    prompt, [brackets] may mark the concept. device None = the best there is. seed: one or several, 0 to
    2^63-1; several are sampled `batch_size` at a time, each as it would be alone. num_inference_steps 1 to
    1000 and guidance_scale replace the recipe's where they differ from 30 and 10.0. noise_level: stage II's,
    0 to 999. view_args: keyword arguments per view, or None.
    model: None = the embedded cascade, a folder, a hub id of stage I, or a Cascade. recipe None = the one the
    cascade comes with. concepts: per prompt the words whose attention is kept apart, None = the last word.
    stop_after: the side in px after which to stop. size: stage I's side, None = what it was trained at.
    progress: show a bar. on_step(seeds, stage, state) is called at every step.

    Raises InputError, ConfigError, WeightsError (all ValueErrors) or SourceError (an OSError) before any
    sampling starts.
    """
    job_seeds = check_seeds(seed)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"batch_size={batch_size!r} must be a whole number of at least 1")
    if recipe is not None and not isinstance(recipe, Recipe):
        raise InputError(f"recipe={recipe!r} must be a Recipe, such as Recipe.released(), or None")
    if not isinstance(style, str):
        raise InputError(f"style={style!r} must be a string; '' for none")
    if on_step is not None and not callable(on_step):
        raise InputError(f"on_step={on_step!r} must be a function on_step(seeds, stage, state), or None")
    clean, marked, positions = _concepts(style, prompts, concepts)
    made_views = get_views(views, view_args)
    check_prompts(clean, len(made_views))
    _check_noise_level(noise_level)
    folder = check_folder(save_dir)
    changes: dict[str, Any] = {}
    if num_inference_steps != DEFAULT_STEPS:
        changes["num_inference_steps"] = num_inference_steps
    if guidance_scale != DEFAULT_GUIDANCE:
        changes["guidance_scale"] = guidance_scale
    dataclasses.replace(Recipe.released() if recipe is None else recipe, **changes)  # checks the values
    resolved = resolve_device(device) if device is not None else None

    cascade = _cascade(model, resolved)
    chosen = dataclasses.replace(cascade.recipe if recipe is None else recipe, **changes)
    sizes = _sizes(cascade, made_views, size, stop_after, chosen)
    job = _Job(clean, marked, positions, made_views, chosen, noise_level, sizes)
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
        views = [view_from_metadata(view) for view in _column(request, "views", dict)]
        checksum = request["weights_sha256"]
        job = _Job(
            _column(request, "prompts", str),
            _column(request, "concepts", str, type(None), length=len(views)),
            _column(request, "concept_positions", int, type(None), length=len(views)),
            views,
            recipe,
            request["noise_level"],
            _column(content, "sizes", int),
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
    _check_noise_level(job.noise_level)
    check_prompts(job.prompts, len(views))
    folder = check_folder(save_dir)
    cascade = _cascade(model, resolve_device(device) if device is not None else None)
    found = combined_checksum(cascade.checksums())
    if found != checksum:
        raise InputError(
            f"{metadata} was made with weights of sha256 {checksum}, but {cascade.name} has {found}: name the "
            "same weights with model="
        )
    possible = _sizes(cascade, views, job.sizes[0], job.sizes[-1], recipe)
    if possible != job.sizes:
        raise InputError(
            f"{metadata} has sizes={job.sizes}, but {cascade.name} makes {possible}: it is damaged"
        )
    return next(iter(_run(cascade, job, style, seeds, folder, 1, overwrite, progress, None)))


def _column(values: dict[str, Any], name: str, *kinds: type, length: int | None = None) -> list[Any]:
    """A list of the metadata whose entries are all of these kinds; InputError for anything else."""
    column = values[name]
    fits = isinstance(column, list) and bool(column) and all(type(entry) in kinds for entry in column)
    if not fits or (length is not None and len(column) != length):
        number = "1 or more" if length is None else str(length)
        words = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
        raise InputError(f"{name}={column!r} must be a list of {number}, each {words}")
    return column


def check_seeds(seed: int | Sequence[int]) -> list[int]:
    """One or several seeds -> a list without repetitions; InputError for anything else."""
    seeds = list(seed) if isinstance(seed, Sequence) and not isinstance(seed, str | bytes) else [seed]
    if not seeds:
        raise InputError("seed=[] names no seed: give at least one")
    for value in seeds:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_SEED:
            raise InputError(f"seed={value!r} must be a whole number from 0 to {MAX_SEED}")
    return list(dict.fromkeys(seeds))  # type: ignore[arg-type]


def check_folder(save_dir: str | Path) -> Path:
    """The output folder's path, if files can go there; it is made only when something is written."""
    if not isinstance(save_dir, str | Path) or not str(save_dir) or "\0" in str(save_dir):
        raise InputError(f"save_dir={save_dir!r} must be a folder's path")
    try:
        os.fsencode(save_dir)
        folder = Path(save_dir).expanduser()
    except (UnicodeEncodeError, RuntimeError) as error:  # half a character; a user without a home here
        raise InputError(
            f"save_dir={save_dir!r} cannot be a path ({error}); choose another folder"
        ) from error
    try:
        for ancestor in (folder, *folder.parents):
            if ancestor.exists():
                if not ancestor.is_dir():
                    raise SourceError(
                        f"save_dir={str(folder)!r}: {ancestor} is a file; choose another folder"
                    )
                break
    except OSError as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(f"save_dir={str(folder)!r} cannot be used ({error}); choose another") from error
    return folder


def _check_noise_level(noise_level: int) -> None:
    if isinstance(noise_level, bool) or not isinstance(noise_level, int) or not 0 <= noise_level <= 999:
        raise InputError(f"noise_level={noise_level!r} must be a whole number from 0 to 999 (50 is usual)")


def _concepts(
    style: str, prompts: Sequence[str], concepts: Sequence[str | None] | None
) -> tuple[list[str], list[str | None], list[int | None]]:
    """Full prompts without brackets; per prompt the concept named, and where it stands, or None."""
    if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not prompts:
        raise InputError(f"prompts={prompts!r} must be a list of strings, one per view")
    for prompt in prompts:
        if not isinstance(prompt, str) or not prompt.strip():
            raise InputError(f"prompt {prompt!r} must be a string that is not empty")
    parsed = [parse_concept(styled(style, prompt)) for prompt in prompts]
    clean, marked, positions = (list(column) for column in zip(*parsed, strict=True))
    if concepts is not None:
        if not isinstance(concepts, list | tuple) or len(concepts) != len(prompts):
            raise InputError(
                f"concepts={concepts!r} must be a list of {len(prompts)}, one per prompt, or None"
            )
        for i, concept in enumerate(concepts):
            if concept is None:
                continue
            if not isinstance(concept, str) or not concept.strip():
                raise InputError(f"concept {concept!r} must be words of the prompt {clean[i]!r}, or None")
            marked[i], positions[i] = concept, None
    return clean, marked, positions


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


def _sizes(
    cascade: Cascade, views: list[View], size: int | None, stop_after: int | None, recipe: Recipe
) -> list[int]:
    """The sides in px that will be made, each one that the UNets and the views allow."""
    config = cascade.unet_1.config
    side = (config.sample_size or 64) if size is None else size
    factor = config.size_factor
    if isinstance(side, bool) or not isinstance(side, int) or not factor <= side <= MAX_SIDE or side % factor:
        raise InputError(
            f"size={side!r} must be a multiple of {factor} up to {MAX_SIDE} for this stage I UNet"
        )
    sizes = [side, 4 * side] if cascade.has_stage_2 else [side]
    if stop_after is not None:
        if stop_after not in (side, 4 * side):
            raise InputError(f"stop_after={stop_after!r} must be {side} (stage I) or {4 * side} (stage II)")
        if stop_after not in sizes:
            raise InputError(
                f"stop_after={stop_after}: the cascade {cascade.name} has no stage II; name one with stage_2=, or "
                f"stop after {side}"
            )
        sizes = sizes[: sizes.index(stop_after) + 1]
    if len(sizes) > 1 and sizes[1] % cascade.unet_2.config.size_factor:
        raise InputError(
            f"size={side} makes {sizes[1]} px in stage II, whose UNet needs a multiple of "
            f"{cascade.unet_2.config.size_factor}"
        )
    for view in views:
        for made in sizes:
            view.check_size(made)
    if recipe.anti_segregation and len(views) > 1:
        resolution = recipe.map_resolution * side // 64
        layers = cascade.unet_1.attention_layers(side)
        have = {res for name, res in layers.items() if name.startswith(tuple(recipe.map_places))}
        if resolution not in have:
            raise InputError(
                f"size={side}: the anti-segregation loss wants attention at {resolution} px, this UNet has it at "
                f"{sorted(have)}; choose another size or map_resolution, or turn anti_segregation off"
            )
    return sizes


def _run(
    cascade: Cascade,
    job: _Job,
    style: str,
    seeds: list[int],
    folder: Path,
    batch_size: int,
    overwrite: bool,
    progress: bool,
    on_step: OnStep | None,
) -> Iterator[Anagram]:
    request = job.request(style, cascade)
    done = {seed: _finished(folder, seed, request, job.sizes, overwrite) for seed in seeds}
    todo = [seed for seed in seeds if done[seed] is None]
    spans = None
    if job.recipe.anti_segregation and len(job.views) > 1:
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
            _check_room(_folder(folder, seed), job.sizes)
        schedules = [
            cascade.schedule(stage, job.recipe.num_inference_steps) for stage in range(1, len(job.sizes) + 1)
        ]
        text, null = cascade.encode(job.prompts)
        _check_networks(cascade, job, schedules, text.shape[-1])
        score = None
        if job.recipe.balancing and len(job.views) > 1:
            score = cascade.noise_clip.scorer(job.prompts)
        with _bar(progress, len(todo) * len(job.sizes) * job.recipe.num_inference_steps) as bar:

            def step(batch: list[int], stage: int, state: StepState) -> None:
                bar.set_description(f"stage {'I' * stage}, seed {_span(batch)}", refresh=False)
                if state.loss is not None:
                    bar.set_postfix_str(f"overlap loss {state.loss.mean().item():.3f}", refresh=False)
                bar.update(len(batch))
                if on_step is not None:
                    on_step(batch, stage, state)

            for start in range(0, len(todo), batch_size):
                batch = todo[start : start + batch_size]
                for stage in _stages(cascade, job, batch, text, null, spans, score, schedules, step):
                    side = job.sizes[0] if stage.num == 1 else job.sizes[1]
                    for seed, picture in zip(batch, stage.pictures, strict=True):
                        if overwrite and stage.num == 1:
                            _clear(_folder(folder, seed))
                        _write_pictures(_folder(folder, seed), side, picture, job.views)
                for seed in batch:
                    made[seed] = _finish(folder, seed, request, cascade, job.sizes)
    for seed in seeds:
        yield done[seed] or made[seed]


@dataclass(frozen=True)
class _Stage:
    num: int
    pictures: Tensor  # (B, 3, H, W)


def _stages(
    cascade: Cascade,
    job: _Job,
    seeds: list[int],
    text: Tensor,
    null: Tensor,
    spans: list[tuple[int, int]] | None,
    score: Any,
    schedules: list[Schedule],
    step: Callable[[list[int], int, StepState], None],
) -> Iterator[_Stage]:
    """Stage I, then II where asked for; one generator per image serves both, as in the released code."""
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


def _check_networks(cascade: Cascade, job: _Job, schedules: list[Schedule], text_width: int) -> None:
    """InputError for networks that are not each other's, which would else show when work is half done."""
    for stage, schedule in enumerate(schedules, start=1):
        config = (cascade.unet_1 if stage == 1 else cascade.unet_2).config
        wanted = {
            "in_channels": 3 * stage,  # stage II sees stage I's picture too
            "out_channels": 6,
            "encoder_hid_dim": text_width,
            "class_embed_type": None if stage == 1 else "timestep",
        }
        for name, value in wanted.items():
            if getattr(config, name) != value:
                raise InputError(
                    f"the cascade {cascade.name}: its UNet of stage {'I' * stage} has "
                    f"{name}={getattr(config, name)!r}, but {value!r} is needed here; take all parts from one release"
                )
        if stage == 2 and job.noise_level >= schedule.num_train_timesteps:
            raise InputError(
                f"noise_level={job.noise_level} must be below stage II's {schedule.num_train_timesteps} timesteps"
            )
    if job.recipe.balancing and len(job.views) > 1:
        encoder = cascade.noise_clip.image_encoder
        first = max(schedule.timesteps[0] for schedule in schedules)
        if encoder.image_size != SCORER_SIZE or encoder.n_timesteps <= first:
            raise InputError(
                f"the cascade {cascade.name}: its noise-aware CLIP is for {encoder.image_size} px and "
                f"{encoder.n_timesteps} timesteps, but {SCORER_SIZE} px and timesteps up to {first} are needed; "
                "name another with noise_clip=, or turn balancing off"
            )


def _check_room(folder: Path, sizes: list[int]) -> None:
    """SourceError where a seed's files could not be written in the end."""
    names = [METADATA, *(f"sample_{side}{kind}.png" for side in sizes for kind in ("", ".views"))]
    try:
        if folder.exists() and not folder.is_dir():
            raise SourceError(f"{folder} is a file, where a folder is to be made; choose another save_dir")
        for name in names:
            if (folder / name).is_dir():
                raise SourceError(
                    f"{folder / name} is a folder, where a file is to be written; remove it, or choose another "
                    "save_dir"
                )
        there = next((path for path in (folder, *folder.parents) if path.exists()), folder)
        if not os.access(there, os.W_OK | os.X_OK):
            raise SourceError(
                f"{folder}: {there} cannot be written to; choose a save_dir that you can write to"
            )
    except OSError as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(f"{folder} cannot be used ({error}); choose another save_dir") from error


def _folder(folder: Path, seed: int) -> Path:
    return folder / f"{seed:04d}"


def _clear(folder: Path) -> None:
    """Take away a finished seed's metadata and pictures, which would no longer belong together."""
    try:
        if not (folder / METADATA).is_file():
            return
        (folder / METADATA).unlink()
        for path in folder.glob("sample_*.png"):
            if re.fullmatch(r"sample_\d+(\.views)?\.png", path.name):
                path.unlink()
    except OSError as error:
        raise SourceError(f"{folder} cannot be overwritten ({error}); choose another folder") from error


def _write_pictures(folder: Path, side: int, picture: Tensor, views: list[View]) -> None:
    remove_leftovers(folder)
    write_atomically(folder / f"sample_{side}.png", encode_png(picture))
    write_atomically(folder / f"sample_{side}.views.png", encode_png(side_by_side(picture, views)))


def _finish(folder: Path, seed: int, request: dict[str, Any], cascade: Cascade, sizes: list[int]) -> Anagram:
    from . import __version__

    own = _folder(folder, seed)
    names = [f"sample_{side}{kind}.png" for side in sizes for kind in ("", ".views")]
    content = {
        "format": 1,
        "seed": seed,
        "sizes": sizes,
        "request": request,
        "pictures": {name: hashlib.sha256((own / name).read_bytes()).hexdigest() for name in names},
        "weights": {"name": cascade.name, "variant": cascade.variant, "files": cascade.checksums()},
        "made_with": {
            "mtl_anagram": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": str(cascade.device),
            "dtype": str(cascade.dtype).removeprefix("torch."),
        },
    }
    write_atomically(own / METADATA, (json.dumps(content, indent=1) + "\n").encode())
    return Anagram(seed, own, {side: own / f"sample_{side}.png" for side in sizes}, skipped=False)


def _finished(
    folder: Path, seed: int, request: dict[str, Any], sizes: list[int], overwrite: bool
) -> Anagram | None:
    """The seed's pictures if its folder holds them whole; None if there is work to do."""
    own = _folder(folder, seed)
    if overwrite or not (own / METADATA).is_file():
        return None
    try:
        content = read_json(own / METADATA)
    except SourceError as error:
        raise SourceError(
            f"{error}; overwrite=True (--overwrite) makes the pictures of seed {seed} anew"
        ) from error
    if content.get("request") != json.loads(json.dumps(request)):
        old = content.get("request")
        old = old if isinstance(old, dict) else {}
        differs = ", ".join(key for key in request if old.get(key) != json.loads(json.dumps(request[key])))
        differs = differs or "fields that this version does not know"
        raise InputError(
            f"{own} holds another request's pictures (different: {differs}); choose another folder, or "
            "overwrite=True (--overwrite) to replace them"
        )
    pictures = content.get("pictures")
    for side in sizes:
        for kind in ("", ".views"):
            name = f"sample_{side}{kind}.png"
            path = own / name
            if not isinstance(pictures, dict) or name not in pictures or not path.is_file():
                return None
            if hashlib.sha256(path.read_bytes()).hexdigest() != pictures[name]:
                return None
    remove_leftovers(own)
    return Anagram(seed, own, {side: own / f"sample_{side}.png" for side in sizes}, skipped=True)


def _span(seeds: list[int]) -> str:
    return str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]}..{seeds[-1]}"


def _bar(progress: bool, total: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit="step", disable=not progress, dynamic_ncols=True)
