"""The streamed T5 encoder: the same numbers as the whole one's, little memory, and damage that is named."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtl_anagram.errors import InputError, SourceError, WeightsError
from mtl_anagram.models import T5Config, T5Encoder, load_t5, t5_streamed
from mtl_anagram.models.shards import Shards
from tests.helpers import relative
from tests.unit import tiny

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[2]
FILE = "model.safetensors"
WI = "encoder.block.1.layer.1.DenseReluDense.wi_0.weight"
NORM = "encoder.block.0.layer.1.layer_norm.weight"
IDS = torch.tensor([[5, 9, 30, 1, 0, 0], [7, 7, 250, 12, 3, 1]])
MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])


@pytest.fixture
def folder(tmp_path):
    tiny.write_t5(tmp_path)
    return tmp_path


def rewrite(folder, *, drop=(), **changes):
    state = load_file(folder / FILE)
    for name in drop:
        del state[name]
    save_file({**state, **{name.replace("__", "."): value for name, value in changes.items()}}, folder / FILE)


def published(folder, *, shards, embedding):
    """The file's tensors as the fp16 variant is published: shards, their index, wo in float32, a .bin twin."""
    state = load_file(folder / FILE)
    state = {name: value if name.endswith("wo.weight") else value.half() for name, value in state.items()}
    state[embedding] = state.pop("shared.weight")
    (folder / FILE).unlink()
    names, weight_map = sorted(state), {}
    for number in range(shards):
        shard = f"model.fp16-{number + 1:05}-of-{shards:05}.safetensors"
        save_file({name: state[name] for name in names[number::shards]}, folder / shard)
        weight_map |= dict.fromkeys(names[number::shards], shard)
        (folder / shard.replace("model", "pytorch_model").replace("safetensors", "bin")).write_bytes(b"junk")
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.fp16.json").write_text(json.dumps(index))
    weight_map = {**weight_map, "encoder.embed_tokens.weight": "x", "shared.weight": "x"}
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "pytorch_model.bin.index.fp16.json").write_text(index)


@pytest.mark.parametrize("embedding", ["shared.weight", "encoder.embed_tokens.weight"])
@pytest.mark.parametrize("shards", [1, 3])
def test_the_fp16_variant_as_published(folder, shards, embedding):
    original = load_t5(folder)(IDS, MASK)
    published(folder, shards=shards, embedding=embedding)
    kept = load_t5(folder, variant="fp16")
    assert {p.dtype for p in kept.parameters()} == {torch.float16, torch.float32}
    assert relative(kept(IDS, MASK).float(), original) < 0.02
    streamed = load_t5(folder, variant="fp16", streamed=True)
    states = streamed(IDS, MASK)
    assert states.dtype == streamed.dtype == torch.float32
    assert relative(states, load_t5(folder, variant="fp16", dtype="float32")(IDS, MASK)) <= 1e-6
    with pytest.raises(SourceError, match="no model.safetensors and no index"):
        load_t5(folder, streamed=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_any_dtype_from_any_file(folder, dtype, stored):
    rewrite(folder, **{n.replace(".", "__"): v.to(stored) for n, v in load_file(folder / FILE).items()})
    expected = load_t5(folder, dtype=dtype)(IDS, MASK)
    states = load_t5(folder, dtype=dtype, streamed=True)(IDS, MASK)
    assert states.dtype == expected.dtype
    assert relative(states.float(), expected.float()) <= (1e-6 if dtype == "float32" else 0.01)


def test_matrices_are_cast_in_pieces_that_need_not_fit(folder, monkeypatch):
    expected = load_t5(folder, dtype="bfloat16")(IDS, MASK)
    monkeypatch.setattr(t5_streamed, "_CHUNK", 16 * 5)  # 5 rows of 16, which do not divide 32
    states = load_t5(folder, dtype="bfloat16", streamed=True)(IDS, MASK)
    assert relative(states.float(), expected.float()) <= 0.01


def test_an_older_config_with_fields_missing(folder):
    expected = load_t5(folder)(IDS, MASK)
    config = json.loads((folder / "config.json").read_text())
    required = {"vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "feed_forward_proj"}
    (folder / "config.json").write_text(json.dumps({name: config[name] for name in required}))
    assert torch.equal(load_t5(folder)(IDS, MASK), expected)
    assert relative(load_t5(folder, streamed=True)(IDS, MASK), expected) <= 1e-6


@pytest.mark.parametrize("alias", ["equal", "other values", "other dtype"])
def test_two_copies_of_the_embedding(folder, alias):
    table = load_file(folder / FILE)["shared.weight"]
    expected = load_t5(folder)(IDS)
    copy = {"equal": table, "other values": table + 1, "other dtype": table.double()}[alias]
    rewrite(folder, encoder__embed_tokens__weight=copy.clone())
    if alias == "equal":
        assert relative(load_t5(folder, streamed=True)(IDS), expected) <= 1e-6
    else:
        with pytest.raises(WeightsError, match="second time"):
            load_t5(folder, streamed=True)


def test_a_call_reads_each_matrix_once_into_two_buffers_which_it_gives_back(folder, monkeypatch):
    encoder = load_t5(folder, streamed=True)
    reads, places = [], set()
    read, take = t5_streamed.read_into, t5_streamed.Stream.take
    monkeypatch.setattr(
        t5_streamed, "read_into", lambda entry, buffer: (reads.append(entry), read(entry, buffer))
    )

    def taken(stream, name):
        matrix = take(stream, name)
        places.add(matrix.data_ptr())
        return matrix

    monkeypatch.setattr(t5_streamed.Stream, "take", taken)
    encoder(IDS.repeat(4, 1), MASK.repeat(4, 1))
    assert len(reads) == len(set(reads)) == 2 * 7
    assert len(places) == 2
    assert buffers_of(encoder) == []


def buffers_of(encoder):
    """Names of the buffers that an encoder holds on to between calls."""
    return [name for name in vars(encoder._matrices) if name in ("_host", "_buffers")]


def test_only_the_rows_of_the_embedding_that_occur_are_read(folder):
    expected = load_t5(folder)(IDS, MASK)
    table = load_file(folder / FILE)["shared.weight"]
    unused = torch.ones(len(table), dtype=torch.bool)
    unused[IDS.unique()] = False
    table[unused] = float("nan")
    rewrite(folder, shared__weight=table)
    encoder = load_t5(folder, streamed=True)
    assert relative(encoder(IDS, MASK), expected) <= 1e-6
    with pytest.raises(WeightsError, match="shared.weight gives states that are not finite"):
        encoder(IDS + 1, MASK)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_damaged_values_are_named(folder, bad):
    value = load_file(folder / FILE)[WI]
    value[3, 2] = bad
    rewrite(folder, **{WI.replace(".", "__"): value})
    encoder = load_t5(folder, streamed=True)
    with pytest.raises(WeightsError, match=f"{WI} gives states that are not finite"):
        encoder(IDS, MASK)
    value = load_file(folder / FILE)[NORM]
    value[3] = bad
    rewrite(folder, **{NORM.replace(".", "__"): value})
    with pytest.raises(WeightsError, match=f"{NORM} is not finite"):
        load_t5(folder, streamed=True)


def test_values_beyond_half_precision(folder):
    value = load_file(folder / FILE)[WI]
    value[3, 2] = 1e6
    rewrite(folder, **{WI.replace(".", "__"): value})
    with pytest.raises(WeightsError, match="overflow torch.float16: load in float32 or bfloat16"):
        load_t5(folder, streamed=True, dtype="float16")(IDS, MASK)
    for dtype in (None, "bfloat16"):
        assert load_t5(folder, streamed=True, dtype=dtype)(IDS, MASK).isfinite().all()


def test_tensors_that_do_not_fit_are_named_before_any_call(folder):
    whole = (folder / FILE).read_bytes()
    for changes, match in (
        ({"drop": [WI]}, f"1 tensors missing: {WI}"),
        ({"stray": torch.zeros(1)}, "1 tensors unexpected: stray"),
        ({WI.replace(".", "__"): torch.zeros(16, 32)}, r"misshapen: .* \(16, 32\), expected \(32, 16\)"),
        ({WI.replace(".", "__"): torch.zeros(32, 16, dtype=torch.int8)}, "not floating"),
    ):
        rewrite(folder, **changes)
        with pytest.raises(WeightsError, match=match):
            load_t5(folder, streamed=True)
        (folder / FILE).write_bytes(whole)


@pytest.mark.parametrize("keep", [0, 3, 8, 100, 0.5, -1])
def test_truncated_files(folder, keep):
    content = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(SourceError, match="not a whole safetensors file"):
        load_t5(folder, streamed=True)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b'{"a": 3}',
        b'{"a": {"dtype": "F32", "shape": [1]}}',
        b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": null, "data_offsets": [0, 4]}}',
        b"\xff\xfe",
        b'{"a":' * 2000,
    ],
)
def test_headers_that_are_none(tmp_path, header):
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(SourceError, match="not a whole safetensors file"):
        Shards([path])
    with pytest.raises(SourceError, match="not a whole safetensors file"):
        Shards([tmp_path / "absent.safetensors"])


def test_a_file_that_goes_away_is_an_error_and_no_more(folder):
    encoder = load_t5(folder, streamed=True)
    expected, content = encoder(IDS, MASK), (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(content[: len(content) // 3])
    with pytest.raises(SourceError, match="ends .* bytes too early"):
        encoder(IDS, MASK)
    (folder / FILE).unlink()
    with pytest.raises(SourceError, match="cannot be read"):
        encoder(IDS, MASK)
    assert buffers_of(encoder) == []
    (folder / FILE).write_bytes(content)
    assert torch.equal(encoder(IDS, MASK), expected)


def test_calls_from_two_threads_wait_for_each_other(folder):
    encoder, made = load_t5(folder, streamed=True), {}
    expected = {n: encoder(IDS[:, :n]) for n in (2, 3, 4, 5)}
    threads = [threading.Thread(target=lambda n=n: made.update({n: encoder(IDS[:, :n])})) for n in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(made[n], expected[n]) for n in expected)


def test_in_inference_mode_and_without_a_gradient(folder):
    encoder = load_t5(folder, streamed=True)
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not encoder(IDS).requires_grad
    with torch.inference_mode():
        states = load_t5(folder, streamed=True)(IDS)
    assert torch.equal(states, encoder(IDS))


def test_what_cannot_be_done_is_refused(folder):
    with pytest.raises(InputError, match="streamed=1"):
        load_t5(folder, streamed=1)
    encoder = load_t5(folder, streamed=True)
    with pytest.raises(InputError, match="vocabulary has 300"):
        encoder(IDS + 200)
    with pytest.raises(InputError, match="ids' shape"):
        encoder(IDS, MASK[:, :3])
    for _ in range(2):
        with pytest.raises(RuntimeError, match="within its encoder's call only"):
            encoder.encoder.block[0].layer[0].SelfAttention.q(torch.zeros(1, 1, 16))
        encoder(IDS)


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
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 60e6
