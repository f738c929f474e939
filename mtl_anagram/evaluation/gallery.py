"""What was made, shown: films from one reading to the next, one page on which a reader turns all, and all views."""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from inspect import signature
from operator import itemgetter
from os.path import expanduser
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..errors import InputError, SourceError, number, whole_number
from ..files.hub import read_json
from ..files.images import as_image, as_tensor, contact_sheet, encode_png, label, read_picture
from ..files.outputs import METADATA, SCORES, picture_names, read_metadata, write_new
from ..views import View, get_views, view_from_metadata
from ..views.motion import Motion, Moving
from ..views.registry import CLASSES

SIDE = 256  # px: of the pictures that are shown
RATE = 20  # frames a second
KINDS = ("gif", "webp", "mp4")
ROOM = 0.21  # of a picture's side, around it, where its corners turn
SHAPES = (  # of the picture on which views are shown, in 128ths of its side
    ("rectangle", (0, 92, 128, 128), "yellowgreen"), ("ellipse", (92, 8, 120, 36), "gold"),
    ("rectangle", (26, 58, 82, 106), "firebrick"), ("polygon", (16, 60, 54, 22, 92, 60), "saddlebrown"),
    ("rectangle", (34, 76, 50, 106), "black"), ("rectangle", (58, 68, 74, 84), "lightyellow"),
)  # fmt: skip


@dataclass(frozen=True)
class Made:
    """One seed as it is shown: a picture's file, the metadata's content, the score or None."""

    file: Path
    content: dict[str, Any]
    score: float | None

    def ways(self) -> tuple[list[Moving], int]:
        """The picture on its way to each of its views, and the room around it, in px."""
        with _shown(self.file):
            picture = read_picture(self.file)
            ways = [Moving(view_from_metadata(view), picture) for view in self.content["request"]["views"]]
            return ways, round(ROOM * max(picture.shape))


@contextmanager
def _shown(path: Path) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise InputError(f"{path} cannot be shown ({type(error).__name__}: {error})") from error


def find_made(folders: Sequence[str | Path], size: int = SIDE) -> list[Made]:
    """All seeds in and below folders, the best score first, then by seed; InputError where there is none.

    size: of each seed the largest picture of at most so many px a side, or its smallest.
    """
    whole_number("size", size, 1)
    found = []
    places = [path for folder in folders for path in sorted(Path(expanduser(folder)).rglob(METADATA))]
    for path in (paths := {path.resolve(): path for path in places}).values():
        own, run = path.parent, path.absolute().parents[1]
        if run.name == "candidates" and (run.parent / own.name / METADATA).resolve() in paths:
            continue  # the best one, which went on
        with _shown(path):
            content = read_metadata(path)
            request, seed, (first, *more) = itemgetter("request", "seed", "sizes")(content)
            itemgetter("prompts", "style", "recipe")(request)  # which are shown
            chosen = [first, *(s for s in more if (max(s) if isinstance(s, list) else s) <= size)][-1]
            scores = [p for p in (run / SCORES, run / "candidates" / SCORES) if p.is_file()]
            score = read_json(scores[0]).get(str(seed)) if scores else None
            found.append(Made(own / picture_names(chosen)[0], content, score and float(score)))
    if not found:
        where = ", ".join(map(str, folders))
        raise InputError(f"{where}: no {METADATA} is there; name a folder that generate wrote")
    return sorted(found, key=lambda made: (made.score is None, -(made.score or 0), made.content["seed"]))


def animate(
    folder: str | Path, *, size: int = SIDE, seconds: float = 1.5, overwrite: bool = False
) -> Iterator[tuple[Path, bool]]:
    """Write each seed's animation beside its picture, as GIF, WebP and, with ffmpeg, MP4; yields (file, was there).

    folder: a seed's, or one that holds several. From view to view and round again, each held for a while with its
    prompt below. size: as for `find_made`; seconds: of one movement.
    """
    count = max(1, round(number("seconds", seconds, high=60, above=True) * RATE))
    for made in find_made([folder], size):
        frames, ticks = zip(*_frames(made, count), strict=True)
        for kind in KINDS:
            content = encode_animation(frames, ticks, kind)
            if content is not None:
                path = made.file.with_suffix(f".{kind}")
                yield path, write_new(path, content, overwrite)


def _frames(made: Made, count: int) -> Iterator[tuple[Image.Image, int]]:
    """Pictures with their prompts below, and for how many ticks each is shown."""
    ways, room = made.ways()
    high, wide = ways[0].stations[0].shape[1:]
    grown = max(1, SIDE // max(high, wide))  # small pictures are shown larger
    width = grown * (wide + 2 * room)
    below = [label(prompt, width, 0, max(24, width // 11)) for prompt in made.content["request"]["prompts"]]
    for i, way in enumerate(ways):
        j = (i + 1) % len(ways)
        legs = [(leg, back) for leg, back in ((way, True), (ways[j], False)) if leg.motions]
        for tick in range(count if i != j and legs else 1):
            time = tick / count
            done = time * time * (3 - 2 * time)  # slowly at first, and at last
            leg, back = legs[int(done * len(legs))] if tick else (way, True)
            along = done * len(legs) % 1
            picture = leg.at(1 - along if back else along, room)
            picture = picture.repeat_interleave(grown, 1).repeat_interleave(grown, 2)
            frame = torch.cat([picture, torch.lerp(below[i], below[j], done)], dim=1)
            yield as_image(frame), 1 if tick else RATE


def encode_animation(frames: Sequence[Image.Image], ticks: Sequence[int], kind: str) -> bytes | None:
    """Frames of one size, each shown for so many ticks of 1 / RATE s, over and over; None: no ffmpeg here.

    kind: "gif" (256 colours), "webp" (a tenth of its bytes) or "mp4" (one round, by ffmpeg).
    """
    if kind == "mp4":
        return _by_ffmpeg(frames, ticks) if shutil.which("ffmpeg") else None
    flat, buffer = Image.Dither.NONE, io.BytesIO()
    images = [image.quantize(256, dither=flat) for image in frames] if kind == "gif" else frames
    times = [1000 // RATE * count for count in ticks]  # ms
    more = {"save_all": True, "append_images": images[1:], "duration": times, "loop": 0, "quality": 90}
    images[0].save(buffer, format=kind, **more)
    return buffer.getvalue()


def _by_ffmpeg(frames: Sequence[Image.Image], ticks: Sequence[int]) -> bytes:
    raw = b"".join(frame.tobytes() * count for frame, count in zip(frames, ticks, strict=True))
    given = f"-loglevel error -f rawvideo -pix_fmt rgb24 -r {RATE} -s {'{}x{}'.format(*frames[0].size)} -i -"
    made = "-vf crop=trunc(iw/2)*2:trunc(ih/2)*2 -pix_fmt yuv420p -movflags +faststart"  # sides must be even
    with tempfile.TemporaryDirectory() as folder:  # the format is not written in one go
        path = Path(folder, "made.mp4")
        command = ["ffmpeg", *given.split(), *made.split(), str(path)]
        done = subprocess.run(command, input=raw, capture_output=True)
        if done.returncode:
            raise SourceError(f"ffmpeg made no MP4: {done.stderr.decode(errors='replace').strip()[-300:]}")
        return path.read_bytes()


def write_page(
    folders: Sequence[str | Path], out: str | Path, *, size: int = SIDE, overwrite: bool = False
) -> int:
    """Write one HTML file, which needs nothing else, of all seeds below the folders; returns how many there are.

    There a reader turns every picture by clicks, drags or keys. size, order: as for `find_made`.
    """
    motions: dict[str, int] = {}
    cards = [_card(made, motions) for made in find_made(folders, size)]
    data = json.dumps({"cards": cards, "motions": [json.loads(text) for text in motions]})
    data = data.replace("<", "\\u003c")
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    write_new(Path(expanduser(out)), page.replace("DATA", data, 1).encode(), overwrite)
    return len(cards)


def _card(made: Made, motions: dict[str, int]) -> dict[str, Any]:
    """What the page needs of one seed; what it shares with others goes into `motions`, described by JSON."""
    (ways, room), request = made.ways(), made.content["request"]
    pictures, legs = dict[str, int](), list[list[list[int]]]()
    for way in ways:
        numbers = [pictures.setdefault(_url(station), len(pictures)) for station in way.stations]
        moved = [motions.setdefault(_described(motion), len(motions)) for motion in way.motions]
        legs.append([list(leg) for leg in zip(numbers, numbers[1:], moved, strict=False)])
    about = {"seed": made.content["seed"], "score": made.score, "style": request["style"]} | request["recipe"]
    return {
        "prompts": request["prompts"], "views": [view["name"] for view in request["views"]], "room": room,
        "pictures": list(pictures), "legs": legs, "about": {name: str(value) for name, value in about.items()},
    }  # fmt: skip


def _described(motion: Motion) -> str:
    """A motion as JSON; its map has a pixel's piece as the colour, red first."""
    about: dict[str, Any] = {"fade": motion.fade, "zoom": motion.zoom}
    about |= {name: getattr(motion, name).tolist() for name in ("turn", "mirror", "starts", "ends")}
    if len(motion.turn) > 1:
        about["map"] = _url(torch.stack([motion.pieces >> bits & 255 for bits in (0, 8, 16)]) / 127.5 - 1)
    return json.dumps(about)


def _url(picture: Tensor) -> str:
    return "data:image/png;base64," + base64.b64encode(encode_png(picture)).decode()


def describe_views() -> list[str]:
    """A line for each view: what it takes, which sizes it allows, how predictions are put together, what it is."""
    lines = []
    for name, kind in CLASSES.items():
        view, takes = _plain(name) or kind, str(signature(kind)).replace("'", "").removesuffix(" -> None")
        sizes = view.sizes or (f"a multiple of {view.multiple} px" if view.multiple > 1 else "any size")
        sizes += ", square" * view.square
        lines.append(f"{name}{takes}: {sizes}; {view.reduce}; {str(kind.__doc__).splitlines()[0]}")
    return lines


def _plain(name: str) -> View | None:
    """The view of this name as it is without arguments, None where it needs one."""
    with suppress(InputError):
        return get_views([name])[0]
    return None


def views_sheet(side: int = 128) -> Tensor:
    """All views that need no argument, each half-way and whole, of one drawn picture: (3, H, W) in [-1, 1]."""
    drawn = Image.new("RGB", (side, side), "lightskyblue")
    for shape, place, colour in SHAPES:
        getattr(ImageDraw.Draw(drawn), shape)([value * side / 128 for value in place], fill=colour)
    ways = {name: Moving(view, as_tensor(drawn)) for name in CLASSES if (view := _plain(name))}
    return contact_sheet([torch.cat([way.at(0.4), way.at(1)], dim=2) for way in ways.values()], list(ways))
