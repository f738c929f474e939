"""The streamed T5 encoder against transformers', on folders that transformers writes."""

import pytest
import torch

from mtl_anagram.models import StreamedT5Encoder, load_t5
from tests.helpers import relative
from tests.parity.test_t5 import SIZES, batch, pair


@pytest.mark.parametrize("shard", ["1GB", "5KB"])
@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_states_equal_the_references_and_the_whole_encoders(tmp_path, size, shard):
    _, reference = pair(size)
    reference.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "5KB")
    whole = load_t5(tmp_path)
    streamed = load_t5(tmp_path, streamed=True)
    assert isinstance(streamed, StreamedT5Encoder)
    for length in (1, 7, 77, 150):
        ids, mask = batch(length)
        for given in (None, mask, mask.bool()):
            expected = reference(input_ids=ids, attention_mask=given).last_hidden_state
            states = streamed(ids, given)
            assert states.dtype == torch.float32
            assert relative(states, expected) <= 1e-5
            assert relative(states, whole(ids, given)) <= 1e-6


@torch.no_grad()
def test_a_sharded_fp16_variant_as_transformers_writes_it(tmp_path):
    """Mixed as the published one: transformers keeps wo in float32 when it loads T5 in half precision."""
    _, reference = pair("heads wider than d_model")
    for name, parameter in reference.named_parameters():
        if not name.endswith("wo.weight"):
            parameter.data = parameter.data.half()
    reference.save_pretrained(tmp_path, max_shard_size="5KB", variant="fp16")
    assert (tmp_path / "model.safetensors.index.fp16.json").is_file()
    ids, mask = batch(20)
    expected = reference.float()(input_ids=ids, attention_mask=mask).last_hidden_state
    assert relative(load_t5(tmp_path, variant="fp16", streamed=True)(ids, mask), expected) <= 1e-5
    near = load_t5(tmp_path, variant="fp16", streamed=True, dtype="bfloat16")(ids, mask)
    assert near.dtype == torch.bfloat16
    assert relative(near.float(), expected) <= 0.08


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_on_cuda(tmp_path):
    _, reference = pair("heads wider than d_model")
    reference.save_pretrained(tmp_path, max_shard_size="5KB")
    streamed = load_t5(tmp_path, streamed=True, dtype="float32", device="cuda")
    for length in (7, 77, 150):
        ids, mask = batch(length)
        expected = reference(input_ids=ids, attention_mask=mask).last_hidden_state
        for _ in range(3):
            assert relative(streamed(ids.cuda(), mask.cuda()).cpu(), expected) <= 1e-4
    assert load_t5(tmp_path, streamed=True, device="cuda").dtype == torch.bfloat16
