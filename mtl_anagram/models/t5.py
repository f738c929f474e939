"""The T5 v1.1 encoder that IF reads its prompts with, under the published checkpoints' parameter names."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..errors import InputError
from .attention import attention
from .t5_config import T5Config


class T5Encoder(nn.Module):
    """Token ids to text states: pre-norm blocks of self-attention and a gated feed-forward, no biases.

    As published (Raffel et al. 2020, v1.1 with the tanh-approximated gated GELU): logits are not divided by
    sqrt(d), and one table of relative position biases, the first block's, serves every block. There is no
    dropout. The residual stream is float32 whatever the weights' dtype, because the feed-forward's sums
    exceed half precision's range; each matrix product runs in its own weight's dtype, so a file that mixes
    half and float32 weights works as it is.
    """

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.shared = _embedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the states that a call returns: the query weights'."""
        return self.encoder.first_attention.q.weight.dtype

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """ids (B, L) token numbers of any length L, mask (B, L) 1 = keep, 0 = padding -> (B, L, D).

        mask None keeps all tokens. Padded positions are not attended to but get states too (IF's UNet reads
        them). Raises InputError for ids outside the vocabulary or a mask of another shape.
        """
        self._check(ids, mask)
        weight = self.shared.weight
        stream = F.embedding(ids, weight).to(torch.promote_types(weight.dtype, torch.float32))
        return self.encoder(stream, mask).to(self.dtype)

    def _check(self, ids: Tensor, mask: Tensor | None) -> None:
        if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
            kind = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
            raise InputError(f"ids must be a tensor of integers (B, L), not {kind}; use the tokenizer's")
        if ids.ndim != 2 or ids.shape[1] == 0:
            raise InputError(f"ids {tuple(ids.shape)} must be (B, L) with L at least 1")
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.is_floating_point() or mask.is_complex():
                kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise InputError(f"mask must be a bool or integer tensor, 1 = keep, not {kind}")
            if mask.shape != ids.shape:
                raise InputError(f"mask {tuple(mask.shape)} must have ids' shape {tuple(ids.shape)}")
        if ids.device.type != "meta" and ids.numel():
            low, high = (int(bound) for bound in ids.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                raise InputError(
                    f"ids run from {low} to {high}, but the vocabulary has {self.config.vocab_size} entries: "
                    "use the tokenizer that belongs to this model"
                )


class Stack(nn.Module):
    """The blocks and the last norm (`encoder.` in the checkpoints)."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.max_distance = config.relative_attention_max_distance
        self.block = nn.ModuleList(Block(config, first=i == 0) for i in range(config.num_layers))
        self.final_layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, L, D) float32, mask (B, L) or None -> normed states (B, L, D) float32."""
        bias = self.bias(x.shape[1], mask)
        for block in self.block:
            x = block(x, bias)
        return self.final_layer_norm(x)

    @property
    def first_attention(self) -> SelfAttention:
        """The first block's attention, which owns the table of position biases."""
        return cast(SelfAttention, self.get_submodule("block.0.layer.0.SelfAttention"))

    def bias(self, length: int, mask: Tensor | None) -> Tensor:
        """What all blocks add to their logits: (1 or B, N, L, L), the dtype's lowest value on padding."""
        first = self.first_attention
        table = first.relative_attention_bias.weight  # (buckets, N)
        buckets = position_buckets(length, table.shape[0], self.max_distance).to(table.device)
        bias = rearrange(F.embedding(buckets, table), "q k n -> 1 n q k").to(first.q.weight.dtype)
        if mask is None:
            return bias
        padding = mask.logical_not()[:, None, None, :]
        return bias.masked_fill(padding, torch.finfo(bias.dtype).min)


class Block(nn.Module):
    """Self-attention, then feed-forward, each added to the stream."""

    def __init__(self, config: T5Config, *, first: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList([AttentionLayer(config, first=first), FeedForwardLayer(config)])

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x (B, L, D) float32, bias (1 or B, N, L, L) -> (B, L, D) float32."""
        for layer in self.layer:
            x = x + layer(x, bias)
        return x


class AttentionLayer(nn.Module):
    """Norm and self-attention, without the residual."""

    def __init__(self, config: T5Config, *, first: bool) -> None:
        super().__init__()
        self.SelfAttention = SelfAttention(config, first=first)
        self.layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x (B, L, D), bias (1 or B, N, L, L) -> (B, L, D) in x's dtype."""
        return self.SelfAttention(self.layer_norm(x), bias).to(x.dtype)


class SelfAttention(nn.Module):
    """Attention without scale; the first block's also owns the table of position biases."""

    def __init__(self, config: T5Config, *, first: bool) -> None:
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.heads = config.num_heads
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        if first:
            self.relative_attention_bias = _embedding(config.relative_attention_num_buckets, config.num_heads)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x (B, L, D), bias (1 or B, N, L, L) in the query weights' dtype -> (B, L, D)."""
        q, k, v = (
            rearrange(_linear(x, layer), "b l (n d) -> b n l d", n=self.heads).to(bias.dtype)
            for layer in (self.q, self.k, self.v)
        )
        return _linear(rearrange(attention(q, k, v, mask=bias, scale=1.0), "b n l d -> b l (n d)"), self.o)


class FeedForwardLayer(nn.Module):
    """Norm and gated feed-forward, without the residual."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.DenseReluDense = GatedGELU(config)
        self.layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (B, L, D) -> (B, L, D) in x's dtype; the bias is the attention's and is not read."""
        return self.DenseReluDense(self.layer_norm(x))


class GatedGELU(nn.Module):
    """wo(gelu(wi_0 x) * (wi_1 x)) with the tanh approximation of GELU."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, D) float32 -> (B, L, D) float32."""
        gate = F.gelu(_linear(x, self.wi_0).to(x.dtype), approximate="tanh")
        hidden = gate * _linear(x, self.wi_1).to(x.dtype)  # (B, L, F)
        if self.wo.weight.dtype != torch.float16:
            return _linear(hidden, self.wo).to(x.dtype)
        # The product of the gate and wo's sums both leave half precision's range in T5-XXL: bring each token
        # below 1 for the product, by a power of two, which loses nothing, and back after it.
        peak = hidden.detach().abs().amax(dim=-1, keepdim=True).clamp(min=1.0)
        scale = peak.log2().ceil().exp2()
        return _linear(hidden / scale, self.wo).to(x.dtype) * scale


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, no mean taken off, in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) float32 -> (..., D) float32."""
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps) * self.weight.to(x.dtype)


def position_buckets(length: int, buckets: int, max_distance: int) -> Tensor:
    """Bucket of each pair of positions, (L, L) long on the CPU: row = query, column = key.

    Keys at or before the query use the first half of the buckets, keys after it the second. In each half the
    first distances have a bucket of their own (a quarter of all buckets), farther ones share buckets that
    widen logarithmically, and max_distance and beyond share the last (Raffel et al. 2020, section 2.1).
    Computed on the CPU, so that a distance on a bucket's edge falls on the same side on every device.
    """
    positions = torch.arange(length)
    offsets = positions[None, :] - positions[:, None]  # key - query
    half, distances = buckets // 2, offsets.abs()
    exact = half // 2
    ratio = torch.log(distances.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (ratio * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(distances < exact, distances, far) + half * (offsets > 0)


def _embedding(rows: int, width: int) -> nn.Embedding:
    """nn.Embedding, but quick on the meta device, where its random start imports 800 modules (0.8 s, 70 MB)."""
    table = torch.empty(rows, width)
    return nn.Embedding(rows, width, _weight=table if table.is_meta else nn.init.normal_(table))


def _linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """The layer on x (..., D) cast to its weight's dtype."""
    return layer(x.to(layer.weight.dtype))
