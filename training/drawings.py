"""Real drawings as smooth 64 px pictures: read, made smooth, split, cached, augmented."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

# Concepts of the first cascade: simple drawings that do not read as themselves when turned.
CONCEPTS = (
    "duck", "rabbit", "cat", "elephant", "penguin", "face", "house", "flower", "tree", "snowman",
    "skull", "whale",
)  # fmt: skip
SIZE = 64
HELD_OUT = 10  # one drawing in this many is never trained on
INK_LIMITS = (0.03, 0.45)  # share of ink; outside, a drawing is unfinished or scribbled over
CACHE_VERSION = 1


def held_out(images: np.ndarray) -> np.ndarray:
    """Which of (N, h, w) uint8 drawings belong to the test split: (N,) bool, from a hash of the drawing.

    The hash sees the drawing and its mirror image alike, so that a copy in the data, mirrored or not, is on
    the same side of the split.
    """
    out = np.zeros(len(images), dtype=bool)
    for i, image in enumerate(images):
        digests = [
            hashlib.sha256(np.ascontiguousarray(turn).tobytes()).digest() for turn in (image, image[:, ::-1])
        ]
        out[i] = int.from_bytes(min(digests)[:8], "big") % HELD_OUT == 0
    return out


def smooth_64(images: np.ndarray, *, threshold: float = 0.42, softness: float = 0.085) -> np.ndarray:
    """(N, h, w) uint8 rasters, white ink on black -> (N, 64, 64) uint8, ink white, with smooth strokes.

    28 px rasters are antialiased: a bicubic enlargement, a slight blur and a soft threshold bring their
    strokes' edges back. 64 px rasters get the same blur and threshold. The soft threshold is a logistic
    curve of the given centre and width on ink in 0..1.
    """
    out = np.empty((len(images), SIZE, SIZE), dtype=np.uint8)
    kernel = _gaussian(1.0 if images.shape[-1] < SIZE else 0.8)
    for start in range(0, len(images), 2048):
        x = torch.from_numpy(images[start : start + 2048]).float().div(255)[:, None]  # (n, 1, h, w)
        if x.shape[-1] != SIZE:
            x = F.interpolate(x, size=(SIZE, SIZE), mode="bicubic", align_corners=False)
        radius = kernel.numel() // 2
        x = F.pad(x, (radius,) * 4, mode="constant", value=0.0)
        x = F.conv2d(F.conv2d(x, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))
        low, high = torch.sigmoid(torch.tensor([(0 - threshold) / softness, (1 - threshold) / softness]))
        x = (torch.sigmoid((x - threshold) / softness) - low) / (high - low)
        out[start : start + 2048] = x[:, 0].clamp(0, 1).mul(255).round().to(torch.uint8).numpy()
    return out


def _gaussian(sigma: float) -> Tensor:
    radius = int(3 * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32)
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    return weights / weights.sum()


def load(
    data: str | Path, concepts: tuple[str, ...], cache: str | Path, limit: int | None = None
) -> dict[str, Tensor]:
    """The drawings of `concepts` as 64 px rasters, from the cache file or, the first time, from `data`.

    data: a folder with drawings_28.npz and, optionally, drawings_64.npz (images (N, s, s) uint8, labels (N,),
    names). A concept found in the 64 px file is taken from there, any other from the 28 px one; at most
    `limit` drawings of each, chosen by a fixed draw, if it is given. Returns train
    and test (N, 64, 64) uint8, ink white, and train_labels and test_labels (N,) long: places in `concepts`.
    """
    cache = Path(cache)
    key = hashlib.sha256(repr((CACHE_VERSION, concepts, limit)).encode()).hexdigest()[:12]
    file = cache / f"drawings-{key}.pt"
    if file.is_file():
        return torch.load(file, weights_only=True)
    data = Path(data)
    found: dict[str, np.ndarray] = {}
    for name in ("drawings_28.npz", "drawings_64.npz"):  # the finer file overrides
        if not (data / name).is_file():
            if name == "drawings_28.npz":
                raise SystemExit(
                    f"{data / name} is missing: give the folder of the packed drawings with --data"
                )
            continue
        with np.load(data / name) as packed:
            names, labels, images = (
                [str(n).lower() for n in packed["names"]],
                packed["labels"],
                packed["images"],
            )
        for concept in concepts:
            if concept in names and (labels == names.index(concept)).sum() >= 500:
                found[concept] = images[labels == names.index(concept)]
    missing = [concept for concept in concepts if concept not in found]
    if missing:
        raise SystemExit(f"no drawings of {', '.join(missing)} in {data}")
    parts: dict[str, list[np.ndarray]] = {"train": [], "train_labels": [], "test": [], "test_labels": []}
    for label, concept in enumerate(concepts):
        raw = found[concept]
        ink = raw.mean(axis=(1, 2)) / 255
        raw = raw[(ink > INK_LIMITS[0]) & (ink < INK_LIMITS[1])]
        if limit is not None:
            raw = raw[np.random.default_rng(0).permutation(len(raw))[:limit]]
        test, smooth = held_out(raw), smooth_64(raw)
        for split, chosen in (("train", ~test), ("test", test)):
            parts[split].append(smooth[chosen])
            parts[f"{split}_labels"].append(np.full(int(chosen.sum()), label, dtype=np.int64))
    loaded = {name: torch.from_numpy(np.concatenate(arrays)) for name, arrays in parts.items()}
    cache.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(".tmp")
    torch.save(loaded, scratch)
    scratch.replace(file)
    return loaded


def by_concept(labels: Tensor, count: int) -> list[Tensor]:
    """(N,) labels -> for each of `count` concepts the rows that show it."""
    return [torch.nonzero(labels == label)[:, 0] for label in range(count)]


def draw_rows(rows: list[Tensor], size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A batch with every concept equally likely: rows (size,) into the drawings, concepts (size,)."""
    concepts = torch.randint(len(rows), (size,), generator=generator)
    lengths = torch.tensor([len(r) for r in rows])[concepts]
    places = (torch.rand(size, generator=generator, dtype=torch.float64) * lengths).long()
    return torch.stack(
        [rows[c][p] for c, p in zip(concepts.tolist(), places.tolist(), strict=True)]
    ), concepts


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """(B, 64, 64) uint8, ink white -> (B, 3, 64, 64) float in [-1, 1], black ink on white paper.

    Each drawing is mirrored with probability 1/2, scaled by 0.85..1.0 and shifted by up to 3 pixels; a
    drawing's label survives all of it.
    """
    count = len(images)
    draws = torch.rand(count, 4, generator=generator) * 2 - 1
    mirror = torch.where(draws[:, 0] < 0, -1.0, 1.0)
    scale = 1 / (0.925 + 0.075 * draws[:, 1])
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = mirror * scale, scale
    theta[:, :, 2] = draws[:, 2:] * (3 / (SIZE / 2))
    grid = F.affine_grid(theta, [count, 1, SIZE, SIZE], align_corners=False)
    ink = F.grid_sample(images[:, None].float().div(255), grid, mode="bilinear", align_corners=False)
    return (1 - 2 * ink).expand(-1, 3, -1, -1)


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
    parser.add_argument("--data", required=True, help="folder with drawings_28.npz and drawings_64.npz")
    parser.add_argument("--cache", default="runs/data", help="folder of the packed drawings")
    parser.add_argument("--sheet", default="runs/data/sheet.png", help="where the overview is written")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    packed = load(args.data, CONCEPTS, args.cache)
    generator = torch.Generator().manual_seed(args.seed)
    pictures = []
    for concept, rows in zip(CONCEPTS, by_concept(packed["train_labels"], len(CONCEPTS)), strict=True):
        test = int((packed["test_labels"] == CONCEPTS.index(concept)).sum())
        print(f"{concept}: {len(rows)} to train on, {test} held out")
        picked = rows[torch.randperm(len(rows), generator=generator)[:16]]
        pictures.append(augment(packed["train"][picked], generator))
    sheet(torch.cat(pictures), 16).save(args.sheet)


if __name__ == "__main__":
    main()
