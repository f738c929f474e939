"""Views in and out, classifier-free guidance, and the combination of all views' predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..errors import float_tensor


class ViewLike(Protocol):
    """What the loops need of a view. Optional: inverse_map(maps), check_size(size), reduce = "mean" or "sum"."""

    def view(self, x: Tensor) -> Tensor: ...

    def inverse_view(self, prediction: Tensor) -> Tensor: ...


def to_views(x: Tensor, views: Sequence[ViewLike]) -> Tensor:
    """What every reader sees: pictures (B, C, H, W) -> (B, V, C, H, W) by each view's `view`."""
    return torch.stack([view.view(x) for view in views], dim=1)


def from_views(prediction: Tensor, views: Sequence[ViewLike]) -> Tensor:
    """Predictions (B, V, 6, H, W), 3 channels of noise and 3 of variance, brought back by each `inverse_view`."""
    pairs = zip(views, prediction.unbind(1), strict=True)
    return torch.stack([view.inverse_view(seen) for view, seen in pairs], dim=1)


def guide(null: Tensor, text: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022): null + scale (text - null), of any equal shapes."""
    return null + scale * (text - null)


def combine(noise: Tensor, weights: Tensor, scale: Tensor | None = None) -> Tensor:
    """scale sum_i a_i eps_i -> (B, C, H, W).

    noise (B, V, C, H, W); weights (B, V), or per pixel (B, V, 1, H, W); scale (B,) or None for 1.
    """
    images, views = float_tensor("noise", noise, (None,) * 5, "(B, V, C, H, W)").shape[:2]
    weights = weights[..., None, None, None] if weights.ndim == 2 else weights
    float_tensor("weights", weights, (images, views, 1, None, None), "(B, V) or (B, V, 1, H, W)")
    if scale is not None:
        weights = weights * float_tensor("scale", scale, (images,), "(B,)")[:, None, None, None, None]
    return (noise * weights).sum(dim=1)
