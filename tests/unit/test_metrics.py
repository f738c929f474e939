"""Alignment and concealment on scores whose measures are known."""

import math

import pytest
import torch

from mtl_anagram.errors import InputError
from mtl_anagram.evaluation.metrics import alignment, anagram_score, concealment, score_matrix
from mtl_anagram.views import get_views


def test_alignment_is_the_worst_views():
    scores = torch.tensor([[[0.3, 0.9], [0.9, 0.2]], [[0.1, 0.0], [0.0, 0.4]]])
    assert alignment(scores).tolist() == pytest.approx([0.2, 0.1])


def test_concealment_by_hand():
    s = [[0.30, 0.27, 0.21], [0.25, 0.29, 0.28], [0.20, 0.26, 0.31]]
    total = 0.0
    for i in range(3):
        row = sum(math.exp(s[i][j] / 0.02) for j in range(3))
        column = sum(math.exp(s[j][i] / 0.02) for j in range(3))
        total += math.exp(s[i][i] / 0.02) * (1 / row + 1 / column) / 2
    assert concealment(torch.tensor([s]), temperature=0.02).item() == pytest.approx(total / 3, abs=1e-6)


@pytest.mark.parametrize("views", [1, 2, 3, 5])
def test_concealment_at_its_ends(views):
    assert concealment(torch.full((2, views, views), 0.3)).tolist() == pytest.approx([1 / views] * 2)
    assert concealment(torch.eye(views)[None]).item() == pytest.approx(1.0)
    if views > 1:
        assert concealment(1 - torch.eye(views)[None]).item() < 1e-6


def test_the_matrix_has_a_row_for_every_view():
    """A scorer that sees the brightest row: upside down, the other prompt's."""
    views = get_views(["identity", "flip"])
    pictures = torch.zeros(2, 3, 4, 4)
    pictures[0, :, 0] = 1.0
    pictures[1, :, 3] = 2.0  # the norm does not matter
    scores = score_matrix(pictures, views, lambda x: x.mean(dim=(1, 3)), torch.eye(4)[[0, 3, 1]] * 5)
    expected = [[[1.0, 0, 0], [0, 1, 0]], [[0, 1, 0], [1, 0, 0]]]  # the third: another thing
    assert torch.allclose(scores, torch.tensor(expected))


def test_the_score_compares_with_other_things():
    """The worst reading's log probability among its view's texts, by hand; another thing that fits lowers it."""
    s = [[0.30, 0.27, 0.21], [0.25, 0.29, 0.28]]
    rows = [math.exp(r[i] / 0.05) / sum(math.exp(v / 0.05) for v in r) for i, r in enumerate(s)]
    found = anagram_score(torch.tensor([s]))
    assert found.item() == pytest.approx(math.log(min(rows)), abs=1e-5)
    s[1][2] = 0.35
    assert anagram_score(torch.tensor([s])).item() < found.item() - 0.5


def test_without_others_the_score_wants_every_reading_in_its_own_view_alone():
    good = [[0.5, 0.1], [0.1, 0.5]]
    one_missing = [[0.5, 0.1], [0.1, 0.2]]
    both_in_both = [[0.5, 0.5], [0.5, 0.5]]
    scores = anagram_score(torch.tensor([good, one_missing, both_in_both]))
    assert scores[0] > max(scores[1:])


def test_refusals():
    with pytest.raises(InputError, match=r"\(2, 2\)"):
        alignment(torch.zeros(2, 2))
    with pytest.raises(InputError, match="temperature=0.0"):
        concealment(torch.zeros(1, 2, 2), 0.0)
