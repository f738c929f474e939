"""Noise vector balancing: the views that match their prompts least get the largest weights."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError, at_least_float32, float_tensor, number, whole_number

FLOOR = 1e-4  # smallest cosine that counts as itself; a negative one would have no real power


def balance(scores: Tensor, step: int, *, horizon: float = 30, floor: float = FLOOR) -> Tensor:
    """Weights a_i = c_i^-(1 + step/horizon), normalised to sum 1 over the views.

    Xu et al. 2024 (arXiv 2412.02693), noise vector balancing; the released code's horizon is 30 for any
    number of steps. scores (B, V): how well each view matches its prompt, cosines, finite; those below floor count
    as floor (the released code gives NaN for a negative one). step: index of the denoising step, 0 first;
    horizon: above 0. Returns (B, V) in float32 (or wider), positive.
    """
    scores = at_least_float32(float_tensor("scores", scores, (None, None), "(B, V)"))
    whole_number("step", step, 0)
    number("horizon", horizon, above=True)
    number("floor", floor, above=True)
    if not torch.isfinite(scores).all():
        raise InputError(f"scores={scores.tolist()} must be finite: check the scorer's pictures and dtype")
    return weights_of(scores, step, horizon, floor)


def weights_of(scores: Tensor, step: int, horizon: float, floor: float) -> Tensor:
    """`balance` of checked values: it asks a device nothing."""
    # The same powers through logarithms: c^-p / sum c^-p cannot overflow, however small c or large p.
    return torch.softmax(-(1 + step / horizon) * scores.clamp(min=floor).log(), dim=1)
