"""How anagrams are measured: alignment and concealment, from any CLIP-like scorer's embeddings.

Definitions: Geng et al. 2023 (Visual Anagrams, arXiv 2311.17919), as Xu et al. 2024 (arXiv 2412.02693) use them.
B pictures, V views and prompts, K other texts, embeddings D wide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import at_least_float32, float_tensor, number
from ..views import View

CLIP_TEMPERATURE = 0.01  # of the published CLIPs: 1 / exp(ln 100)
TEMPERATURE = 0.05  # of the embedded cascade's CLIP, which was trained at a scale of 20


def score_matrix(
    pictures: Tensor, views: Sequence[View], embed_image: Callable[[Tensor], Tensor], texts: Tensor
) -> Tensor:
    """S_ij, the cosine of what view i shows and text j says: (B, V, V + K).

    pictures (B, 3, H, W) in the range that embed_image takes; embed_image: (B V, 3, H, W) -> (B V, D), of any norm,
    such as `lambda x: clip.embed_image(x, 0)`; texts (V + K, D): the views' prompts, then K >= 0 other things.
    """
    float_tensor("texts", texts[: len(views)], (len(views), None), "(V + K, D): each view's, then others")
    images = embed_image(torch.stack([view.show(pictures) for view in views], dim=1).flatten(0, 1))
    float_tensor("embed_image's result", images, (len(pictures) * len(views), texts.shape[1]), "(B V, D)")
    images, words = (F.normalize(at_least_float32(x), dim=-1) for x in (images, texts))
    return images.unflatten(0, (len(pictures), len(views))) @ words.to(images).T


def alignment(scores: Tensor) -> Tensor:
    """A = min_i S_ii: how well the view that fits worst fits its prompt. scores (B, V, V) -> (B,)."""
    float_tensor("scores", scores, (None, *scores.shape[-1:] * 2), "(B, V, V)")
    return scores.diagonal(dim1=1, dim2=2).amin(dim=1)


def concealment(scores: Tensor, temperature: float = CLIP_TEMPERATURE) -> Tensor:
    """C = trace(softmax(S / temperature)) / V, the mean of both softmax directions: (B, V, V) -> (B,).

    How well views and prompts are told apart: 1 where each view shows its own prompt and no other, 1/V at chance.
    """
    float_tensor("scores", scores, (None, *scores.shape[-1:] * 2), "(B, V, V)")
    scores = at_least_float32(scores) / number("temperature", temperature, above=True)
    return (scores.softmax(1) + scores.softmax(2)).diagonal(0, 1, 2).mean(1) / 2


def anagram_score(scores: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """How good an anagram is by the CLIP alone, (B,): what the best of N is chosen by.

    scores (B, V, V + K). With K > 0: the log probability of the reading that is read worst, by a softmax over all
    texts: of all that this might be, is it that? With none: alignment plus temperature times log concealment.
    """
    float_tensor("scores", scores, (None, None, None), "(B, V, V + K)")
    if scores.shape[2] <= scores.shape[1]:
        return alignment(scores) + temperature * concealment(scores, temperature).clamp(min=1e-6).log()
    logits = at_least_float32(scores) / number("temperature", temperature, above=True)
    return logits.log_softmax(dim=2).diagonal(dim1=1, dim2=2).amin(dim=1)
