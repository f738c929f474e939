"""Pictures to files: 8-bit conversion, views side by side, writes that are whole or not there."""

from __future__ import annotations

import ctypes
import io
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .atomic import write_atomically
from .errors import InputError, SourceError
from .views import View


def to_uint8(picture: Tensor) -> Tensor:
    """A picture (..., 3, H, W) in [-1, 1] -> uint8 0..255, rounded as the released code's files are."""
    unit = picture.detach().float().cpu() / 2 + 0.5
    return (unit * 255 + 0.5).clamp(0, 255).to(torch.uint8)


def side_by_side(picture: Tensor, views: Sequence[View]) -> Tensor:
    """All views of one picture (3, H, W) in a row: (3, H, V W)."""
    return torch.cat([view.view(picture) for view in views], dim=-1)


def encode_png(picture: Tensor) -> bytes:
    """A picture (3, H, W) in [-1, 1] as the bytes of a PNG file."""
    from PIL import Image

    if picture.ndim != 3 or picture.shape[0] != 3 or not picture.numel():
        raise InputError(f"a picture of shape {tuple(picture.shape)} cannot be written: expected (3, H, W)")
    pixels = to_uint8(picture).permute(1, 2, 0).contiguous()  # (H, W, 3)
    raw = ctypes.string_at(pixels.data_ptr(), pixels.numel())
    buffer = io.BytesIO()
    Image.frombytes("RGB", (picture.shape[2], picture.shape[1]), raw).save(buffer, format="PNG")
    return buffer.getvalue()


def decode_png(content: bytes) -> Tensor:
    """The bytes of a picture file -> (3, H, W) float32 in [-1, 1]. Raises SourceError for anything else."""
    from PIL import Image, UnidentifiedImageError

    try:
        picture = Image.open(io.BytesIO(content)).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise SourceError(f"{len(content)} bytes are no whole picture ({error}); make it again") from error
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(picture.height, picture.width, 3).permute(2, 0, 1).float() / 127.5 - 1


def save_picture(path: str | Path, picture: Tensor) -> None:
    """Write one picture (3, H, W) in [-1, 1] as a PNG file, atomically."""
    write_atomically(Path(path), encode_png(picture))
