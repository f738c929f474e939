"""Bring a cascade's files to this machine: exactly those that are loaded, checked, before they are needed."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from .atomic import write_atomically
from .errors import CapacityError, InputError, SourceError
from .models import glide
from .models.loading import index_names
from .models.sources import Folder, Repository, hub_errors, open_source
from .releases import LAYOUTS, PLACES, Layout, Network

if TYPE_CHECKING:
    from .cascade import Cascade


@dataclass(frozen=True)
class HubFile:
    """A file as the hub lists it; sha256 None = a small file, which has none there."""

    path: str
    bytes: int
    sha256: str | None


@dataclass(frozen=True)
class Fetched:
    """A file on this machine. verified: its size, and its sha256 where the hub gives one, are as listed."""

    part: str
    path: Path
    bytes: int
    verified: bool


def download(cascade: Cascade, to: str | Path | None = None, *, progress: bool = False) -> list[Fetched]:
    """Fetch all that a cascade loads and is not here yet; returns every file with its place.

    to None = the hub's own cache (and $MTL_ANAGRAM_CACHE for GLIDE's CLIP), where the cascade's name finds them
    again; a folder = a cascade's folder, which is a source by itself. An interrupted download goes on where it
    was. Before the first byte: CapacityError where the machine cannot hold a stage (unless the cascade's
    ignore_memory) or the disk the files; SourceError for an unknown repository, one whose licence is not
    accepted, or no connection. With HF_HUB_OFFLINE=1 it only looks whether all is here.
    """
    from huggingface_hub import constants

    folder = None if to is None else _checked_folder(to, cascade)
    cascade.check_memory()
    offline = bool(constants.HF_HUB_OFFLINE)
    wanted: dict[str, tuple[str, dict[str, HubFile]]] = {}
    for part, layout in LAYOUTS.items():
        source = cascade.sources[part]
        files = None if source is None else open_source(source, None, "config.json")
        if isinstance(files, Repository):
            variant = cascade.variants[part]
            if offline:
                _all_cached(files.repo_id, layout, cascade, folder)
            else:
                wanted[part] = (
                    files.repo_id,
                    needed_files(list_files(files.repo_id), layout, variant, files.repo_id),
                )
    clip = glide.is_glide(cascade.sources["noise_clip"])
    clip_folder = folder / "noise_clip" if folder is not None else glide.cache_folder()
    _check_room(wanted, folder, clip_folder if clip else None)

    fetched: list[Fetched] = []
    # The small files first: a licence that is not accepted shows at once.
    queue = [(part, repo_id, file) for part, (repo_id, files) in wanted.items() for file in files.values()]
    for part, repo_id, file in sorted(queue, key=lambda entry: (entry[2].sha256 is not None, entry[0])):
        path = _fetch(repo_id, file.path, None if folder is None else folder / part, progress)
        _verify(path, file, repo_id)
        fetched.append(Fetched(part, path, file.bytes, verified=True))
    if clip:
        glide.fetch_glide(clip_folder, progress=progress)
        names = (*(f"{tower}.safetensors" for tower in glide.TOWERS), *glide.MERGES)
        paths = [path for path in (clip_folder / name for name in names) if path.is_file()]
        fetched += [Fetched("noise_clip", path, path.stat().st_size, verified=True) for path in paths]
    if folder is not None:
        about = {"name": cascade.name, "variants": cascade.variants}
        write_atomically(folder / "cascade.json", (json.dumps(about, indent=1) + "\n").encode())
    return fetched


def list_files(repo_id: str) -> dict[str, HubFile]:
    """A repository's files by path, with sizes and the large ones' sha256, as the hub lists them."""
    from huggingface_hub import HfApi

    with hub_errors(repo_id, "the list of its files"):
        info = HfApi().model_info(repo_id, files_metadata=True)
    found = {}
    for entry in info.siblings or []:
        large = entry.lfs
        sha256 = None if large is None else large["sha256"]
        found[entry.rfilename] = HubFile(entry.rfilename, entry.size or 0, sha256)
    return found


def needed_files(
    listed: Mapping[str, HubFile], layout: Layout, variant: str | None, repo_id: str
) -> dict[str, HubFile]:
    """Those of a repository's files that loading reads; SourceError names what is not there."""
    names: list[str] = []
    for network in layout.networks:
        names += [f"{network.subfolder}/config.json", *_weight_names(listed, network, variant, repo_id)]
    names += layout.required
    for name in names:
        if name not in listed:
            raise SourceError(
                f"{repo_id} has no {name}: see https://huggingface.co/{repo_id}/tree/main; name another source"
            )
    names += [name for name in layout.optional if name in listed]
    return {name: listed[name] for name in names}


def _weight_names(
    listed: Mapping[str, HubFile], network: Network, variant: str | None, repo_id: str
) -> list[str]:
    """One safetensors file, or an index and its shards: in the order in which the loader looks."""
    dot = "" if variant is None else f".{variant}"
    whole = f"{network.subfolder}/{network.base}{dot}.safetensors"
    if whole in listed:
        return [whole]
    shard = re.compile(rf"{re.escape(f'{network.subfolder}/{network.base}{dot}')}-\d+-of-\d+\.safetensors")
    shards = [name for name in listed if shard.fullmatch(name)]
    for index in (f"{network.subfolder}/{name}" for name in index_names(network.base, variant)):
        if index in listed and shards:
            return [index, *shards]
    hint = "" if variant is None else '; variant "fp32" takes the files without one'
    raise SourceError(f"{repo_id} has no {whole} and no index with shards{hint}; name another source")


def _checked_folder(to: str | Path, cascade: Cascade) -> Path:
    folder = Path(to).expanduser()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"to={str(to)!r} is a file; name a folder")
    for part, source in cascade.sources.items():
        known = source is None or (part == "noise_clip" and glide.is_glide(source))
        if not known and isinstance(open_source(source or "", None, "config.json"), Folder):
            raise InputError(
                f"to={str(to)!r} gathers what comes from the hub, but {part} is the folder {source}: leave `to` "
                f"out, or name a hub id for {part}"
            )
    return folder


def _all_cached(repo_id: str, layout: Layout, cascade: Cascade, folder: Path | None) -> None:
    """Offline: SourceError that names what the hub's cache lacks, or that nothing can be gathered elsewhere."""
    from .planning import plan_network

    networks = [network for network in map(partial(plan_network, cascade), PLACES) if network is not None]
    files = [file for network in networks if network.source == repo_id for file in network.files]
    lacking = [file.path for file in files if not file.present]
    for path in layout.required:
        subfolder, _, name = path.rpartition("/")
        if Repository(repo_id, subfolder).cached(name) is None:
            lacking.append(path)
    if lacking:
        glide.refuse_offline(f"{repo_id}: {', '.join(lacking)} is not in the hub's local cache")
    if folder is not None:
        glide.refuse_offline(f"{folder} is filled from the hub")


def _check_room(
    wanted: Mapping[str, tuple[str, Mapping[str, HubFile]]], folder: Path | None, clip: Path | None
) -> None:
    """CapacityError where a disk has less room than what is missing needs."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    demands: list[tuple[Path, int]] = []
    for part, (repo_id, files) in wanted.items():
        for file in files.values():
            demands.append(_demand(repo_id, file, cache, None if folder is None else folder / part))
    if clip is not None:
        # A tower's pickle and what it is converted to are there at the same time, one tower after the other.
        lacking = glide.missing(clip)
        sizes = [4 * count for tower, count in glide.PARAMETERS.items() if f"{tower}.safetensors" in lacking]
        demands.append((clip, sum(sizes) + max(sizes, default=0)))
    by_disk: dict[int, tuple[Path, int]] = {}
    for place, count in demands:
        there = next(path for path in (place.absolute(), *place.absolute().parents) if path.exists())
        first, total = by_disk.get(there.stat().st_dev, (there, 0))
        by_disk[there.stat().st_dev] = first, total + count
    for place, needed in by_disk.values():
        free = shutil.disk_usage(place).free
        if needed > free:
            raise CapacityError(
                f"the disk of {place} has {free:,} bytes free and the files that are missing need {needed:,}: make "
                "room, or choose another place with --to (or HF_HOME for the hub's cache)"
            )


def _demand(repo_id: str, file: HubFile, cache: Path, local: Path | None) -> tuple[Path, int]:
    """Where a file goes, and how many bytes of it are still to come."""
    place = cache if local is None else local
    if local is not None:
        present = local / file.path
        parts = local / ".cache" / "huggingface" / "download"
    else:
        subfolder, _, name = file.path.rpartition("/")
        found = Repository(repo_id, subfolder).cached(name)
        present = found if found is not None else cache / "not there"
        parts = cache / f"models--{repo_id.replace('/', '--')}" / "blobs"
    if present.is_file() and present.stat().st_size == file.bytes:
        return place, 0
    begun = 0
    if file.sha256 is not None and parts.is_dir():
        begun = max((p.stat().st_size for p in parts.rglob(f"*{file.sha256}*.incomplete")), default=0)
    return place, max(0, file.bytes - begun)


def _fetch(repo_id: str, path: str, local: Path | None, progress: bool) -> Path:
    """One file through the hub's client, which caches and resumes."""
    subfolder, _, name = path.rpartition("/")
    with _bars(progress):
        found = Repository(repo_id, subfolder).get(name, local)
    if found is None:
        raise SourceError(f"{repo_id} no longer has {path}; try again")
    return found


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """The hub client's progress bars, on or off, and as they were afterwards."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _verify(path: Path, file: HubFile, repo_id: str) -> None:
    found = path.stat().st_size
    remedy = "delete it and run the same command again"
    if found != file.bytes:
        raise SourceError(f"{path} has {found:,} bytes, {repo_id} lists {file.bytes:,}: {remedy}")
    if file.sha256 is None:
        return
    digest = hashlib.sha256()
    with open(path, "rb") as content:
        while chunk := content.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != file.sha256:
        raise SourceError(f"{path} has sha256 {digest.hexdigest()}, {repo_id} lists {file.sha256}: {remedy}")
