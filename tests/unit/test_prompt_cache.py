"""Prompts' states on disk: what is found again, what is not, and damage, bounds and places."""

import hashlib
import json
import os
import shutil
import time
import warnings

import pytest
import torch
from safetensors import safe_open

import mtl_anagram.cascade as cascade_module
from mtl_anagram import Cascade, InputError, SourceError
from mtl_anagram.cli import main
from mtl_anagram.models import StreamedT5Encoder, T5Encoder
from mtl_anagram.models.shards import Shards, encode_safetensors
from mtl_anagram.prompt_cache import PromptCache
from mtl_anagram.text import free_bytes, streams
from tests.unit.tiny import sentencepiece_model

pytestmark = pytest.mark.usefixtures("one_thread")
ABOUT = {"weights": "abc", "stored": "torch.float32"}


@pytest.fixture
def asked():
    """The texts that were encoded, call by call."""
    return []


@pytest.fixture
def encode(asked):
    def encode(texts):
        asked.append(texts)
        return torch.stack([torch.full((3, 4), float(len(text))) for text in texts])

    return encode


def states(folder):
    return sorted(folder.glob("*.safetensors"))


def test_what_was_encoded_once_is_found_again(tmp_path, encode, asked):
    cache = PromptCache(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()  # nothing is made before there is something to keep
    made = cache.states(["a duck", "", "a duck"], ABOUT, encode)
    assert made.shape == (3, 3, 4)
    assert asked == [["a duck", ""]]
    again = PromptCache(tmp_path / "a" / "b").states(["", "a rabbit", "a duck"], ABOUT, encode)
    assert asked == [["a duck", ""], ["a rabbit"]]
    assert again[:, 0, 0].tolist() == [0, 8, 6]
    assert len(states(cache.folder)) == 3
    assert cache.clear() == 3
    assert states(cache.folder) == []


@pytest.mark.parametrize("change", [{"weights": "abd"}, {"stored": "torch.float16"}, {"more": "x"}])
def test_another_model_or_dtype_never_finds_it(tmp_path, encode, asked, change):
    cache = PromptCache(tmp_path)
    for about in (ABOUT, {**ABOUT, **change}, {**ABOUT, **change}):
        cache.states(["a duck"], about, encode)
    assert len(asked) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_states_come_back_bit_for_bit_and_any_reader_can_read_them(tmp_path, dtype):
    value = torch.randn(2, 5, 4).to(dtype)
    cache = PromptCache(tmp_path)
    cache.states(['ä \n"\\', "b"], ABOUT, lambda texts: value)
    assert torch.equal(cache.states(["b", 'ä \n"\\'], ABOUT, None), value.flip(0))
    with safe_open(states(tmp_path)[0], "pt") as file:
        assert file.metadata()["text"] in ("b", 'ä \n"\\')
        assert file.metadata()["weights"] == "abc"
        assert any(torch.equal(file.get_tensor("states"), one) for one in value)


@pytest.mark.parametrize("damage", ["empty", "cut", "a bit", "other words", "other tensor", "junk"])
def test_a_damaged_file_is_named_and_made_anew(tmp_path, encode, asked, damage):
    cache = PromptCache(tmp_path)
    cache.states(["a duck"], ABOUT, encode)
    (path,) = states(tmp_path)
    content = bytearray(path.read_bytes())
    metadata = Shards([path]).metadata
    if damage == "a bit":
        content[-3] ^= 1
    elif damage == "other words":
        content = encode_safetensors({"states": Shards([path]).read("states")}, {**metadata, "text": "a"})
    elif damage == "other tensor":
        content = encode_safetensors({"other": torch.zeros(2)}, metadata)
    else:
        content = {"empty": b"", "cut": content[:-1], "junk": b"\x80" * 300}[damage]
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=f"{path.name} is damaged"):
        made = cache.states(["a duck"], ABOUT, encode)
    assert len(asked) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(cache.states(["a duck"], ABOUT, encode), made)
    assert len(asked) == 2


def test_the_oldest_go_when_the_folder_is_full_but_not_what_was_just_used(tmp_path, encode):
    cache = PromptCache(tmp_path)
    cache.states(["a"], ABOUT, encode)
    size = states(tmp_path)[0].stat().st_size
    for age, text in ((300, "b"), (200, "c"), (100, "d")):
        before = set(states(tmp_path))
        cache.states([text], ABOUT, encode)
        (new,) = set(states(tmp_path)) - before
        os.utime(new, (time.time() - age,) * 2)
    cache.states(["b"], ABOUT, None)  # the oldest becomes the youngest
    (tmp_path / "notes.txt").write_text("not ours")
    (tmp_path / ".left.part").write_text("a killed process's")
    os.utime(tmp_path / ".left.part", (time.time() - 7200,) * 2)
    (tmp_path / ".new.part").write_text("a living process's")
    small = PromptCache(tmp_path, max_bytes=3 * size + 10)
    small.states(["e"], ABOUT, encode)
    for text in ("a", "b", "e"):
        assert small.states([text], ABOUT, None).shape == (1, 3, 4)
    assert len(states(tmp_path)) == 3
    assert (tmp_path / "notes.txt").is_file()
    assert sorted(path.name for path in tmp_path.glob(".*.part")) == [".new.part"]
    none = PromptCache(tmp_path, max_bytes=0)
    assert none.states(["f", "g"], ABOUT, encode).shape == (2, 3, 4)
    assert len(states(tmp_path)) == 2  # a call's own stay until the next


@pytest.mark.parametrize("folder", ["", 3, "a\0b", b"x"])
def test_places_that_are_none(folder):
    with pytest.raises(InputError, match="prompt_cache="):
        PromptCache(folder)


@pytest.mark.parametrize("size", [-1, 2.5, True, "1"])
def test_sizes_that_are_none(tmp_path, size):
    with pytest.raises(InputError, match="max_bytes="):
        PromptCache(tmp_path, max_bytes=size)


def test_a_folder_that_cannot_be_written_is_refused_before_encoding(tmp_path, encode, asked, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(SourceError, match="is a file"):
        PromptCache(tmp_path / "file")
    with pytest.raises(SourceError, match="cannot be made|cannot be used"):
        PromptCache(tmp_path / "file" / "inner").states(["a"], ABOUT, encode)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(SourceError, match="cannot be written to"):
        PromptCache(tmp_path).states(["a"], ABOUT, encode)
    assert asked == []


def test_checksums_are_remembered_until_the_file_changes(tmp_path, monkeypatch):
    cache, path, read = PromptCache(tmp_path / "cache"), tmp_path / "weights", []

    def compute(path):
        read.append(path)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    path.write_bytes(b"one")
    for _ in range(2):  # so new that it could change again without a trace
        cache.checksum(path, compute)
    assert len(read) == 2
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + 10**10)
    first = [PromptCache(tmp_path / "cache").checksum(path, compute) for _ in range(3)]
    assert len(read) == 3
    assert set(first) == {hashlib.sha256(b"one").hexdigest()}
    path.write_bytes(b"two")  # as long as before
    assert cache.checksum(path, compute) == hashlib.sha256(b"two").hexdigest()
    (tmp_path / "cache" / "checksums.json").write_text("{")
    for _ in range(2):  # read again for a damaged memory, and then remembered
        assert cache.checksum(path, compute) == hashlib.sha256(b"two").hexdigest()
    assert len(read) == 5
    with pytest.raises(FileNotFoundError):
        cache.checksum(tmp_path / "absent", compute)


@pytest.fixture
def encoders(monkeypatch):
    """Every text encoder that a cascade loads."""
    loaded = []
    load = cascade_module.load_t5

    def counted(*args, **options):
        loaded.append(load(*args, **options))
        return loaded[-1]

    monkeypatch.setattr(cascade_module, "load_t5", counted)
    return loaded


def test_a_cascade_with_all_prompts_cached_loads_no_text_encoder(cascade_folder, cascade, tmp_path, encoders):
    prompts = ["a duck", "a rabbit"]
    expected = cascade.encode(prompts)
    encoders.clear()
    first = Cascade.from_pretrained(cascade_folder, device="cpu", prompt_cache=tmp_path).encode(prompts)
    assert len(encoders) == 1
    again = Cascade.from_pretrained(cascade_folder, device="cpu", prompt_cache=str(tmp_path))
    second = again.encode(prompts)
    assert len(encoders) == 1
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for found, wanted in zip(second, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    again.encode(["a rabbit"])
    assert len(encoders) == 1
    again.encode(["the sea"])
    assert len(encoders) == 2
    assert len(states(tmp_path)) == 4


def test_a_cascades_cache_depends_on_weights_tokenizer_and_dtype(cascade_folder, tmp_path, encoders):
    own = shutil.copytree(cascade_folder, tmp_path / "own")
    Cascade.from_pretrained(own, device="cpu", prompt_cache=tmp_path / "c").encode(["a duck"])
    Cascade.from_pretrained(own, device="cpu", prompt_cache=tmp_path / "c", dtype="bfloat16").encode(
        ["a duck"]
    )
    assert len(encoders) == 2
    for changed, name in enumerate(("text_encoder/config.json", "tokenizer/spiece.model"), start=3):
        path = own / "stage_1" / name
        # Neither change is one that the reader notices: a space, and the pieces of another training.
        path.write_bytes(path.read_bytes() + (b" " if name.endswith("json") else b""))
        if name.endswith("model"):
            path.write_bytes(sentencepiece_model(["zebra"] * 9))
        for _ in range(2):
            cascade = Cascade.from_pretrained(own, device="cpu", prompt_cache=tmp_path / "c")
            text, null = cascade.encode(["a duck"])
            assert text.dtype == null.dtype == torch.float32
        assert len(encoders) == changed


def test_whole_or_streamed_is_the_callers_or_the_memorys_choice(cascade_folder, monkeypatch, tmp_path):
    made = {}
    for mode in ("whole", "streamed", "auto"):
        cascade = Cascade.from_pretrained(cascade_folder, device="cpu", text_encoder=mode)
        assert type(cascade.text_encoder) is (StreamedT5Encoder if mode == "streamed" else T5Encoder)
        made[mode] = cascade.encode(["a duck"])[0]
    assert torch.allclose(made["whole"], made["streamed"], rtol=0, atol=1e-6)
    monkeypatch.setattr("mtl_anagram.text.free_bytes", lambda device: 1000)
    cascade = Cascade.from_pretrained(cascade_folder, device="cpu")
    assert isinstance(cascade.text_encoder, StreamedT5Encoder)
    assert torch.equal(cascade.encode(["a duck"])[0], made["streamed"])
    # Streamed and whole give the same numbers, and share their place in a cache.
    cascade = Cascade.from_pretrained(cascade_folder, device="cpu", prompt_cache=tmp_path)
    cascade.encode(["a duck"])
    whole = Cascade.from_pretrained(cascade_folder, device="cpu", prompt_cache=tmp_path, text_encoder="whole")
    whole.encode(["a duck"])
    assert len(states(tmp_path)) == 2
    with pytest.raises(InputError, match="text_encoder='half' must be one of"):
        Cascade.from_pretrained(cascade_folder, text_encoder="half")


def test_the_choice_counts_the_bytes_in_the_dtype_that_is_computed_in(cascade_folder, monkeypatch):
    source = cascade_folder / "stage_1"
    total = sum(entry.nbytes for entry in Shards([source / "text_encoder" / "model.safetensors"]).values())
    options = {"variant": None, "device": torch.device("cpu")}
    for share, dtype, expected in (
        (2, None, False),
        (1, None, True),
        (1, torch.bfloat16, False),
        (0.5, torch.bfloat16, True),
    ):
        monkeypatch.setattr("mtl_anagram.text.free_bytes", lambda device, share=share: int(share * total))
        assert streams("auto", source, dtype=dtype, **options) is expected
    monkeypatch.setattr("mtl_anagram.text.free_bytes", lambda device: None)
    assert streams("auto", source, dtype=None, **options) is False


def test_free_memory_is_told_or_not_known():
    free = free_bytes(torch.device("cpu"))
    assert free is None or 1 << 20 < free < 1 << 50


def test_from_the_command(cascade_folder, tmp_path, encoders, capsys):
    command = [
        "generate",
        "a duck",
        "a rabbit",
        "--views",
        "identity",
        "flip",
        "--size",
        "16",
        "--steps",
        "1",
    ]
    command += ["--stop-after", "16", "--model", str(cascade_folder), "--device", "cpu", "--quiet"]
    command += ["--prompt-cache", str(tmp_path / "c"), "--text-encoder", "streamed"]
    pictures = []
    for out in ("a", "b"):
        assert main([*command, "--out", str(tmp_path / out)]) == 0
        pictures.append((tmp_path / out / "0000" / "sample_16.png").read_bytes())
    assert pictures[0] == pictures[1]
    assert [type(encoder) for encoder in encoders] == [StreamedT5Encoder]
    assert len(states(tmp_path / "c")) == 3
    first, second = (
        json.loads((tmp_path / out / "0000" / "metadata.json").read_text())["weights"] for out in "ab"
    )
    assert first == second
    (tmp_path / "file").write_text("")
    assert main([*command, "--out", str(tmp_path / "d"), "--prompt-cache", str(tmp_path / "file")]) == 2
    assert "is a file" in capsys.readouterr().err
