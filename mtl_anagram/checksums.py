"""Which files a cascade's pictures depend on, and their checksums."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

from .errors import SourceError
from .models.glide import MERGES, open_noise_clip
from .models.loading import weight_files
from .models.sources import Folder, Source, open_source
from .releases import LAYOUTS


def weight_paths(sources: Mapping[str, Source | None], variants: Mapping[str, str | None]) -> dict[str, Path]:
    """Every file that pictures of 64 and 256 px depend on, by part and name; sources and variants by part.

    Stage III's are not among them (`Upscaler.files`): pictures that end before it do not depend on it.
    """
    found: dict[str, Path] = {}
    for part, layout in LAYOUTS.items():
        source = sources.get(part)
        if source is None or part == "stage_3":
            continue
        for network in layout.networks:
            files = open_source(source, network.subfolder, "config.json")
            paths = [files.get("config.json"), *weight_files(files, network.base, variants[part])]
            found |= {f"{part}/{network.subfolder}/{p.name}": p for p in paths if p is not None}
        for small in (*layout.required, *layout.optional):
            path = optional_file(source, *small.split("/"))
            if path is not None:
                found[f"{part}/{small}"] = path
    clip = sources.get("noise_clip")
    if clip is not None:
        files = open_noise_clip(clip)
        groups = [[f"{tower}.safetensors", f"{tower}.pt"] for tower in ("clip_image_enc", "clip_text_enc")]
        for names in [*groups, list(MERGES)]:
            path = next((p for p in map(files.get, names) if p is not None), None)
            if path is not None:
                found[f"noise_clip/{path.name}"] = path
    return found


def optional_file(source: Source, subfolder: str, name: str) -> Path | None:
    """A file that a release may lack, with its folder or without, or None."""
    files = open_source(source, None, name)
    if isinstance(files, Folder) and not (files.path / subfolder).is_dir():
        return files.get(name)
    return open_source(source, subfolder, name).get(name)


def combined_checksum(checksums: Mapping[str, str]) -> str:
    """One sha256 for a set of files: of their names and checksums."""
    return hashlib.sha256(json.dumps(dict(checksums), sort_keys=True).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """A file's sha256; SourceError where it cannot be read."""
    blob = path.resolve()
    if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return blob.name  # the hub's cache names large files by their sha256: no need to read 10 GB again
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error}); allow it, or download it again") from error
    return digest.hexdigest()
