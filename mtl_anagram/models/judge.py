"""The judge: a plain classifier of clean pictures, which says what a picture shows and steers nothing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError


class Judge(nn.Module):
    """Convolutions at 32, 16, 8 and 4 pixels, their mean, and one logit for each of `names`, in their order."""

    def __init__(self, names: list[str], widths: tuple[int, ...] = (32, 64, 128, 192)) -> None:
        super().__init__()
        self.names = list(names)
        self.blocks = nn.ModuleList(
            nn.Sequential(_conv_norm(inner, outer), nn.GELU(), _conv_norm(outer, outer), nn.GELU())
            for inner, outer in zip((3, *widths), widths, strict=False)
        )
        self.head = nn.Linear(widths[-1], len(names))

    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1], any size of at least 32 -> logits (B, K)."""
        h = F.interpolate(pictures.float(), size=(32, 32), mode="bilinear", antialias=True)
        h = h.to(self.head.weight.dtype)
        for i, block in enumerate(self.blocks):
            h = block(F.max_pool2d(h, 2) if i else h)
        return self.head(h.mean((2, 3)))

    def index(self, names: list[str]) -> Tensor:
        """Places of these names, (N,) long on the CPU; InputError for a name that the judge does not know."""
        unknown = set(names) - set(self.names)
        if unknown:
            raise InputError(f"the judge does not know {unknown}: it tells apart {', '.join(self.names)}")
        return torch.tensor([self.names.index(name) for name in names], dtype=torch.int64, device="cpu")


def _conv_norm(inner: int, outer: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inner, outer, 3, padding=1, bias=False), nn.GroupNorm(8, outer))
