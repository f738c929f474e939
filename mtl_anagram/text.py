"""How a cascade reads its prompts: T5 whole or streamed from its files, and which files decide the states."""

from __future__ import annotations

from pathlib import Path

import torch

from .errors import AnagramError
from .memory import machine_of
from .models.loading import T5_ALIASES, weight_files
from .models.shards import Shards
from .models.sources import Source, open_source

MODES = ("auto", "whole", "streamed")
_SHARE = 0.8  # of the free memory: the states, the system and what comes after need some too


def streams(
    mode: str, source: Source, *, variant: str | None, dtype: torch.dtype | None, device: torch.device
) -> bool:
    """Whether the text encoder is to run from its files: "auto" = where its weights do not fit what is free.

    dtype None = every tensor's own. Where the system does not tell what is free, the whole encoder is loaded.
    """
    if mode != "auto":
        return mode == "streamed"
    free = free_bytes(device)
    if free is None:
        return False
    try:
        files = open_source(source, "text_encoder", "config.json")
        shards = Shards(weight_files(files, "model", variant), aliases=T5_ALIASES)
    except AnagramError:  # files that do not load: their loading says it
        return False
    return is_too_large(sum(entry.bytes_in(dtype or entry.dtype) for entry in shards.values()), free)


def is_too_large(whole: int, free: int) -> bool:
    """Whether "auto" streams a text encoder whose weights take `whole` bytes, where `free` are free."""
    return whole > _SHARE * free


def text_files(source: Source, variant: str | None) -> dict[str, Path]:
    """The files that a prompt's states depend on, by their names in a release."""
    files = open_source(source, "text_encoder", "config.json")
    paths = [files.get("config.json"), *weight_files(files, "model", variant)]
    found = {f"text_encoder/{path.name}": path for path in paths if path is not None}
    path = open_source(source, "tokenizer", "spiece.model").get("spiece.model")
    return found if path is None else {**found, "tokenizer/spiece.model": path}


def free_bytes(device: torch.device) -> int | None:
    """Memory that new tensors on a device can have now, or None where the system does not tell."""
    machine = machine_of(device)
    return None if machine is None else machine.free
