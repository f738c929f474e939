"""A UNet's config: what it accepts, refuses and fills in; the released models' names and sizes."""

import pytest
import torch

from mtl_anagram.errors import ConfigError, InputError
from mtl_anagram.models.configs import FIXED, UNetConfig
from mtl_anagram.models.unet import UNet
from tests.helpers import facts
from tests.unit.tiny import STAGE_1, STAGE_2

# block_out_channels, layers_per_block, cross dim, and the published files' facts
RELEASED = {
    "IF-I-M": ([192, 384, 576, 768], 3, 768, 775, 371_605_830, "dbcff754abc312b0"),
    "IF-I-L": ([320, 640, 960, 1280], 3, 1280, 775, 935_365_830, "8ac78ca7eade5450"),
    "IF-I-XL": ([704, 1408, 2112, 2816], 3, 2816, 775, 4_304_695_110, "80c7e421cc9c1f3d"),
    "IF-II-M": ([128, 256, 512, 768, 768], [2, 2, 3, 4, 2], 768, 721, 461_064_198, "7c1ed44b82eea23f"),
    "IF-II-L": ([160, 320, 640, 960, 1280], [2, 2, 3, 5, 5], 1280, 939, 1_243_277_190, "350659213c9a2bff"),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_sizes_on_the_meta_device(name):
    widths, layers, cross, *expected = RELEASED[name]
    config = {
        **(STAGE_2 if "II" in name else STAGE_1), "block_out_channels": widths, "layers_per_block": layers,
        "cross_attention_dim": cross, "encoder_hid_dim": 4096, "attention_head_dim": 64,
        "addition_embed_type_num_heads": 64, "norm_num_groups": 32, "encoder_hid_dim_type": None,  # text_proj
        "time_embedding_dim": cross if "II" in name else None,
    }  # fmt: skip
    with torch.device("meta"):
        assert facts(UNet(UNetConfig.from_dict(config))) == tuple(expected)


@pytest.mark.parametrize("name", FIXED)
def test_every_other_value_of_a_fixed_field_is_refused_by_name(name):
    with pytest.raises(ConfigError, match=name):
        UNetConfig.from_dict({**STAGE_1, name: "something else"})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"class_labels_dim": 1}, "'class_labels_dim' = 1.*remove it"),
        ({"act_fun": "gelu"}, "'act_fun'.*did you mean 'act_fn'"),
        ({"block_out_channels": [8, 16, 16, 12.5]}, r"block_out_channels\[3\]=12.5"),
        ({"block_out_channels": [8, 16, 16, 18]}, "does not divide"),
        ({"layers_per_block": [1, 1]}, "layers_per_block has 2.*one per level"),
        ({"attention_head_dim": 7}, "attention_head_dim=7 does not divide"),
        ({"addition_embed_type_num_heads": 3}, "does not divide encoder_hid_dim"),
        ({"down_block_types": 4 * ["CrossAttnDownBlock2D"]}, "CrossAttnDown.*SimpleCrossAttnDownBlock2D"),
    ],
)
def test_bad_values_are_refused_with_field_and_remedy(changes, message):
    with pytest.raises(ConfigError, match=message):
        UNetConfig.from_dict({**STAGE_1, **changes})


@pytest.mark.parametrize(
    "shape, text, labels, message",
    [
        ((2, 6, 16, 16), (2, 5, 16), None, "expected \\(rows, 3, H, W\\)"),
        ((2, 3, 20, 16), (2, 5, 16), None, "multiples of 8"),
        ((2, 3, 16, 16), (1, 5, 16), None, "one per picture"),
        ((2, 3, 16, 16), (2, 5, 12), None, "text encoder"),
        ((2, 3, 16, 16), (2, 5, 16), 50, "a stage I has none"),
    ],
)
def test_bad_inputs_of_a_call(shape, text, labels, message):
    unet = UNet(UNetConfig.from_dict(STAGE_1))
    with pytest.raises(InputError, match=message):
        unet(torch.zeros(shape), 1, torch.zeros(text), labels)


def test_stage_two_wants_a_noise_level_and_maps_say_what_there_is():
    unet = UNet(UNetConfig.from_dict(STAGE_2))
    with pytest.raises(InputError, match="class_labels"):
        unet(torch.zeros(1, 6, 16, 16), 1, torch.zeros(1, 5, 16))
    with pytest.raises(InputError, match=r"ask for one of \[1, 2\]"):
        unet.text_maps(torch.zeros(1, 6, 16, 16), 1, torch.zeros(1, 5, 16), (0, 1), 50, resolution=32)
    with pytest.raises(InputError, match="0 <= start < stop <= 5"):
        unet.text_maps(torch.zeros(1, 6, 16, 16), 1, torch.zeros(1, 5, 16), (3, 6), 50, resolution=2)
