"""The sampler's pure functions: balancing, rectification, token maps and their loss, guidance, schedule."""

import itertools
import math

import pytest
import torch

from mtl_anagram.errors import ConfigError, InputError
from mtl_anagram.sampling import (
    Schedule,
    anti_segregation_loss,
    anti_segregation_step,
    balance,
    combine,
    concept_maps,
    ddpm_step,
    guide,
    rectify,
)
from mtl_anagram.sampling.balancing import FLOOR
from mtl_anagram.views import get_views
from tests.helpers import relative


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("step, horizon", [(0, 30), (1, 30), (29, 30), (99, 30), (5, 10)])
def test_balance_is_the_formula(step, horizon):
    scores = torch.tensor([[0.3, 0.2, 0.25], [0.11, 0.4, 0.9]])
    powers = [[c ** -(1 + step / horizon) for c in row] for row in scores.tolist()]
    want = torch.tensor([[p / sum(row) for p in row] for row in powers])
    assert relative(balance(scores, step, horizon=horizon), want) < 1e-5


def test_balance_of_cosines_without_a_power():
    """Negative and zero cosines count as the floor; the weights stay finite for any step."""
    scores = torch.tensor([[-0.2, 0.3], [0.0, 0.3], [-0.5, -0.1]])
    for step in (0, 17, 999):
        weights = balance(scores, step)
        assert torch.isfinite(weights).all()
        assert torch.allclose(weights.sum(1), torch.ones(3))
        assert torch.equal(weights[0], weights[1])
        assert torch.allclose(weights[2], torch.tensor([0.5, 0.5]))
    assert torch.allclose(balance(scores, 0)[0, 1], torch.tensor(FLOOR / (FLOOR + 0.3)), rtol=1e-4, atol=0)
    assert torch.allclose(balance(scores, 0, floor=0.1)[0], torch.tensor([0.75, 0.25]))


def test_balance_is_symmetric_and_by_row():
    scores = torch.rand(4, 3, generator=seeded()) + 0.05
    weights, order = balance(scores, 12), [2, 0, 1]
    assert torch.allclose(balance(scores[:, order], 12), weights[:, order])
    assert torch.equal(balance(scores[2:3], 12), weights[2:3])
    assert torch.equal(balance(torch.tensor([[0.3]]), 7), torch.ones(1, 1))
    assert balance(scores.half(), 3).dtype == torch.float32


def correlated(correlation, power=(1.0, 1.0), size=256):
    """Two noises of exactly this power and correlation over one picture, (1, 2, 3, size, size)."""
    a, b = torch.randn(2, 3 * size * size, generator=seeded(), dtype=torch.float64)
    a = a / a.square().mean().sqrt()
    b = b - (a * b).mean() * a
    b = b / b.square().mean().sqrt()
    mixed = correlation * a + math.sqrt(1 - correlation**2) * b
    both = torch.stack([a * math.sqrt(power[0]), mixed * math.sqrt(power[1])])
    return both.reshape(1, 2, 3, size, size).float()


@pytest.mark.parametrize("correlation", [-0.9, -0.3, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("diagonal", ["unit", "measured"])
def test_unit_noises_of_known_correlation_keep_unit_power(correlation, diagonal):
    noise, weights = correlated(correlation), torch.tensor([[0.7, 0.3]])
    scale = rectify(noise, weights, diagonal=diagonal)
    by_hand = 1 / math.sqrt(0.7**2 + 0.3**2 + 2 * 0.7 * 0.3 * correlation)
    assert abs(scale.item() / by_hand - 1) < 1e-5
    assert abs(combine(noise, weights, scale).square().mean().item() - 1) < 1e-5


def test_measured_power_is_the_weighted_mean_of_the_parts():
    """Guided noise has no unit power: 4 and 0.25 at weights 0.2, 0.8 have mean 1; "unit" misses that."""
    noise, weights = correlated(0.4, power=(4.0, 0.25)), torch.tensor([[0.2, 0.8]])
    measured = combine(noise, weights, rectify(noise, weights, diagonal="measured"))
    assert abs(measured.square().mean().item() - (0.2 * 4 + 0.8 * 0.25)) < 1e-5
    unit = combine(noise, weights, rectify(noise, weights))
    # 0.04 * 4 + 0.64 * 0.25 + 2 * 0.16 * m_12, over 0.04 + 0.64 + 2 * 0.16 * m_12, with m_12 = 0.4 * 2 * 0.5
    assert abs(unit.square().mean().item() - (0.32 + 0.128) / (0.68 + 0.128)) < 1e-5


def test_rectify_is_symmetric_and_image_by_image():
    noise, weights = torch.randn(2, 3, 3, 8, 8, generator=seeded()), torch.rand(2, 3, generator=seeded(1))
    order = [2, 0, 1]
    for diagonal in ("unit", "measured"):
        whole = rectify(noise, weights, diagonal=diagonal)
        assert torch.allclose(rectify(noise[:, order], weights[:, order], diagonal=diagonal), whole)
        assert torch.equal(rectify(noise[1:], weights[1:], diagonal=diagonal), whole[1:])


def test_rectify_where_there_is_nothing_to_divide_by():
    one = torch.randn(2, 1, 3, 8, 8, generator=seeded()) * 3
    for diagonal in ("unit", "measured"):
        assert torch.equal(rectify(one, torch.ones(2, 1), diagonal=diagonal), torch.ones(2))
    opposite = torch.cat([one, -one], dim=1)
    half = torch.full((2, 2), 0.5)
    assert torch.allclose(rectify(opposite, half, diagonal="measured"), torch.tensor(100.0))
    assert torch.allclose(rectify(opposite, half), torch.tensor(100.0))  # the released code: a root of < 0
    zero = torch.zeros(1, 2, 3, 8, 8)
    assert torch.equal(rectify(zero, half[:1], diagonal="measured"), torch.ones(1))
    assert torch.allclose(rectify(zero, half[:1]), torch.tensor(math.sqrt(2)))


def slow_loss(maps, measure):
    """The loss of one image's maps (V, h, w) pixel by pixel, in Python numbers."""
    maps = [view.flatten().tolist() for view in maps]
    wanted = 0.5 - 0.05 * (len(maps) - 1)
    if measure == "iou":
        maps = [[value / sum(view) for value in view] for view in maps]
        wanted = wanted / (1 - wanted)
    gaps = []
    for one, other in itertools.combinations(maps, 2):
        shared = sum(map(min, one, other))
        whole = sum(map(max, one, other)) if measure == "iou" else sum(one) + sum(other)
        gaps.append(abs(wanted - shared / whole))
    return sum(gaps) / len(gaps)


@pytest.mark.parametrize("measure", ["overlap", "iou"])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_loss_against_a_double_loop(count, measure):
    maps = torch.rand(3, count, 6, 6, generator=seeded(count)) ** 3
    maps = maps * torch.arange(1, count + 1)[None, :, None, None]  # of unequal mass
    loss = anti_segregation_loss(maps, measure=measure)
    assert loss.shape == (3,)
    assert relative(loss, torch.tensor([slow_loss(m, measure) for m in maps])) < 1e-5


def test_loss_by_hand_and_of_one_view_and_of_empty_maps():
    same = torch.ones(1, 2, 4, 4)
    assert torch.allclose(anti_segregation_loss(same), torch.tensor([0.05]))  # |0.45 - 0.5|
    assert torch.allclose(anti_segregation_loss(same, target=0.4, slope=0.1), torch.tensor([0.2]))
    assert torch.equal(anti_segregation_loss(torch.rand(3, 1, 4, 4)), torch.zeros(3))
    maps = torch.zeros(1, 2, 4, 4, requires_grad=True)
    for measure in ("overlap", "iou"):
        (gradient,) = torch.autograd.grad(anti_segregation_loss(maps, measure=measure).sum(), maps)
        assert torch.isfinite(gradient).all()


def test_concept_maps_are_sums_in_the_canonical_frame():
    layers = {name: torch.rand(4, 5, 6, 6, 2, generator=seeded(i)) for i, name in enumerate("ab")}
    views = get_views(["identity", "rotate_cw"])
    got = concept_maps(layers, views)
    assert got.shape == (2, 2, 6, 6)
    for b, y, x in itertools.product(range(2), range(6), range(6)):
        for v, (row, column) in enumerate([(y, x), (x, 5 - y)]):
            want = sum(maps[2 * b + v, :, row, column].sum() for maps in layers.values())
            assert torch.allclose(got[b, v, y, x], want)
    for wrong in ({}, {"a": torch.rand(3, 5, 6, 6, 2)}):
        with pytest.raises(InputError):
            concept_maps(wrong, views)


def test_gradient_step_is_plain_descent_image_by_image():
    """Against finite differences; the rate is the released 5; the input and the weights are left alone."""
    weight = torch.rand(2, 3, generator=seeded(3), dtype=torch.float64).requires_grad_()
    x = torch.rand(3, 3, 4, 4, generator=seeded(4), dtype=torch.float64)

    def maps_of(pictures):
        return torch.einsum("vc,bchw->bvhw", weight, pictures).exp()

    before = x.clone()
    with torch.no_grad():
        moved, loss = anti_segregation_step(x, maps_of)
        assert not torch.is_grad_enabled()
    assert torch.equal(x, before)
    assert weight.grad is None
    assert not any(y.requires_grad for y in (moved, loss))
    assert torch.allclose(loss, anti_segregation_loss(maps_of(x)))
    for place in [(0, 0, 0, 0), (1, 2, 3, 1), (2, 1, 2, 2)]:
        more, less = x.clone(), x.clone()
        more[place] += 1e-6
        less[place] -= 1e-6
        slope = (anti_segregation_loss(maps_of(more)) - anti_segregation_loss(maps_of(less))).sum() / 2e-6
        assert abs((x - moved)[place] - 5.0 * slope) < 1e-7
    alone, _ = anti_segregation_step(x[1:2], maps_of)
    assert torch.allclose(alone, moved[1:2], atol=1e-12)


def test_guide_and_combine():
    null, text = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 0.0])
    assert torch.equal(guide(null, text, 10.0), torch.tensor([11.0, -18.0]))
    assert torch.equal(guide(null, text, 0.0), null)
    noise = torch.randn(2, 3, 3, 4, 4, generator=seeded())
    weights, scale = torch.rand(2, 3, generator=seeded(1)), torch.tensor([1.5, 2.0])
    want = torch.stack([scale[b] * sum(weights[b, v] * noise[b, v] for v in range(3)) for b in range(2)])
    assert relative(combine(noise, weights, scale), want) < 1e-6
    assert relative(combine(noise, weights), want / scale[:, None, None, None]) < 1e-6


def test_a_step_needs_what_it_uses():
    schedule, x = Schedule.stage_1(30), torch.zeros(1, 3, 8, 8)
    with pytest.raises(InputError, match="z is NoneType.*zeros"):
        ddpm_step(x, x, x, 957, schedule)
    with pytest.raises(InputError, match="variance"):
        ddpm_step(x, None, x, 957, schedule, x)
    with pytest.raises(InputError, match="956"):
        ddpm_step(x, x, x, 956, schedule, x)
    with pytest.raises(InputError):
        schedule.add_noise(x, x, 1000)


@pytest.mark.parametrize(
    "name, value",
    [("prediction_type", "v_prediction"), ("beta_schedule", "linear"), ("_class_name", "DDIMScheduler")],
)
def test_configs_and_steps_that_are_not_implemented(name, value):
    with pytest.raises(ConfigError, match=name):
        Schedule.from_config({"beta_schedule": "squaredcos_cap_v2", name: value}, 30)
    with pytest.raises(InputError, match="from 1 to 1000"):
        Schedule.stage_1(1001)
