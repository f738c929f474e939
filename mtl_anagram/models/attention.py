"""Attention as one function of ready queries, keys and values; explicit columns of it on request."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """Softmax attention by torch's fused kernel.

    q (B, N, Q, d), k and v (B, N, S, d), mask broadcastable to (B, N, Q, S): a float one is added to the
    logits, a bool one keeps where True. scale None = 1/sqrt(d). Returns (B, N, Q, d).
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, is_causal=causal)


def attention_with_columns(
    q: Tensor, k: Tensor, v: Tensor, columns: Tensor, keep: Tensor, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The same attention with some columns of its softmax made explicit, differentiable.

    Of the softmax's probabilities over all S keys, row b's keys `columns[b]` (B, T) are returned as (B, N, Q, T)
    float32, times `keep` (B, T), which is 0 where a row asks for fewer than T columns. As in a fused kernel the
    softmax is taken in float32 and its result is in q's dtype. Returns (output (B, N, Q, d), columns).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    probabilities = ((q * scale) @ k.transpose(-1, -2)).softmax(dim=-1)  # (B, N, Q, S)
    # A column is what attention makes of values that are 1 at its key: one product gives both, and one gradient.
    picked = (F.one_hot(columns, k.shape[2]) * keep[..., None]).transpose(1, 2)  # (B, S, T)
    picked = picked.to(v.dtype)[:, None].expand(-1, v.shape[1], -1, -1)
    both = probabilities @ torch.cat([v, picked], dim=-1)  # (B, N, Q, d + T)
    return both[..., : v.shape[-1]], both[..., v.shape[-1] :].float()


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """Positional code of (R,) numbers as (R, width) float32: cosines first, then sines.

    Frequencies 10000^(-k / (width/2)), the IF UNets' time and noise level code (flip_sin_to_cos true,
    freq_shift 0).
    """
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=positions.device)
    angles = positions.float()[:, None] * torch.exp(-math.log(10000) * steps / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
