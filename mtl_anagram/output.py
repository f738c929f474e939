"""A seed's folder: pictures and metadata, whole or not there, and what is finished already."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .atomic import remove_leftovers, write_atomically
from .cascade import Cascade
from .errors import InputError, SourceError
from .media import encode_png, side_by_side
from .models.sources import read_json
from .views import View

METADATA = "metadata.json"


@dataclass(frozen=True)
class Anagram:
    """What one seed became: its folder, its pictures' files by side in px, and whether it was there before."""

    seed: int
    folder: Path
    pictures: dict[int, Path]
    skipped: bool


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


def check_room(folder: Path, sizes: list[int]) -> None:
    """SourceError where a seed's files could not be written in the end."""
    names = [METADATA, *picture_names(sizes)]
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


def picture_names(sizes: list[int]) -> list[str]:
    """The released code's names: for each side in px the picture, and its views side by side."""
    return [f"sample_{side}{kind}.png" for side in sizes for kind in ("", ".views")]


def folder_of(folder: Path, seed: int) -> Path:
    return folder / f"{seed:04d}"


def clear(folder: Path) -> None:
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


def write_pictures(folder: Path, side: int, picture: Tensor, views: list[View]) -> None:
    remove_leftovers(folder)
    write_atomically(folder / f"sample_{side}.png", encode_png(picture))
    write_atomically(folder / f"sample_{side}.views.png", encode_png(side_by_side(picture, views)))


def finish(folder: Path, seed: int, request: dict[str, Any], cascade: Cascade, sizes: list[int]) -> Anagram:
    from . import __version__

    own = folder_of(folder, seed)
    names = picture_names(sizes)
    files = cascade.checksums() | (cascade.upscaler_checksums() if "stage_3" in request else {})
    content = {
        "format": 1,
        "seed": seed,
        "sizes": sizes,
        "request": request,
        "pictures": {name: hashlib.sha256((own / name).read_bytes()).hexdigest() for name in names},
        "weights": {"name": cascade.name, "variant": cascade.variant, "files": files},
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


def finished(
    folder: Path, seed: int, request: dict[str, Any], sizes: list[int], overwrite: bool
) -> Anagram | None:
    """The seed's pictures if its folder holds them whole; None if there is work to do."""
    own = folder_of(folder, seed)
    if overwrite or not (own / METADATA).is_file():
        return None
    try:
        content = read_json(own / METADATA)
    except SourceError as error:
        raise SourceError(
            f"{error}; overwrite=True (--overwrite) makes the pictures of seed {seed} anew"
        ) from error
    old = content.get("request")
    old = old if isinstance(old, dict) else {}
    if ("stage_3" in old) != ("stage_3" in request):
        # Stage III comes after the others and changes nothing in them: one request goes on where the other ends.
        old, request = ({k: v for k, v in one.items() if k != "stage_3"} for one in (old, request))
    if old != json.loads(json.dumps(request)):
        differs = ", ".join(key for key in request if old.get(key) != json.loads(json.dumps(request[key])))
        differs = differs or "fields that this version does not know"
        raise InputError(
            f"{own} holds another request's pictures (different: {differs}); choose another folder, or "
            "overwrite=True (--overwrite) to replace them"
        )
    pictures = content.get("pictures")
    for name in picture_names(sizes):
        path = own / name
        if not isinstance(pictures, dict) or name not in pictures or not path.is_file():
            return None
        if hashlib.sha256(path.read_bytes()).hexdigest() != pictures[name]:
            return None
    remove_leftovers(own)
    return Anagram(seed, own, {side: own / f"sample_{side}.png" for side in sizes}, skipped=True)
