"""Views in and out, classifier-free guidance, and the combination of all views' predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import float_tensor
from ..errors import InputError


def to_views(x: Tensor, views: Sequence[Any]) -> Tensor:
    """What every reader sees: pictures (B, C, H, W) -> (B, V, C, H, W) by each view's `view`."""
    if not views:
        raise InputError("0 views: give at least one, for example the identity")
    return torch.stack([view.view(x) for view in views], dim=1)


def from_views(prediction: Tensor, views: Sequence[Any]) -> Tensor:
    """Predictions brought back into the canonical frame by each view's `inverse_view`.

    prediction (B, V, 6, H, W): 3 channels of noise, 3 of variance. Returns the same shape.
    """
    if len(views) != prediction.shape[1]:
        raise InputError(f"{len(views)} views for predictions of {prediction.shape[1]}: give one per view")
    return torch.stack([view.inverse_view(prediction[:, i]) for i, view in enumerate(views)], dim=1)


def guide(null: Tensor, text: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022): null + scale (text - null), of any equal shapes."""
    return null + scale * (text - null)


def combine(noise: Tensor, weights: Tensor, scale: Tensor | None = None) -> Tensor:
    """scale sum_i a_i eps_i: (B, V, C, H, W) and weights (B, V), scale (B,) or None for 1 -> (B, C, H, W)."""
    float_tensor("noise", noise, (None,) * 5, "(B, V, C, H, W)")
    float_tensor("weights", weights, tuple(noise.shape[:2]), "(B, V)")
    if scale is not None:
        weights = weights * float_tensor("scale", scale, (noise.shape[0],), "(B,)")[:, None]
    return (noise * weights[:, :, None, None, None]).sum(dim=1)
