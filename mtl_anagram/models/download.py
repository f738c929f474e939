"""Bring a cascade's files to this machine: exactly those that are loaded, through the hub's own client."""

import json
import shutil
import warnings
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from ..errors import CapacityError, InputError
from ..files.atomic import write_atomically
from ..files.hub import Folder, Repository, Source, hub_errors, open_source
from ..files.outputs import check_folder
from . import glide
from .loading import weight_names
from .planning import TOO_LARGE, Plan, human_bytes
from .releases import NETWORKS, PARTS, SMALL_FILES, TOKENIZER_JSON, weight_paths


def download(
    plan: Plan, sources: Mapping[str, Source | None], variants: Mapping[str, str | None],
    to: str | Path | None = None,
) -> dict[str, Path]:  # fmt: skip
    """Fetch what a cascade loads and is not here yet; returns the files by part and name, {} if none is remote.

    to None = the hub's cache (and $MTL_ANAGRAM_CACHE for GLIDE's CLIP), where the cascade's name finds them again;
    a folder becomes a cascade's folder, a source by itself, named as the plan is. An interrupted download goes on.
    Before the first byte: CapacityError where a disk is too small, SourceError for an unknown repository, a warning
    for what the plan finds too large (it may be for another machine). With HF_HUB_OFFLINE=1 it only looks.
    """
    from huggingface_hub import constants, snapshot_download

    folder, clip = None if to is None else check_folder(to, "to"), glide.is_glide(sources.get("noise_clip"))
    given = {part: s for part, s in sources.items() if s is not None and not glide.is_glide(s)}
    opened = {part: open_source(source, None, "config.json") for part, source in given.items()}
    remote = {part: files.repo_id for part, files in opened.items() if isinstance(files, Repository)}
    if not remote and not clip:
        return {}
    if folder is not None:
        own = [f"{part} is the folder {given[part]}" for part in given if part not in remote]
        if own:
            remedy = "name another, or hub ids for all parts, or leave it out"
            said = f"is to gather what comes from the hub, but {own[0]}"
            raise InputError(f"to={to!r} {said}: {remedy}")
        glide.refuse_offline(f"{folder} is filled from the hub")
        sources = {part: folder / part for part, source in sources.items() if source is not None}
    if not constants.HF_HUB_OFFLINE:
        for stage in (stage for stage in plan.stages if stage.verdict == TOO_LARGE):
            needed = f"{stage.name} needs about {human_bytes(stage.needed)}, more than this machine has"
            remedy = "take a smaller release, or a dtype of half the size (--dtype bfloat16)"
            warnings.warn(f"{needed}: {remedy}", stacklevel=2)
        wanted = {part: _wanted(repo_id, part, variants.get(part)) for part, repo_id in remote.items()}
        clip_folder = glide.cache_folder() if folder is None else folder / "noise_clip"
        _check_room(remote, wanted, folder, clip_folder if clip else None)
        for part, sizes in wanted.items():
            with hub_errors(remote[part], "its files"):
                place = None if folder is None else folder / part
                snapshot_download(remote[part], allow_patterns=list(sizes), local_dir=place)
        if clip:
            glide.fetch_glide(clip_folder)
    if folder is not None:
        about = {"name": plan.name, "variants": dict(variants)}
        write_atomically(folder / "cascade.json", (json.dumps(about, indent=1) + "\n").encode())
    return weight_paths(sources, variants, PARTS)


def _wanted(repo_id: str, part: str, variant: str | None) -> dict[str, int]:
    """The files of a repository that loading reads, with their sizes."""
    from huggingface_hub import HfApi

    with hub_errors(repo_id, "the list of its files"):
        listed = HfApi().model_info(repo_id, files_metadata=True).siblings or []
    sizes = {entry.rfilename: entry.size or 0 for entry in listed}
    absent = any(needed and name not in sizes for name, needed in SMALL_FILES[part].items())
    patterns = [*SMALL_FILES[part], *[TOKENIZER_JSON] * absent]
    patterns += [name for names in glide.CLIP_FILES for name in names] if part == "noise_clip" else []
    for network in (network for network in NETWORKS if network.part == part and network.base):
        dot = "" if variant is None else f".{variant}"
        weights = [*weight_names(network.base, variant), f"{network.base}{dot}-*-of-*.safetensors"]
        patterns += [f"{network.subfolder}/{name}" for name in ("config.json", *weights)]
    return {name: size for name, size in sizes.items() if any(fnmatchcase(name, p) for p in patterns)}


def _check_room(
    remote: dict[str, str], wanted: dict[str, dict[str, int]], folder: Path | None, clip: Path | None
) -> None:
    """CapacityError where a disk has less room than what is missing needs."""
    demands: list[tuple[Path, int]] = []
    for part, sizes in wanted.items():
        repository = Repository(remote[part], "")
        place = repository.cache if folder is None else folder / part
        here = repository.cached if folder is None else Folder(place).get
        begun = sum(path.stat().st_size for path in place.rglob("*.incomplete"))
        demands.append((place, sum(size for name, size in sizes.items() if here(name) is None) - begun))
    if clip is not None:
        towers = [name.removesuffix(".pt") for name in glide.missing(clip)]
        demands.append((clip, sum(4 * glide.PARAMETERS.get(tower, 0) for tower in towers)))
    disks: dict[int, tuple[Path, int]] = {}  # by device a place on it, and what is needed
    for place, count in demands:
        there = next(path for path in (place.absolute(), *place.absolute().parents) if path.exists())
        before = disks.get(there.stat().st_dev, (there, 0))[1]
        disks[there.stat().st_dev] = there, before + max(0, count)
    for place, needed in disks.values():
        if needed > (free := shutil.disk_usage(place).free):
            said = f"has {free:,} bytes free and the files that are missing need {needed:,}"
            remedy = "make room, or choose another place with --to (or HF_HOME for the hub's cache)"
            raise CapacityError(f"the disk of {place} {said}: {remedy}")
