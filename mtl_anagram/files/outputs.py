"""A seed's folder: pictures and metadata, whole or not there, and what is finished already."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import InputError, SourceError
from .atomic import remove_leftovers, write_atomically
from .hub import read_json
from .images import contact_sheet, encode_png, read_picture, views_strip

METADATA = "metadata.json"
SCORES = "scores.json"  # best_of's, in the candidates' folder: scores by seed
OURS = re.compile(r"metadata\.json|(start_from|reference|sample_\d+(x\d+)?(\.views)?)\.(png|gif|webp|mp4)")
REPLACE = "choose another folder, or delete them (overwrite=True does)"
Request = dict[str, Any]  # JSON, read or to be written
Size = int | tuple[int, int]  # a square's side, or (height, width), in px
Sizes = Sequence[Size]


class DamagedError(InputError):
    """A folder's metadata cannot be read."""


@dataclass(frozen=True)
class Anagram:
    """What one seed became: its folder, its pictures' files by side in px, whether it was there before."""

    seed: int
    folder: Path
    pictures: dict[Size, Path]
    skipped: bool
    warnings: tuple[str, ...] = ()


def folder_of(folder: Path, seed: int) -> Path:
    return folder / f"{seed:04d}"


def picture_names(size: Size) -> tuple[str, str]:
    """The released code's names of a picture and its views side by side: sample_64.png, or sample_64x96.png."""
    side = size if isinstance(size, int) else "x".join(map(str, size))
    return f"sample_{side}.png", f"sample_{side}.views.png"


def check_folder(path: str | Path, name: str = "save_dir", *, write: bool = False) -> Path:
    """A folder's path, if it is one or can be made; it is made when something is written (write = now)."""
    try:
        folder = Path(os.path.expanduser(path))
        if not path or b"\0" in os.fsencode(path):  # which refuses half a character
            raise ValueError("it is empty or holds a null character")
        there = next(path for path in (folder, *folder.parents) if path.exists())
    except (TypeError, ValueError, OSError) as error:
        raise InputError(f"{name}={path!r} must be a folder's path ({error}); choose another") from error
    if not there.is_dir() or (write and not os.access(there, os.W_OK | os.X_OK)):
        said = "cannot be written to" if there.is_dir() else "is a file"
        raise SourceError(f"{name}={str(folder)!r}: {there} {said}; choose another folder")
    return folder


def clear(folder: Path) -> None:
    """Take away a finished seed's metadata, then its pictures, which would no longer belong together."""
    if (folder / METADATA).is_file():
        for path in sorted(folder.iterdir()):
            if OURS.fullmatch(path.name):
                path.unlink()


def write_pictures(folder: Path, size: Size, picture: Tensor, views: Sequence[Any]) -> None:
    """One picture (3, H, W) in [-1, 1], and its views side by side."""
    remove_leftovers(folder)
    for name, shown in zip(picture_names(size), (picture, views_strip(picture, views)), strict=True):
        write_atomically(folder / name, encode_png(shown))


def write_new(path: Path, content: bytes, overwrite: bool = False) -> bool:
    """Write a file; True if it was there already. InputError where another is in its place, unless overwrite."""
    if there := path.is_file() and path.read_bytes() == content:
        return there
    if path.exists() and not overwrite:
        raise InputError(f"{path} is there and is another; {REPLACE}")
    write_atomically(path, content)
    return False


def finish(folder: Path, seed: int, asked: Request, sizes: Sizes, about: Request, said: list[str]) -> Anagram:
    """Write the seed's metadata, last of all: the request, the pictures' checksums, and `about`: what made them."""
    own = folder_of(folder, seed)
    content = {"format": 1, "seed": seed, "sizes": list(sizes), "request": asked}
    content |= {"pictures": _sums(own, sizes), **about}
    write_atomically(own / METADATA, (json.dumps(content, indent=1) + "\n").encode())
    return Anagram(seed, own, {size: own / picture_names(size)[0] for size in sizes}, False, tuple(said))


def write_sheet(folder: Path, seeds: Sequence[int], size: Size) -> None:
    """seeds.png: the views of all seeds' pictures of this size on one sheet, 400 seeds at most."""
    strips = [folder_of(folder, seed) / picture_names(size)[1] for seed in seeds[:400]]
    pictures = [read_picture(strip) for strip in strips]
    names = [f"seed {seed}" for seed in seeds[:400]]
    path, content = folder / "seeds.png", encode_png(contact_sheet(pictures, names))
    if not path.is_file() or path.read_bytes() != content:
        write_atomically(path, content)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """A metadata.json's content, of its folder too; SourceError where there is none or it is damaged."""
    return read_json(Path(path) / METADATA if Path(path).is_dir() else Path(path))


def finished(
    folder: Path, seed: int, request: Request, sizes: Sizes, *, dtype: str,
    normal: Callable[[Request], Request] = dict,
) -> Anagram | None:  # fmt: skip
    """The seed's Anagram if its folder holds this request's pictures whole; None if there is work to do.

    normal: brings a request to the form in which two can be compared. Pictures that were made in another dtype
    are left, and Anagram.warnings says so. Raises InputError where the folder holds another request's pictures.
    """
    own = folder_of(folder, seed)
    if not (own / METADATA).is_file():
        return None
    try:
        content = read_json(own / METADATA)
        old, new = normal(dict(content["request"])), normal(json.loads(json.dumps(request)))
        sums, recorded = dict(content["pictures"]), content["made_with"]["dtype"]
    except (SourceError, KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"{own}: its {METADATA} cannot be read ({error!r}); {REPLACE}") from error
    # Stage III comes after the others and changes nothing in them: one request goes on where the other ends.
    extra = "stage_3" if ("stage_3" in old) != ("stage_3" in new) else None
    differs = [key for key in {**new, **old} if key != extra and old.get(key) != new.get(key)]
    if differs:
        said = f"holds another request's pictures (different: {', '.join(differs)})"
        raise InputError(f"{own} {said}; {REPLACE}")
    copies = [own / f"{name}.png" for name in ("start_from", "reference") if name in new]
    whole = all(sums.get(name) == found for name, found in _sums(own, sizes).items())
    if not whole or not all(path.is_file() for path in copies):
        return None
    remove_leftovers(own)
    said = f"{own}: its pictures were made in {recorded} and are left as they are; in {dtype} they differ; {REPLACE}"
    pictures = {size: own / picture_names(size)[0] for size in sizes}
    return Anagram(seed, own, pictures, True, (said,) if recorded != dtype else ())


def _sums(own: Path, sizes: Sizes) -> dict[str, str]:
    """The pictures' sha256 by name, "" for one that is not there."""
    paths = [own / name for size in sizes for name in picture_names(size)]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "" for p in paths}
