"""A sheet of anagrams: of every pair and view the best of its seeds by the cascade's own CLIP, the best first.

    python examples/sheet.py docs/sheet.png --folder evaluation

samples what is missing with the cascade's own recipe. Of an evaluation that was made already:

    python examples/sheet.py docs/sheet.png --folder evaluation --as-is plain

The judge has no say in the choice; an asterisk after a name says that it reads that name too.
"""

import argparse
import dataclasses
from pathlib import Path

from PIL import Image, ImageDraw

from mtl_anagram import Cascade, Protocol, evaluate, get_views
from mtl_anagram.cascade import embedded_folder
from mtl_anagram.evaluation.protocol import choose_pairs
from mtl_anagram.files.hub import read_json
from mtl_anagram.files.images import as_image, read_picture
from mtl_anagram.models import load_judge

SIDE, TEXT, GAP = 128, 16, 10  # px: of a picture, of its line of text, between anagrams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sheet", nargs="?", default="sheet.png", help="the PNG to write (default: sheet.png)")
    parser.add_argument("--folder", default="evaluation", help="where samples are kept, and found again")
    parser.add_argument("--as-is", metavar="RECIPE", help="of its cells in the folder; sample none")
    parser.add_argument("--model", help="default: the embedded cascade")
    parser.add_argument("--concepts", nargs="+", help="default: all that the model has learnt")
    parser.add_argument("--pair-count", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, help="default: the model's recipe's")
    parser.add_argument("--style", default="a poster of")
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--columns", type=int, default=4)
    args = parser.parse_args()

    cascade = Cascade.from_pretrained(args.model)
    recipe = cascade.recipe
    if args.steps is not None:
        recipe = dataclasses.replace(recipe, num_inference_steps=args.steps)
    folder = Path(args.model or embedded_folder())
    judge = load_judge(folder)
    concepts = args.concepts or list(cascade.concepts)
    protocol = Protocol(
        pairs=choose_pairs(concepts, args.pair_count), recipes={"own": recipe}, style=args.style,
        seeds=tuple(range(args.seeds)),
    )  # fmt: skip
    if args.as_is is None:
        evaluate(cascade, protocol, args.folder, judge=judge, progress=True)

    latest = {}  # by pair and view: a folder can hold measurements with an older CLIP or fewer seeds, too
    paths = (Path(args.folder) / "cells").glob(f"{args.as_is or 'own'}-*.json")
    for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns):
        cell = read_json(path)
        request = cell["request"]
        if request["style"] != args.style or (args.as_is is None and request["recipe"] != recipe.to_dict()):
            continue
        if tuple(request["names"]) not in protocol.pairs or request["view"] not in protocol.views:
            continue
        key = (*request["names"], request["view"])
        if key not in latest or len(cell["samples"]) >= len(latest[key][1]["samples"]):
            latest[key] = (path, cell)
    found = []
    for path, cell in latest.values():
        best = max(range(len(cell["samples"])), key=lambda i: cell["samples"][i]["score"])
        found.append((cell["samples"][best]["score"], path, cell, best))
    found.sort(key=lambda entry: -entry[0])

    wide, high = 2 * SIDE + GAP, SIDE + TEXT + GAP
    lines = -(-min(args.count, len(found)) // args.columns)
    sheet = Image.new("RGB", (args.columns * wide + GAP, lines * high + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (_, path, cell, best) in enumerate(found[: args.count]):
        request, sample = cell["request"], cell["samples"][best]
        strip = read_picture(path.parent / cell["picture"])
        picture = strip[:, :, best * strip.shape[1] : (best + 1) * strip.shape[1]]
        left, top = GAP + i % args.columns * wide, GAP + i // args.columns * high
        for v, view in enumerate(get_views(["identity", request["view"]])):
            tile = as_image(view.view(picture))
            sheet.paste(tile.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (left + v * SIDE, top))
            name = request["names"][v]
            read = " *" if sample["named"][v] == name else ""
            draw.text((left + v * SIDE + 4, top + SIDE + 2), f"{name}{read}", fill="black")
        draw.rectangle((left, top, left + 2 * SIDE - 1, top + SIDE - 1), outline="gray")
        turn = request["view"].replace("rotate_", "")
        draw.text((left + 2 * SIDE - 30, top + SIDE + 2), turn, fill="gray")
    sheet.quantize(128).save(args.sheet, optimize=True)
    print(f"{args.sheet}  {min(args.count, len(found))} anagrams of {len(found)} pairs and views")


if __name__ == "__main__":
    main()
