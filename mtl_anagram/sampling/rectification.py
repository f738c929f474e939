"""Scales of noise, one per image: rectification, for the mean of several; the fit to the noise that is there."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import at_least_float32, choice, float_tensor

DIAGONALS = ("unit", "measured")
# Smallest power of the weighted mean, relative to the parts': noises that cancel are scaled up by at most 100.
FLOOR = 1e-4
FIT = 0.5, 3.0  # the least and the most that noise is scaled by to fit


def second_moments(noise: Tensor) -> Tensor:
    """mean(eps_i eps_j) over channels and pixels: (B, V, C, H, W) -> (B, V, V), not centred."""
    noise = at_least_float32(noise)
    # Products and means, no matrix product: those may be computed in lower precision on a GPU.
    rows = [(noise * noise[:, i : i + 1]).mean(dim=(2, 3, 4)) for i in range(noise.shape[1])]
    return torch.stack(rows, dim=1)


def rectify(noise: Tensor, weights: Tensor, *, diagonal: str = "unit") -> Tensor:
    """Scale by which to multiply sum_i a_i eps_i.

    Xu et al. 2024 (arXiv 2412.02693), noise variance rectification. noise (B, V, C, H, W): the guided noise
    predictions in the canonical frame; weights (B, V), summing to 1; m_ij: their second moments.
    diagonal="unit", the released code's: 1 / sqrt(sum_i a_i^2 + 2 sum_{i<j} a_i a_j m_ij), as if every eps_i
    had unit power. "measured": sqrt(sum_i a_i m_ii / sum_ij a_i a_j m_ij), so that the combined noise has the
    weighted mean power of its parts. The denominator is at least FLOOR (measured: FLOOR times the numerator).
    Returns (B,) in float32 (or wider); 1 for one view, and 1 where all noise is zero under "measured".
    """
    float_tensor("noise", noise, (None,) * 5, "(B, V, C, H, W)")
    float_tensor("weights", weights, tuple(noise.shape[:2]), "(B, V)")
    choice("diagonal", diagonal, DIAGONALS)
    moments = second_moments(noise)
    weights = at_least_float32(weights).to(moments.device)
    products = weights[:, :, None] * weights[:, None, :]  # (B, V, V)
    if diagonal == "unit":
        ones = torch.eye(moments.shape[1], dtype=torch.bool, device=moments.device)
        return scale_of((products * torch.where(ones, 1.0, moments)).sum(dim=(1, 2)))
    target = (weights * moments.diagonal(dim1=1, dim2=2)).sum(dim=1)
    return scale_of((products * moments).sum(dim=(1, 2)), target)


def scale_of(power: Tensor, target: Tensor | None = None) -> Tensor:
    """What brings noise of this power (B,) to the target power (B,), None = 1; 1 where the target is 0."""
    if target is None:
        return power.clamp(min=FLOOR).rsqrt()
    relative = power / torch.where(target > 0, target, 1.0)
    return torch.where(target > 0, relative.clamp(min=FLOOR).rsqrt(), 1.0)


def noise_fit(noise: Tensor, x: Tensor, sigma: float) -> Tensor:
    """Scale of predicted noise that explains x_t best: the least-squares fit of sigma noise to it, within FIT.

    noise, x (B, C, H, W): the prediction and x_t; sigma: sqrt(1 - alpha_bar_t). Fitted without their 3x3 averages,
    so that a picture's own detail counts little. A briefly trained network takes too strong noise for noise of the
    schedule's strength; what it leaves adds up to grain (exposure bias; Ning et al. 2024, arXiv 2308.15321, scale by
    one number a step).
    Returns (B,) in float32 (or wider).
    """
    parts = [at_least_float32(part) for part in (noise, x)]
    # The average, at the border, is of what there is.
    noise, x = (p - F.avg_pool2d(p, 3, stride=1, padding=1, count_include_pad=False) for p in parts)
    power = sigma * noise.square().sum(dim=(1, 2, 3))
    return ((noise * x).sum(dim=(1, 2, 3)) / power.clamp(min=FLOOR)).clamp(*FIT)
