"""Which files a cascade's pictures depend on, and what identifies them."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..errors import SourceError
from ..files.hub import Folder, Repository, Source, open_source
from .glide import CLIP_FILES, first_of, open_noise_clip
from .loading import weight_files
from .releases import NETWORKS, SMALL_FILES, T5_FILE, T5_JSON

WHOLE, SAMPLE, SAMPLES = 64 << 20, 1 << 18, 64  # a file up to WHOLE is read whole, else 64 parts of 256 KiB
SAMPLED = "sampled:"


def weight_paths(
    sources: Mapping[str, Source | None],
    variants: Mapping[str, str | None],
    parts: Iterable[str] = ("stage_1", "stage_2", "noise_clip"),
) -> dict[str, Path]:
    """Every file that pictures depend on, by part and name; stage III's apart, which only its pictures need."""
    given = {part: source for part in parts if (source := sources.get(part)) is not None}
    found = {part: part_files(source, part, variants.get(part)) for part, source in given.items()}
    return {f"{part}/{name}": path for part, files in found.items() for name, path in files.items()}


def part_files(source: Source, part: str, variant: str | None) -> dict[str, Path]:
    """The files of one part by their names within it; what is not here yet is downloaded."""
    if part == "noise_clip":
        clip = open_noise_clip(source)
        return {path.name: path for names in CLIP_FILES if (path := first_of(clip, names))}
    # model_index.json, which lies in no folder, holds a limit: it changes no picture.
    found = {name: optional_file(source, *name.split("/")) for name in SMALL_FILES[part] if "/" in name}
    for network in (network for network in NETWORKS if network.part == part):
        files = open_source(source, network.subfolder, "config.json")
        paths = [files.get("config.json"), *weight_files(files, network.base, variant)]
        found |= {f"{network.subfolder}/{path.name}": path for path in paths if path is not None}
    if T5_FILE in found and found[T5_FILE] is None:
        found[T5_JSON] = optional_file(source, *T5_JSON.split("/"))
    return {name: path for name, path in found.items() if path is not None}


def optional_file(source: Source, subfolder: str, name: str) -> Path | None:
    """A file that a release may lack, with its folder or without, or None; offline, None too if it is not here."""
    from huggingface_hub import constants

    files = open_source(source, None, name)
    if not isinstance(files, Folder) or (files.path / subfolder).is_dir():
        files = open_source(source, subfolder, name)
    if isinstance(files, Repository) and constants.HF_HUB_OFFLINE:
        return files.cached(name)
    return files.get(name)


def checksum_of(path: Path, like: str = "") -> str:
    """What identifies a file: its sha256, or of more than 64 MB the size and 64 parts spread evenly ("sampled:...").

    A large file in the hub's cache bears its sha256 as its name and is not read. like: a recorded checksum, whose kind
    is made again, so that a record from another place or an older version can be compared.
    """
    sampled, blob = like.startswith(SAMPLED), path.resolve()
    if not sampled and blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return blob.name
    try:
        size = path.stat().st_size
        whole = not sampled and (bool(like) or size <= WHOLE)
        digest = hashlib.sha256(b"" if whole else str(size).encode())
        # The first sample has the header: all names, shapes and dtypes.
        spread = [max(0, size - SAMPLE) * i // (SAMPLES - 1) for i in range(SAMPLES)]
        with open(path, "rb") as file:
            for start in range(0, size, SAMPLE) if whole else spread:
                file.seek(start)
                digest.update(file.read(SAMPLE))
        return digest.hexdigest() if whole else SAMPLED + digest.hexdigest()
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error}); allow it, or download it again") from error


def combined_checksum(checksums: Mapping[str, str]) -> str:
    """One sha256 for a set of files: of their names and checksums."""
    return hashlib.sha256(json.dumps(dict(checksums), sort_keys=True).encode()).hexdigest()
