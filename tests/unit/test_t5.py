"""The T5 encoder's config, names, sizes and refusals; its numbers are tests/parity's."""

import pytest
import torch

from mtl_anagram.errors import ConfigError, InputError
from mtl_anagram.models.t5 import T5Config, T5Encoder
from tests.helpers import facts

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
        assert facts(T5Encoder(config)) == (219, 4_762_310_656, "62c306522b62d0ff")


@pytest.mark.parametrize(
    "change, match",
    [
        ({"is_gated_act": 1}, "is_gated_act=1"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon=nan"),
        ({"relative_attention_max_distance": 8}, "relative_attention_max_distance=8"),
    ],
)
def test_config_refuses_and_names(change, match):
    with pytest.raises(ConfigError, match=match):
        T5Config.from_dict({**CONFIG, **change})


@pytest.mark.parametrize(
    "ids, mask, match",
    [
        ([[1, 2]], None, "list: give tensors of integers"),
        (torch.ones(1, 2), None, "float32"),
        (torch.tensor([[1, 20]]), None, "to 20.*vocabulary has 20"),
        (torch.tensor([[1, 2]]), torch.ones(1, 3, dtype=torch.long), r"\(1, 3\)"),
    ],
)
def test_ids_and_mask_are_checked(ids, mask, match):
    with pytest.raises(InputError, match=match):
        T5Encoder(T5Config.from_dict(CONFIG))(ids, mask)


def test_a_row_of_nothing_but_padding_is_not_nan():
    model = T5Encoder(T5Config.from_dict(CONFIG))
    states = model(torch.randint(0, 20, (2, 5)), torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0]]))
    assert torch.isfinite(states).all()
    states.square().mean().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
