"""The loops of both stages on toy networks: order of rows, batches, a known score, errors; draws are parity's."""

import math

import pytest
import torch
import torch.nn.functional as F

from mtl_anagram.errors import InputError
from mtl_anagram.sampling import Recipe, Schedule, noise_fit, sample_stage1, sample_stage2
from mtl_anagram.views import get_views

TOKENS, WIDTH = 5, 4
VIEWS = get_views(["identity", "flip"])


class Network(torch.nn.Module):
    """A smooth toy network that depends on pixels, time and text, row by row; records how it was called."""

    def __init__(self, channels=3):
        super().__init__()
        draws = torch.Generator().manual_seed(7)
        self.mix = torch.nn.Parameter(torch.randn(6, channels, generator=draws) / 2)
        self.words = torch.nn.Parameter(torch.randn(WIDTH, 3, generator=draws) / 4)
        self.calls, self.prepared = [], 0

    def prepare(self, text):
        assert not torch.is_grad_enabled()
        self.prepared += 1
        return text * 1.0

    def forward(self, x, t, text, class_labels=None):
        self.calls.append((tuple(x.shape), t, x.dtype, class_labels))
        words = torch.tanh(text.mean(1)[:, :1, None, None])  # (R, 1, 1, 1)
        moved = x.roll(1, -2) + 0.3 * torch.sin(3 * x)
        return torch.einsum("oc,rchw->rohw", self.mix, moved) * 0.4 + words * t / 2000

    def text_maps(self, x, t, text, spans, *, resolution=32, places=("down", "up")):
        self.calls.append(("maps", tuple(x.shape), t, tuple(spans), resolution, tuple(places)))
        small = F.adaptive_avg_pool2d(x, resolution)
        rows = torch.einsum("rchw,dc,rld->rhwl", small, self.words, text)  # (R, h, w, L)
        asked = [row[..., start:stop] for row, (start, stop) in zip(rows.exp(), spans, strict=True)]
        longest = max(row.shape[-1] for row in asked)
        maps = torch.stack([F.pad(row, (0, longest - row.shape[-1])) for row in asked])[:, None]
        return {"down": maps, "up": maps * 0.5}


def texts(views=2, images=None, seed=0):
    draws = torch.Generator().manual_seed(seed)
    shape = (views, TOKENS, WIDTH) if images is None else (images, views, TOKENS, WIDTH)
    return torch.randn(shape, generator=draws), torch.randn(1, TOKENS, WIDTH, generator=draws)


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def score(pictures, t):
    """Cosines between 0.1 and 0.9 from the pictures' top left corners."""
    assert pictures.shape[2:] == (3, 64, 64)
    return 0.5 + 0.4 * torch.tanh(pictures[:, :, :, :9, :9].mean(dim=(2, 3, 4)) * 3 + t / 2000)


SPANS = [(0, 2), (1, 2)]


def stage1(seeds=(0,), *, unet=None, text=None, views=VIEWS, spans=SPANS, scorer=score, **more):
    more = {"recipe": Recipe.released(num_inference_steps=4), **more}
    network, states, own = unet or Network(), text or texts(len(views)), generators(*seeds)
    return sample_stage1(network, *states, views, score=scorer, spans=spans, generators=own, **more)


def stage2(low_res, seeds=(0,), *, unet=None, text=None, views=VIEWS, scorer=score, **more):
    more = {"recipe": Recipe.released(num_inference_steps=3), "size": 128, **more}
    network, states, own = unet or Network(6), text or texts(len(views)), generators(*seeds)
    return sample_stage2(network, low_res, *states, views, score=scorer, generators=own, **more)


@pytest.mark.parametrize("steps, dtype", [(1, torch.float32), (27, torch.bfloat16)])
def test_states(steps, dtype):
    unet, (text, null) = Network().to(dtype), texts()
    recipe = Recipe.released(num_inference_steps=steps)
    states = list(stage1((0, 1), unet=unet, text=(text.to(dtype), null), recipe=recipe))
    assert unet.calls[0][2] == dtype
    schedule = Schedule.stage_1(steps)
    assert [s.index for s in states] == list(range(steps))
    assert [s.timestep for s in states] == list(schedule.timesteps)
    for s in states:
        assert s.num_steps == steps
        assert (s.x.shape, s.x.dtype) == ((2, 3, 64, 64), torch.float32)
        assert (s.weights.shape, s.weights.dtype) == ((2, 2), torch.float32)
        assert (s.scale.shape, s.scale.dtype) == ((2,), torch.float32)
        assert torch.allclose(s.weights.sum(1), torch.ones(2))
        guided = s.index <= 25 and s.index < steps - 1
        assert (s.loss is not None) == guided
        assert s.loss is None or (s.loss.shape, s.loss.dtype) == ((2,), torch.float32)
    assert states[-1].x.abs().max() <= 1


def test_rows_times_and_maps_as_documented():
    unet = Network()
    list(stage1((0, 1, 2), unet=unet, recipe=Recipe.released(num_inference_steps=2)))
    assert unet.calls == [
        ((12, 3, 64, 64), 500, torch.float32, None),
        ("maps", (6, 3, 64, 64), 0, ((0, 2), (1, 2)) * 3, 32, ("down", "up")),
        ((12, 3, 64, 64), 0, torch.float32, None),
    ]
    assert unet.prepared == 1
    unet = Network(6)
    list(stage2(torch.zeros(2, 3, 64, 64) - 1, (0, 1), unet=unet, noise_level=7, size=64))
    assert unet.calls == [((8, 6, 64, 64), t, torch.float32, 7) for t in (666, 333, 0)]


def zeros(x, t, text, class_labels=None):
    return x.new_zeros(len(x), 6, *x.shape[-2:])


@pytest.mark.parametrize("recipe", [Recipe.released, Recipe.corrected, Recipe.plain])
def test_a_batch_of_four_is_four_single_runs(recipe):
    recipe = recipe(num_inference_steps=5)
    text, null = texts(2, images=4)
    spans = [[(0, 2), (1, 2)], [(0, 1), (1, 4)], [(2, 3), (0, 5)], [(4, 5), (3, 5)]]
    batch = list(stage1((3, 1, 4, 15), text=(text, null), spans=spans, recipe=recipe, size=32))
    low_res = batch[-1].x
    larger = list(stage2(low_res, (3, 1, 4, 15), text=(text, null), recipe=recipe, size=64))
    for b, seed in enumerate((3, 1, 4, 15)):
        alone = list(stage1((seed,), text=(text[b], null), spans=spans[b], recipe=recipe, size=32))
        own = low_res[b : b + 1]
        alone_larger = list(stage2(own, (seed,), text=(text[b], null), recipe=recipe, size=64))
        for states, singles in ((batch, alone), (larger, alone_larger)):
            for s, one in zip(states, singles, strict=True):
                assert torch.allclose(s.x[b], one.x[0], atol=1e-5)
                assert torch.allclose(s.weights[b], one.weights[0], atol=1e-6)
                assert torch.allclose(s.scale[b], one.scale[0], atol=1e-5)
                assert (s.loss is None) == (one.loss is None)
                assert s.loss is None or torch.allclose(s.loss[b], one.loss[0], atol=1e-6)


def test_parameters_inputs_and_grad_mode_are_left_alone():
    unet, (text, null) = Network(), texts()
    kept = text.clone(), null.clone()
    text.requires_grad_()
    for state in stage1((0,), unet=unet, text=(text, null)):
        assert torch.is_grad_enabled()
        assert not state.x.requires_grad
        assert not state.weights.requires_grad
    assert all(p.grad is None for p in unet.parameters())
    assert text.grad is None
    assert torch.equal(text, kept[0])
    assert torch.equal(null, kept[1])
    low_res = state.x.clone()
    list(stage2(low_res))
    assert torch.equal(low_res, state.x)


@pytest.mark.parametrize("size", [64, 128])
def test_what_the_scorer_sees(size):
    """Stage II: the viewed x_t alone; x/2 + 0.5 or x itself; the middle 2 x 2 of a block, not its mean."""
    seen, rows = [], []

    def unet(x, t, text, class_labels=None):
        rows.append(x)
        return zeros(x, t, text)

    def watch(pictures, t):
        seen.append((pictures, t))
        return torch.full(pictures.shape[:2], 0.5)

    for recipe in (Recipe.released(num_inference_steps=1), Recipe.corrected(num_inference_steps=1)):
        list(stage2(torch.zeros(1, 3, 64, 64) - 1, unet=unet, scorer=watch, recipe=recipe, size=size))
    x = rows[0][:2, :3][None]
    small = x if size == 64 else x.unflatten(-2, (64, 2)).unflatten(-1, (64, 2)).mean(dim=(-3, -1))
    assert seen[0][1] == 0
    assert seen[0][0].dtype == torch.float32
    assert torch.allclose(seen[0][0], small / 2 + 0.5, atol=1e-6)
    assert torch.allclose(seen[1][0], small, atol=1e-6)


class Gaussian:
    """The exact network of pixels that are independently N(mean, std^2): noise, and the reverse variance."""

    def __init__(self, steps, mean, std):
        self.schedule, self.mean, self.power = Schedule.stage_1(steps), mean, std**2

    def __call__(self, x, t, text, class_labels=None):
        a = self.schedule.alphas_cumprod[t].item()
        total = a * self.power + 1 - a
        noise = math.sqrt(1 - a) * (x - math.sqrt(a) * self.mean) / total
        later = self.schedule.next_timestep(t)
        if later < 0:
            return torch.cat([noise, noise], dim=1)
        p = self.schedule.alphas_cumprod[later].item()
        beta = 1 - a / p
        lowest = (1 - p) / (1 - a) * beta
        # p(x_s | x_t) averages p(x_s | x_t, x_0) over what x_0 may be: its variance comes on top
        exact = lowest + (math.sqrt(p) * beta / (1 - a)) ** 2 * self.power * (1 - a) / total
        position = math.log(exact / lowest) / math.log(beta / lowest)
        return torch.cat([noise, torch.full_like(noise, 2 * position - 1)], dim=1)


@pytest.mark.parametrize("steps", [5, 10, 30])
@pytest.mark.parametrize("recipe", [Recipe.plain, Recipe.corrected])
def test_pictures_of_a_known_score_have_its_mean_and_spread(recipe, steps):
    """Exact score and variance: a few steps sample it as well as many (fewer start where it is not noise)."""
    mean, std = 0.15, 0.2
    unet = Gaussian(steps, mean, std)
    *_, last = stage1((0, 1, 2, 3), unet=unet, spans=None, recipe=recipe(num_inference_steps=steps))
    assert abs(last.x.mean().item() - mean) < 0.005  # 5 standard errors of 49152 values
    assert abs(last.x.std().item() / std - 1) < 0.02
    pixels = last.x.flatten(1) - last.x.mean()
    skewness = (pixels**3).mean() / pixels.std() ** 3
    excess = (pixels**4).mean() / pixels.std() ** 4 - 3
    assert abs(skewness) < 0.1
    assert abs(excess) < 0.15
    images = torch.corrcoef(pixels)
    assert (images - torch.eye(4)).abs().max() < 0.06  # and are independent of each other


TEXT, NULL = texts()


@pytest.mark.parametrize(
    "change",
    [
        {"text": TEXT[:1]},
        {"text": TEXT * math.nan},
        {"null": NULL[:, :3]},
        {"views": []},
        {"score": 0.5},
        {"spans": [(0, 1)]},
        {"spans": [(0, 1), (1, TOKENS + 1)]},
        {"spans": [SPANS] * 2},
        {"generators": [torch.Generator()] * 2},
        {"recipe": None},
        {"size": (64,)},
        {"schedule": Schedule.stage_1(29)},
        {"unet": lambda x, t, text: x},  # has no text_maps
    ],
)
def test_stage_1_refuses_at_the_call(change):
    unet = Network()
    arguments = {"unet": unet, "text": TEXT, "null": NULL, "views": VIEWS, "score": score, "spans": SPANS}
    arguments |= {"generators": generators(0), "recipe": Recipe.released()} | change
    places = [arguments.pop(name) for name in ("unet", "text", "null", "views")]
    with pytest.raises(InputError):
        sample_stage1(*places, **arguments)
    assert unet.calls == []


def test_stage_2_refuses_at_the_call():
    good = torch.zeros(1, 3, 64, 64) - 1
    for low_res in (good.expand(2, -1, -1, -1), good * 255, good * math.nan):
        with pytest.raises(InputError, match="low_res"):
            stage2(low_res)
    with pytest.raises(InputError, match="noise_level=1000"):
        stage2(good, noise_level=1000)


def test_numbers_that_are_not_finite_name_the_step():
    def overflows(x, t, text, class_labels=None):
        return zeros(x, t, text) + (math.nan if t == 250 else 0.0)

    with pytest.raises(InputError, match=r"step 2 \(t=250\).*float32"):
        list(stage1(unet=overflows, spans=None))
    with pytest.raises(InputError, match=r"score is not finite at step 2 \(t=250\)"):
        list(stage1(scorer=lambda p, t: torch.full(p.shape[:2], math.nan if t == 250 else 0.3)))

    class Steep(Network):
        def text_maps(self, x, t, text, spans, **more):
            maps = super().text_maps(x, t, text, spans, **more)
            return {name: torch.sqrt(m - m.detach()) for name, m in maps.items()}  # of slope 1/0

    with pytest.raises(InputError, match=r"gradient is not finite at step 1 \(t=500\)"):
        list(stage1(unet=Steep()))


@pytest.mark.parametrize("strength", [0.7, 1.0, 1.6, 9.0])
def test_the_noise_fit_tells_how_strong_noise_is(strength):
    draws = torch.Generator().manual_seed(1)
    noise = torch.randn(2, 3, 64, 64, generator=draws)
    picture = F.interpolate(torch.randn(2, 3, 4, 4, generator=draws), (64, 64), mode="bilinear")
    x = picture + 0.3 * strength * noise
    assert noise_fit(noise, x, 0.3).tolist() == pytest.approx([min(strength, 3.0)] * 2, rel=0.02)
    assert torch.equal(noise_fit(noise[:1], x[:1], 0.3), noise_fit(noise, x, 0.3)[:1])


def test_the_noise_fit_takes_out_what_a_network_of_fixed_strength_leaves():
    """It sees exactly which noise is there, but says 0.9 of unit power whatever its strength."""
    schedule = Schedule.stage_2(10)
    low = F.interpolate(torch.rand(1, 3, 4, 4) - 0.5, (16, 16), mode="bilinear")
    large = F.interpolate(low, (64, 64), mode="bilinear", align_corners=True)

    def network(x, t, text, class_labels):
        noise = x[:, :3] - schedule.roots(int(t))[0] * large
        return torch.cat([0.9 * noise / noise.square().mean().sqrt(), torch.zeros_like(noise)], dim=1)

    def left(**changes):
        recipe = Recipe.plain(num_inference_steps=10, guidance_scale=1, **changes)
        options = {"recipe": recipe, "noise_level": 0, "size": 64}
        *_, last = stage2(low, (3,), unet=network, views=VIEWS[:1], scorer=None, **options)
        return (last.x - large).square().mean().sqrt().item()

    assert left(stage_2_noise_fit=True) < 0.1 * left()
