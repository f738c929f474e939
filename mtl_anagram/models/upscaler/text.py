"""Stage III's text tower: OpenCLIP's ViT-H text transformer, cut before its last layer."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ...errors import InputError
from ..attention import attention
from .configs import CLIPTextConfig


class CLIPTextTower(nn.Module):
    """Token ids to text states: causal pre-norm blocks with exact GELU, a norm after the last.

    The released checkpoint has 23 of ViT-H's 24 layers, so that its last states are the penultimate ones that
    the upscaler was trained on. Padding is attended to like any token (causally, so only by padding): there is
    no mask.
    """

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = Trunk(config)

    @property
    def dtype(self) -> torch.dtype:
        return self.text_model.final_layer_norm.weight.dtype

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, L) token numbers, L at most 77 -> (B, L, D)."""
        config = self.config
        if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32) or ids.ndim != 2:
            kind = f"{tuple(ids.shape)} {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
            raise InputError(f"ids must be a tensor of integers (B, L), not {kind}; use the tokenizer's")
        if not 1 <= ids.shape[1] <= config.max_position_embeddings:
            raise InputError(
                f"ids of {ids.shape[1]} tokens: this tower reads 1 to {config.max_position_embeddings}"
            )
        if ids.device.type != "meta" and ids.numel():
            low, high = (int(bound) for bound in ids.aminmax())
            if low < 0 or high >= config.vocab_size:
                raise InputError(
                    f"ids run from {low} to {high}, but the vocabulary has {config.vocab_size} entries: use the "
                    "tokenizer that belongs to this model"
                )
        return self.text_model(ids)


class Trunk(nn.Module):
    """Embeddings, blocks, last norm (`text_model.` in the checkpoints)."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = nn.ModuleDict(
            {"layers": nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))}
        )
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, L) -> (B, L, D)."""
        x = self.embeddings(ids)
        for block in cast("nn.ModuleList", self.encoder["layers"]):
            x = block(x)
        return self.final_layer_norm(x)


class Embeddings(nn.Module):
    """A token's vector plus its place's."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, L) -> (B, L, D)."""
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class Block(nn.Module):
    """Attention to the tokens before, then a feed-forward, each added to the stream."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.self_attn = SelfAttention(width, config.num_attention_heads)
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, config.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class SelfAttention(nn.Module):
    """Causal attention, all four projections with bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        q, k, v = (
            rearrange(project(x), "b l (n d) -> b n l d", n=self.heads)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(rearrange(attention(q, k, v, causal=True), "b n l d -> b l (n d)"))


class MLP(nn.Module):
    """Two layers with exact GELU between."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        return self.fc2(F.gelu(self.fc1(x)))
