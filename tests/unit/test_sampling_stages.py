"""The loops of both stages on toy networks: order of draws and rows, batches, a known score, errors."""

import math

import pytest
import torch
import torch.nn.functional as F

from mtl_anagram.errors import InputError
from mtl_anagram.models import UNet, UNetConfig
from mtl_anagram.sampling import Recipe, Schedule, ddpm_step, sample_stage1, sample_stage2
from tests.helpers import relative
from tests.unit import tiny

TOKENS, WIDTH = 5, 4


pytestmark = pytest.mark.usefixtures("one_thread")


class Flip:
    """A toy view: upside down, or as it is."""

    def __init__(self, on):
        self.on = on

    def view(self, x):
        return x.flip(-2) if self.on else x

    inverse_view = inverse_map = view


VIEWS = [Flip(False), Flip(True)]


class Network(torch.nn.Module):
    """A smooth toy network that depends on pixels, time and text, row by row; records how it was called."""

    def __init__(self, channels=3):
        super().__init__()
        draws = torch.Generator().manual_seed(7)
        self.mix = torch.nn.Parameter(torch.randn(6, channels, generator=draws) / 2)
        self.words = torch.nn.Parameter(torch.randn(WIDTH, 3, generator=draws) / 4)
        self.calls = []

    def forward(self, x, t, text, class_labels=None):
        self.calls.append((tuple(x.shape), t, x.dtype, class_labels))
        words = text.mean(1)[:, :1]  # (R, 1)
        moved = x.roll(1, -2) + 0.3 * torch.sin(3 * x)
        return (
            torch.einsum("oc,rchw->rohw", self.mix, moved) * 0.4
            + torch.tanh(words[..., None, None]) * t / 2000
        )

    def text_maps(self, x, t, text, spans, *, resolution=32, places=("down", "up")):
        self.calls.append(("maps", tuple(x.shape), t, tuple(spans), resolution, tuple(places)))
        small = F.adaptive_avg_pool2d(x, resolution)
        rows = torch.einsum("rchw,dc,rld->rhwl", small, self.words, text)  # (R, h, w, L)
        longest = max(stop - start for start, stop in spans)
        maps = [
            F.pad(row[..., a:b], (0, longest - (b - a)))
            for row, (a, b) in zip(rows.exp(), spans, strict=True)
        ]
        return {layer: torch.stack(maps)[:, None] * scale for layer, scale in (("down", 1.0), ("up", 0.5))}


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


def stage1(seeds=(0,), *, unet=None, text=None, views=VIEWS, spans=SPANS, recipe=None, scorer=score, **more):
    text, null = texts(len(views)) if text is None else text
    recipe = Recipe.released(num_inference_steps=4) if recipe is None else recipe
    return sample_stage1(
        Network() if unet is None else unet, text, null, views,
        score=scorer, spans=spans, generators=generators(*seeds), recipe=recipe, **more,
    )  # fmt: skip


def stage2(low_res, seeds=(0,), *, unet=None, text=None, recipe=None, size=128, **more):
    text, null = texts() if text is None else text
    recipe = Recipe.released(num_inference_steps=3) if recipe is None else recipe
    return sample_stage2(
        Network(6) if unet is None else unet, low_res, text, null, VIEWS,
        score=score, generators=generators(*seeds), recipe=recipe, size=size, **more,
    )  # fmt: skip


# What a run looks like


@pytest.mark.parametrize("steps", [1, 2, 27, 30])
def test_states(steps):
    states = list(stage1((0, 1), recipe=Recipe.released(num_inference_steps=steps)))
    schedule = Schedule.stage_1(steps)
    assert [s.index for s in states] == list(range(steps))
    assert [s.timestep for s in states] == list(schedule.timesteps)
    for s in states:
        assert s.num_steps == steps
        assert (s.x.shape, s.x.dtype) == ((2, 3, 64, 64), torch.float32)
        assert s.weights.shape == (2, 2)
        assert s.scale.shape == (2,)
        assert torch.allclose(s.weights.sum(1), torch.ones(2))
        guided = s.index <= 25 and s.index < steps - 1
        assert (s.loss is not None) == guided
        assert s.loss is None or s.loss.shape == (2,)
    assert states[-1].x.abs().max() <= 1


def test_rows_times_and_maps_as_documented():
    unet = Network()
    list(stage1((0, 1, 2), unet=unet, recipe=Recipe.released(num_inference_steps=2)))
    assert unet.calls == [
        ((12, 3, 64, 64), 500, torch.float32, None),
        ("maps", (6, 3, 64, 64), 0, ((0, 2), (1, 2)) * 3, 32, ("down", "up")),
        ((12, 3, 64, 64), 0, torch.float32, None),
    ]
    unet = Network(6)
    list(stage2(torch.zeros(2, 3, 64, 64), (0, 1), unet=unet, noise_level=7, size=64))
    assert unet.calls == [((8, 6, 64, 64), t, torch.float32, 7) for t in (666, 333, 0)]


def test_null_rows_first_then_prompts_image_by_image_view_by_view():
    seen = []

    def unet(x, t, text, class_labels=None):
        seen.append((x, text))
        return x.new_zeros(len(x), 6, *x.shape[-2:])

    text, null = texts(2, images=3)
    next(stage1((0, 1, 2), unet=unet, text=(text, null), spans=None))
    x, rows = seen[0]
    for b in range(3):
        start = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(b))
        for v in range(2):
            assert torch.equal(rows[b * 2 + v], null[0])
            assert torch.equal(rows[6 + b * 2 + v], text[b, v])
            for row in (b * 2 + v, 6 + b * 2 + v):
                assert torch.equal(x[row], VIEWS[v].view(start))


def test_prepare_is_called_once_and_its_rows_are_sliced():
    class Prepared(Network):
        prepared = 0

        def prepare(self, text):
            assert not torch.is_grad_enabled()
            self.prepared += 1
            return text * 1.0

    unet = Prepared()
    with_prepare = list(stage1((0, 1), unet=unet))
    assert unet.prepared == 1
    for a, b in zip(with_prepare, stage1((0, 1)), strict=True):
        assert torch.equal(a.x, b.x)


# Random draws


def zeros(x, t, text, class_labels=None):
    return x.new_zeros(len(x), 6, *x.shape[-2:])


def test_draws_of_stage_1_in_order():
    """With a prediction of zero the trajectory can be written by hand: initial noise, then one per step."""
    draws, schedule = torch.Generator().manual_seed(9), Schedule.stage_1(4)
    x = torch.randn(3, 64, 64, generator=draws)[None]
    for state in stage1((9,), unet=zeros, spans=None):
        z = None if state.index == 3 else torch.randn(3, 64, 64, generator=draws)[None]
        x = ddpm_step(torch.zeros_like(x), torch.zeros_like(x), x, state.timestep, schedule, z)
        assert torch.equal(state.x, x)


def test_draws_of_stage_2_in_order_and_where_stage_1_stopped():
    """Initial noise, noise on the enlarged picture, one per step; a generator goes on where it stopped."""
    seen = []

    def unet(x, t, text, class_labels=None):
        seen.append(x)
        return zeros(x, t, text)

    low_res = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    draws, schedule = torch.Generator().manual_seed(9), Schedule.stage_2(3)
    torch.randn(3, 64, 64, generator=draws)
    used = torch.Generator().manual_seed(9)
    torch.randn(3, 64, 64, generator=used)
    text, null = texts()
    run = sample_stage2(
        unet, low_res, text, null, VIEWS, score=None, generators=[used],
        recipe=Recipe.released(num_inference_steps=3), size=128,
    )  # fmt: skip
    x = torch.randn(3, 128, 128, generator=draws)[None]
    large = F.interpolate(low_res, (128, 128), mode="bilinear", align_corners=True)
    alpha = 0.9917247
    condition = math.sqrt(alpha) * large + math.sqrt(1 - alpha) * torch.randn(3, 128, 128, generator=draws)
    for state in run:
        assert torch.equal(seen[-1][0, :3], x[0])
        assert torch.equal(seen[-1][1, :3], x[0].flip(-2))
        assert torch.allclose(seen[-1][0, 3:], condition[0], atol=1e-5)
        assert torch.allclose(seen[-1][1, 3:], condition[0].flip(-2), atol=1e-5)
        z = None if state.index == 2 else torch.randn(3, 128, 128, generator=draws)[None]
        x = ddpm_step(torch.zeros_like(x), torch.zeros_like(x), x, state.timestep, schedule, z)
        assert torch.equal(state.x, x)


def test_same_seed_same_picture_and_nothing_global():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = [s.x for s in stage1((5,))]
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert all(torch.equal(a, s.x) for a, s in zip(first, stage1((5,)), strict=True))
    assert not torch.equal(first[-1], list(stage1((6,)))[-1].x)


# Batches, and what is left alone


@pytest.mark.parametrize("recipe", [Recipe.released, Recipe.corrected, Recipe.plain])
def test_a_batch_of_four_is_four_single_runs(recipe):
    recipe = recipe(num_inference_steps=5)
    text, null = texts(2, images=4)
    spans = [[(0, 2), (1, 2)], [(0, 1), (1, 4)], [(2, 3), (0, 5)], [(4, 5), (3, 5)]]
    batch = list(stage1((3, 1, 4, 15), text=(text, null), spans=spans, recipe=recipe))
    low_res = batch[-1].x
    larger = list(stage2(low_res, (3, 1, 4, 15), text=(text, null), recipe=recipe))
    for b, seed in enumerate((3, 1, 4, 15)):
        alone = list(stage1((seed,), text=(text[b], null), spans=spans[b], recipe=recipe))
        alone_larger = list(stage2(low_res[b : b + 1], (seed,), text=(text[b], null), recipe=recipe))
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


def test_inside_inference_mode():
    want = list(stage1((0,)))[-1].x
    unet, text = Network(), texts()
    with torch.inference_mode():
        got = list(stage1((0,), unet=unet, text=text))[-1].x
    assert torch.equal(got, want)


def test_half_precision_networks_keep_a_float32_state():
    text, null = texts()
    unet = Network().to(torch.bfloat16)
    states = list(stage1((0,), unet=unet, text=(text.bfloat16(), null)))
    assert unet.calls[0][2] == torch.bfloat16
    assert all(s.x.dtype == s.weights.dtype == s.scale.dtype == torch.float32 for s in states)
    assert states[0].loss.dtype == torch.float32


# The recipe's switches


def test_switches():
    def run(recipe, **more):
        return list(stage1((0,), recipe=recipe, **more))

    plain = run(Recipe.plain(num_inference_steps=3))
    for s in plain:
        assert torch.equal(s.weights, torch.tensor([[0.5, 0.5]]))
        assert torch.equal(s.scale, torch.ones(1))
        assert s.loss is None
    same = run(Recipe.plain(num_inference_steps=3, anti_segregation=True, guidance_rate=0))
    assert torch.equal(same[-1].x, plain[-1].x)
    assert same[0].loss is not None
    for name in ("balancing", "rectification", "anti_segregation"):
        changed = run(Recipe.plain(num_inference_steps=3, **{name: True}))
        assert not torch.equal(changed[0].x, plain[0].x), name
    unscored = run(Recipe.released(num_inference_steps=3), scorer=None)
    assert torch.equal(unscored[0].weights, torch.tensor([[0.5, 0.5]]))
    assert all(s.loss is None for s in run(Recipe.released(num_inference_steps=3), spans=None))
    early = run(Recipe.released(num_inference_steps=4, last_guided_step=1))
    assert [s.loss is None for s in early] == [False, False, True, True]


def test_one_view():
    for state in stage1((0, 1), views=[Flip(True)], spans=[(0, 2)]):
        assert torch.equal(state.weights, torch.ones(2, 1))
        assert torch.equal(state.scale, torch.ones(2))
        assert state.loss is None


def test_three_views_and_other_sizes():
    views = [Flip(False), Flip(True), Flip(False)]
    for size, resolution in ((32, 16), (40, 20), (60, 30), (128, 64)):
        unet = Network()
        states = list(stage1((0,), unet=unet, views=views, spans=[(0, 1), (1, 3), (4, 5)], size=size))
        assert states[-1].x.shape == (1, 3, size, size)
        assert unet.calls[1][4] == resolution


@pytest.mark.parametrize("levels, size, factor", [(2, 14, 2), (3, 20, 4), (4, 24, 8)])
def test_any_size_that_the_networks_depth_allows(levels, size, factor):
    attend = levels - 1
    config = UNetConfig.from_dict(
        {
            **tiny.STAGE_1,
            "block_out_channels": [8, 16, 16, 16][:levels],
            "down_block_types": ["ResnetDownsampleBlock2D"] + attend * ["SimpleCrossAttnDownBlock2D"],
            "up_block_types": attend * ["SimpleCrossAttnUpBlock2D"] + ["ResnetUpsampleBlock2D"],
        }
    )
    unet = UNet(config).requires_grad_(False)
    text, null = torch.randn(2, TOKENS, 16), torch.randn(1, TOKENS, 16)
    states = list(stage1((0,), unet=unet, text=(text, null), size=size))
    assert states[-1].x.shape == (1, 3, size, size)
    assert states[0].loss.isfinite().all()
    with pytest.raises(InputError, match=f"multiples of {factor}"):
        next(stage1((0,), unet=unet, text=(text, null), size=size + factor // 2))


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

    text, null = texts()
    for recipe in (Recipe.released(num_inference_steps=1), Recipe.corrected(num_inference_steps=1)):
        list(
            sample_stage2(
                unet, torch.zeros(1, 3, 64, 64), text, null, VIEWS, score=watch,
                generators=generators(0), recipe=recipe, size=size,
            )
        )  # fmt: skip
    x = rows[0][:2, :3][None]
    small = x if size == 64 else x.unflatten(-2, (64, 2)).unflatten(-1, (64, 2)).mean(dim=(-3, -1))
    assert seen[0][1] == 0
    assert seen[0][0].dtype == torch.float32
    assert torch.allclose(seen[0][0], small / 2 + 0.5, atol=1e-6)
    assert torch.allclose(seen[1][0], small, atol=1e-6)


# A distribution whose score is known


class Gaussian:
    """The exact network of pixels that are independently N(mean, std^2): noise, and the reverse variance."""

    def __init__(self, schedule, mean, std):
        self.schedule, self.mean, self.power = schedule, mean, std**2

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


@pytest.mark.parametrize("steps", [5, 10, 30, 100])
@pytest.mark.parametrize("recipe", [Recipe.plain, Recipe.corrected])
def test_pictures_of_a_known_score_have_its_mean_and_spread(recipe, steps):
    """Exact score and variance: a few steps sample it as well as many (fewer start where it is not noise)."""
    mean, std = 0.15, 0.2
    unet = Gaussian(Schedule.stage_1(steps), mean, std)
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


# Errors


GOOD_TEXT, GOOD_NULL = texts()


@pytest.mark.parametrize(
    "change",
    [
        {"unet": None},
        {"unet": lambda x, t, text: x},  # has no text_maps
        {"text": GOOD_TEXT[0]},
        {"text": GOOD_TEXT[:1]},
        {"text": GOOD_TEXT[None].expand(2, -1, -1, -1)},
        {"text": GOOD_TEXT.long()},
        {"text": GOOD_TEXT * math.nan},
        {"text": "a duck"},
        {"null": GOOD_NULL[0]},
        {"null": GOOD_NULL[:, :3]},
        {"null": GOOD_NULL.expand(2, -1, -1)},
        {"null": None},
        {"views": []},
        {"views": VIEWS[:1]},
        {"views": [*VIEWS, VIEWS[0]]},
        {"views": ["identity", "flip"]},
        {"views": "identity"},
        {"views": None},
        {"score": 0.5},
        {"spans": [(0, 1)]},
        {"spans": [(0, 1), (1, 1)]},
        {"spans": [(0, 1), (1, TOKENS + 1)]},
        {"spans": [(0, 1), (-1, 2)]},
        {"spans": [(0, 1), (1.0, 2)]},
        {"spans": [(0, 1), None]},
        {"spans": [(0, 1), (1, 2, 3)]},
        {"spans": []},
        {"spans": 3},
        {"spans": [[(0, 1), (1, 2)], [(0, 1), (1, 2)]]},
        {"generators": []},
        {"generators": torch.Generator()},
        {"generators": [0]},
        {"generators": None},
        {"generators": [torch.Generator()] * 2},
        {"recipe": None},
        {"recipe": "released"},
        {"size": 0},
        {"size": -64},
        {"size": 64.0},
        {"size": True},
        {"recipe": Recipe.released(map_resolution=1), "size": 32},
        {"schedule": Schedule.stage_1(29)},
        {"schedule": 30},
    ],
)
def test_stage_1_refuses_at_the_call(change):
    """Before any network runs, and before the first step is asked for."""
    unet = Network()
    arguments = {
        "unet": unet,
        "text": GOOD_TEXT,
        "null": GOOD_NULL,
        "views": VIEWS,
        "score": score,
        "spans": SPANS,
    }
    arguments |= {"generators": generators(0), "recipe": Recipe.released()} | change
    places = [arguments.pop(name) for name in ("unet", "text", "null", "views")]
    with pytest.raises(InputError):
        sample_stage1(*places, **arguments)
    assert unet.calls == []


@pytest.mark.parametrize(
    "change",
    [
        {"low_res": torch.zeros(2, 3, 64, 64)},
        {"low_res": torch.zeros(3, 64, 64)},
        {"low_res": torch.zeros(1, 1, 64, 64)},
        {"low_res": torch.zeros(1, 3, 64, 64, dtype=torch.uint8)},
        {"low_res": torch.full((1, 3, 64, 64), 255.0)},
        {"low_res": torch.full((1, 3, 64, 64), math.nan)},
        {"low_res": None},
        {"noise_level": -1},
        {"noise_level": 1000},
        {"noise_level": 50.0},
        {"noise_level": None},
        {"size": 0},
    ],
)
def test_stage_2_refuses_at_the_call(change):
    with pytest.raises(InputError):
        stage2(**{"low_res": torch.zeros(1, 3, 64, 64), "noise_level": 50} | change)


def test_views_may_refuse_a_size():
    class Picky(Flip):
        def check_size(self, size):
            if size != 64:
                raise InputError(f"size={size}: 64 only")

    stage1(views=[Picky(False), Picky(True)])
    with pytest.raises(InputError, match="64 only"):
        stage1(views=[Picky(False), Picky(True)], size=72)


def test_numbers_that_are_not_finite_name_the_step():
    def overflows(x, t, text, class_labels=None):
        return zeros(x, t, text) + (math.nan if t == 250 else 0.0)

    with pytest.raises(InputError, match=r"step 2 \(t=250\).*float32"):
        list(stage1(unet=overflows, spans=None))
    with pytest.raises(InputError, match=r"step 2 \(t=250\).*nan"):
        list(stage1(scorer=lambda p, t: torch.full(p.shape[:2], math.nan if t == 250 else 0.3)))

    class Steep(Network):
        def text_maps(self, x, t, text, spans, **more):
            maps = super().text_maps(x, t, text, spans, **more)
            return {name: torch.sqrt(m - m.detach()) for name, m in maps.items()}  # of slope 1/0

    with pytest.raises(InputError, match=r"gradient is not finite after step 0 \(t=500\)"):
        list(stage1(unet=Steep()))


def test_results_of_another_shape():
    with pytest.raises(InputError, match=r"\(4, 3, 64, 64\) instead of \(4, 6, 64, 64\)"):
        list(stage1(unet=lambda x, t, text: x, spans=None))
    with pytest.raises(InputError, match="NoneType"):
        list(stage1(unet=lambda x, t, text: None, spans=None))
    with pytest.raises(InputError, match=r"score returned \(1,\)"):
        list(stage1(scorer=lambda p, t: torch.ones(1)))


def test_negative_cosines_give_a_finite_picture():
    for recipe in (Recipe.released(), Recipe.corrected()):
        *_, last = stage1(scorer=lambda p, t: p.new_tensor([[-0.3, 0.2]]), spans=None, recipe=recipe)
        assert torch.isfinite(last.x).all()


def test_stages_agree_on_what_a_run_is():
    """Stage II without a use for its conditioning is stage I's loop under another schedule."""
    unet = Network(6)
    with torch.no_grad():
        unet.mix[:, 3:] = 0
    one = Network()
    with torch.no_grad():
        one.mix.copy_(unet.mix[:, :3])
    recipe = Recipe.plain(num_inference_steps=1)
    a = list(stage1((0,), unet=one, recipe=recipe, schedule=Schedule.stage_2(1)))[-1].x
    b = list(stage2(torch.zeros(1, 3, 64, 64), (0,), unet=unet, recipe=recipe, size=64))[-1].x
    assert relative(a, b) < 1e-6
