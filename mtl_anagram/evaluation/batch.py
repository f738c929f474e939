"""batch(): many requests from one file, by one process or by all that torchrun starts; what is finished stays."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import logging
import os
import re
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..cascade import Cascade, SamplingRun
from ..cascade.run import Job
from ..errors import AnagramError, InputError, SourceError, whole_number
from ..files import outputs
from ..files.atomic import remove_leftovers, write_atomically
from ..files.claims import Claims, locked, restarted
from ..files.hub import Source
from ..files.outputs import Anagram
from ..files.prompt_cache import PromptCache
from ..generate import cascade_of, checksums_of, finished_job, write_jobs
from ..models.releases import UP_TO_STAGE_2, weight_paths
from ..sampling import Recipe, UpscaleRecipe

log = logging.getLogger("mtl_anagram")
Line = dict[str, Any]  # of the manifest
MANIFEST, STATE, LOCK = "manifest.jsonl", ".batch", "manifest.lock"  # STATE: the folder of locks and marks
NAME = re.compile(r"\w[\w .+-]{0,99}(?<! )")
NOT_JSON = {"self", "seeds", "batch_size", "combine", "step", "after"}  # of Cascade.sample's arguments
OF_SAMPLE = {*inspect.signature(Cascade.sample).parameters} - NOT_JSON
FIELDS = sorted({"name", "seed", "num_inference_steps", "guidance_scale"} | OF_SAMPLE)
SHOWN = 20  # errors in one message
RELOADS, LARGE = 16, 4 << 30  # batches for which one loading of networks serves that have so many bytes


def batch(
    requests: str | Path, save_dir: str | Path, *, model: Cascade | Source | None = None,
    device: str | torch.device | None = None, batch_size: int = 4, progress: bool = False,
) -> list[Line]:  # fmt: skip
    """Make all anagrams of a JSON Lines file: one request a line, `generate_anagram`'s arguments and a "name".

    Writes SAVE_DIR/NAME/SEED/... as generate_anagram does, and SAVE_DIR/manifest.jsonl, whole at any time: a line for
    each picture, "done" or "failed" with its error. All lines are checked before the first network runs; InputError
    names every line that is wrong. Requests of one size and recipe share batches. Any number of processes may work at
    one folder; a later call goes on with what is not done. What raises fails alone, what kills its worker twice in one
    torchrun is set aside. Returns the manifest's lines of these requests.
    """
    whole_number("batch_size", batch_size, 1)
    folder, cascade = outputs.check_folder(save_dir, write=True), cascade_of(model, device)
    runs = read_requests(Path(os.path.expanduser(requests)), cascade)
    before = cascade.prompt_cache
    if before is None and not cascade.keeps_all:
        cascade.prompt_cache = PromptCache(folder / STATE / "prompts")
    try:
        return _Batch(cascade, runs, folder, batch_size).work(progress)
    finally:
        cascade.prompt_cache = before


def read_requests(path: Path, cascade: Cascade) -> dict[str, SamplingRun]:
    """The requests of a file by name, each checked; one InputError for all lines that are wrong."""
    runs, wrong = dict[str, tuple[str, SamplingRun]](), list[str]()
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # JSON may have other line ends within
    except (OSError, ValueError) as error:
        raise SourceError(f"{path} cannot be read ({error}): give a file of JSON Lines") from error
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                name, run = _request(line, cascade)
                if name.lower() in runs:
                    raise InputError(f"name={name!r} is another line's, too (in any case): give each its own")
                runs[name.lower()] = name, run
        except AnagramError as error:
            wrong.append(f"line {number}: {error}")
    if wrong or not runs:
        more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise InputError(f"{path}: {'; '.join(wrong[:SHOWN]) or 'it holds no request'}{more}")
    return dict(runs.values())


def _request(line: str, cascade: Cascade) -> tuple[str, SamplingRun]:
    """A line's name and its checked run."""
    try:
        given = {field: value for field, value in {**json.loads(line)}.items() if value is not None}
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"it is no JSON object ({error}): write one with {', '.join(FIELDS)}") from error
    name, unknown = given.pop("name", None), sorted({*given} - {*FIELDS})
    if not isinstance(name, str) or not NAME.fullmatch(name) or len(name.encode()) > 255 or name == MANIFEST:
        said = f"must be up to 100 letters, digits, spaces, . + - _ (255 bytes), not {MANIFEST}: a folder's"
        raise InputError(f"name={name!r} {said}")
    if unknown or not {"prompts", "views"} <= {*given}:
        found = f"{', '.join(unknown)}: unknown" if unknown else "prompts and views are needed"
        raise InputError(f"{found}; a request has {', '.join(FIELDS)}")
    changes = {f: given.pop(f) for f in ("num_inference_steps", "guidance_scale") if f in given}
    recipe = given.pop("recipe", None)
    if recipe in ("released", "corrected", "plain"):
        recipe = getattr(Recipe, recipe)()
    elif recipe is not None:
        recipe = Recipe.from_dict(recipe)
    if "upscale" in given:
        given["upscale"] = UpscaleRecipe.from_dict(given["upscale"])
    seeds = given.pop("seed", 0)
    recipe = dataclasses.replace(recipe or cascade.recipe, **changes)
    return name, cascade.sample(seeds=seeds, recipe=recipe, **given)


class _Batch:
    """One process's part of the work."""

    def __init__(self, cascade: Cascade, runs: Mapping[str, SamplingRun], folder: Path, size: int) -> None:
        self.cascade, self.folder, self.size = cascade, folder, size
        self.names = {run: name for name, run in runs.items()}
        self.folders = {run: folder / name for name, run in runs.items()}
        self.jobs = [(run, seed) for run in self.names for seed in run.seeds]
        self.checksums = checksums_of(max(self.names, key=lambda run: len(run.sizes)))
        self.claims = Claims(folder / STATE)
        self.read: tuple[Any, dict[str, Line]] = None, {}  # the manifest's content, and of which file
        self.groups = self._groups()

    def _groups(self) -> dict[str, list[Job]]:
        """What is claimed at once, by name: the same in every process and at every resume, so pictures are, too."""
        # By what all processes see alike: how much memory is free, others' loading changes.
        keep, sources, variants = self.cascade.keep, self.cascade.sources, self.cascade.variants
        paths = weight_paths(sources, variants, UP_TO_STAGE_2).values()
        stored = sum(path.stat().st_size for path in paths)
        large = keep == "one" or (keep == "auto" and stored > LARGE)
        count = self.size * (RELOADS if large else 1)
        kinds: list[list[Job]] = []
        for run, own in groupby(self.jobs, key=lambda job: job[0]):
            kind = next((kind for kind in kinds if kind[0][0].joins(run)), None)
            if kind is None:
                kinds.append(kind := [])
            kind += own
        groups = [kind[start : start + count] for kind in kinds for start in range(0, len(kind), count)]
        names = ["\n".join(map(self._title, group)).encode() for group in groups]
        return {hashlib.sha256(n).hexdigest()[:16]: group for n, group in zip(names, groups, strict=True)}

    def work(self, progress: bool) -> list[Line]:
        self._begin()
        shown = progress and os.environ.get("LOCAL_RANK", "0") == "0"
        with tqdm(total=len(self.jobs), unit="picture", disable=not shown, dynamic_ncols=True) as bar:

            def done(name: str) -> bool:
                there = self._manifest()
                bar.update(sum(self._title(job) in there for job in self.jobs) - bar.n)
                return all(self._title(job) in there for job in self.groups[name])

            for name in self.claims.share(list(self.groups), done):
                self._make(name, self.groups[name])
                done(name)
        found = self._manifest()
        return [found[title] for job in self.jobs if (title := self._title(job)) in found]

    def _begin(self) -> None:
        """The manifest as the folders are: what is damaged is said and made anew, as what failed in another launch."""
        launch = os.environ.get("RANK", "0") == "0" and not restarted()
        with locked(self.folder / STATE / LOCK):  # no other process writes meanwhile
            remove_leftovers(self.folder)
            lines, wrong = self._manifest(), list[str]()
            for job in self.jobs:
                title = self._title(job)
                try:
                    if (found := self._finished(job)) is not None:
                        lines[title] = self._line(job, found)
                        continue
                    outputs.check_folder(outputs.folder_of(self.folders[job[0]], job[1]), write=True)
                    if launch or lines.get(title, {}).get("status") == "done":
                        lines.pop(title, None)
                except AnagramError as error:
                    wrong.append(str(error))
            if wrong:
                raise InputError("; ".join(wrong[:SHOWN]))
            self._write_manifest(lines)

    def _make(self, name: str, group: list[Job]) -> None:
        """One group; where that kills its worker or raises, each of its pictures by itself."""
        # The whole batch, even where a part of it is there: arithmetic depends on who is in it.
        if (todo := self._left(group)) and self._failure(name, group, todo):
            for job in self._left(group):
                if error := self._failure(f"{name}.{group.index(job)}", [job], [job]):
                    self._note({job: error})

    def _left(self, group: list[Job]) -> list[Job]:
        """Which of a group are not there yet; what is there, whoever made it, comes into the manifest."""
        found = {job: self._finished(job) for job in group}
        if there := {job: anagram for job, anagram in found.items() if anagram is not None}:
            self._note(there)
        return [job for job, anagram in found.items() if anagram is None]

    def _failure(self, name: str, group: list[Job], todo: list[Job]) -> str:
        """Make pictures; what went wrong, "" for nothing."""
        if self.claims.killed(name):
            return "the process that was at work on it was killed, twice"
        with self.claims.begun(name):
            try:
                if self.cascade.prompt_cache is not None:  # all of them in one call of the text encoder
                    asked = [run.request for run, _ in group]
                    texts = (text for one in asked for text in (*one.prompts, *(one.negative or ())))
                    self.cascade.encode(list(dict.fromkeys(texts)))
                self._note(write_jobs(group, todo, self.folders, self.checksums, self.size))
                return ""
            except (InputError, RuntimeError) as error:
                return str(error) or repr(error)

    def _finished(self, job: Job) -> Anagram | None:
        """A picture that is there whole; InputError where its folder holds another request's."""
        own = outputs.folder_of(self.folders[job[0]], job[1])
        said = "its pictures are not whole, or not all that are asked for"
        try:
            found = finished_job(job, self.folders[job[0]], self.checksums)
        except outputs.DamagedError as error:
            found, said = None, str(error)
        if found is None and (own / outputs.METADATA).is_file():
            log.warning("%s: %s; it is made again", own, said)
        return found

    def _title(self, job: Job) -> str:
        return f"{self.names[job[0]]}/{job[1]:04d}"

    def _line(self, job: Job, found: Anagram | str) -> Line:
        line: Line = {"name": self.names[job[0]], "seed": job[1]}
        if isinstance(found, str):
            return {**line, "status": "failed", "error": found}
        files = [path.relative_to(self.folder).as_posix() for path in found.pictures.values()]
        return {**line, "status": "done", "pictures": files, "warnings": list(found.warnings)}

    def _note(self, made: Mapping[Job, Anagram] | Mapping[Job, str]) -> None:
        with locked(self.folder / STATE / LOCK):
            lines = {self._title(job): self._line(job, found) for job, found in made.items()}
            self._write_manifest(self._manifest() | lines)

    def _manifest(self) -> dict[str, Line]:
        path = self.folder / MANIFEST
        if not path.is_file():
            return {}
        stat = path.stat()  # of the file that took the last one's place
        if (key := (stat.st_ino, stat.st_mtime_ns, stat.st_size)) != self.read[0]:
            try:
                lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
                self.read = key, {f"{line['name']}/{line['seed']:04d}": line for line in lines}
            except (OSError, ValueError, TypeError, LookupError) as error:
                said = f"is no manifest of a batch ({error!r}): move it away, or choose another folder"
                raise SourceError(f"{path} {said}") from error
        return dict(self.read[1])

    def _write_manifest(self, lines: dict[str, Line]) -> None:
        """In the requests' order, after what other files asked for."""
        asked = {title: lines.pop(title) for job in self.jobs if (title := self._title(job)) in lines}
        text = "".join(json.dumps(line) + "\n" for line in (lines | asked).values())
        write_atomically(self.folder / MANIFEST, text.encode())
