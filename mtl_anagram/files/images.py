"""Pictures to files and back: 8-bit conversion, PNG, all views side by side with their names, a preview."""

from __future__ import annotations

import io
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import SourceError, float_tensor
from .atomic import write_atomically
from .shards import bytes_of

if TYPE_CHECKING:
    from PIL import Image


def to_uint8(picture: Tensor) -> Tensor:
    """A picture (..., 3, H, W) in [-1, 1] -> uint8 0..255, rounded as the released code's files are."""
    return ((picture.detach().float().cpu() / 2 + 0.5) * 255 + 0.5).clamp(0, 255).to(torch.uint8)


def views_strip(picture: Tensor, views: Sequence[Any]) -> Tensor:
    """One picture (3, H, W) in [-1, 1] as each view shows it, in a row, with its name: (3, H + label, all widths)."""
    tiles = [view.show(picture).detach().float().cpu() for view in views]
    height = max(tile.shape[1] for tile in tiles)
    for i, (tile, view) in enumerate(zip(tiles, views, strict=True)):
        turned = isinstance(angle := getattr(view, "angle", None), int | float)
        name = f"{view.name} {angle:g}°" if turned else view.name
        below = label(name, tile.shape[2], height - tile.shape[1], max(18, height // 10))
        tiles[i] = torch.cat([tile, below], dim=1)
    return torch.cat(tiles, dim=2)


def contact_sheet(pictures: Sequence[Tensor], names: Sequence[str]) -> Tensor:
    """Pictures (3, H, W) in [-1, 1] of one size, each with its name above, in about a square on white."""
    _, height, width = pictures[0].shape
    columns = math.ceil((len(pictures) * (height + 24) / (width + 8)) ** 0.5)
    named = [torch.cat([label(name, width, 0, 20), x], 1) for x, name in zip(pictures, names, strict=True)]
    tiles = [F.pad(tile, (4, 4, 0, 4), value=1) for tile in named]
    tiles += [torch.ones_like(tiles[0])] * (-len(tiles) % columns)
    return torch.cat([torch.cat(tiles[i : i + columns], 2) for i in range(0, len(tiles), columns)], dim=1)


def as_image(picture: Tensor) -> Image.Image:
    """A picture (3, H, W) in [-1, 1] as Pillow's."""
    from PIL import Image

    _, height, width = float_tensor("picture", picture, (3, None, None), "(3, H, W)").shape
    return Image.frombytes("RGB", (width, height), bytes_of(to_uint8(picture).permute(1, 2, 0)))


def encode_png(picture: Tensor) -> bytes:
    """A picture (3, H, W) in [-1, 1] as the bytes of a PNG file."""
    buffer = io.BytesIO()
    as_image(picture).save(buffer, format="PNG")
    return buffer.getvalue()


def read_picture(path: str | Path) -> Tensor:
    """A picture file, turned as its camera says -> (3, H, W) float32 in [-1, 1]. Raises SourceError."""
    from PIL import Image, ImageOps

    try:
        content = io.BytesIO(Path(os.path.expanduser(path)).read_bytes())
        image = ImageOps.exif_transpose(Image.open(content))
        if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off at 255
            image = image.convert("I").point(lambda value: value / 257).convert("L")
        elif image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
            paper = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(paper, image.convert("RGBA"))
        return as_tensor(image.convert("RGB"))
    except Exception as error:  # whatever the bytes lead Pillow to
        raise SourceError(f"{str(path)!r} is no readable picture ({error}): check its path") from error


def save_picture(path: str | Path, picture: Tensor) -> None:
    """Write one picture (3, H, W) in [-1, 1] as a PNG file, atomically."""
    write_atomically(Path(os.path.expanduser(path)), encode_png(picture))


def as_tensor(image: Image.Image) -> Tensor:
    """Pillow's RGB picture -> (3, H, W) float32 in [-1, 1]."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1).float() / 127.5 - 1


def label(name: str, width: int, above: int, height: int) -> Tensor:
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
    return as_tensor(image)


class Preview:
    """An `on_step` that shows the clean pictures which each step predicts, those of a batch in a row.

    path: a PNG that is written anew at every step, or None. In a notebook an image below the cell changes, too.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path, self._shown = path and Path(os.path.expanduser(path)), None

    def __call__(self, seeds: list[int], stage: int, state: Any) -> None:
        pictures = state.x0 if stage < 3 else state.picture
        if pictures is None:
            return
        content = encode_png(torch.cat(list(pictures), dim=-1))
        if self.path:
            write_atomically(self.path, content)
        if (notebook := sys.modules.get("IPython")) and notebook.get_ipython():
            image = notebook.display.Image(content)
            if self._shown is None:
                self._shown = notebook.display.display(image, display_id=True)
            else:
                self._shown.update(image)
