"""generate_anagram: a request in, files out; and repeat_anagram: the same picture again from its metadata."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from os.path import expanduser
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import __version__
from .cascade import Cascade, Picture, SamplingRun, check_seeds
from .cascade.models import Models
from .cascade.run import Job, picture_of, sample_jobs
from .errors import InputError
from .files import outputs
from .files.checksums import combined_checksum
from .files.hub import Source
from .files.images import save_picture
from .files.outputs import Anagram
from .models.loading import resolve_device
from .sampling import Recipe, StepState, UpscaleRecipe
from .sampling.checks import check_kinds
from .sampling.loop import After, Combine, Step
from .views import View, view_from_metadata

OnStep = Callable[[list[int], int, StepState], None]
Checksums = tuple[dict[str, str], dict[str, str]]  # of files up to stage II, and of stage III's


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
    start_from: Picture | None = None,
    strength: float | Sequence[float] | None = None,
    reference: Picture | None = None,
    reference_view: str | View | None = None,
) -> list[Anagram]:
    """Sample pictures that read as `prompts[i]` under `views[i]`, and write them: the released code's call.

    Writes SAVE_DIR/SEED (4 digits)/sample_64.png, sample_64.views.png (all views side by side), the same at 256 px
    (and 1024) where the cascade has a stage II (and III), copies of start_from and reference, and last metadata.json,
    from which `repeat_anagram` makes the picture again; of several seeds also SAVE_DIR/seeds.png, a sheet of all. A
    seed whose folder holds all this for the same request is skipped; another request's is an error, unless `overwrite`.
    num_inference_steps, guidance_scale: in place of the recipe's. model: None = the embedded cascade, a folder, a hub
    id, or a Cascade. progress: show bars. on_step(seeds, stage, state) is called at every step (`Preview` is one). All
    else: as `Cascade.sample`, whose errors and warnings come before any sampling starts.
    """
    check_kinds(on_step=(on_step, Callable, type(None)), recipe=(recipe, Recipe, type(None)))
    folder = outputs.check_folder(save_dir)
    given = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    cascade = cascade_of(model, device)
    run = cascade.sample(
        prompts, views, seed, style=style, negative=negative, concepts=concepts, view_args=view_args,
        recipe=dataclasses.replace(recipe or cascade.recipe, **changes), size=size, stop_after=stop_after,
        noise_level=noise_level, upscale=upscale, batch_size=batch_size, combine=combine, step=step, after=after,
        start_from=start_from, strength=strength, reference=reference, reference_view=reference_view,
    )  # fmt: skip
    return write_run(run, folder, overwrite, progress, on_step)


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
    content = outputs.read_metadata(metadata := Path(expanduser(metadata)))
    folder = outputs.check_folder(save_dir)
    try:
        arguments, request = _arguments(content, metadata), content["request"]
        dtype, first = content["made_with"]["dtype"], request["weights_sha256"]
        files = dict(content["weights"]["files"])
        recorded_sums = dict(content.get("pictures", {}))
        third = request["stage_3"]["weights_sha256"] if "stage_3" in request else None
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        said = f"is not metadata of this library ({type(error).__name__}: {error})"
        raise InputError(f"{metadata} {said}; give a metadata.json that generate_anagram wrote") from error
    cascade = cascade_of(model, device, dtype)
    found = cascade.checksums(files), cascade.checksums(files, ["stage_3"]) if third else {}
    for sums, recorded in zip(found, (first, third), strict=True):
        if recorded and combined_checksum(sums) != recorded:
            said = f"was made with weights of sha256 {recorded}, but {cascade.name} has {combined_checksum(sums)}"
            raise InputError(f"{metadata} {said}: name the same weights with model=")
    run = cascade.sample(**arguments, batch_size=1, combine=combine, step=step, after=after)
    for name, about in run.request.given.about.items():
        if about != request[name]:
            raise InputError(f"{arguments[name]} is not the picture that was there: put that back")
    rules, own = request.get("rules", {}), _rules(run)
    if own != rules:
        said = f"was made with rules of one's own, {rules}, and now there are {own}"
        raise InputError(f"{metadata} {said}: give the same as combine=, step= and after=")
    run.request = dataclasses.replace(run.request, style=request["style"])
    anagram = write_run(run, folder, overwrite, progress, checksums=found)[0]
    names, made = [path.name for path in anagram.pictures.values()], outputs.read_metadata(anagram.folder)
    other = [name for name in names if recorded_sums.get(name) != made["pictures"][name]]
    if other:
        said = f"{', '.join(other)} in {anagram.folder} is not the recorded picture to the bit, which was made with"
        said += f" {content['made_with']}: another device, dtype, version or batch rounds differently"
        anagram = dataclasses.replace(anagram, warnings=(*anagram.warnings, said))
    return anagram


def _arguments(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What `Cascade.sample` was asked for, from a metadata.json's content; concepts are in brackets again."""
    request, sizes, folder = content["request"], content["sizes"], path if path.is_dir() else path.parent
    own = {name: request[name] for name in ("start_from", "reference") if name in request}
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
    views, recipe = [*map(view_from_metadata, request["views"])], Recipe.from_dict(request["recipe"])
    style = request["style"] if all(p.startswith(f"{request['style']} ") for p in prompts) else ""
    prompts = [prompt.removeprefix(f"{style} ") for prompt in prompts]
    found = {"prompts": prompts, "views": views, "seeds": check_seeds(content["seed"]), "recipe": recipe}
    found |= {"style": style, "noise_level": request["noise_level"], "concepts": concepts}
    found |= {"negative": request.get("negative"), "size": sizes[0]}
    found["stop_after"] = sizes[-1][0] if isinstance(sizes[-1], list) else sizes[-1]
    found |= {name: folder / f"{name}.png" for name in own}
    if stage_3:
        found["upscale"] = UpscaleRecipe.from_dict(stage_3)
    if "start_from" in own:
        found["strength"] = own["start_from"]["strength"]
    if "reference" in own:
        found["reference_view"] = view_from_metadata(own["reference"]["view"])
    return found


def cascade_of(model: Cascade | Source | None, device: Any, dtype: str | None = None) -> Cascade:
    if not isinstance(model, Cascade):
        return Cascade.from_pretrained(model, device=device, dtype=dtype)
    asked, own = model.device if device is None else resolve_device(device), model.device
    if (asked.type, asked.index or 0) != (own.type, own.index or 0):
        remedy = "leave device out, or make the Cascade there"
        raise InputError(f"device={str(asked)!r}, but the cascade is on {str(own)!r}: {remedy}")
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
    about: dict[str, Any] = {name: getattr(asked, name) for name in ("style", "prompts", "concepts")}
    about |= {"concept_positions": asked.positions, "views": [view.to_metadata() for view in asked.views]}
    about |= {"recipe": asked.recipe.to_dict(), "noise_level": asked.noise_level, "size": asked.sizes[0]}
    about |= {"weights_sha256": combined_checksum(files), **asked.given.about}
    if asked.negative is not None:
        about["negative"] = asked.negative
    if rules := _rules(run):
        about["rules"] = rules
    if len(asked.sizes) > 2:
        about["stage_3"] = {**asked.upscale.to_dict(), "weights_sha256": combined_checksum(files_3)}
    return about


def write_run(
    run: SamplingRun, folder: Path, overwrite: bool = False, progress: bool = False,
    on_step: OnStep | None = None, checksums: Checksums | None = None,
) -> list[Anagram]:  # fmt: skip
    """Run what is not there yet, write each stage's pictures when they are made, and metadata last."""
    checksums = checksums or checksums_of(run)
    jobs = [(run, seed) for seed in run.seeds]
    there = [] if overwrite else [(job, finished_job(job, folder, checksums)) for job in jobs]
    done = {job: found for job, found in there if found is not None}
    todo = [job for job in jobs if job not in done]
    for _, seed in todo:
        outputs.check_folder(outputs.folder_of(folder, seed), write=True)
    bars: dict[int, Any] = {}

    def watch(jobs: Sequence[Job], stage: int, state: StepState) -> None:
        if stage not in bars:
            total, title = len(todo) * (state.num_steps - state.index), "stage " + "I" * stage
            bar = tqdm(total=total, desc=title, unit="step", disable=not progress, dynamic_ncols=True)
            bars[stage] = stack.enter_context(bar)
        bars[stage].update(len(jobs))
        if on_step is not None:
            on_step([seed for _, seed in jobs], stage, state)

    with ExitStack() as stack:
        done |= write_jobs(todo, todo, {run: folder}, checksums, run.batch_size, watch, overwrite)
    if len(run.seeds) > 1 and (todo or not (folder / "seeds.png").is_file()):
        outputs.write_sheet(folder, run.seeds, run.sizes[0])
    return [done[job] for job in jobs]


def checksums_of(run: SamplingRun) -> Checksums:
    """What identifies the files that a run's pictures depend on, those of stage III apart."""
    return run.models.checksums(), run.models.checksums(parts=["stage_3"]) if len(run.sizes) > 2 else {}


def finished_job(job: Job, folder: Path, checksums: Checksums) -> Anagram | None:
    """A picture that is there whole, else None; InputError where the folder holds another request's."""

    def normal(old: dict[str, Any]) -> dict[str, Any]:  # with the fields that older versions did not write
        return {**old, "recipe": Recipe.from_dict(old["recipe"]).to_dict()}

    run, seed = job
    request, dtype = request_of(run, *checksums), str(run.models.dtype).removeprefix("torch.")
    found = outputs.finished(folder, seed, request, run.sizes, dtype=dtype, normal=normal)
    if found is None:
        return None
    said = [*run.warnings, *found.warnings]
    if own := {**request.get("rules", {}), **dict.fromkeys(sorted(run.models.replaced), "of one's own")}:
        said.append(f"{found.folder}: if {own} do something else now, {outputs.REPLACE}")
    return dataclasses.replace(found, warnings=tuple(said))


def write_jobs(
    jobs: Sequence[Job], todo: Collection[Job], folders: Mapping[SamplingRun, Path], checksums: Checksums,
    batch_size: int, watch: Callable[[Sequence[Job], int, StepState], None] | None = None, overwrite: bool = False,
) -> dict[Job, Anagram]:  # fmt: skip
    """Sample jobs, which may be in one batch, and write those of `todo`, each into its run's folder."""
    done = {}
    for part, stage, state in sample_jobs(jobs, batch_size):
        # A copy: who watches may change the state's.
        pictures = () if (picture := picture_of(state)) is None else picture.clone()
        if watch is not None:
            watch(part, stage, state)
        for job, picture in zip(part, pictures, strict=False):
            if job not in todo:
                continue
            (run, seed), folder = job, folders[job[0]]
            if overwrite and stage == 1:
                outputs.clear(outputs.folder_of(folder, seed))
            outputs.write_pictures(outputs.folder_of(folder, seed), run.sizes[stage - 1], picture, run.views)
            if stage == len(run.sizes):
                for name, given in run.request.given.pictures.items():
                    save_picture(outputs.folder_of(folder, seed) / f"{name}.png", given)
                request, about = request_of(run, *checksums), _made_with(run.models, checksums)
                done[job] = outputs.finish(folder, seed, request, run.sizes, about, run.warnings)
    return done


def _made_with(cascade: Models, checksums: Checksums) -> dict[str, Any]:
    """What a metadata.json says of the weights and of the machine."""
    made_with = {
        "mtl_anagram": __version__, "torch": torch.__version__, "python": platform.python_version(),
        "device": str(cascade.device), "dtype": str(cascade.dtype).removeprefix("torch."),
    }  # fmt: skip
    files = checksums[0] | checksums[1]
    about = {"name": cascade.name, "variant": cascade.variants["stage_1"], "files": files}
    return {"weights": about, "made_with": made_with}
