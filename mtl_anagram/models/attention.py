"""Attention as one function of ready queries, keys and values; explicit columns of it on request."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..errors import InputError, choice

WIDTH_MULTIPLE = 8  # of a head, as fused kernels on a GPU want it


def split(states: Tensor, heads: int) -> Tensor:
    """(B, L, N d) -> (B, N, L, d)."""
    return rearrange(states, "b l (n d) -> b n l d", n=heads)


def multi_head(
    q: Tensor, k: Tensor, v: Tensor, heads: int, *, mask: Tensor | None = None, scale: float | None = None,
    causal: bool = False,
) -> Tensor:  # fmt: skip
    """Softmax attention of states with their heads side by side, (B, Q, N d) and (B, S, N d) -> (B, Q, N d).

    mask: broadcastable to (B, N, Q, S), added to the logits. scale None = 1/sqrt(d).
    """
    q, k, v = (split(states, heads) for states in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, is_causal=causal)
    return rearrange(out, "b n l d -> b l (n d)")


def attention_with_columns(q: Tensor, k: Tensor, v: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of q (B, N, Q, d) to k and v (B, N, S, d), and T columns of its softmax, differentiable, float32.

    Returns (B, N, Q, d) and (B, N, Q, T). columns (B, L, T): for row b and asked column t, 1 at one of the first L
    keys (text comes first) and else 0. The softmax (B, N, Q, S) is never there as a whole, neither here nor in the
    gradient.
    """
    # A column is what attention makes of values that are 1 at its key: torch's fused kernel gives it beside the output.
    # The kernel wants queries, keys and values of one width; zeros add nothing to a product.
    more = columns.shape[-1] + -(q.shape[-1] + columns.shape[-1]) % WIDTH_MULTIPLE
    ones = F.pad(columns.to(v.dtype), (0, more - columns.shape[-1], 0, k.shape[2] - columns.shape[1]))
    values = torch.cat([v, ones[:, None].expand(-1, v.shape[1], -1, -1)], dim=-1)  # (B, N, S, d + more)
    padded_q, padded_k = (F.pad(x, (0, more)) for x in (q, k))
    both = F.scaled_dot_product_attention(padded_q, padded_k, values, scale=q.shape[-1] ** -0.5)
    return both[..., : v.shape[-1]], both[..., v.shape[-1] :][..., : columns.shape[-1]].float()


def columns_by(name: str, device: torch.device) -> Callable[..., tuple[Tensor, Tensor]]:
    """What computes `attention_with_columns` on a device: "fused", that itself; "triton", a kernel for CUDA."""
    if choice("token_maps", name, ("fused", "triton")) == "fused":
        return attention_with_columns
    try:
        from . import triton_attention
    except ImportError:
        raise InputError('token_maps="triton" needs the package triton: install it, or use "fused"') from None
    if triton_attention.needs_cuda and device.type != "cuda":
        raise InputError(f'token_maps="triton" needs a CUDA device, not {device}: use "fused"')
    return triton_attention.attention_with_columns


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """Positional code of (R,) numbers, (R, width) float32: cosines, then sines, of falling frequency."""
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=positions.device)
    angles = positions.float()[:, None] * torch.exp(-math.log(10000) * steps / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def random_weight(*shape: int, std: float) -> nn.Parameter:
    """Normal noise to start a training from; on the meta device nothing: noise there imports 800 modules (1 s)."""
    start = torch.empty(shape)
    return nn.Parameter(start if start.is_meta else nn.init.normal_(start, std=std))
