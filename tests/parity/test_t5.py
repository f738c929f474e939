"""The T5 encoder against transformers' on tiny random models."""

import json

import pytest
import torch
from transformers import T5Config as ReferenceConfig
from transformers import T5EncoderModel

from mtl_anagram.errors import ConfigError
from mtl_anagram.models.t5 import T5Config, T5Encoder, position_buckets
from tests.helpers import relative

SIZES = {
    "heads times d_kv = d_model": {"d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 40, "num_layers": 3},
    "heads wider than d_model": {"d_model": 24, "d_kv": 16, "num_heads": 3, "d_ff": 50, "num_layers": 2},
    "few buckets, near": {
        "d_model": 16, "d_kv": 8, "num_heads": 1, "d_ff": 24, "num_layers": 1,
        "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20,
        "layer_norm_epsilon": 1e-3,
    },
}  # fmt: skip


def pair(size: str) -> tuple[T5Encoder, T5EncoderModel]:
    """Ours on the meta device filled with the reference's weights, and the reference."""
    torch.manual_seed(0)
    config = ReferenceConfig(vocab_size=60, feed_forward_proj="gated-gelu", **SIZES[size])
    reference = T5EncoderModel(config).eval()
    for parameter in reference.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # norms away from 1, biases from each other
    with torch.device("meta"):
        ours = T5Encoder(T5Config.from_dict(json.loads(config.to_json_string())))
    state = {name: value for name, value in reference.state_dict().items() if "embed_tokens" not in name}
    ours.load_state_dict(state, strict=True, assign=True)
    return ours, reference


def batch(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows of ids, the second one half padding."""
    ids = torch.randint(2, 60, (2, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, (length + 1) // 2 :] = 0
    return ids * mask, mask


@pytest.mark.parametrize("length", [1, 7, 77, 150])
@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_states_equal_the_reference(size, length):
    ours, reference = pair(size)
    ids, mask = batch(length)
    for given in (None, mask, mask.bool()):
        expected = reference(input_ids=ids, attention_mask=given).last_hidden_state
        assert relative(ours(ids, given), expected) <= 1e-5


def test_gradients_equal_the_reference():
    ours, reference = pair("heads wider than d_model")
    ours.requires_grad_(True)
    ids, mask = batch(9)
    probe = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(1))
    (ours(ids, mask) * probe).sum().backward()
    reference.zero_grad()
    (reference(input_ids=ids, attention_mask=mask).last_hidden_state * probe).sum().backward()
    expected = dict(reference.named_parameters())
    for name, parameter in ours.named_parameters():
        assert relative(parameter.grad, expected[name].grad) <= 1e-4, name


@torch.no_grad()
def test_padding_of_the_null_prompt_gives_identical_rows():
    ours, reference = pair("heads times d_kv = d_model")
    ids, mask = torch.zeros(1, 77, dtype=torch.long), torch.zeros(1, 77, dtype=torch.long)
    ids[0, 0] = mask[0, 0] = 1
    states = ours(ids, mask)[0]
    assert relative(states[1:], states[1:2].expand(76, -1)) <= 1e-6
    assert relative(states[:1], states[1:2]) > 1e-2
    assert relative(ours(ids)[0, 1], ours(ids)[0, 2]) > 1e-3  # without the mask they differ
    assert relative(states, reference(input_ids=ids, attention_mask=mask).last_hidden_state[0]) <= 1e-5


def test_buckets_equal_the_reference_at_every_distance():
    from transformers.models.t5.modeling_t5 import T5Attention

    for buckets, distance in ((32, 128), (8, 20), (16, 64)):
        positions = torch.arange(300)
        expected = T5Attention._relative_position_bucket(
            positions[None] - positions[:, None], num_buckets=buckets, max_distance=distance
        )
        assert torch.equal(position_buckets(300, buckets, distance), expected)


@pytest.mark.parametrize("wo_in_float32", [True, False])
@torch.no_grad()
def test_half_precision_stays_finite_where_sums_leave_its_range(wo_in_float32):
    ours, _ = pair("heads times d_kv = d_model")
    ids, mask = batch(12)
    peaks = []
    for feed_forward in (block.layer[1].DenseReluDense for block in ours.encoder.block):
        feed_forward.wi_0.weight *= 60
        feed_forward.wi_1.weight *= 60
        feed_forward.wo.weight *= 20
        feed_forward.register_forward_hook(lambda module, inputs, output: peaks.append(output.abs().max()))
    expected = ours(ids, mask)
    assert peaks[0] > 65504  # more than half precision can hold
    for name, parameter in ours.named_parameters():
        if not (wo_in_float32 and name.endswith(".wo.weight")):
            parameter.data = parameter.data.half()
    states = ours(ids, mask)
    assert states.dtype == torch.float16
    assert torch.isfinite(states).all()
    assert relative(states.float(), expected) < 0.03


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_is_near_float32(dtype):
    ours, _ = pair("heads wider than d_model")
    ids, mask = batch(20)
    expected = ours(ids, mask)
    states = ours.to(dtype)(ids, mask)
    assert states.dtype == dtype
    assert relative(states.float(), expected) < {torch.float16: 0.01, torch.bfloat16: 0.08}[dtype]


def test_our_config_file_is_read_by_the_reference_and_back(tmp_path):
    ours = T5Config.from_dict(ReferenceConfig(feed_forward_proj="gated-gelu", d_kv=16).to_dict())
    (tmp_path / "config.json").write_text(json.dumps(ours.to_dict()))
    theirs = ReferenceConfig.from_pretrained(tmp_path)
    assert T5Config.from_dict(theirs.to_dict()) == ours
    small = {**ours.to_dict(), "num_layers": 1, "d_model": 8, "d_ff": 8}
    reference = T5EncoderModel(ReferenceConfig(**small))
    assert reference.encoder.block[0].layer[1].DenseReluDense.wi_1.weight.shape == (8, 8)


def test_the_v1_0_config_is_refused():
    with pytest.raises(ConfigError, match="feed_forward_proj='relu'"):
        T5Config.from_dict(ReferenceConfig().to_dict())
