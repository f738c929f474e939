"""Stage III's loop: what the views do in it, which of them are exact on latents, what it refuses."""

import pytest
import torch
import torch.nn.functional as F

from mtl_anagram.errors import ConfigError, InputError
from mtl_anagram.models.upscaler import AutoencoderConfig, LatentDecoder, LatentEncoder
from mtl_anagram.sampling import LatentSchedule, NoiseLevels, Recipe, UpscaleRecipe, ddim_step, sample_stage3
from mtl_anagram.views import get_views
from mtl_anagram.views.registry import KINDS
from tests.helpers import relative
from tests.unit.tiny_upscaler import DDIM, LOW_RES, VAE_X4


class Toy:
    """An odd network of each pixel and its right and lower neighbours: no view leaves it as it is."""

    def __init__(self, *, pointwise=False):
        self.pointwise = pointwise
        self.calls = []

    def __call__(self, x, t, text, class_labels):
        self.calls.append((x, t, text, class_labels))
        latents, picture = x[:, :-3], x[:, -3:]
        near = (
            latents if self.pointwise else latents + 0.5 * x[:, :-3].roll(1, -1) - 0.3 * latents.roll(1, -2)
        )
        color = picture.mean(dim=1, keepdim=True) * (1 + 0 * near)
        return torch.tanh(near * text.mean(dim=(1, 2))[:, None, None, None] + color) * (0.5 + t / 2000)


def decode(z):
    """Latents of three channels, enlarged: commutes with whole turns and mirrors, and with signs."""
    return 0.5 * F.interpolate(z, scale_factor=4.0)


def encode(x):
    return 2.0 * F.avg_pool2d(x, 4)


def run(views, *, unet=None, size=8, seeds=(0, 1), low_res=None, channels=3, texts=None, **changes):
    views = get_views(views)
    arguments = {
        "decode": decode,
        "encode": encode,
        "generators": [torch.Generator().manual_seed(seed) for seed in seeds],
        "channels": channels,
        "upscale": UpscaleRecipe(num_inference_steps=5, guidance_scale=3.0),
        "recipe": Recipe.released(),
    }
    if low_res is None:
        low_res = torch.rand(len(seeds), 3, size, size, generator=torch.Generator().manual_seed(5)) * 2 - 1
    if texts is None:
        texts = torch.randn(len(views), 4, 6, generator=torch.Generator().manual_seed(6))
    null = torch.zeros(1, 4, 6)
    return list(sample_stage3(unet or Toy(), low_res, texts, null, views, **{**arguments, **changes}))


def upscale(views, **changes):
    return UpscaleRecipe(**{"num_inference_steps": 5, "guidance_scale": 3.0, "views": views, **changes})


def scores(pictures, t):
    assert t == 0
    assert pictures.shape[2:] == (3, 64, 64)
    return 0.2 + pictures[:, :, 0, 3, 5].abs()


def test_states_and_the_draws():
    generators = [torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)]
    unet = Toy()
    states = run(["identity", "flip"], unet=unet, generators=generators)
    assert [state.index for state in states] == [0, 1, 2, 3, 4]
    assert [state.timestep for state in states] == [801, 601, 401, 201, 1]
    assert all(state.x.shape == (2, 1, 3, 8, 8) for state in states)
    assert states[-1].picture.shape == (2, 3, 32, 32)
    assert states[-1].picture.abs().max() <= 1
    assert states[0].weights.tolist() == [[1, 0], [1, 0]]
    own = torch.Generator().manual_seed(1)
    noise, latents = torch.randn(3, 8, 8, generator=own), torch.randn(3, 8, 8, generator=own)
    assert torch.equal(own.get_state(), generators[1].get_state())
    x, t, text, level = unet.calls[1]  # the second image's first step
    assert (t, level) == (801, 0)
    assert torch.equal(x[0, :3], latents)
    assert torch.equal(x[0], x[1])
    low_res = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(5)) * 2 - 1
    assert torch.equal(x[0, 3:], NoiseLevels().add_noise(low_res[1], noise, 0))
    assert not text[0].any()


def test_a_picture_without_negative_values_is_not_rescaled():
    unet = Toy()
    bright = torch.full((1, 3, 8, 8), 0.75)
    with pytest.warns(UserWarning, match=r"\[0, 1\]"):
        run(["identity"], unet=unet, seeds=(0,), low_res=bright, upscale=upscale("first", noise_level=0))
    assert abs(unet.calls[0][0][0, 3:].mean().item() - 0.75) < 0.01


def test_published_mode_leaves_views_and_other_texts_alone():
    texts = torch.randn(2, 4, 6)
    ours = run(["rotate_cw", "negate"], texts=texts, encode=None)[-1].picture
    assert torch.equal(ours, run(["identity"], texts=texts[:1])[-1].picture)


@pytest.mark.parametrize("mode", ["first", "all", "all_latents"])
def test_an_image_is_what_it_is_alone(mode):
    options = {"upscale": upscale(mode), "score": scores}
    low_res = torch.rand(2, 3, 8, 8) * 2 - 1
    both = run(["identity", "rotate_cw"], low_res=low_res, **options)
    alone = run(["identity", "rotate_cw"], low_res=low_res[1:], seeds=(1,), **options)
    for together, one in zip(both, alone, strict=True):
        assert torch.equal(together.x[1:], one.x)
        assert torch.equal(together.scale[1:], one.scale)
    assert torch.equal(both[-1].picture[1:], alone[-1].picture)


@pytest.fixture(scope="module")
def autoencoder():
    """A random decoder and an encoder that is not at all its inverse, 4 px per latent, as run takes them."""
    torch.manual_seed(0)
    config = AutoencoderConfig.from_dict(VAE_X4)
    decoder, encoder = LatentDecoder(config), LatentEncoder(config)
    return {"decode": decoder.picture, "encode": encoder.latents, "channels": 4}


@pytest.mark.parametrize("mode", ["all", "all_latents"])
def test_one_view_alone_is_the_published_sampling_exactly(autoencoder, mode):
    published = run(["identity"], **autoencoder)
    ours = run(["identity"], upscale=upscale(mode), **autoencoder)
    assert torch.equal(ours[-1].picture, published[-1].picture)
    assert torch.equal(ours[-1].x, published[-1].x)


@pytest.mark.parametrize("mode", ["all", "all_latents"])
def test_views_that_agree_change_nothing_whatever_the_autoencoder(autoencoder, mode):
    texts, changes = torch.randn(1, 4, 6), {"upscale": upscale(mode), "recipe": Recipe.corrected()}
    published = run(["identity"], texts=texts, **autoencoder)[-1].picture
    ours = run(["identity"] * 3, texts=texts.repeat(3, 1, 1), **changes, **autoencoder)
    assert relative(ours[-1].picture, published) < 1e-4
    assert torch.allclose(ours[-1].scale, torch.ones(2), atol=1e-5)


RIGID = ["rotate_cw", "flip", "rotate_180", "rotate_ccw"]


@pytest.mark.parametrize("view", RIGID)
@pytest.mark.parametrize(
    "recipe", [Recipe.released(), Recipe.corrected(), Recipe.released(rectification=False), Recipe.plain()]
)
def test_both_ways_agree_where_the_decoder_is_blind_to_the_view(view, recipe):
    views = ["identity", view, "flip"]
    options = {"recipe": recipe, "score": scores}
    pixels = run(views, upscale=upscale("all"), **options)
    latents = run(views, upscale=upscale("all_latents"), **options)
    for one, other in zip(pixels, latents, strict=True):
        assert relative(one.scale, other.scale) < 1e-4
        assert torch.equal(one.weights, other.weights)
        assert relative(one.x[:, 0], other.x[:, 0]) < 1e-4
    assert relative(pixels[-1].picture, latents[-1].picture) < 1e-4
    scaled = recipe.rectification
    assert ((pixels[2].scale - 1).abs().min() > 1e-4) == scaled
    assert (pixels[0].weights.std() > 0.01) == recipe.balancing
    published = run(views, **options)[-1].picture
    assert relative(latents[-1].picture, published) > 0.02  # the other views had their say


MOVING = [kind.name for kind in KINDS if kind.reduce == "mean" and kind.name not in ("negate", "permutation")]


@pytest.mark.parametrize("name", MOVING)
def test_every_permutation_is_exact_in_the_algebra_on_latents(name):
    """With a network that treats each pixel alone, the view's way in and out cancels, to the last bit."""
    options = {"unet": Toy(pointwise=True), "size": 64, "seeds": (0,)}
    texts = torch.randn(1, 4, 6)
    published = run(["identity"], texts=texts, **options)[-1]
    ours = run([name], texts=texts, upscale=upscale("all_latents"), **options)[-1]
    assert torch.equal(ours.x, published.x)


@pytest.mark.parametrize("name", [*RIGID, "patch_permute", "inner_circle"])
def test_which_views_a_decoder_is_blind_to(name):
    """Turns and mirrors if its kernels are; views with cuts not even then; in general none but the identity."""
    torch.manual_seed(0)
    decoder = LatentDecoder(AutoencoderConfig.from_dict(VAE_X4)).requires_grad_(False)
    (view,) = get_views([name], [{"num_patches": 2, "seed": 1}] if name == "patch_permute" else None)
    z = torch.randn(1, 4, 64, 64)

    def gap():
        return relative(decoder(view.view(z)), view.view(decoder(z)))

    assert gap() > 0.05
    for parameter in decoder.parameters():  # every kernel averaged over the square's eight symmetries
        if parameter.ndim == 4:
            turns = [torch.rot90(parameter, k, (2, 3)) for k in range(4)]
            parameter.copy_(sum(turn + turn.flip(-1) for turn in turns) / 8)
    if name in RIGID:
        assert gap() < 1e-5
    else:
        assert gap() > 0.01


def test_negation_is_for_pixels():
    with pytest.raises(InputError, match=r"negate.*changes values.*views=\"all\""):
        run(["identity", "negate"], upscale=upscale("all_latents"))
    with pytest.raises(InputError, match="changes values"):
        run(["rotate_cw+negate"], upscale=upscale("all_latents"))
    # Everything in this toy is odd: seen negated, it is the same sampling with all signs changed.
    texts = torch.randn(1, 4, 6)
    published = run(["identity"], texts=texts)[-1]
    negated = run(["negate"], texts=texts, upscale=upscale("all"))[-1]
    assert torch.equal(negated.x, -published.x)
    assert torch.equal(negated.picture, published.picture)


def test_the_exchange_draws_the_views_together():
    """What the two readers' latents decode to differs less with every exchange than without any."""
    views = get_views(["identity", "rotate_cw"])

    def disagreement(every):
        states = run(
            ["identity", "rotate_cw"],
            upscale=upscale("all", exchange_every=every, num_inference_steps=10),
            recipe=Recipe.plain(),
        )
        seen = [decode(states[-2].x[:, i]) for i in range(2)]
        return (views[0].inverse_view(seen[0]) - views[1].inverse_view(seen[1])).abs().mean()

    assert disagreement(1) < 1e-5  # this toy's decoder is blind to turns: they are one picture
    assert disagreement(4) > 10 * disagreement(1)
    assert disagreement(10) > disagreement(4)


def test_how_often_pictures_are_exchanged():
    calls = []

    def counting(z):
        calls.append(z.shape)
        return decode(z)

    for every, exchanges in ((1, 5), (2, 3), (5, 1), (999, 1)):
        calls.clear()
        unet, often = Toy(), upscale("all", exchange_every=every)
        run(["identity", "flip"], unet=unet, decode=counting, seeds=(0,), upscale=often)
        assert len(calls) == 2 * exchanges + 2
        assert set(calls) == {(1, 3, 8, 8)}  # memory does not grow with images and views
        assert [call[0].shape[0] for call in unet.calls] == [2] * 10


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"low_res": torch.full((2, 3, 8, 8), 1.5)}, r"1.5.*\[-1, 1\]"),
        ({"texts": torch.zeros(2, 4, 7)}, "null has shape"),
        ({"encode": None, "upscale": upscale("all")}, "give encode"),
        ({"decode": None}, "decode=None"),
        ({"upscale": Recipe.released()}, "UpscaleRecipe"),
    ],
)
def test_bad_arguments_are_refused_at_the_call(changes, message):
    with pytest.raises(InputError, match=message):
        run(["identity", "flip"], **changes)


def test_views_that_the_large_size_does_not_suit():
    wide = {"low_res": torch.zeros(2, 3, 8, 16) - 1, "upscale": upscale("all")}
    with pytest.raises(InputError, match=r"\(8, 16\) px.*'rotate_cw'.*square"):
        run(["identity", "rotate_cw"], **wide)
    assert run(["identity", "flip"], **wide)[-1].picture.shape == (2, 3, 32, 64)


def test_what_the_callables_return_is_checked():
    for message, changes in {
        "instead of": {"unet": lambda x, t, text, class_labels: x},
        r"step 0 \(t=801\)": {"unet": lambda x, t, text, class_labels: x[:, :3] * float("nan")},
        "decode returned": {"decode": lambda z: z},
        "decode in float32": {"decode": lambda z: decode(z) * float("inf")},
        "encode returned": {"encode": lambda x: x},
        "score returned": {"score": lambda pictures, t: torch.ones(2)},
    }.items():
        with pytest.raises(InputError, match=message):
            run(["identity", "flip"], upscale=upscale("all"), **changes)


def test_schedules_and_steps_that_are_none():
    assert LatentSchedule(75, set_alpha_to_one=True).alpha_bar(-12) == 1
    with pytest.raises(InputError, match="a step less"):
        LatentSchedule(1000)
    with pytest.raises(InputError, match="none of the schedule's 75 timesteps"):
        ddim_step(torch.zeros(1), torch.zeros(1), 2, LatentSchedule(75))


def test_scheduler_configs_that_are_none():
    with pytest.raises(ConfigError, match="_class_name"):
        LatentSchedule.from_config({**DDIM, "_class_name": "DDPMScheduler"})
    with pytest.raises(ConfigError, match="beta_end"):
        NoiseLevels.from_config({**LOW_RES, "beta_end": 2.0})
    for name in ("prediction_type", "clip_sample", "beta_schedule"):  # a file without it means another
        with pytest.raises(ConfigError, match=f"lacks {name}"):
            LatentSchedule.from_config({key: value for key, value in DDIM.items() if key != name})
