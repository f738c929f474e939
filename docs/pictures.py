"""Draws these pages' pictures anew with the embedded cascade.

    python docs/pictures.py [NAME ...] [--out FOLDER] [--steps N]

On one core four minutes, and sheet.png about fifteen more (kept in output/sheet: an interrupted sheet goes on).
`--out FOLDER --steps 2` rehearses all. anagram.png follows README's first command, illusions.png the table of
illusions.md, sheet.png sheet.jsonl. `choices`, which must be named, shows both with seeds 0 to 7, to choose by eye.
"""

import argparse
import dataclasses
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mtl_anagram import Cascade, get_views
from mtl_anagram.evaluation.gallery import views_sheet
from mtl_anagram.files.images import as_image, label, read_picture, save_picture, views_strip
from mtl_anagram.models.prompts import with_article

DOCS = Path(__file__).resolve().parent
KINDS = ("poster", "painting", "stained glass window", "watercolour", "paper cut", "sketch")  # of styles
TILE, GAP = 128, 8  # px


def sampled(
    prompts: list[str], views: list[str], seeds: Sequence[int] = (0,), kind: str = "poster", size: int = 64
) -> dict[int, Tensor]:
    """Pictures (N, 3, side, side) by side: 64, and 256 where asked for."""
    request = {"style": f"a {kind} of", "recipe": recipe, "stop_after": size, "batch_size": 8}
    return cascade.sample(prompts, views, seeds, **request).pictures


def single(name: str, **request: object) -> dict[int, Tensor]:
    return sampled([with_article(name)], ["identity"], **request)


def enlarged(picture: Tensor, side: int = TILE) -> Tensor:
    return F.interpolate(picture[None], size=(side, side), mode="bicubic", antialias=True)[0].clamp(-1, 1)


def grid(tiles: Sequence[Tensor], columns: int) -> Tensor:
    """Tiles of any sizes on white, each in the upper left corner of a cell of the largest one's size."""
    high, wide = (max(tile.shape[i] for tile in tiles) + GAP for i in (1, 2))
    cells = [F.pad(t, (0, wide - t.shape[2], 0, high - t.shape[1]), value=1.0) for t in tiles]
    cells += [torch.ones_like(cells[0])] * (-len(cells) % columns)
    rows = [torch.cat(cells[i : i + columns], 2) for i in range(0, len(cells), columns)]
    return torch.cat(rows, 1)[:, :-GAP, :-GAP]


def save(name: str, picture: Tensor) -> None:
    """With a palette: a third of the bytes."""
    as_image(picture).quantize(256).save(options.out / f"{name}.png", optimize=True)


def example(name: str, *words: str) -> None:
    subprocess.run([sys.executable, DOCS.parent / "examples" / name, *map(str, words)], check=True)


def readme() -> tuple[list[str], list[str], str, int]:
    """Prompts, views, kind and seed of README's first command."""
    line = r'^ +mtl-anagram generate (".+") --views (.+) --style "a (.+) of" --seed (\d+)$'
    prompts, views, kind, seed = re.findall(line, (DOCS.parent / "README.md").read_text("utf-8"), re.M)[0]
    return shlex.split(prompts), views.split(), kind, int(seed)


def kinds() -> list[tuple[list[str], list[str], int]]:
    """Prompts, views and seed of every line of illusions.md's table."""
    line, page = r'^\|[^|]+\| (".+") \| `(.+)` \| (\d+) \|', (DOCS / "illusions.md").read_text("utf-8")
    return [(shlex.split(p), views.split(), int(seed)) for p, views, seed in re.findall(line, page, re.M)]


def illusion(prompts: list[str], views: list[str], seeds: Sequence[int]) -> list[Tensor]:
    """Every seed's picture under its views, with their names."""
    return [views_strip(enlarged(x), get_views(views)) for x in sampled(prompts, views, seeds)[64]]


def anagram() -> None:
    prompts, views, kind, seed = readme()
    picture = sampled(prompts, views, [seed], kind, 256)[256][0]
    tiles = [view.show(picture) for view in get_views(views)]
    tiles = [torch.cat([x, label(prompt, 256, 4, 24)], 1) for x, prompt in zip(tiles, prompts, strict=True)]
    save_picture(options.out / "anagram.png", grid(tiles, 2))


def samples() -> None:
    tiles = []
    for name in cascade.concepts:
        three = torch.cat([enlarged(x) for x in single(name, seeds=range(3))[64]], dim=2)
        tiles.append(torch.cat([three, label(name, 3 * TILE, 0, 22)], dim=1))
    save("samples", grid(tiles, 3))


def styles() -> None:
    tiles = []
    for name in ("duck", "house", "butterfly", "elephant"):
        for kind in KINDS:
            picture = enlarged(single(name, kind=kind)[64][0])
            tiles.append(torch.cat([picture, label(kind, TILE, 0, 20)], 1))
    save("styles", grid(tiles, len(KINDS)))


def stage_2() -> None:
    shown = {"duck": "poster", "house": "poster", "butterfly": "painting", "wine glass": "sketch"}
    made = [single(name, kind=kind, size=256) for name, kind in shown.items()]
    save("stage_2", torch.cat([torch.cat([enlarged(m[64][0], 256), m[256][0]], 1) for m in made], 2))


def illusions() -> None:
    save("illusions", grid([illusion(prompts, views, [seed])[0] for prompts, views, seed in kinds()], 3))


def choices() -> None:
    requests = [readme()[:2], *(kind[:2] for kind in kinds())]
    save("choices", grid([tile for request in requests for tile in illusion(*request, range(8))], 8))


def sheet() -> None:
    which = ["--count", 2, "--seeds", 1] if options.steps else [DOCS / "sheet.jsonl"]
    example("sheet.py", options.out / "sheet.png", *which)


def attention() -> None:
    path = options.out / "attention.png"
    example("attention_maps.py", path)
    save("attention", read_picture(path))


def views() -> None:
    save("views", views_sheet())


if __name__ == "__main__":
    drawn = {f.__name__: f for f in (anagram, samples, styles, stage_2, illusions, attention, views, sheet)}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"choices, or of {' '.join(drawn)} (all)")
    parser.add_argument("--out", type=Path, default=DOCS, metavar="FOLDER", help="default: docs")
    parser.add_argument("--steps", type=int, help="default: the cascade's recipe's")
    options = parser.parse_args()
    if unknown := {*options.names} - {*drawn, "choices"}:
        parser.error(f"{', '.join(sorted(unknown))}: there are choices, {', '.join(drawn)}")
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    options.out.mkdir(parents=True, exist_ok=True)
    cascade = Cascade.from_pretrained(device="cpu")
    steps = options.steps or cascade.recipe.num_inference_steps
    recipe = dataclasses.replace(cascade.recipe, num_inference_steps=steps)
    for name in options.names or drawn:
        (drawn | {"choices": choices})[name]()
        print(options.out / f"{name}.png", flush=True)
