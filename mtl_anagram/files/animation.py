"""Animations: frames as the bytes of a GIF, a WebP or an MP4 file."""

import io
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from ..errors import SourceError
from .images import as_image

RATE = 20  # frames a second
KINDS = ("gif", "webp", "mp4")


def encode_animation(frames: Sequence[Tensor], ticks: Sequence[int], kind: str) -> bytes | None:
    """Frames (3, H, W) in [-1, 1], each shown for so many ticks of 1 / RATE s, over and over; None: no ffmpeg here.

    kind: "gif" (256 colours), "webp" (a tenth of its bytes) or "mp4" (one round, by ffmpeg).
    """
    if kind == "mp4":
        return _by_ffmpeg(frames, ticks) if shutil.which("ffmpeg") else None
    images, buffer = [as_image(frame) for frame in frames], io.BytesIO()
    if kind == "gif":
        images = [image.quantize(256, dither=Image.Dither.NONE) for image in images]
    times = [1000 // RATE * count for count in ticks]  # ms
    more = {"save_all": True, "append_images": images[1:], "duration": times, "loop": 0, "quality": 90}
    images[0].save(buffer, format=kind, **more)
    return buffer.getvalue()


def _by_ffmpeg(frames: Sequence[Tensor], ticks: Sequence[int]) -> bytes:
    raw = b"".join(as_image(frame).tobytes() * count for frame, count in zip(frames, ticks, strict=True))
    given = f"-loglevel error -f rawvideo -pix_fmt rgb24 -s {frames[0].shape[2]}x{frames[0].shape[1]} -r {RATE} -i -"
    made = "-vf crop=trunc(iw/2)*2:trunc(ih/2)*2 -pix_fmt yuv420p -movflags +faststart"  # sides must be even
    with tempfile.TemporaryDirectory() as folder:  # the format is not written in one go
        path = Path(folder, "made.mp4")
        command = ["ffmpeg", *given.split(), *made.split(), str(path)]
        done = subprocess.run(command, input=raw, capture_output=True)
        if done.returncode:
            raise SourceError(f"ffmpeg made no MP4: {done.stderr.decode(errors='replace').strip()[-300:]}")
        return path.read_bytes()
