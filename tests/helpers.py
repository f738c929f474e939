"""What several test files use."""

import os
from pathlib import Path

import torch


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest absolute difference over the reference's largest magnitude, both (...) of one shape."""
    assert value.shape == reference.shape, f"{tuple(value.shape)} is not {tuple(reference.shape)}"
    return ((value - reference).abs().max() / reference.abs().max().clamp(min=1e-12)).item()


def data_folder() -> Path | None:
    """The folder with the published tokenizers' files, which the repository does not hold, or None.

    The environment variable MTL_ANAGRAM_DATA names it; else shared/data beside the repository is tried.
    """
    named = os.environ.get("MTL_ANAGRAM_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    return folder if folder.is_dir() else None
