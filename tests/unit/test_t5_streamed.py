"""The streamed T5 encoder: the same numbers as the whole one's, little memory, and damage that is named."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtl_anagram.errors import SourceError, WeightsError
from mtl_anagram.models import T5Config, T5Encoder, load_t5
from tests.helpers import relative
from tests.readme import ROOT
from tests.unit import tiny
from tests.unit.test_layouts import lay_out

FILE = "model.safetensors"
WI = "encoder.block.1.layer.1.DenseReluDense.wi_0.weight"
NORM = "encoder.block.0.layer.1.layer_norm.weight"
IDS = torch.tensor([[5, 9, 30, 1, 0, 0], [7, 7, 250, 12, 3, 1]])
MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])


@pytest.fixture
def folder(tmp_path):
    tiny.write_t5(tmp_path)
    return tmp_path


def rewrite(folder, changes):
    save_file({**load_file(folder / FILE), **changes}, folder / FILE)


@pytest.mark.parametrize("embedding", ["shared.weight", "encoder.embed_tokens.weight"])
@pytest.mark.parametrize("shards", [1, 3])
def test_the_fp16_variant_as_published(folder, shards, embedding):
    """Shards of half precision with wo in float32, one copy of the embedding under either name, .bin twins beside."""
    original, state = load_t5(folder)(IDS, MASK), load_file(folder / FILE)
    state[embedding] = state.pop("shared.weight")
    save_file(state, folder / FILE)
    lay_out(folder, "model", variant="fp16", shards=shards, half=lambda name: not name.endswith("wo.weight"))
    kept = load_t5(folder, variant="fp16")
    for name, value in kept.state_dict().items():
        assert value.dtype == (torch.float32 if name.endswith("wo.weight") else torch.float16)
    assert relative(kept(IDS, MASK).float(), original) < 0.02
    streamed = load_t5(folder, variant="fp16", streamed=True)
    states = streamed(IDS, MASK)
    assert states.dtype == streamed.dtype == torch.float32
    assert relative(states, load_t5(folder, variant="fp16", dtype="float32")(IDS, MASK)) <= 1e-6
    with pytest.raises(SourceError, match="has no model.safetensors or .*holds config.json"):
        load_t5(folder, streamed=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_any_dtype_from_any_file(folder, dtype, stored):
    rewrite(folder, {name: value.to(stored) for name, value in load_file(folder / FILE).items()})
    expected = load_t5(folder, dtype=dtype)(IDS, MASK)
    states = load_t5(folder, dtype=dtype, streamed=True)(IDS, MASK)
    assert states.dtype == expected.dtype
    assert relative(states.float(), expected.float()) <= (1e-6 if dtype == "float32" else 0.01)


def test_two_copies_of_the_embedding_must_be_equal(folder):
    table = load_file(folder / FILE)["shared.weight"]
    expected = load_t5(folder)(IDS)
    rewrite(folder, {"encoder.embed_tokens.weight": table.clone()})
    assert torch.equal(load_t5(folder)(IDS), expected)
    for other in (table + 1, table.double()):
        rewrite(folder, {"encoder.embed_tokens.weight": other})
        with pytest.raises(WeightsError, match="second time"):
            load_t5(folder, streamed=True)


def test_only_the_rows_of_the_embedding_that_occur_are_read(folder):
    expected = load_t5(folder)(IDS, MASK)
    table = load_file(folder / FILE)["shared.weight"]
    unused = torch.ones(len(table), dtype=torch.bool)
    unused[IDS.unique()] = False
    table[unused] = float("nan")
    rewrite(folder, {"shared.weight": table})
    encoder = load_t5(folder, streamed=True)
    assert relative(encoder(IDS, MASK), expected) <= 1e-6
    with pytest.raises(WeightsError, match="shared.weight gives states that are not finite"):
        encoder(IDS + 1, MASK)


def test_damaged_values_are_named(folder):
    value = load_file(folder / FILE)[WI]
    value[3, 2] = torch.nan
    rewrite(folder, {WI: value})
    with pytest.raises(WeightsError, match=f"{WI} gives states that are not finite"):
        load_t5(folder, streamed=True)(IDS, MASK)
    value = load_file(folder / FILE)[NORM]
    value[3] = torch.nan
    rewrite(folder, {NORM: value})
    with pytest.raises(WeightsError, match=f"{NORM} is not finite"):
        load_t5(folder, streamed=True)


def test_a_file_that_goes_away_is_an_error_and_no_more(folder):
    encoder = load_t5(folder, streamed=True)
    expected, content = encoder(IDS, MASK), (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(content[: len(content) // 3])
    for _ in range(2):
        with pytest.raises(SourceError, match="not a whole safetensors file"):
            encoder(IDS, MASK)
        (folder / FILE).unlink(missing_ok=True)
    (folder / FILE).write_bytes(content)
    assert torch.equal(encoder(IDS, MASK), expected)


def test_calls_from_two_threads_wait_for_each_other(folder):
    encoder, lengths = load_t5(folder, streamed=True), (2, 3, 4, 5) * 5
    expected = [encoder(IDS[:, :n]) for n in lengths]
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda n: encoder(IDS[:, :n]), lengths))
    assert all(map(torch.equal, made, expected))


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the process's peak from /proc")
def test_peak_memory_is_far_below_the_files(tmp_path):
    """45 million parameters, 180 MB, of which a call of the whole encoder would hold all."""
    sizes = {"vocab_size": 20000, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 8, "num_heads": 8}
    config = T5Config(**sizes)
    tiny.save_module(T5Encoder(config), tmp_path / FILE)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert (tmp_path / FILE).stat().st_size > 170e6
    script = f"""
import sys, torch
from mtl_anagram.models import load_t5

def memory(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

torch.set_num_threads(1)
torch.nn.functional.linear(torch.randn(9, 2048), torch.randn(512, 2048))  # the library's own first call
before = memory("VmRSS")
encoder = load_t5({str(tmp_path)!r}, streamed=True)
assert encoder(torch.tensor([[5, 19999, 1]])).isfinite().all()
print(memory("VmHWM") - before)
"""
    printed = subprocess.check_output([sys.executable, "-c", script], cwd=ROOT, text=True)
    assert int(printed) < 60e6
