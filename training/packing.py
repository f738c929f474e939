"""Where drawings come from: the packed files, or the data set's own bitmaps; and a smaller pack to take along."""

import argparse
from pathlib import Path

import numpy as np

MIN_COUNT = 500  # a concept with fewer drawings in a file is looked for elsewhere
BITMAPS = ("{}.npy", "full_numpy_bitmap_{}.npy")  # as they are named once downloaded
BITMAP_COUNT = 5_000  # of a bitmap file's hundred thousand drawings, the first


def read(data: str | Path, concepts: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The raw drawings of each concept, (N, s, s) uint8, white ink on black, s = 28 or 64.

    data: a folder with drawings_28.npz and, where there is one, drawings_64.npz (images (N, s, s), labels (N,)
    places in names, names; the finer file counts where both have a concept), or with Quick, Draw!'s own
    numpy_bitmap files ("duck.npy", (N, 784) uint8). SystemExit names the concepts that are in none of them.
    """
    data = Path(data)
    found: dict[str, np.ndarray] = {}
    for concept in concepts:
        for pattern in BITMAPS:
            path = data / pattern.format(concept)
            if path.is_file():
                rows = np.load(path, mmap_mode="r")[:BITMAP_COUNT]
                found[concept] = np.array(rows).reshape(-1, 28, 28)
    for name in ("drawings_28.npz", "drawings_64.npz"):
        if not (data / name).is_file():
            continue
        with np.load(data / name) as packed:
            names = [str(n).lower() for n in packed["names"]]
            labels, images = packed["labels"], packed["images"]
        for concept in concepts:
            if concept in names and (labels == names.index(concept)).sum() >= MIN_COUNT:
                found[concept] = images[labels == names.index(concept)]
    missing = [concept for concept in concepts if concept not in found]
    if missing:
        raise SystemExit(
            f"no drawings of {', '.join(missing)} in {data}: it needs drawings_28.npz, or Quick, Draw!'s "
            "numpy_bitmap files of these names"
        )
    return found


def pack(found: dict[str, np.ndarray], out: Path, count: int) -> list[Path]:
    """Write the first `count` drawings of each concept in the packed files' layout, one file a size."""
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for size in sorted({images.shape[-1] for images in found.values()}):
        own = {name: images[:count] for name, images in found.items() if images.shape[-1] == size}
        labels = np.repeat(np.arange(len(own)), [len(images) for images in own.values()]).astype(np.int16)
        path = out / f"drawings_{size}.npz"
        np.savez_compressed(
            path, images=np.concatenate(list(own.values())), labels=labels, names=np.array(list(own))
        )
        written.append(path)
    return written


def main() -> None:
    from training.drawings import CONCEPTS

    parser = argparse.ArgumentParser(description="Pack some drawings of every concept into small files.")
    parser.add_argument("--data", required=True, help="folder of the drawings")
    parser.add_argument("--out", required=True, help="folder of the small files")
    parser.add_argument("--count", type=int, default=1_500, help="drawings of each concept (default: 1500)")
    args = parser.parse_args()
    for path in pack(read(args.data, CONCEPTS), Path(args.out), args.count):
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
