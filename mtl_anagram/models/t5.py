"""The T5 v1.1 encoder that IF reads its prompts with, under the published checkpoints' parameter names.

Shapes: B texts, L tokens, D width, N heads of size d. The residual stream x (B, L, D) and what is added to it are
float32; bias (1 or B, N, L, L) is in the query weights' dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..errors import ConfigError, InputError
from .attention import multi_head, random_weight
from .configs import Config

# Fields of which one value is implemented: T5 v1.1's. A file without feed_forward_proj means the ReLU of T5 v1.0.
FIXED: dict[str, Any] = {
    "model_type": "t5", "feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new", "is_gated_act": True
}  # fmt: skip


@dataclass(frozen=True)
class T5Config(Config):
    """Sizes of a T5 v1.1 encoder, by the names of the published config.json; d_kv is the size of one head."""

    _owner, _fixed = "T5 v1.1", FIXED
    _required, _unused = ["feed_forward_proj"], None

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int = 32  # half of them for each direction
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    def check(self) -> None:
        buckets, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets % 2 or buckets < 4 or distance <= buckets // 4:
            said = f"relative_attention_num_buckets={buckets} must be even and at least 4, and"
            raise ConfigError(f"{said} relative_attention_max_distance={distance} above a quarter of it")


class T5Encoder(nn.Module):
    """Token ids to text states: pre-norm blocks of self-attention and a gated feed-forward, no biases.

    As published (Raffel et al. 2020): logits are not divided by sqrt(d), and one table of relative position biases,
    the first block's, serves every block. The residual stream is float32 because the feed-forward's sums exceed half
    precision's range; each matrix product runs in its own weight's dtype, so a file may mix half and float32 weights.
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
        stream = F.embedding(ids.long(), weight).to(torch.promote_types(weight.dtype, torch.float32))
        return self.encoder(stream, mask).to(self.dtype)

    def _check(self, ids: Tensor, mask: Tensor | None) -> None:
        for name, x in (("ids", ids), ("mask", ids if mask is None else mask)):
            found = f"{tuple(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            whole = isinstance(x, Tensor) and not x.is_floating_point() and x.shape == ids.shape
            if not whole or x.ndim != 2 or not x.shape[1]:
                wanted = "integers (B, L), L at least 1, of one shape; mask 1 = keep, 0 = padding"
                raise InputError(f"{name} is {found}: give tensors of {wanted}")
        size = self.config.vocab_size
        unseen = ids.is_meta or torch.compiler.is_compiling()
        if not unseen and not ((ids >= 0) & (ids < size)).all():
            said = f"but the vocabulary has {size} entries: use the tokenizer that belongs to this model"
            raise InputError(f"ids run from {ids.min()} to {ids.max()}, {said}")


class Stack(nn.Module):
    """The blocks and the last norm (`encoder.` in the checkpoints); mask (B, L) or None."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.max_distance = config.relative_attention_max_distance
        self.block = nn.ModuleList(Block(config, first=i == 0) for i in range(config.num_layers))
        self.final_layer_norm = RMSNorm(config)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
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
        return bias.masked_fill(mask.logical_not()[:, None, None, :], torch.finfo(bias.dtype).min)


class Block(nn.Module):
    """Self-attention, then feed-forward, each with its norm before it and added to the stream."""

    def __init__(self, config: T5Config, *, first: bool) -> None:
        super().__init__()
        parts = {"SelfAttention": SelfAttention(config, first=first), "DenseReluDense": GatedGELU(config)}
        self.layer = nn.ModuleList(
            nn.ModuleDict({name: part, "layer_norm": RMSNorm(config)}) for name, part in parts.items()
        )

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        attend, feed = cast("list[nn.ModuleDict]", self.layer)
        x = x + attend["SelfAttention"](attend["layer_norm"](x), bias)
        return x + feed["DenseReluDense"](feed["layer_norm"](x))


class SelfAttention(nn.Module):
    """Attention without scale; the first block's also owns the table of position biases."""

    def __init__(self, config: T5Config, *, first: bool) -> None:
        super().__init__()
        self.heads, width, inner = config.num_heads, config.d_model, config.num_heads * config.d_kv
        self.q = nn.Linear(width, inner, bias=False)
        self.k = nn.Linear(width, inner, bias=False)
        self.v = nn.Linear(width, inner, bias=False)
        self.o = nn.Linear(inner, width, bias=False)
        if first:
            self.relative_attention_bias = _embedding(config.relative_attention_num_buckets, config.num_heads)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (_linear(x, layer).to(bias.dtype) for layer in (self.q, self.k, self.v))
        return _linear(multi_head(q, k, v, self.heads, mask=bias, scale=1.0), self.o).to(x.dtype)


class GatedGELU(nn.Module):
    """wo(gelu(wi_0 x) * (wi_1 x)) with the tanh approximation of GELU."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
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
    """x / sqrt(mean(x^2) + eps) * weight, no mean taken off."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.eps = config.layer_norm_epsilon
        self.weight = nn.Parameter(torch.ones(config.d_model))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps) * self.weight.to(x.dtype)


def position_buckets(length: int, buckets: int, max_distance: int) -> Tensor:
    """Bucket of each pair of positions, (L, L) long on the CPU: row = query, column = key.

    Keys after the query use the second half of the buckets. In each half the first distances have a bucket of their
    own, farther ones share buckets that widen logarithmically, and max_distance and beyond share the last (Raffel et
    al. 2020, section 2.1). On the CPU, so that a bucket's edge falls on the same side on every device.
    """
    positions = torch.arange(length, device="cpu")
    offsets = positions[None, :] - positions[:, None]  # key - query
    half, distances = buckets // 2, offsets.abs()
    exact = half // 2
    ratio = torch.log(distances.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (ratio * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(distances < exact, distances, far) + half * (offsets > 0)


def _embedding(rows: int, width: int) -> nn.Embedding:
    return nn.Embedding(rows, width, _weight=random_weight(rows, width, std=1.0))


def _linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """The layer on x (..., D) cast to its weight's dtype."""
    return layer(x.to(layer.weight.dtype))
