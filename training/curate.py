"""How typical each drawing is: what the exported CLIP thinks of it, among all names.

A few per cent of the drawings show something else or nothing, and a small model learns sooner from drawings that
look like what they are called; the trainings take the most typical share of each concept (`--typical`). The judge,
which measures the cascade, has no part in the choice.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from mtl_anagram.models import NoiseCLIP, load_noise_clip
from training import captions, drawings

SHARPNESS = 20.0  # of the softmax over cosines, as in the CLIP's own training


@torch.no_grad()
def typical(clip: NoiseCLIP, ink: Tensor, labels: Tensor, names: tuple[str, ...]) -> Tensor:
    """The probability of each drawing's own name, (N,), for strokes (N, 64, 64) uint8 and places in `names`."""
    texts = clip.embed_text([f"a sketch of {captions.with_article(name)}" for name in names])
    found = []
    for strokes, own in zip(ink.split(256), labels.split(256), strict=True):
        pictures = (1 - 2 * strokes.float()[:, None] / 255).expand(-1, 3, -1, -1)
        cosines = clip.embed_image(pictures, 0) @ texts.T  # (B, K)
        found.append((SHARPNESS * cosines).softmax(1).gather(1, own[:, None])[:, 0])
    return torch.cat(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of the drawings (see training/README.md)")
    parser.add_argument("--cache", default="runs/data", help="folder of the packed drawings")
    parser.add_argument("--weights", default="weights", help="the cascade whose CLIP is asked")
    args = parser.parse_args()
    names = drawings.CONCEPTS
    data = drawings.load(args.data, names, args.cache)
    clip = load_noise_clip(f"{args.weights}/noise_clip", dtype=torch.float32)
    found = typical(clip, data["train"], data["train_labels"], names)
    for place, name in enumerate(names):
        own = found[data["train_labels"] == place]
        print(f"{name}: {len(own)} drawings, median {own.median():.2f}, above 0.5 {(own > 0.5).sum()}")
    torch.save(found, Path(args.cache) / "typical.pt")


if __name__ == "__main__":
    main()
