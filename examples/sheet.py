"""A sheet of anagrams: the pairs that a table of partners has at its top, each under its best view.

    python examples/sheet.py sheet.png
    python examples/sheet.py hidden.png --unnamed      # what do you see?

Of every pair's seeds the one that the cascade's own CLIP likes best. The judge has a say in the table and none in the
choice of the seed; an asterisk after a name says that it reads that name.
"""

import argparse
from pathlib import Path

from PIL import Image, ImageDraw

from mtl_anagram import Cascade, get_views
from mtl_anagram.cascade import embedded_folder
from mtl_anagram.evaluation.best_of import best_of
from mtl_anagram.evaluation.partners import TABLE, partners_of
from mtl_anagram.files.images import as_image, read_picture
from mtl_anagram.models import load_judge
from mtl_anagram.models.prompts import with_article

SIDE, TEXT, GAP, COLUMNS = 128, 16, 10, 4  # px: of a picture, of its line of text, between anagrams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sheet", nargs="?", default="sheet.png", help="the PNG to write (default: sheet.png)")
    parser.add_argument("--folder", default="output/sheet", help="where samples are kept, and found again")
    parser.add_argument("--model", help="default: the embedded cascade")
    parser.add_argument("--table", help="a partners.json (default: the model's own)")
    parser.add_argument("--seeds", type=int, default=8, help="of a pair (default: 8)")
    parser.add_argument("--style", default="a poster of")
    parser.add_argument("--count", type=int, default=24, help="of pairs (default: 24)")
    parser.add_argument("--unnamed", action="store_true", help="write no names below the pictures")
    args = parser.parse_args()

    cascade, folder = Cascade.from_pretrained(args.model), Path(args.model or embedded_folder())
    judge, best = load_judge(folder), {}
    for row in partners_of(args.table or folder / TABLE):
        best.setdefault((row.first, row.second), row)
    rows = list(best.values())[: args.count]

    wide, high = 2 * SIDE + GAP, SIDE + TEXT + GAP
    lines = -(-len(rows) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * wide + GAP, lines * high + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (first, second, view, *_) in enumerate(rows):
        names, views = (first, second), get_views(["identity", view])
        one, _ = best_of(
            args.seeds, args.style, [*map(with_article, names)], views,
            Path(args.folder, f"{first} {second} {view}"), model=cascade, batch_size=args.seeds,
        )  # fmt: skip
        left, top = GAP + i % COLUMNS * wide, GAP + i // COLUMNS * high
        pictures = [*map(read_picture, one.pictures.values())]
        for v, name in enumerate(names):
            tile = as_image(views[v].view(pictures[-1])).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            sheet.paste(tile, (left + v * SIDE, top))
            read = judge.names[judge(views[v].view(pictures[0])[None]).argmax()]
            text = "" if args.unnamed else f"{name} *" if read == name else name
            draw.text((left + v * SIDE + 4, top + SIDE + 2), text, fill="black")
        draw.rectangle((left, top, left + 2 * SIDE - 1, top + SIDE - 1), outline="gray")
        turn = view.replace("rotate_", "")
        draw.text((left + 2 * SIDE - 30, top + SIDE + 2), turn, fill="gray")
    sheet.quantize(256).save(args.sheet, optimize=True)
    print(f"{args.sheet}  {len(rows)} pairs")


if __name__ == "__main__":
    main()
