"""Components: filters by their definitions, families that add up, and what the recipe's techniques do to a sum."""

import pytest
import torch
import torch.nn.functional as F

from mtl_anagram import InputError, Recipe
from mtl_anagram.sampling import alternate
from mtl_anagram.views import Component, get_views, view_from_metadata
from tests.helpers import noise
from tests.unit.test_sampling_stages import stage1, texts

HYBRID, COLOURS = ["low_pass", "high_pass"], ["grayscale", "color"]
TRIPLE = ["triple_low_pass", "triple_medium_pass", "triple_high_pass"]
FAMILIES = [HYBRID, TRIPLE, COLOURS, ["motion:9,30", "motion_res:9,30"], ["scale:0.2", "scale:0.3", "scale"]]
HALVES = [f"{turn}{part}scale" for turn in ("", "rotate_180+") for part in ("low_pass+", "high_pass+")]
# A component turned is exact where its filter is the same from there.
MIXED = [["flip+low_pass", "rotate_cw+high_pass"], ["negate+scale", "scale"], ["grayscale", "jigsaw+color"]]
MIXED += [["rotate_180+motion", "motion_res"], ["high_pass+transpose", "low_pass"], HALVES]
BROKEN = [HYBRID[:1], HYBRID * 2, ["low_pass", "high_pass:3"], ["low_pass", "skew+high_pass"]]


def convolved(x, kernel):
    """x (C, H, W) under a kernel of odd sides, edges mirrored."""
    pads = [side // 2 for side in kernel.shape for _ in (0, 1)][::-1]
    return F.conv2d(F.pad(x[:, None], pads, mode="reflect"), kernel[None, None])[:, 0]


def gaussian(x, sigma, size):
    places = torch.arange(size) - size // 2
    line = torch.exp(-(places**2) / (2 * sigma**2))
    return convolved(convolved(x, line[:, None] / line.sum()), line[None] / line.sum())


@pytest.mark.parametrize("side,times", [(64, 1), (256, 4)])
def test_filters_by_their_published_definitions(side, times):
    x = noise(3, side, side)
    sizes = ((1, 25), (2, 25), (2, 33))
    one, two, hybrid = (gaussian(x, sigma * times, taps * times // 2 * 2 + 1) for sigma, taps in sizes)
    length = 7 if times == 1 else 29
    motion = convolved(x, torch.eye(length) / length)
    across = convolved(x, torch.ones(1, length) / length)
    gray = x.mean(0).expand(3, -1, -1)
    wanted = {"low_pass": hybrid, "high_pass": x - hybrid}
    wanted |= {"triple_low_pass": two, "triple_medium_pass": one - two}
    wanted |= {"triple_high_pass": x - one, "grayscale": gray, "color": x - gray, "motion": motion}
    wanted |= {"motion_res": x - motion, "motion:angle=0": across, "motion:angle=180": across, "scale": x / 2}
    for name, component in wanted.items():
        (view,) = get_views([name])
        assert view.view(x) is x  # the network sees the picture as it is
        torch.testing.assert_close(view.inverse_view(x), component, rtol=0, atol=1e-5, msg=name)
        seen = {"triple_medium_pass": one, "scale": x}.get(name, x if view.rest else component)
        torch.testing.assert_close(view.show(x), seen, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("names", FAMILIES + MIXED, ids="|".join)
@pytest.mark.parametrize("size", [(64, 64), (24, 40), (8, 8)])
def test_families_add_up(names, size):
    views, prediction = get_views(names), noise(2, 6, *size)
    if size == (24, 40) and any(view.square for view in views):
        return
    prediction[:, 3:] = 0.3  # one variance for all
    total = sum(view.inverse_view(view.view(prediction)) for view in views)
    wanted = prediction.clone()
    if names[0] == "negate+scale":
        wanted[:, 3:] = 0  # viewed by -1 here, which no variance is
    torch.testing.assert_close(total, wanted, rtol=0, atol=1e-4)
    for view in views:  # noise and variance are filtered apart
        part = view.inverse_view(prediction[:, :3])
        torch.testing.assert_close(view.inverse_view(prediction)[:, :3], part, rtol=0, atol=1e-6)
        assert view_from_metadata(view.to_metadata()).to_metadata() == view.to_metadata()


def test_readers_who_agree_see_what_one_sees():
    """Nothing is lost: with one text for all, any family samples the picture that the text alone gives."""
    (text, null), recipe = texts(1), Recipe.plain(num_inference_steps=3)
    alone = list(stage1(views=get_views(["identity"]), text=(text, null), spans=None, recipe=recipe))[-1]
    for names in (HYBRID, TRIPLE, COLOURS, HALVES[:2] * 2):
        both = (text.expand(len(names), -1, -1), null)
        last = list(stage1(views=get_views(names), text=both, spans=None, recipe=recipe))[-1]
        torch.testing.assert_close(last.x, alone.x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("names,lost", [(HYBRID, 0.04), (COLOURS, 0.0), (["scale"] * 2, 0.5), (HALVES, 0.51)])
def test_rectification_gives_a_sum_the_power_of_its_parts(names, lost):
    """Readers that differ in all: unit noises. Balancing and anti-segregation leave a sum alone."""
    views, recipe = get_views(names), Recipe.released(num_inference_steps=1, guidance_scale=1)
    rows = noise(len(views), 6, 64, 64)

    def unet(x, t, text):
        return rows

    (state,) = stage1(views=views, unet=unet, recipe=recipe, spans=[(0, 1)] * len(views))
    total = sum(view.inverse_view(row[:3]) for view, row in zip(views, rows, strict=True))
    assert abs(1 - total.square().mean() - lost) < 0.02
    assert abs(state.scale**2 * total.square().mean() - 1) < 0.02
    assert torch.equal(state.weights, torch.ones(1, len(views)))
    assert state.loss is None
    recipe = Recipe.plain(num_inference_steps=1, guidance_scale=1)
    (plain,) = stage1(views=views, unet=unet, recipe=recipe, spans=None)
    assert plain.scale == 1


@pytest.mark.parametrize("names", BROKEN, ids="|".join)
def test_what_does_not_add_up_is_refused_before_any_network_runs(cascade, names):
    with pytest.raises(InputError, match="add up"):  # at 64 px, if not at 16
        cascade.sample(["a duck"] * len(names), names, recipe=Recipe.plain(num_inference_steps=2), size=16)


class Left(Component):
    name = "left"

    def filter(self, x):
        return x * (torch.arange(x.shape[-1]) < x.shape[-1] // 2)


class Right(Left):
    name, rest = "right", True


def test_a_component_of_ones_own(cascade):
    def made(*prompts):
        recipe = Recipe.plain(num_inference_steps=2)
        return cascade.sample(prompts, [Left(), Right()], recipe=recipe, size=16, stop_after=16).pictures[16]

    assert not torch.equal(made("a duck", "a cat"), made("a duck", "a duck"))


def test_alternate_follows_one_view_a_step():
    (text, null), recipe = texts(2), Recipe.plain(num_inference_steps=3)
    views = get_views(["flip", "rotate_180"])
    states = list(stage1(views=views, text=(text, null), spans=None, recipe=recipe, combine=alternate))
    assert [state.weights.tolist() for state in states] == [[[1.0, 0.0]], [[0.0, 1.0]], [[1.0, 0.0]]]
    first = next(stage1(views=views[:1], text=(text[:1], null), spans=None, recipe=recipe))
    torch.testing.assert_close(states[0].x, first.x)
