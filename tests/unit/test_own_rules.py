"""The loop's seams: examples/own_rules.py, each rule by a property, and the loop alone."""

import pytest
import torch

from examples import own_rules as rules
from mtl_anagram import Recipe
from mtl_anagram.errors import InputError
from mtl_anagram.sampling import DDIM, Combined, DPMSolver2M, Prediction, Schedule, sample, sample_stage1
from tests.unit.test_sampling_stages import VIEWS, Gaussian, Network, generators, score, stage1, texts

PLAIN = Recipe.plain(num_inference_steps=4)
SCHEDULE = Schedule.stage_1(4)


def plain(**seams):
    return list(stage1((0, 1), recipe=PLAIN, spans=None, **seams))


def test_the_view_that_fits_worst_takes_all():
    def cosines(pictures, t):
        return torch.tensor([[0.1, 0.4], [0.3, 0.2]])

    states = plain(combine=rules.worst_takes_all(cosines))
    assert torch.equal(states[0].weights, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    alone = list(stage1((0,), recipe=PLAIN, spans=None, views=VIEWS[:1], text=(texts()[0][:1], texts()[1])))
    assert torch.allclose(states[-1].x[0], alone[-1].x[0], atol=1e-5)


def test_weights_per_pixel():
    states = plain(combine=rules.left_and_right)
    assert states[0].weights.shape == (2, 2, 1, 64, 64)
    assert torch.allclose(states[0].weights.sum(1), torch.ones(2, 1, 64, 64))
    equal = plain(combine=lambda p, i, t: Combined(p.noise.mean(1), p.variance.mean(1)))
    assert torch.allclose(equal[-1].x, plain()[-1].x, atol=1e-6)
    assert torch.equal(equal[0].weights, torch.full((2, 2), 0.5))
    assert not torch.allclose(states[-1].x, equal[-1].x, atol=1e-3)


def test_a_loss_of_ones_own_moves_the_picture_where_it_says():
    before, after = plain()[-1].x.mean(), plain(combine=rules.brighter(SCHEDULE))[-1].x.mean()
    assert abs(after - 0.5) < abs(before - 0.5) - 0.02


def test_a_known_region_is_kept():
    known, mask = torch.rand(3, 64, 64) * 2 - 1, torch.zeros(64, 64)
    mask[10:30] = 1
    after = rules.keep(known, mask, SCHEDULE, torch.Generator().manual_seed(0))
    x = plain(after=after)[-1].x
    assert torch.equal(x[:, :, 10:30], known[None, :, 10:30].expand(2, -1, -1, -1))
    assert not torch.allclose(x[0, :, 40:], x[1, :, 40:])


@pytest.mark.parametrize("name, kind", [("ddim", DDIM), ("dpm_solver_2m", DPMSolver2M)])
def test_deterministic_solvers_draw_nothing_and_a_recipe_names_them(name, kind):
    (text, null), used = texts(), generators(0)
    options = {"recipe": Recipe.plain(num_inference_steps=4, solver=name), "score": score, "spans": None}
    *_, last = sample_stage1(Network(), text, null, VIEWS, generators=used, **options)
    once = torch.Generator().manual_seed(0)
    torch.randn(3, 64, 64, generator=once)
    assert torch.equal(used[0].get_state(), once.get_state())
    given = list(stage1((0,), recipe=PLAIN, spans=None, step=kind(SCHEDULE)))
    assert torch.equal(given[-1].x, last.x)
    assert not torch.allclose(last.x, plain()[-1].x[:1], atol=1e-3)


@pytest.mark.parametrize("solver", ["ddim", "dpm_solver_2m"])
def test_solvers_reach_a_known_distribution(solver):
    """A Gaussian whose score is known: they carry unit noise to its mean and spread, as ddpm does elsewhere."""
    mean, std, steps = 0.15, 0.2, 200
    recipe, unet = Recipe.plain(num_inference_steps=steps, solver=solver), Gaussian(steps, mean, std)
    *_, last = stage1((0, 1, 2, 3), unet=unet, spans=None, recipe=recipe, size=32)
    assert abs(last.x.mean().item() - mean) < 0.01
    assert abs(last.x.std().item() / std - 1) < 0.02


def test_the_loop_alone_on_any_shape_and_number_of_channels():
    """One channel, one dimension: a picture is whatever the callables make of x."""
    states = list(
        sample(
            torch.ones(2, 1, 8),
            [2, 1, 0],
            lambda x, t: Prediction(x[:, None], x[:, None] * 0.5),
            lambda prediction, index, t: Combined(prediction.noise.sum(1)),
            lambda combined, x, t, t_next: x - combined.noise,
            after=lambda x, index, t_next: (x + (t_next < 0), torch.full((2,), float(index))),
        )
    )
    assert [state.timestep for state in states] == [2, 1, 0]
    assert torch.equal(states[-1].x, torch.full((2, 1, 8), 1.125))
    assert states[0].x0 is None
    assert states[1].loss.tolist() == [1.0, 1.0]


def test_no_null_rows_run_without_guidance_or_for_a_network_that_reads_no_text():
    for reads_text, scale in ((True, 1), (False, 10)):
        unet, recipe = Network(), Recipe.plain(num_inference_steps=4, guidance_scale=scale)
        unet.reads_text = reads_text
        list(stage1((0,), unet=unet, spans=None, recipe=recipe))
        assert [call[0][0] for call in unet.calls] == [2] * 4


def test_components_add_up():
    class Half:
        reduce = "sum"

        def view(self, x):
            return x

        def inverse_view(self, prediction):
            return prediction / 2

    options = {"spans": None, "recipe": Recipe.released(num_inference_steps=3)}
    text, null = texts(1)
    whole = list(stage1((0,), views=VIEWS[:1], text=(text, null), **options))
    parts = list(stage1((0,), views=[Half(), Half()], text=(text.expand(2, -1, -1), null), **options))
    assert torch.allclose(whole[-1].x, parts[-1].x, atol=1e-5)
    with pytest.raises(InputError, match="components.*give one kind"):
        stage1((0,), views=[VIEWS[0], Half()])


@pytest.mark.parametrize(
    "seam, rule",
    [
        ("combine", lambda p, i, t: p.noise.mean(1)),
        ("combine", lambda p, i, t: Combined(p.noise)),
        ("step", lambda combined, x, t, t_next: x[:, :1]),
        ("after", lambda x, i, t_next: None),
    ],
)
def test_a_rule_that_returns_something_else_is_named(seam, rule):
    with pytest.raises(InputError, match=rf"^{seam} returned .*\(2, 3, 64, 64\)"):
        plain(**{seam: rule})


def test_a_hosts_autocast_changes_nothing():
    with torch.autocast("cpu"):
        inside = plain()[-1].x
    assert torch.equal(inside, plain()[-1].x)
