"""The attention function against a slow one that takes a query at a time."""

import math

import pytest
import torch

from mtl_anagram.models.attention import multi_head, sinusoids, split
from tests.helpers import relative

ROWS, HEADS, QUERIES, KEYS, WIDTH = 2, 3, 5, 7, 4


def slow(q, k, v, *, mask=None, scale=None, causal=False):
    """Output (B, N, Q, d) and probabilities (B, N, Q, S), one query after another, in doubles."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    output, probabilities = torch.zeros_like(q), torch.zeros(*q.shape[:3], k.shape[2], dtype=q.dtype)
    for i in range(q.shape[2]):
        logits = (q[:, :, i, None] * k).sum(-1) * scale  # (B, N, S)
        if mask is not None:
            entry = mask.expand(*q.shape[:3], k.shape[2])[:, :, i]
            logits = logits.masked_fill(~entry, -math.inf) if mask.dtype == torch.bool else logits + entry
        weights = logits.exp() * (torch.arange(k.shape[2]) <= i if causal else 1)
        probabilities[:, :, i] = weights / weights.sum(-1, keepdim=True)
        output[:, :, i] = (probabilities[:, :, i, :, None] * v).sum(2)
    return output, probabilities


def inputs(keys=KEYS):
    draws = torch.Generator().manual_seed(0)
    shapes = [(ROWS, HEADS, length, WIDTH) for length in (QUERIES, keys, keys)]
    return [torch.randn(shape, generator=draws, dtype=torch.float64) for shape in shapes]


def attention(q, k, v, **options):
    """`multi_head` of heads that lie apart, (B, N, Q, d)."""
    return split(multi_head(*(x.transpose(1, 2).flatten(2) for x in (q, k, v)), HEADS, **options), HEADS)


def masks():
    draws = torch.Generator().manual_seed(1)
    return {
        "none": None,
        "bias": torch.randn(1, HEADS, QUERIES, KEYS, generator=draws, dtype=torch.float64),
        "padding": torch.arange(KEYS)[None, None, None] < torch.tensor([4, 7])[:, None, None, None],
    }


@pytest.mark.parametrize("scale", [None, 1.0])
@pytest.mark.parametrize("mask", masks())
def test_attention_equals_the_slow_one(mask, scale):
    q, k, v = inputs()
    expected, _ = slow(q, k, v, mask=masks()[mask], scale=scale)
    assert relative(attention(q, k, v, mask=masks()[mask], scale=scale), expected) < 1e-12


def test_causal():
    q, k, v = inputs(keys=QUERIES)
    assert relative(attention(q, k, v, causal=True), slow(q, k, v, causal=True)[0]) < 1e-12


def test_sinusoids_are_cosines_then_sines_of_falling_frequency():
    code = sinusoids(torch.tensor([0, 957]), 6)
    assert torch.equal(code[0], torch.tensor([1.0, 1, 1, 0, 0, 0]))
    for k in range(3):
        angle = 957 * 10000 ** (-k / 3)
        assert abs(code[1, k].item() - math.cos(angle)) < 1e-4
        assert abs(code[1, 3 + k].item() - math.sin(angle)) < 1e-4
