"""Real drawings as smooth 64 px strokes, the shapes and the regions they enclose: read, split, cached, augmented."""

import argparse
import hashlib
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from training import packing

# What the judge and the CLIP tell apart: drawings that people name at a glance.
CONCEPTS = (
    "duck", "rabbit", "cat", "elephant", "penguin", "face", "house", "flower", "tree", "snowman",
    "skull", "whale", "airplane", "apple", "bee", "bicycle", "book", "butterfly", "cake", "car",
    "chair", "clock", "cloud", "donut", "eye", "fish", "guitar", "hat", "house plant", "lion",
    "lollipop", "moon", "mouth", "pig", "rainbow", "sea turtle", "sheep", "snowflake", "star", "sun",
    "wine bottle", "wine glass",
)  # fmt: skip
# What stages I and II are trained on: named at once, mostly of the finer drawings, and few that a turn leaves alike.
DRAWN = (
    "duck", "rabbit", "cat", "elephant", "penguin", "face", "house", "flower", "tree", "snowman",
    "skull", "whale", "hat", "house plant", "butterfly", "wine glass", "lion", "sea turtle",
)  # fmt: skip
SIZE = 64
# Of ten drawings one is never trained on, two train the judge alone, the others the cascade.
SPLITS = ("test", "judge", "judge", *["train"] * 7)
INK_LIMITS = (0.03, 0.45)  # share of ink; outside, a drawing is unfinished or scribbled over
CACHE_VERSION = 3
MOST_REGIONS = 16  # that are told apart in a drawing, the outside being one
LEAST_REGION = 6  # pixels; what is smaller is part of its neighbour


def places_of(images: np.ndarray) -> np.ndarray:
    """Where each of (N, h, w) uint8 drawings belongs: (N,) int64 places in SPLITS, from a hash of the drawing.

    The hash sees the drawing and its mirror image alike, so that a copy in the data, mirrored or not, is on
    the same side of the split.
    """
    out = np.zeros(len(images), dtype=np.int64)
    for i, image in enumerate(images):
        digests = [
            hashlib.sha256(np.ascontiguousarray(turn).tobytes()).digest() for turn in (image, image[:, ::-1])
        ]
        out[i] = int.from_bytes(min(digests)[:8], "big") % len(SPLITS)
    return out


def smooth_64(images: np.ndarray, *, threshold: float = 0.42, softness: float = 0.085) -> np.ndarray:
    """(N, h, w) uint8 rasters, white ink on black -> (N, 64, 64) uint8, ink white, with smooth strokes.

    28 px rasters are antialiased: a bicubic enlargement, a slight blur and a soft threshold bring their
    strokes' edges back. 64 px rasters get the same blur and threshold. The soft threshold is a logistic
    curve of the given centre and width on ink in 0..1.
    """
    out = np.empty((len(images), SIZE, SIZE), dtype=np.uint8)
    kernel = gaussian(1.0 if images.shape[-1] < SIZE else 0.8)
    for start in range(0, len(images), 2048):
        x = torch.from_numpy(images[start : start + 2048]).float().div(255)[:, None]  # (n, 1, h, w)
        if x.shape[-1] != SIZE:
            x = F.interpolate(x, size=(SIZE, SIZE), mode="bicubic", align_corners=False)
        x = convolved(F.pad(x, (4,) * 4), kernel)[..., 4:-4, 4:-4]
        low, high = torch.sigmoid(torch.tensor([(0 - threshold) / softness, (1 - threshold) / softness]))
        x = (torch.sigmoid((x - threshold) / softness) - low) / (high - low)
        out[start : start + 2048] = x[:, 0].clamp(0, 1).mul(255).round().to(torch.uint8).numpy()
    return out


def enclosed(ink: Tensor, *, gap: int = 2) -> Tensor:
    """(N, 64, 64) uint8 strokes -> (N, 64, 64) uint8: the strokes and all that they enclose.

    Strokes are widened by `gap` pixels, which closes gaps of twice that; what then has no way to the picture's
    edge is inside; the outside is widened back.
    """
    from scipy import ndimage

    margin, out = gap + 1, torch.empty_like(ink)
    within_a_picture = np.zeros((3, 3, 3), dtype=bool)
    within_a_picture[1] = ndimage.generate_binary_structure(2, 1)
    for start in range(0, len(ink), 1024):
        x = F.pad(ink[start : start + 1024, None].float().div(255), (margin,) * 4)
        wide = F.max_pool2d((x > 0.35).float(), 2 * gap + 1, stride=1, padding=gap)
        regions, _ = ndimage.label(wide[:, 0].numpy() == 0, structure=within_a_picture)
        outside = torch.from_numpy(regions == regions[:, :1, :1])[:, None].float()
        outside = F.max_pool2d(outside, 2 * gap + 1, stride=1, padding=gap)
        inside = F.avg_pool2d(1 - outside, 3, stride=1, padding=1)
        inside = torch.maximum(inside, x)[:, 0, margin:-margin, margin:-margin]
        out[start : start + 1024] = inside.mul(255).round().to(torch.uint8)
    return out


def regions(ink: Tensor) -> Tensor:
    """(N, 64, 64) uint8 strokes -> (N, 64, 64) uint8: which of the areas that they leave free a pixel is in.

    0 is the outside, 1 the largest area inside, and so on; pixels under a stroke, and areas too small or too many
    to be told apart, belong to the nearest one.
    """
    from scipy import ndimage

    out = np.zeros(ink.shape, dtype=np.uint8)
    for i, image in enumerate(ink.numpy()):
        found, _ = ndimage.label(np.pad(image, 1) < 115)
        found = found[1:-1, 1:-1]  # the outside is 1: the margin joins all of it
        sizes = np.bincount(found.ravel(), minlength=2)
        sizes[0] = 0
        inner = [k for k in np.argsort(-sizes, kind="stable") if k > 1 and sizes[k] >= LEAST_REGION]
        numbers = np.full(len(sizes), 255, dtype=np.uint8)
        numbers[[1, *inner[: MOST_REGIONS - 1]]] = np.arange(min(len(inner) + 1, MOST_REGIONS))
        named = numbers[found]
        if (named == 255).all():
            continue
        near = ndimage.distance_transform_edt(named == 255, return_distances=False, return_indices=True)
        out[i] = named[tuple(near)]
    return torch.from_numpy(out)


def gaussian(sigma: float) -> Tensor:
    """A normal curve's values at whole offsets up to three sigma, summing to 1."""
    radius = int(3 * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32)
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    return weights / weights.sum()


def load(data: str | Path, concepts: tuple[str, ...], cache: str | Path) -> dict[str, Tensor]:
    """The drawings of `concepts` at 64 px, from the cache file or, the first time, from `data`.

    data: a folder that `packing.read` reads. Returns for each split ("train", "judge", "test"), here of
    "train": train (N, 64, 64) uint8, ink white; train_shapes (N, 64, 64) uint8, what the strokes enclose;
    train_labels (N,) long, places in `concepts`.
    """
    cache = Path(cache)
    key = hashlib.sha256(repr((CACHE_VERSION, concepts)).encode()).hexdigest()[:12]
    file = cache / f"drawings-{key}.pt"
    if file.is_file():
        return torch.load(file, weights_only=True)
    found = packing.read(data, concepts)
    splits = dict.fromkeys(SPLITS)
    parts: dict[str, list[np.ndarray]] = {f"{s}{kind}": [] for s in splits for kind in ("", "_labels")}
    for label, concept in enumerate(concepts):
        raw = found[concept]
        ink = raw.mean(axis=(1, 2)) / 255
        raw = raw[(ink > INK_LIMITS[0]) & (ink < INK_LIMITS[1])]
        split, smooth = np.array(SPLITS)[places_of(raw)], smooth_64(raw)
        for name in splits:
            parts[name].append(smooth[split == name])
            parts[f"{name}_labels"].append(np.full(int((split == name).sum()), label, dtype=np.int64))
    loaded = {name: torch.from_numpy(np.concatenate(arrays)) for name, arrays in parts.items()}
    loaded |= {f"{name}_shapes": enclosed(loaded[name]) for name in splits}
    loaded |= {f"{name}_regions": regions(loaded[name]) for name in splits}
    cache.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(".tmp")
    torch.save(loaded, scratch)
    scratch.replace(file)
    return loaded


def load_some(data: str | Path, concepts: tuple[str, ...], cache: str | Path) -> dict[str, Tensor]:
    """`load` of all of CONCEPTS, the labels being places in `concepts`; -1 for drawings of others."""
    unknown = [name for name in concepts if name not in CONCEPTS]
    if unknown or not concepts:
        raise SystemExit(
            f"no drawings of {', '.join(unknown) or 'nothing'}; there are: {', '.join(CONCEPTS)}"
        )
    loaded = load(data, CONCEPTS, cache)
    places = torch.full((len(CONCEPTS),), -1)
    places[[CONCEPTS.index(name) for name in concepts]] = torch.arange(len(concepts))
    return loaded | {f"{split}_labels": places[loaded[f"{split}_labels"]] for split in dict.fromkeys(SPLITS)}


def load_typical(cache: str | Path) -> Tensor:
    """How typical every drawing of the train split is, (N,): what `training.curate` wrote."""
    file = Path(cache) / "typical.pt"
    if not file.is_file():
        raise SystemExit(f"{file} is missing: run python -m training.curate first")
    return torch.load(file, weights_only=True)


def by_concept(labels: Tensor, count: int, typical: Tensor | None = None, share: float = 1.0) -> list[Tensor]:
    """(N,) labels -> for each of `count` concepts the rows that show it.

    typical (N,): how typical each drawing is; of each concept the most typical `share` stays then.
    """
    rows = [torch.nonzero(labels == label)[:, 0] for label in range(count)]
    if typical is None or share >= 1:
        return rows
    return [r[typical[r].argsort(descending=True, stable=True)[: math.ceil(share * len(r))]] for r in rows]


def held_out(labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` rows, or all there are, of the test split's labels (N,) that are of a concept (not -1)."""
    known = torch.nonzero(labels >= 0)[:, 0]
    return known[torch.randperm(len(known), generator=generator, device=generator.device)[:count]]


def draw_rows(rows: list[Tensor], size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A batch with every concept equally likely: rows (size,) into the drawings, concepts (size,)."""
    device = generator.device
    concepts = torch.randint(len(rows), (size,), generator=generator, device=device)
    lengths = torch.tensor([len(r) for r in rows], device=device)
    starts = lengths.cumsum(0) - lengths
    share = torch.rand(size, generator=generator, device=device, dtype=torch.float64)
    places = (share * lengths[concepts]).long()
    return torch.cat(rows).to(device)[starts[concepts] + places], concepts


def augment(
    data: dict[str, Tensor], split: str, rows: Tensor, generator: torch.Generator, size: int = SIZE
) -> Tensor:
    """A split's drawings (B,) -> fields (B, 3, size, size), moved alike: strokes and shape in [0, 1], regions.

    Each drawing is mirrored with probability 1/2, scaled by 0.85..1.0 and shifted by up to 3 pixels of 64; a
    drawing's label survives all of it. Above 64 px the strokes' edges are made sharp again.
    """
    device, count = generator.device, len(rows)
    draws = torch.rand(count, 4, generator=generator, device=device) * 2 - 1
    mirror = torch.where(draws[:, 0] < 0, -1.0, 1.0)
    scale = 1 / (0.925 + 0.075 * draws[:, 1])
    theta = torch.zeros(count, 2, 3, device=device)
    theta[:, 0, 0], theta[:, 1, 1] = mirror * scale, scale
    theta[:, :, 2] = draws[:, 2:] * (3 / (SIZE / 2))
    grid = F.affine_grid(theta, [count, 3, size, size], align_corners=False)
    soft, numbers = as_they_are(data, split, rows).split((2, 1), dim=1)
    numbers = F.grid_sample(numbers, grid, mode="nearest", align_corners=False)
    if size == SIZE:
        soft = F.grid_sample(soft, grid, mode="bilinear", align_corners=False)
    else:
        soft = F.grid_sample(soft, grid, mode="bicubic", align_corners=False)
        soft = sharpened(soft, size // SIZE)
    return torch.cat([soft, numbers], dim=1)


def as_they_are(data: dict[str, Tensor], split: str, rows: Tensor) -> Tensor:
    """`augment`'s fields (B, 3, 64, 64) of drawings that nothing moves."""
    ink, shapes, numbers = (data[f"{split}{kind}"][rows].float() for kind in ("", "_shapes", "_regions"))
    return torch.stack([ink / 255, shapes / 255, numbers], dim=1)


def sharpened(fields: Tensor, factor: int) -> Tensor:
    """Enlarged fields in [0, 1], whose edges are as blurred as the small ones' -> edges a pixel or two wide."""
    blur = gaussian(0.35 * factor)
    fields = convolved(fields, blur)
    return torch.sigmoid((fields - 0.5) * 3.2 * factor)


def convolved(x: Tensor, kernel: Tensor) -> Tensor:
    """(B, C, H, W) with a separable kernel (K,) along both sides; the edges' values go on outside."""
    radius, channels, kernel = kernel.numel() // 2, x.shape[1], kernel.to(x)
    x = F.pad(x, (radius,) * 4, mode="replicate")
    x = F.conv2d(x, kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
    return F.conv2d(x, kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)


def sheet(pictures: Tensor, columns: int) -> Image.Image:
    """(N, 3, H, W) in [-1, 1] -> one picture with `columns` a row."""
    count, _, height, width = pictures.shape
    lines = -(-count // columns)
    canvas = torch.ones(3, lines * height, columns * width)
    for i, picture in enumerate(pictures):
        top, left = i // columns * height, i % columns * width
        canvas[:, top : top + height, left : left + width] = picture
    pixels = canvas.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(pixels.numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description="Pack the drawings and show some of each concept.")
    parser.add_argument("--data", required=True, help="folder of the drawings")
    parser.add_argument("--cache", default="runs/data", help="folder of the packed drawings")
    parser.add_argument("--sheet", default="runs/data/sheet.png", help="where the overview is written")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    from training.styles import PAINTS, paint

    packed = load(args.data, CONCEPTS, args.cache)
    generator = torch.Generator().manual_seed(args.seed)
    pictures = []
    for concept, rows in zip(CONCEPTS, by_concept(packed["train_labels"], len(CONCEPTS)), strict=True):
        held = [int((packed[f"{s}_labels"] == CONCEPTS.index(concept)).sum()) for s in ("judge", "test")]
        print(f"{concept}: {len(rows)} to train on, {held[0]} for the judge, {held[1]} held out")
        picked = rows[torch.randperm(len(rows), generator=generator)[: 2 * len(PAINTS)]]
        fields = augment(packed, "train", picked, generator)
        pictures.append(paint(fields, torch.arange(len(fields)) % len(PAINTS), generator))
    sheet(torch.cat(pictures), 2 * len(PAINTS)).save(args.sheet)


if __name__ == "__main__":
    main()
