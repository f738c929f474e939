"""Prompts' states on disk: what is found again, what is not, and damage, bounds and places."""

import io
import os
from unittest.mock import Mock, call

import pytest
import torch

import mtl_anagram.cascade.models as cascade_models
from mtl_anagram import Cascade, InputError, SourceError
from mtl_anagram.files.prompt_cache import PromptCache
from mtl_anagram.models import StreamedT5Encoder, T5Encoder
from mtl_anagram.models.machine import Memory
from tests.unit.tiny import sentencepiece_model

ABOUT = {"weights": "abc", "stored": "torch.float32"}


@pytest.fixture
def encode():
    """An encoder whose calls are noted; a text's states are its length."""
    return Mock(side_effect=lambda texts: torch.stack([torch.full((3, 4), float(len(t))) for t in texts]))


def states(folder):
    return sorted(folder.glob("*.pt"))


def test_what_was_encoded_once_is_found_again(tmp_path, encode):
    cache = PromptCache(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()  # nothing is made before there is something to keep
    assert cache.states(["a duck", "", "a duck"], ABOUT, encode).shape == (3, 3, 4)
    again = PromptCache(tmp_path / "a" / "b").states(["", "a rabbit", "a duck"], ABOUT, encode)
    assert encode.mock_calls == [call(["a duck", ""]), call(["a rabbit"])]
    assert again[:, 0, 0].tolist() == [0, 8, 6]
    assert len(states(cache.folder)) == 3
    for change in ({"weights": "abd"}, {"stored": "torch.float16"}, {"more": "x"}):  # another model or dtype
        for about in ({**ABOUT, **change}, {**ABOUT, **change}):
            cache.states(["a duck"], about, encode)
    assert encode.call_count == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_states_come_back_bit_for_bit_and_any_reader_can_read_them(tmp_path, dtype):
    value, text = torch.randn(2, 5, 4).to(dtype), 'ä \n"\\'
    PromptCache(tmp_path).states([text, "b"], ABOUT, lambda texts: value)
    with torch.device("meta"):  # a host's default device
        assert torch.equal(PromptCache(tmp_path).states(["b", text], ABOUT, None), value.flip(0))
    assert any(torch.equal(torch.load(states(tmp_path)[0]), one) for one in value)


@pytest.mark.parametrize("damage", ["cut", "a bit", "no tensor", "junk"])
def test_a_damaged_file_is_named_and_made_anew(tmp_path, encode, damage):
    cache = PromptCache(tmp_path)
    cache.states(["a duck"], ABOUT, encode)
    (path,) = states(tmp_path)
    content = path.read_bytes()
    torch.save({"states": 3}, other := io.BytesIO())
    place = content.index(torch.full((3, 4), 6.0).numpy().tobytes())
    bit = bytes([*content[:place], content[place] ^ 1, *content[place + 1 :]])
    damaged = {"cut": content[:-1], "a bit": bit, "no tensor": other.getvalue(), "junk": b"\x80" * 300}
    path.write_bytes(damaged[damage])
    with pytest.warns(UserWarning, match=f"made anew: .*{path.name}"):
        made = cache.states(["a duck"], ABOUT, encode)
    assert torch.equal(cache.states(["a duck"], ABOUT, encode), made)
    assert encode.call_count == 2


def test_places_that_are_none_are_refused_before_encoding(tmp_path, encode, monkeypatch):
    (tmp_path / "file").write_text("")
    for folder, error in (("", InputError), (3, InputError), (tmp_path / "file/a", SourceError)):
        with pytest.raises(error, match="prompt_cache="):
            PromptCache(folder)
    PromptCache(tmp_path).states(["a"], ABOUT, encode)
    monkeypatch.setattr(os, "access", lambda *_: False)
    PromptCache(tmp_path).states(["a"], ABOUT, None)  # a folder to read from will do
    with pytest.raises(SourceError, match="prompt_cache=.*cannot be written to"):
        PromptCache(tmp_path).states(["b"], ABOUT, encode)
    encode.assert_called_once_with(["a"])


def test_a_cascades_cache_depends_on_weights_tokenizer_and_dtype(own_folder, cascade, tmp_path, monkeypatch):
    options = {"device": "cpu", "prompt_cache": str(tmp_path / "c")}
    expected = cascade.encode(["a duck"])
    load = Mock(wraps=cascade_models.load_t5)
    monkeypatch.setattr(cascade_models, "load_t5", load)
    for dtype in ("float32", "bfloat16") * 2:
        found = Cascade.from_pretrained(own_folder, dtype=dtype, **options).encode(["a duck"])
        for one, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(one.float(), wanted, rtol=0, atol=1e-5 if dtype == "float32" else 0.1)
    assert load.call_count == 2
    # Neither change is one that the reader notices: a space, and the pieces of another training.
    config = own_folder / "stage_1/text_encoder/config.json"
    changes = {config: config.read_bytes() + b" "}
    changes[own_folder / "stage_1/tokenizer/spiece.model"] = sentencepiece_model(["zebra"] * 9)
    for changed, path in enumerate(changes, start=3):
        path.write_bytes(changes[path])
        for _ in range(2):
            Cascade.from_pretrained(own_folder, **options).encode(["a duck"])
        assert load.call_count == changed


def test_whole_or_streamed_is_the_callers_or_the_memorys_choice(cascade_folder, monkeypatch, tmp_path):
    for mode, kind in (("whole", T5Encoder), ("streamed", StreamedT5Encoder), ("auto", T5Encoder)):
        options = {"device": "cpu", "prompt_cache": tmp_path, "text_encoder": mode}
        cascade = Cascade.from_pretrained(cascade_folder, **options)
        assert type(cascade.text_encoder) is kind
        cascade.encode(["a duck"])
    assert len(states(tmp_path)) == 2  # the same numbers, which share their place
    monkeypatch.setattr(cascade_models, "memory_of", lambda device: Memory(1000, 1000))
    assert isinstance(Cascade.from_pretrained(cascade_folder, device="cpu").text_encoder, StreamedT5Encoder)
    with pytest.raises(InputError, match="text_encoder='half' must be one of"):
        Cascade.from_pretrained(cascade_folder, text_encoder="half")
