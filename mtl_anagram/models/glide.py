"""GLIDE's noise-aware CLIP where it was published: two pickled state dicts, kept as they are."""

import os
import secrets
import sys
import zipfile
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import SourceError
from ..files.atomic import write_atomically
from ..files.hub import Files, Folder, Repository, Source, open_source, require

GLIDE = "glide"  # the source that means the published files
URL = "https://openaipublic.blob.core.windows.net/diffusion/dec-2021/{}.pt"
PARAMETERS = {"clip_image_enc": 86_443_776, "clip_text_enc": 71_679_488}
MERGES = ("merges.txt", "bpe_simple_vocab_16e6.txt.gz", "bpe_simple_vocab_16e6.txt")
# Its files, each by the names that it may have.
CLIP_FILES = (*((f"{tower}.safetensors", f"{tower}.pt") for tower in PARAMETERS), MERGES)
FILES = (*(f"{tower}.pt" for tower in PARAMETERS), MERGES[0])  # what is kept of it
# CLIP's byte-pair merges, which GLIDE's code carries along; the upscaler's tokenizer has the same ones.
MERGES_FROM = Repository("stabilityai/stable-diffusion-x4-upscaler", "tokenizer")


def is_glide(source: Source | None) -> bool:
    """Whether a source means the published files; a folder of that name, seen from here, goes before them."""
    return source == GLIDE and not Path(GLIDE).is_dir()


def cache_folder() -> Path:
    """Where the published files are kept: $MTL_ANAGRAM_CACHE, else mtl_anagram in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = os.environ.get("MTL_ANAGRAM_CACHE") or f"{base}/mtl_anagram"
    return Path(os.path.expanduser(folder), "noise_clip")


def open_noise_clip(source: Source, subfolder: str | None = None, *, fetch: bool = True) -> Files:
    """The files of a noise-aware CLIP, downloaded first (fetch) if the source is GLIDE's own."""
    if is_glide(source):
        return Folder(fetch_glide(cache_folder()) if fetch else cache_folder())
    return open_source(source, subfolder, CLIP_FILES[0][0], fetch=fetch)


def clip_files(files: Files) -> list[Path]:
    """The picture tower, the text tower and the merges; SourceError where one is missing."""
    return [require(files, *names) for names in CLIP_FILES]


def missing(folder: Path) -> list[str]:
    """Which of FILES a folder lacks."""
    return [name for name in FILES if not (folder / name).is_file()]


def fetch_glide(folder: Path) -> Path:
    """Bring what is missing into a folder, with a bar where there is a terminal; returns the folder."""
    if lacking := missing(folder):
        refuse_offline(f"GLIDE's noise-aware CLIP ({', '.join(lacking)}) is not in {folder}")
    for name in lacking:
        if name == MERGES[0]:
            write_atomically(folder / name, require(MERGES_FROM, name).read_bytes())
        else:
            _download(folder / name)
    return folder


def refuse_offline(what: str) -> None:
    """SourceError where the hub's client is told to stay offline."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        remedy = "unset it once to download, or give a folder that holds the files"
        raise SourceError(f"{what}, and HF_HUB_OFFLINE is set: {remedy}")


def read_pickle(path: Path) -> dict[str, Tensor]:
    """A .pt file's flat state dict on the CPU, by the unpickler that runs no code."""
    try:
        with torch.device("cpu"), torch.inference_mode(False):
            mapped = zipfile.is_zipfile(path)  # files from before torch 1.6 are no zip and cannot be mapped
            state: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # whatever the bytes lead it to, with advice not to be followed
        state = type(error).__name__
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        found = state if isinstance(state, str) else type(state).__name__
        said = f"is no flat state dict of tensors that torch's weights-only unpickler reads ({found})"
        raise SourceError(f"{path} {said}; download it again")
    return state


def _download(path: Path) -> None:
    """One tower, whole and of the right size, or not at all."""
    from huggingface_hub.utils import are_progress_bars_disabled

    # Named as in write_atomically: other processes may fetch the same.
    url, part = URL.format(path.stem), path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shown = sys.stderr.isatty() and not are_progress_bars_disabled()
        torch.hub.download_url_to_file(url, str(part), progress=shown)
        if sum(tensor.numel() for tensor in read_pickle(part).values()) != PARAMETERS[path.stem]:
            raise SourceError("it is cut off or damaged")
        os.replace(part, path)
    except (OSError, HTTPException) as error:  # the server's answer, no connection, no room, damage
        remedy = f"try again later, or give a folder that holds {path.name}"
        raise SourceError(f"{url} could not be fetched into {path.parent} ({error}); {remedy}") from error
    finally:
        part.unlink(missing_ok=True)
