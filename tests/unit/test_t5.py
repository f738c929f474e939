"""The T5 encoder's config, names, sizes and refusals; its numbers are tests/parity's."""

import dataclasses

import pytest
import torch

from mtl_anagram.errors import ConfigError, InputError
from mtl_anagram.models.t5 import T5Encoder
from mtl_anagram.models.t5_config import T5Config

CONFIG = {
    "vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2,
    "feed_forward_proj": "gated-gelu", "model_type": "t5",
}  # fmt: skip


def test_xxl_has_the_published_names_and_sizes():
    config = T5Config.from_dict(
        {**CONFIG, "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24,
         "num_heads": 64, "dense_act_fn": "gelu_new", "is_gated_act": True, "torch_dtype": "float16",
         "_name_or_path": "./", "output_past": True, "transformers_version": "4.28.0.dev0"}
    )  # fmt: skip
    with torch.device("meta"):
        model = T5Encoder(config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert len(shapes) == 219
    assert sum(parameter.numel() for parameter in model.parameters()) == 4_762_310_656
    assert shapes["shared.weight"] == (32128, 4096)
    assert shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] == (32, 64)
    assert shapes["encoder.block.23.layer.1.DenseReluDense.wi_1.weight"] == (10240, 4096)
    assert shapes["encoder.block.23.layer.1.DenseReluDense.wo.weight"] == (4096, 10240)
    assert sum("relative_attention_bias" in name for name in shapes) == 1


@pytest.mark.parametrize(
    "change, match",
    [
        ({"feed_forward_proj": "relu"}, "feed_forward_proj='relu'"),
        ({"dense_act_fn": "gelu"}, "dense_act_fn='gelu'"),
        ({"is_gated_act": 1}, "is_gated_act=1"),
        ({"model_type": "mt5"}, "model_type='mt5'"),
        ({"d_model": 0}, "d_model=0"),
        ({"d_model": True}, "d_model=True"),
        ({"num_heads": 2.0}, "num_heads=2.0"),
        ({"d_kv": "64"}, "d_kv='64'"),
        ({"vocab_size": None}, "vocab_size=None"),
        ({"d_ff": 1 << 40}, "d_ff="),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon=nan"),
        ({"layer_norm_epsilon": "small"}, "layer_norm_epsilon='small'"),
        ({"relative_attention_num_buckets": 7}, "relative_attention_num_buckets=7"),
        ({"relative_attention_max_distance": 8}, "relative_attention_max_distance=8"),
        ({"num_layer": 3}, "did you mean 'num_layers'"),
        ({"rotary": True}, "unknown config field 'rotary'"),
    ],
)
def test_config_refuses_and_names(change, match):
    with pytest.raises(ConfigError, match=match):
        T5Config.from_dict({**CONFIG, **change})


@pytest.mark.parametrize("name", ["vocab_size", "num_heads", "feed_forward_proj"])
def test_config_names_what_is_missing(name):
    with pytest.raises(ConfigError, match=f"lacks {name}"):
        T5Config.from_dict({key: value for key, value in CONFIG.items() if key != name})


def test_config_is_an_object_and_frozen():
    with pytest.raises(ConfigError, match="not list"):
        T5Config.from_dict([])
    config = T5Config.from_dict(CONFIG)
    assert T5Config.from_dict(config.to_dict()) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.d_model = 3


@pytest.mark.parametrize(
    "ids, mask, match",
    [
        ([[1, 2]], None, "not list"),
        (torch.ones(1, 2), None, "not torch.float32"),
        (torch.tensor([1, 2]), None, "must be"),
        (torch.zeros(1, 0, dtype=torch.long), None, "at least 1"),
        (torch.tensor([[1, 20]]), None, "vocabulary has 20"),
        (torch.tensor([[-1, 2]]), None, "from -1"),
        (torch.tensor([[1, 2]]), torch.ones(1, 3, dtype=torch.long), "ids' shape"),
        (torch.tensor([[1, 2]]), torch.ones(1, 2), "not torch.float32"),
    ],
)
def test_ids_and_mask_are_checked(ids, mask, match):
    with pytest.raises(InputError, match=match):
        T5Encoder(T5Config.from_dict(CONFIG))(ids, mask)


def test_every_parameter_learns_and_no_row_is_nan():
    torch.manual_seed(0)
    model = T5Encoder(T5Config.from_dict(CONFIG))
    ids = torch.randint(0, 20, (2, 5))
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])  # even a row of nothing but padding
    states = model(ids, mask)
    assert torch.isfinite(states).all()
    states.square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
