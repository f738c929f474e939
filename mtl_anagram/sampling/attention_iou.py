"""Anti-segregation: token maps of the views, the loss on their overlap, and its gradient step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..errors import InputError, at_least_float32, choice, float_tensor, number

MEASURES = ("overlap", "iou")
FLOOR = 1e-12  # smallest mass of a map, or of a pair of maps, that is divided by


def concept_maps(layers: Mapping[str, Tensor], views: Sequence[Any]) -> Tensor:
    """One map per view of where its picture attends to its concept, in the canonical frame.

    layers: {name: (B V, N, h, w, T)}, attention to the concept's T tokens by N heads, rows image by image,
    view by view. Summed over heads and tokens, brought back by every view's inverse_map, summed over layers
    (the released code's aggregation, unnormalised). Returns (B, V, h, w) in float32.
    """
    if not layers:
        raise InputError("no attention maps: ask the network for layers at a resolution that it has")
    by_layer = []
    for name, maps in layers.items():
        if maps.ndim != 5 or maps.shape[0] % len(views):
            wanted = f"(rows, heads, h, w, tokens), one row per image and view ({len(views)} views)"
            raise InputError(f"maps of {name!r} have shape {tuple(maps.shape)}; give {wanted}")
        seen = rearrange(at_least_float32(maps).sum(dim=(1, 4)), "(b v) h w -> b v h w", v=len(views))
        by_layer.append(torch.stack([view.inverse_map(seen[:, i]) for i, view in enumerate(views)], dim=1))
    return torch.stack(by_layer).sum(dim=0)


def anti_segregation_loss(
    maps: Tensor, *, measure: str = "overlap", target: float = 0.5, slope: float = 0.05
) -> Tensor:
    """Mean over pairs of views of |wanted overlap - overlap| (Xu et al. 2024, arXiv 2412.02693).

    maps (B, V, h, w), non-negative. The wanted overlap o of V views is target - slope (V - 1). measure="overlap",
    the released code's: sum min(A_i, A_j) / sum (A_i + A_j), from 0 to 0.5, on the maps as they are. "iou": maps
    normalised to sum 1, sum min / sum max, from 0 to 1, and the same wanted overlap expressed as an IoU, o / (1 - o).
    Divisors are at least FLOOR. Returns (B,), differentiable; 0 for one view, which has no pair.
    """
    maps = at_least_float32(float_tensor("maps", maps, (None,) * 4, "(B, V, h, w)"))
    choice("measure", measure, MEASURES)
    count = maps.shape[1]
    wanted = number("target", target, high=0.5) - number("slope", slope) * (count - 1)
    if measure == "iou":
        maps = maps / maps.sum(dim=(2, 3), keepdim=True).clamp(min=FLOOR)
        wanted = wanted / (1 - wanted)
    gaps = []
    for i, j in combinations(range(count), 2):
        shared = torch.minimum(maps[:, i], maps[:, j]).sum(dim=(1, 2))
        whole = torch.maximum(maps[:, i], maps[:, j]) if measure == "iou" else maps[:, i] + maps[:, j]
        gaps.append((wanted - shared / whole.sum(dim=(1, 2)).clamp(min=FLOOR)).abs())
    return torch.stack(gaps).mean(dim=0) if gaps else maps.sum(dim=(1, 2, 3)) * 0.0


def anti_segregation_step(
    x: Tensor, maps_of: Callable[[Tensor], Tensor], *, rate: float = 5.0, measure: str = "overlap",
    target: float = 0.5, slope: float = 0.05,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One gradient step of the loss on the pictures: x - rate dL/dx.

    x (B, C, H, W); maps_of: such pictures -> maps (B, V, h, w), row b of picture b alone, differentiable. Works under
    no_grad, and no parameter receives a gradient. Returns (x, loss (B,) before the step), both without a graph.
    """
    number("rate", rate)
    with torch.inference_mode(False), torch.enable_grad():
        picture = x.detach().clone().requires_grad_()
        loss = anti_segregation_loss(maps_of(picture), measure=measure, target=target, slope=slope)
        if not loss.requires_grad:
            raise InputError("the maps do not depend on the pictures: compute them from maps_of's argument")
        # Pictures are independent, so the gradient of the sum holds every picture's own gradient.
        (gradient,) = torch.autograd.grad(loss.sum(), picture)
    return x.detach() - rate * gradient, loss.detach()
