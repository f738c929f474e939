"""GLIDE's noise-aware CLIP where it was published: two pickled state dicts, made safetensors once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..atomic import write_atomically
from ..errors import SourceError, WeightsError
from .fetch import fetch
from .sources import Files, Folder, Repository, Source, open_source

GLIDE = "glide"  # the source that means the published files
TOWERS = ("clip_image_enc", "clip_text_enc")
URL = "https://openaipublic.blob.core.windows.net/diffusion/dec-2021/{}.pt"
PARAMETERS = {"clip_image_enc": 86_443_776, "clip_text_enc": 71_679_488}
MERGES = ("merges.txt", "bpe_simple_vocab_16e6.txt.gz", "bpe_simple_vocab_16e6.txt")
# CLIP's byte-pair merges, which GLIDE's code carries along; the upscaler's tokenizer has the same ones.
MERGES_FROM = ("stabilityai/stable-diffusion-x4-upscaler", "tokenizer", "merges.txt")


def is_glide(source: Source | None) -> bool:
    """Whether a source means the published files; a folder of that name, seen from here, goes before them."""
    return source == GLIDE and not Path(GLIDE).is_dir()


def cache_folder() -> Path:
    """Where the published files are kept: $MTL_ANAGRAM_CACHE, else mtl_anagram in the user's cache folder."""
    named = os.environ.get("MTL_ANAGRAM_CACHE")
    if named:
        return Path(named).expanduser() / "noise_clip"
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "mtl_anagram" / "noise_clip"


def open_noise_clip(source: Source, subfolder: str | None = None) -> Files:
    """The files of a noise-aware CLIP, downloaded first if the source is GLIDE's own; .pt made safetensors."""
    if is_glide(source):
        return Folder(fetch_glide(cache_folder()))
    files = open_source(source, subfolder, "clip_image_enc.safetensors")
    if isinstance(files, Folder):
        for tower in TOWERS:
            pickled = files.path / f"{tower}.pt"
            # A folder that cannot be written to is read as it is, every time.
            if not files.get(f"{tower}.safetensors") and pickled.is_file() and os.access(files.path, os.W_OK):
                convert(pickled)
    return files


def missing(folder: Path) -> list[str]:
    """Which of the published files a folder lacks, by the names that they have here."""
    lacking = [f"{tower}.safetensors" for tower in TOWERS if not (folder / f"{tower}.safetensors").is_file()]
    return lacking + ([] if any((folder / name).is_file() for name in MERGES) else [MERGES[0]])


def fetch_glide(folder: Path, *, progress: bool | None = None) -> Path:
    """Bring the two towers and the merges into a folder, whatever of it is there already; returns the folder.

    Raises SourceError where the machine is offline (HF_HUB_OFFLINE=1 holds here too) and something is missing.
    """
    lacking = missing(folder)
    if lacking:
        refuse_offline(f"GLIDE's noise-aware CLIP ({', '.join(lacking)}) is not in {folder}")
    for tower in TOWERS:
        if f"{tower}.safetensors" not in lacking:
            continue
        url = URL.format(tower)
        pickled = fetch(url, folder / f"{tower}.pt", progress=progress)
        try:
            convert(pickled, parameters=PARAMETERS[tower])
        except (SourceError, WeightsError) as error:
            pickled.unlink(missing_ok=True)  # so that the next call fetches it anew
            raise type(error)(f"{error} (it came from {url})") from error
        pickled.unlink(missing_ok=True)
    if MERGES[0] in lacking:
        repo_id, subfolder, name = MERGES_FROM
        path = Repository(repo_id, subfolder).get(name)
        if path is None:
            raise SourceError(f"{repo_id} has no {subfolder}/{name}; put CLIP's {MERGES[1]} into {folder}")
        write_atomically(folder / name, path.read_bytes())
    return folder


def refuse_offline(what: str) -> None:
    """SourceError where the hub's client is told to stay offline."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise SourceError(
            f"{what}, and HF_HUB_OFFLINE is set: unset it once to download, or give a folder that holds the files"
        )


def convert(pickled: Path, *, parameters: int | None = None) -> Path:
    """Write a .pt state dict as .safetensors beside it, whole or not at all; returns the new file's path.

    parameters: how many numbers the file must hold, None = any.
    """
    from safetensors.torch import save

    state = read_pickle(pickled)
    found = sum(tensor.numel() for tensor in state.values())
    if parameters is not None and found != parameters:
        raise WeightsError(
            f"{pickled} holds {found:,} parameters, {parameters:,} are expected; download it again"
        )
    target = pickled.with_suffix(".safetensors")
    # Views of one storage become tensors of their own; the bytes depend on names and values alone.
    write_atomically(
        target, save({name: tensor.clone().contiguous() for name, tensor in sorted(state.items())})
    )
    return target


def read_pickle(path: Path) -> dict[str, Tensor]:
    """A .pt file's flat state dict, by the unpickler that runs no code."""
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever the bytes lead it to
        raise SourceError(
            f"{path} is not a state dict that the weights-only unpickler reads ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}); download it again"
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise WeightsError(f"{path} holds no flat state dict of tensors; download GLIDE's {path.name} again")
    return state
