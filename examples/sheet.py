"""A sheet of anagrams, each upright and under its view; an asterisk after a name says that the judge reads it.

    python examples/sheet.py sheet.png                       # the pairs at the top of a table of partners
    python examples/sheet.py sheet.png docs/sheet.jsonl      # a file's requests, as for `mtl-anagram batch`
    python examples/sheet.py hidden.png --unnamed            # what do you see?

Of a table's pairs each is under its best view, and of its seeds the one that the cascade's own CLIP likes best.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from mtl_anagram import Cascade, View, get_views
from mtl_anagram.cascade import embedded_folder
from mtl_anagram.evaluation.batch import batch, read_requests
from mtl_anagram.evaluation.best_of import best_of
from mtl_anagram.evaluation.partners import TABLE, Partner, partners_of
from mtl_anagram.files.images import as_image, read_picture
from mtl_anagram.models import load_judge
from mtl_anagram.models.prompts import with_article, without_article

SIDE, TEXT, GAP, COLUMNS = 128, 16, 10, 4  # px: of a picture, of its line of text, between anagrams
Made = tuple[Sequence[str], Sequence[View], list[Path]]  # names, views, pictures from small to large


def top(table: Path, count: int, each: int) -> list[Partner]:
    """A table's best pairs, each under its best view, and none of a name's beyond `each`."""
    best, uses = dict[tuple[str, str], Partner](), Counter[str]()
    for row in partners_of(table):
        pair = row.first, row.second
        if pair not in best and max(map(uses.__getitem__, pair)) < each:
            best[pair] = row
            uses.update(pair)
    return list(best.values())[:count]


def best_seeds(rows: list[Partner], cascade: Cascade, args: argparse.Namespace) -> Iterator[Made]:
    for first, second, view, *_ in rows:
        names, views = (first, second), get_views(["identity", view])
        one, _ = best_of(
            args.seeds, args.style, [*map(with_article, names)], views,
            Path(args.folder, f"{first} {second} {view}"), model=cascade, batch_size=args.seeds,
        )  # fmt: skip
        yield names, views, list(one.pictures.values())


def requested(requests: Path, cascade: Cascade, folder: str) -> Iterator[Made]:
    runs = read_requests(requests, cascade)
    if others := [name for name, run in runs.items() if len(run.views) != 2]:
        sys.exit(f"{requests}: {', '.join(others)}: a sheet shows two views of each; leave the others out")
    for line in batch(requests, folder, model=cascade):
        if line["status"] == "failed":
            print(f"{line['name']}, seed {line['seed']}: {line['error']}", file=sys.stderr)
            continue
        run = runs[line["name"]]
        names = [without_article(prompt.removeprefix(run.request.style)) for prompt in run.prompts]
        yield names, run.views, [Path(folder, path) for path in line["pictures"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sheet", nargs="?", default="sheet.png", help="the PNG to write (default: sheet.png)")
    parser.add_argument("requests", nargs="?", type=Path, help="a JSON Lines file (default: a table's top)")
    parser.add_argument("--folder", default="output/sheet", help="where samples are kept, and found again")
    parser.add_argument("--model", help="default: the embedded cascade")
    parser.add_argument("--table", help="a partners.json (default: the model's own)")
    parser.add_argument("--seeds", type=int, default=8, help="of a pair (default: 8)")
    parser.add_argument("--style", default="a poster of")
    parser.add_argument("--count", type=int, default=24, help="of pairs (default: 24)")
    parser.add_argument("--each", type=int, default=4, help="pairs of one name at most (default: 4)")
    parser.add_argument("--unnamed", action="store_true", help="write no names below the pictures")
    args = parser.parse_args()

    cascade, own = Cascade.from_pretrained(args.model), Path(args.model or embedded_folder())
    judge = load_judge(own)
    if args.requests:
        made = list(requested(args.requests, cascade, args.folder))
    else:
        made = list(best_seeds(top(args.table or own / TABLE, args.count, args.each), cascade, args))

    wide, high = 2 * SIDE + GAP, SIDE + TEXT + GAP
    lines = -(-len(made) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * wide + GAP, lines * high + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (names, views, paths) in enumerate(made):
        left, top_edge = GAP + i % COLUMNS * wide, GAP + i // COLUMNS * high
        pictures = [*map(read_picture, paths)]
        for v, (view, name) in enumerate(zip(views, names, strict=True)):
            tile = as_image(view.view(pictures[-1])).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            sheet.paste(tile, (left + v * SIDE, top_edge))
            read = judge.names[judge(view.view(pictures[0])[None]).argmax()]
            text = "" if args.unnamed else f"{name} *" if read == name else name
            draw.text((left + v * SIDE + 4, top_edge + SIDE + 2), text, fill="black")
        draw.rectangle((left, top_edge, left + 2 * SIDE - 1, top_edge + SIDE - 1), outline="gray")
        turn, right = views[1].name.replace("rotate_", ""), left + 2 * SIDE - 4
        draw.text((right - draw.textlength(turn), top_edge + SIDE + 2), turn, fill="gray")
    sheet.quantize(256).save(args.sheet, optimize=True)
    print(f"{args.sheet}  {len(made)} pairs")


if __name__ == "__main__":
    main()
