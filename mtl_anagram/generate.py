"""generate_anagram: a request in, files out; and repeat_anagram: the same picture again from its metadata."""

from __future__ import annotations

import dataclasses
import hashlib
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .cascade import Cascade, CascadeStep, SamplingRun, check_seeds
from .errors import InputError
from .files import outputs
from .files.hub import Source
from .files.outputs import Anagram
from .models.checksums import combined_checksum
from .models.loading import resolve_device
from .sampling import Recipe, StepState, UpscaleRecipe
from .sampling.checks import check_kinds
from .sampling.loop import After, Combine, Step
from .views import View, view_from_metadata

OnStep = Callable[[list[int], int, StepState], None]


def generate_anagram(
    style: str,
    prompts: Sequence[str],
    views: Sequence[str | View],
    save_dir: str | Path,
    device: str | torch.device | None = None,
    seed: int | Sequence[int] = 0,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    noise_level: int = 50,
    view_args: Sequence[Any] | None = None,
    *,
    model: Cascade | Source | None = None,
    recipe: Recipe | None = None,
    upscale: UpscaleRecipe | None = None,
    negative: str | Sequence[str] | None = None,
    concepts: Sequence[str | None] | None = None,
    stop_after: int | None = None,
    size: int | tuple[int, int] | None = None,
    batch_size: int = 4,
    overwrite: bool = False,
    progress: bool = False,
    on_step: OnStep | None = None,
    combine: Combine | Mapping[int, Combine] | None = None,
    step: Step | Mapping[int, Step] | None = None,
    after: After | Mapping[int, After] | None = None,
) -> list[Anagram]:
    """Sample pictures that read as `prompts[i]` under `views[i]`, and write them: the released code's call.

    Writes SAVE_DIR/SEED (4 digits)/sample_64.png, sample_64.views.png (all views side by side), the same at 256 px
    (and 1024) where the cascade has a stage II (and III), and last metadata.json, from which `repeat_anagram` makes
    the picture again. A seed whose folder holds all this for the same request is skipped; a folder that holds another
    request's is an error, unless `overwrite`. num_inference_steps, guidance_scale: in place of the recipe's. model:
    None = the embedded cascade, a folder, a hub id, or a Cascade. progress: show bars. on_step(seeds, stage, state) is
    called at every step. All else: as `Cascade.sample`, whose errors and warnings come before any sampling starts.
    """
    seeds = check_seeds(seed)
    check_kinds(on_step=(on_step, Callable, type(None)), recipe=(recipe, Recipe, type(None)))
    folder = outputs.check_folder(save_dir)
    given = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    cascade = cascade_of(model, device)
    run = cascade.sample(
        prompts, views, seeds, style=style, negative=negative, concepts=concepts, view_args=view_args,
        recipe=dataclasses.replace(recipe or cascade.recipe, **changes), size=size, stop_after=stop_after,
        noise_level=noise_level, upscale=upscale, batch_size=batch_size, combine=combine, step=step, after=after,
    )  # fmt: skip
    return write_run(cascade, run, folder, overwrite, progress, on_step)


def repeat_anagram(
    metadata: str | Path,
    save_dir: str | Path,
    device: str | torch.device | None = None,
    *,
    model: Cascade | Source | None = None,
    progress: bool = False,
    overwrite: bool = False,
    combine: Combine | Mapping[int, Combine] | None = None,
    step: Step | Mapping[int, Step] | None = None,
    after: After | Mapping[int, After] | None = None,
) -> Anagram:
    """Make a picture again from its metadata.json, with the same weights and dtype, into another folder.

    model: where the weights are, None = the embedded cascade; a Cascade keeps its own dtype. A picture that differs
    from the recorded one (another dtype, device or version of torch) is said in Anagram.warnings. combine, step, after:
    the rules of one's own that made it, by the names that the metadata has. Raises InputError where the weights are
    not those that made the picture, or the file is not metadata of ours.
    """
    content = outputs.read_metadata(metadata)
    folder = outputs.check_folder(save_dir)
    try:
        arguments, request = _arguments(content), content["request"]
        dtype, files = content["made_with"]["dtype"], dict(content["weights"]["files"])
        recorded_sums = dict(content.get("pictures", {}))
        third = request["stage_3"]["weights_sha256"] if "stage_3" in request else None
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        said = f"is not metadata of this library ({type(error).__name__}: {error})"
        raise InputError(f"{metadata} {said}; give a metadata.json that generate_anagram wrote") from error
    cascade = cascade_of(model, device, dtype)
    found = cascade.checksums(files), cascade.checksums(files, ["stage_3"]) if third else {}
    for sums, recorded in zip(found, (request["weights_sha256"], third), strict=True):
        if recorded and combined_checksum(sums) != recorded:
            said = f"was made with weights of sha256 {recorded}, but {cascade.name} has {combined_checksum(sums)}"
            raise InputError(f"{metadata} {said}: name the same weights with model=")
    run = cascade.sample(**arguments, batch_size=1, combine=combine, step=step, after=after)
    rules, own = request.get("rules", {}), _rules(run)
    if own != rules:
        said = f"was made with rules of one's own, {rules}, and now there are {own}"
        raise InputError(f"{metadata} {said}: give the same as combine=, step= and after=")
    run.request = dataclasses.replace(run.request, style=request["style"])
    anagram = write_run(cascade, run, folder, overwrite, progress, None, found)[0]
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in anagram.pictures.values()}
    other = [name for name, found_sum in sums.items() if recorded_sums.get(name) != found_sum]
    if other:
        said = f"{', '.join(other)} in {anagram.folder} is not the recorded picture to the bit, which was made with"
        said += f" {content['made_with']}: another device, dtype, version or batch rounds differently"
        anagram = dataclasses.replace(anagram, warnings=(*anagram.warnings, said))
    return anagram


def _arguments(content: Mapping[str, Any]) -> dict[str, Any]:
    """What `Cascade.sample` was asked for, from a metadata.json's content; concepts are in brackets again."""
    request, sizes = content["request"], content["sizes"]
    if content["format"] != 1 or ("stage_3" in request) != (len(sizes) == 3):
        raise InputError(f"format={content['format']!r} must be 1, and stage_3 be there for three sizes")
    stage_3 = {name: value for name, value in request.get("stage_3", {}).items() if name != "weights_sha256"}
    prompts, concepts = [], []
    named = zip(request["prompts"], request["concepts"], request["concept_positions"], strict=True)
    for prompt, concept, start in named:
        if start is not None:  # a concept that was marked: its brackets again
            stop = start + len(concept)
            prompt = f"{prompt[:start]}[{prompt[start:stop]}]{prompt[stop:]}"
        prompts.append(prompt)
        concepts.append(concept if start is None else None)
    size, stop = (tuple(s) if isinstance(s, list) else s for s in (sizes[0], sizes[-1]))
    return {
        "prompts": prompts,
        "views": [view_from_metadata(view) for view in request["views"]],
        "seeds": check_seeds(content["seed"]),
        "negative": request.get("negative"),
        "concepts": concepts,
        "recipe": Recipe.from_dict(request["recipe"]),
        "size": size,
        "stop_after": stop[0] if isinstance(stop, tuple) else stop,
        "noise_level": request["noise_level"],
        "upscale": UpscaleRecipe.from_dict(stage_3) if stage_3 else None,
    }


def cascade_of(
    model: Cascade | Source | None, device: str | torch.device | None, dtype: str | None = None
) -> Cascade:
    resolved = resolve_device(device) if device is not None else None
    if not isinstance(model, Cascade):
        return Cascade.from_pretrained(model, device=resolved, dtype=dtype)
    places = [(place.type, place.index or 0) for place in (resolved or model.device, model.device)]
    if places[0] != places[1]:
        remedy = "leave device out, or make the Cascade there"
        raise InputError(f"device={str(resolved)!r}, but the cascade is on {str(model.device)!r}: {remedy}")
    return model


def _rules(run: SamplingRun) -> dict[str, str]:
    """The functions of one's own that replace the recipe's, by their qualified names."""

    def name(hook: Any) -> str:
        if isinstance(hook, Mapping):
            return ", ".join(f"{stage}: {name(f)}" for stage, f in sorted(hook.items()) if f is not None)
        hook = getattr(hook, "func", hook)  # of a functools.partial
        kind = hook if hasattr(hook, "__qualname__") else type(hook)
        return f"{kind.__module__}.{kind.__qualname__}"

    named = {seam: name(hook) for seam, hook in run.hooks.items() if hook is not None}
    return {seam: names for seam, names in named.items() if names}


def request_of(run: SamplingRun, files: dict[str, str], files_3: dict[str, str]) -> dict[str, Any]:
    """What decides a picture besides its seed, as JSON; what is not asked for is left out."""
    asked = run.request
    about: dict[str, Any] = {
        "style": asked.style,
        "prompts": asked.prompts,
        "concepts": asked.concepts,
        "concept_positions": asked.positions,
        "views": [view.to_metadata() for view in asked.views],
        "recipe": asked.recipe.to_dict(),
        "noise_level": asked.noise_level,
        "size": asked.sizes[0],
        "weights_sha256": combined_checksum(files),
    }
    if asked.negative is not None:
        about["negative"] = asked.negative
    if rules := _rules(run):
        about["rules"] = rules
    if len(asked.sizes) > 2:
        about["stage_3"] = {**asked.upscale.to_dict(), "weights_sha256": combined_checksum(files_3)}
    return about


def write_run(
    cascade: Cascade, run: SamplingRun, folder: Path, overwrite: bool = False, progress: bool = False,
    on_step: OnStep | None = None, checksums: tuple[dict[str, str], dict[str, str]] | None = None,
) -> list[Anagram]:  # fmt: skip
    """Run what is not there yet, write each stage's pictures when they are made, and metadata last."""
    if checksums is None:
        checksums = cascade.checksums(), cascade.checksums(parts=["stage_3"]) if len(run.sizes) > 2 else {}
    request, dtype = request_of(run, *checksums), str(cascade.dtype).removeprefix("torch.")
    done: dict[int, Anagram] = {}

    def normal(old: dict[str, Any]) -> dict[str, Any]:  # with the fields that older versions did not write
        return {**old, "recipe": Recipe.from_dict(old["recipe"]).to_dict()}

    for seed in [] if overwrite else run.seeds:
        found = outputs.finished(folder, seed, request, run.sizes, dtype=dtype, normal=normal)
        if found is not None:
            done[seed] = dataclasses.replace(found, warnings=(*run.warnings, *found.warnings))
    todo = [seed for seed in run.seeds if seed not in done]
    for seed in todo:
        outputs.check_folder(outputs.folder_of(folder, seed), write=True)
    made_with = {
        "mtl_anagram": __version__, "torch": torch.__version__, "python": platform.python_version(),
        "device": str(cascade.device), "dtype": dtype,
    }  # fmt: skip
    about: dict[str, Any] = {"name": cascade.name, "variant": cascade.variants["stage_1"]}
    about = {"weights": {**about, "files": checksums[0] | checksums[1]}, "made_with": made_with}
    bars: dict[int, Any] = {}
    with ExitStack() as stack:
        for step in run.only(todo):
            if step.stage not in bars:
                bars[step.stage] = stack.enter_context(_bar(step, len(todo), progress))
            bars[step.stage].update(len(step.seeds))
            # A copy: on_step may change the state's.
            pictures = () if step.picture is None else step.picture.clone()
            if on_step is not None:
                on_step(list(step.seeds), step.stage, step.state)
            for seed, picture in zip(step.seeds, pictures, strict=False):
                if overwrite and step.stage == 1:
                    outputs.clear(outputs.folder_of(folder, seed))
                outputs.write_pictures(
                    outputs.folder_of(folder, seed), run.sizes[step.stage - 1], picture, run.views
                )
                if step.stage == len(run.sizes):
                    done[seed] = outputs.finish(folder, seed, request, run.sizes, about, tuple(run.warnings))
    return [done[seed] for seed in run.seeds]


def _bar(step: CascadeStep, count: int, shown: bool) -> Any:
    """The progress bar of a stage: of all seeds' steps."""
    from tqdm import tqdm

    total, title = count * step.state.num_steps, "stage " + "I" * step.stage
    return tqdm(total=total, desc=title, unit="step", disable=not shown, dynamic_ncols=True)
