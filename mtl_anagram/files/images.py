"""Pictures to files and back: 8-bit conversion, PNG, and all views side by side with their names."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..errors import SourceError, float_tensor
from .atomic import write_atomically
from .shards import bytes_of


class Shown(Protocol):
    """What a strip needs of a view."""

    name: str

    def show(self, x: Tensor, /) -> Tensor: ...


def to_uint8(picture: Tensor) -> Tensor:
    """A picture (..., 3, H, W) in [-1, 1] -> uint8 0..255, rounded as the released code's files are."""
    return ((picture.detach().float().cpu() / 2 + 0.5) * 255 + 0.5).clamp(0, 255).to(torch.uint8)


def views_strip(picture: Tensor, views: Sequence[Shown]) -> Tensor:
    """One picture (3, H, W) in [-1, 1] as each view shows it, in a row, with its name: (3, H + label, all widths)."""
    tiles = [view.show(picture).detach().float().cpu() for view in views]
    height = max(tile.shape[1] for tile in tiles)
    for i, (tile, view) in enumerate(zip(tiles, views, strict=True)):
        below = _label(view.name, tile.shape[2], height - tile.shape[1], max(18, height // 10))
        tiles[i] = torch.cat([tile, below], dim=1)
    return torch.cat(tiles, dim=2)


def encode_png(picture: Tensor) -> bytes:
    """A picture (3, H, W) in [-1, 1] as the bytes of a PNG file."""
    from PIL import Image

    _, height, width = float_tensor("picture", picture, (3, None, None), "(3, H, W)").shape
    pixels = to_uint8(picture).permute(1, 2, 0)  # (H, W, 3)
    buffer = io.BytesIO()
    Image.frombytes("RGB", (width, height), bytes_of(pixels)).save(buffer, format="PNG")
    return buffer.getvalue()


def decode_png(content: bytes) -> Tensor:
    """The bytes of a picture file -> (3, H, W) float32 in [-1, 1]. Raises SourceError for anything else."""
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(content)).convert("RGB")
    except OSError as error:  # PIL's own kind is one
        raise SourceError(f"{len(content)} bytes are no whole picture ({error}); make it again") from error
    return _tensor(image.tobytes(), image.size)


def save_picture(path: str | Path, picture: Tensor) -> None:
    """Write one picture (3, H, W) in [-1, 1] as a PNG file, atomically."""
    write_atomically(Path(path), encode_png(picture))


def _tensor(content: bytes, size: tuple[int, int]) -> Tensor:
    """RGB bytes of a picture of (width, height) -> (3, H, W) float32 in [-1, 1]."""
    pixels = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(size[1], size[0], 3)
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


def _label(name: str, width: int, above: int, height: int) -> Tensor:
    """(3, above + height, width): as much of the name as has room, black on white, below blank paper."""
    from PIL import Image, ImageDraw, ImageFont

    try:
        font = ImageFont.load_default(round(0.55 * height))
    except (ImportError, TypeError):  # Pillow without FreeType; Pillow 10.0
        font = ImageFont.load_default()
    shown = name = name.encode("latin-1", "replace").decode("latin-1")  # the bitmap font has no more
    while name and font.getlength(shown) > width - 2:
        name = name[:-1]
        shown = f"{name}.."
    image = Image.new("RGB", (width, above + height), "white")
    place = ((width - font.getlength(shown)) // 2, above + height // 6)
    ImageDraw.Draw(image).text(place, shown, fill="black", font=font)
    return _tensor(image.tobytes(), image.size)
