"""How anagrams are measured: alignment and concealment, from any CLIP-like scorer's embeddings.

Definitions: Geng et al. 2023 (Visual Anagrams, arXiv 2311.17919), as Xu et al. 2024 (arXiv 2412.02693) use
them. One legend: B pictures, V views and prompts, D the embeddings' width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import at_least_float32, float_tensor, number
from .errors import InputError
from .sampling.guidance import to_views

CLIP_TEMPERATURE = 0.01  # of the published CLIPs: 1 / exp(ln 100)
TEMPERATURE = 0.05  # of the embedded cascade's CLIP, which was trained at a scale of 20


def score_matrix(
    pictures: Tensor, views: Sequence[Any], embed_image: Callable[[Tensor], Tensor], texts: Tensor
) -> Tensor:
    """S_ij, the cosine of what view i shows and text j says: (B, V, V + K).

    pictures (B, 3, H, W) in the range that embed_image takes; embed_image: (R, 3, H, W) -> (R, D), of any
    norm, for example `lambda x: clip.embed_image(x, 0)` of a noise-aware CLIP; texts (V + K, D): the
    embeddings of the views' prompts, and of K >= 0 texts of other things that `anagram_score` compares with.
    """
    float_tensor("pictures", pictures, (None,) * 4, "(B, C, H, W)")
    float_tensor("texts", texts, (None, None), "(V + K, D), one row per view, then others")
    if len(texts) < len(views):
        raise InputError(f"texts of shape {tuple(texts.shape)} for {len(views)} views: give one row per view")
    seen = to_views(pictures, views)  # (B, V, C, H, W)
    images = embed_image(seen.flatten(0, 1))
    float_tensor("embed_image's result", images, (len(pictures) * len(views), texts.shape[1]), "(B V, D)")
    images = torch.nn.functional.normalize(at_least_float32(images), dim=-1).unflatten(0, seen.shape[:2])
    words = torch.nn.functional.normalize(at_least_float32(texts), dim=-1)
    return images @ words.to(images).T


def alignment(scores: Tensor) -> Tensor:
    """A = min_i S_ii: how well the view that fits worst fits its prompt. scores (B, V, V) -> (B,)."""
    return _square(scores).diagonal(dim1=1, dim2=2).amin(dim=1)


def concealment(scores: Tensor, temperature: float = CLIP_TEMPERATURE) -> Tensor:
    """C = trace(softmax(S / temperature)) / V, the mean of both softmax directions: (B, V, V) -> (B,).

    How well views and prompts are told apart: 1 where each view shows its own prompt and no other, 1/V at chance.
    """
    scores = at_least_float32(_square(scores)) / number("temperature", temperature, above=True)
    both = scores.softmax(dim=1) + scores.softmax(dim=2)
    return both.diagonal(dim1=1, dim2=2).mean(dim=1) / 2


def anagram_score(scores: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """How good an anagram is by the CLIP alone, (B,): what the best of N is chosen by.

    scores (B, V, V + K) of `score_matrix`. With K > 0 texts of other things: the log probability of the reading
    that is read worst, by a softmax over all V + K texts. It asks as a reader would: of all that this might be,
    is it that? With none: alignment, which asks that every reading be there, plus the temperature times the log
    of concealment, which asks that each be in its own view alone.
    """
    float_tensor("scores", scores, (None, None, None), "(B, V, V + K)")
    if scores.shape[2] <= scores.shape[1]:
        return alignment(scores) + temperature * concealment(scores, temperature).clamp(min=1e-6).log()
    logits = at_least_float32(scores) / number("temperature", temperature, above=True)
    return logits.log_softmax(dim=2).diagonal(dim1=1, dim2=2).amin(dim=1)


def quantile(values: Tensor, share: float = 0.9) -> Tensor:
    """The value that this share of the samples stay below: A.9 and C.9 of (N,) values, 0-dim; linear between two."""
    float_tensor("values", values, (None,), "(N,)")
    return at_least_float32(values).quantile(number("share", share, high=1.0))


def _square(scores: Tensor) -> Tensor:
    float_tensor("scores", scores, (None, None, None), "(B, V, V)")
    if scores.shape[1] != scores.shape[2]:
        raise InputError(
            f"scores of shape {tuple(scores.shape)}: give (B, V, V), one row per view, one column per prompt"
        )
    return scores
