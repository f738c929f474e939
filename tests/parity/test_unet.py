"""Our UNet against diffusers' on tiny random models: predictions, recorded attention, gradients."""

import json

import pytest
import torch

from mtl_anagram.errors import InputError
from mtl_anagram.models import load_unet
from mtl_anagram.models.configs import UNetConfig
from mtl_anagram.models.unet import UNet
from tests.helpers import relative
from tests.parity.references import STAGE_1, STAGE_2, unet
from tests.parity.test_trajectory import ReadableAttention


def ours_of(reference):
    ours = UNet(UNetConfig.from_dict(dict(reference.config))).eval().requires_grad_(False)
    ours.load_state_dict(reference.state_dict(), strict=True)
    return ours


SHAPES = {
    "stage 1": (STAGE_1, {}),
    "stage 1, two layers": (STAGE_1, {"layers_per_block": 2}),
    "stage 1, three layers, other widths": (
        STAGE_1,
        {"layers_per_block": 3, "block_out_channels": [32, 64, 96, 128], "attention_head_dim": 32},
    ),
    "stage 1, 32 groups": (STAGE_1, {"block_out_channels": [32, 64, 64, 96], "norm_num_groups": 32}),
    "stage 1, wide": (STAGE_1, {"block_out_channels": [160, 160, 64, 96], "norm_num_groups": 32}),
    "stage 1, three levels": (
        STAGE_1,
        {
            "block_out_channels": [32, 48, 64],
            "down_block_types": ["ResnetDownsampleBlock2D"] + 2 * ["SimpleCrossAttnDownBlock2D"],
            "up_block_types": 2 * ["SimpleCrossAttnUpBlock2D"] + ["ResnetUpsampleBlock2D"],
        },
    ),
    "stage 2": (STAGE_2, {}),
    "stage 2, other layers": (STAGE_2, {"layers_per_block": [2, 1, 1, 3, 2], "time_embedding_dim": 96}),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [1, 9, 77])
def test_prediction_equals_the_reference(shape, tokens):
    config, changes = SHAPES[shape]
    reference = unet(config, **changes)
    ours = ours_of(reference)
    stage_2 = reference.config.in_channels == 6
    x, text = torch.randn(3, reference.config.in_channels, 32, 32), torch.randn(3, tokens, 32)
    text[1, tokens // 2 :] = text[1, -1]  # padded rows are equal rows
    t = torch.tensor([957, 500, 0])
    labels = torch.tensor([50, 0, 999]) if stage_2 else None
    with torch.no_grad():
        theirs = reference(x, t, text, class_labels=labels).sample
        assert relative(ours(x, t, text, labels), theirs) < 1e-5
        assert relative(ours(x, t, ours.prepare(text), labels), theirs) < 1e-5


def test_one_time_and_one_noise_level_serve_all_rows():
    reference = unet(STAGE_2)
    ours = ours_of(reference)
    x, text = torch.randn(2, 6, 32, 32), torch.randn(2, 5, 32)
    with torch.no_grad():
        theirs = reference(x, 400, text, class_labels=torch.tensor([50, 50])).sample
        assert relative(ours(x, 400, text, 50), theirs) < 1e-5


def stored_maps(reference):
    """Where the reference's attention, written plainly, keeps every softmax by its layer's name."""
    store = {}
    names = [name.removesuffix(".processor") for name in reference.attn_processors]
    reference.set_attn_processor({f"{name}.processor": ReadableAttention(store, name) for name in names})
    return store


@pytest.mark.parametrize(
    "config, size, resolution, places",
    [
        (STAGE_1, 32, 16, ("down", "up")),
        (STAGE_1, 64, 32, ("down", "up")),
        (STAGE_1, 32, 4, ("down", "mid", "up")),
        (STAGE_1, 32, 8, ("down",)),
        (STAGE_1, 32, 16, ("down_blocks.1.attentions.0", "up_blocks.2")),
        (STAGE_2, 64, 8, ("up",)),
        (STAGE_2, 64, 4, ("mid",)),
    ],
)
def test_recorded_maps_equal_the_reference_softmax_columns(config, size, resolution, places):
    reference = unet(config)
    ours = ours_of(reference)
    store = stored_maps(reference)
    x, text = torch.randn(2, reference.config.in_channels, size, size), torch.randn(2, 11, 32)
    labels = torch.tensor([50, 50]) if reference.config.in_channels == 6 else None
    spans = [(3, 5), (0, 4)]
    options = {"resolution": resolution, "places": places}
    with torch.no_grad():
        theirs = reference(x, 300, text, class_labels=labels).sample
        maps = ours.text_maps(x, 300, text, spans, labels, **options)
        prediction = ours(x, 300, text, labels)
        context = ours.prepare(text)
        again = ours.text_maps(x, 300, context, context.columns(spans), labels, **options)
    assert relative(prediction, theirs) < 1e-5
    wanted = {n for n, kept in store.items() if kept.shape[2] == resolution**2 and n.startswith(places)}
    assert wanted
    assert set(maps) == set(again) == wanted
    for name, columns in maps.items():
        assert torch.equal(columns, again[name])
        for row, (start, stop) in enumerate(spans):
            expected = store[name][row, :, :, start:stop].unflatten(1, (resolution, resolution))
            assert relative(columns[row, ..., : stop - start], expected) < 1e-5
            assert not columns[row, ..., stop - start :].any()


def test_gradient_of_maps_equals_autograd_through_the_reference():
    reference = unet(STAGE_1)
    ours = ours_of(reference).requires_grad_(True)
    store = stored_maps(reference)
    x, text = torch.randn(2, 3, 32, 32), torch.randn(2, 7, 32)

    def loss(maps):
        return sum((columns**2).sum() for columns in maps)

    theirs = x.clone().requires_grad_()
    reference(theirs, 300, text)
    chosen = [kept for n, kept in store.items() if kept.shape[2] == 256 and n.startswith(("down", "up"))]
    (expected,) = torch.autograd.grad(loss(kept[..., 2:4] for kept in chosen), theirs)
    mine = x.clone().requires_grad_()
    maps = ours.text_maps(mine, 300, text, (2, 4), resolution=16)
    (gradient,) = torch.autograd.grad(loss(maps.values()), mine)
    assert relative(gradient, expected) < 1e-5
    assert all(parameter.grad is None for parameter in ours.parameters())


@pytest.mark.parametrize("places", ["down", ["side"], [""], ["down", "up_blocks.9"]])
def test_places_that_are_none(places):
    ours, x, text = ours_of(unet(STAGE_1)), torch.zeros(1, 3, 32, 32), torch.zeros(1, 7, 32)
    with pytest.raises(InputError, match="place"):
        ours.text_maps(x, 300, text, (2, 4), resolution=16, places=places)


def test_maps_stop_after_the_last_layer_needed():
    ours = ours_of(unet(STAGE_1))
    ran = []
    for name, module in ours.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    x, text = torch.randn(1, 3, 32, 32), torch.randn(1, 7, 32)
    ours.text_maps(x, 300, text, (2, 4), resolution=16)
    assert "up_blocks.2.attentions.1" in ran
    assert not any(name.startswith(("up_blocks.3", "conv_out", "up_blocks.2.upsamplers")) for name in ran)


def test_folder_written_by_the_reference_loads_whole_and_sharded_and_as_a_variant(tmp_path):
    reference = unet(STAGE_1)
    reference.save_pretrained(tmp_path / "whole" / "unet")
    reference.save_pretrained(tmp_path / "sharded" / "unet", max_shard_size="200KB")
    reference.save_pretrained(tmp_path / "variant" / "unet", variant="fp16")
    reference.save_pretrained(tmp_path / "both" / "unet", variant="fp16", max_shard_size="200KB")
    assert len(list((tmp_path / "sharded" / "unet").glob("*.safetensors"))) > 2
    x, text = torch.randn(1, 3, 32, 32), torch.randn(1, 7, 32)
    expected = reference(x, 300, text).sample
    for folder, variant in (("whole", None), ("sharded", None), ("variant", "fp16"), ("both", "fp16")):
        assert relative(load_unet(tmp_path / folder, variant=variant)(x, 300, text), expected) < 1e-5
    assert relative(load_unet(tmp_path / "whole" / "unet", subfolder=None)(x, 300, text), expected) < 1e-5


def test_config_round_trip_is_a_config_the_reference_reads():
    for config in (STAGE_1, STAGE_2):
        ours = UNetConfig.from_dict(dict(unet(config).config))
        written = json.loads(json.dumps(ours.to_dict()))
        assert UNetConfig.from_dict(written) == ours
        with torch.device("meta"):
            again = UNet(ours)
        names = {name: tuple(value.shape) for name, value in unet(written).state_dict().items()}
        assert {name: tuple(value.shape) for name, value in again.state_dict().items()} == names
