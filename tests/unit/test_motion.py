"""Views half-way: exact at both ends, rigid pieces between, and what fades, turns or goes away does so."""

import pytest
import torch
import torch.nn.functional as F

from mtl_anagram.errors import InputError
from mtl_anagram.views import VIEW_NAMES, get_views
from mtl_anagram.views.base import pixel_numbers
from mtl_anagram.views.motion import Moving

EVERY = [*VIEW_NAMES, "rotate_cw+negate", "jigsaw+skew+negate", "identity+identity"]
# How many pieces a reader sees of a picture of 64 px.
PIECES = {"flip": 1, "rotate_cw": 1, "rotate_180": 1, "inner_circle": 2, "permutation": 3, "square_hinge": 10}


def picture(height=64, width=64):
    """Smooth: what lies half a pixel away has about the same colour."""
    small = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return F.interpolate(small, (height, width), mode="bicubic").clamp(-1, 1)[0]


def make(name):
    return get_views([name], [{"permutation": [3, 2, 0, 1]} if name == "permutation" else None], seed=3)[0]


@pytest.mark.parametrize("name", EVERY)
def test_both_ends_are_exact_and_the_pieces_arrive(name):
    view, x = make(name), picture()
    way = Moving(view, x)
    assert torch.equal(way.at(0), x)
    assert torch.equal(way.at(1), view.show(x))
    assert torch.equal(way.at(1, room=9)[:, 9:-9, 9:-9], view.show(x))
    assert way.at(0.3, room=9).shape == (3, 82, 82)
    assert bool(way.motions) == (not torch.equal(view.show(x), x))
    assert "+" not in name or len(way.motions) == len(set(name.split("+")) - {"identity"})
    for motion, start, end in zip(way.motions, way.stations, way.stations[1:], strict=False):
        if motion.fade != "no":
            continue
        points = pixel_numbers(64, 64).flatten()
        arrived = motion.places(torch.stack([points // 64, points % 64], 1).float(), 1)
        assert (arrived - arrived.round()).abs().max() < 1e-3
        down, right = arrived.round().long().unbind(1)
        seen = torch.zeros_like(start).index_put((torch.arange(3)[:, None], down, right), start.flatten(1))
        assert torch.equal(end, seen)
    if name in PIECES:
        assert len(way.motions[0].turn) == PIECES[name]


def test_halves_of_turns_are_turns():
    """Half of half a turn is a quarter turn; of a disc, too; in half of a flip the card is seen from its edge."""
    x = picture()
    torch.testing.assert_close(Moving(make("rotate_180"), x).at(0.5), make("rotate_cw").view(x))
    disc = Moving(make("inner_circle"), x).at(0.5)
    torch.testing.assert_close(disc[:, 20:-20, 20:-20], make("rotate_cw").view(x)[:, 20:-20, 20:-20])
    torch.testing.assert_close(disc[:, :3], x[:, :3])
    edge = Moving(make("flip"), x).at(0.5)
    assert (edge[:, :30] == 1).all()
    assert (edge[:, 34:] == 1).all()
    eighth = Moving(make("rotate_cw"), x).at(0.5, room=14)  # the corners are at the middles of the sides
    assert (eighth[:, :14, :14] == 1).all()
    assert (eighth[:, 2, 46] - x[:, 0, 0]).abs().max() < 0.2
    assert Moving(make("negate"), x).at(0.5).abs().max() < 1e-6


def test_shears_turn_as_one_piece_filters_fade_and_hybrids_go_away():
    x, turned = picture(), make("rotate:30")
    (motion,) = Moving(turned, x).motions
    assert motion.turn.abs().tolist() == [30]
    half, other = Moving(turned, x).at(0.5), make("rotate:15").show(x)
    assert (half - other)[:, 16:-16, 16:-16].abs().mean() < 0.05
    far = Moving(make("low_pass"), x).at(0.5)
    assert (far[:, :23] == 1).all()  # a quarter of its size
    torch.testing.assert_close(far.mean((1, 2)), (x / 16 + 15 / 16).mean((1, 2)), atol=0.02, rtol=0)
    grey = make("grayscale")
    torch.testing.assert_close(Moving(grey, x).at(0.25), 0.75 * x + 0.25 * grey.show(x))


def test_rectangles_and_what_is_no_fraction():
    x, view = picture(32, 48), make("flip+patch_permute")
    assert Moving(view, x).at(0.7, room=2).shape == (3, 36, 52)
    for fraction in (-0.1, 1.1, float("nan"), "half"):
        with pytest.raises(InputError, match="fraction="):
            Moving(view, x).at(fraction)
    with pytest.raises(InputError, match="square"):
        Moving(make("rotate_cw"), x).at(0.5)
