"""The tokenizers' files, and what is none of theirs; their ids are tests/parity's."""

import gzip
import io
import json

import pytest
import sentencepiece

from mtl_anagram.errors import InputError, SourceError
from mtl_anagram.models import load_tokenizer
from mtl_anagram.models.tokenizers import CLIPTokenizer, T5Tokenizer, clean
from tests.unit.tiny import MERGES


@pytest.fixture
def model(cascade_folder):
    return cascade_folder / "stage_1" / "tokenizer" / "spiece.model"


def test_t5_file_must_be_there_and_whole_and_t5s(model, tmp_path):
    path = tmp_path / "spiece.model"
    other = io.BytesIO()
    texts = iter(["a duck", "a cat"] * 20)
    options = {"vocab_size": 20, "hard_vocab_limit": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=texts, model_writer=other, **options)
    for content in (None, b"", b"no model at all\n" * 20, model.read_bytes()[:-7], other.getvalue()):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(SourceError, match=r"spiece\.model is not T5's.*copy spiece\.model"):
            T5Tokenizer(path)


def test_t5_from_the_file_that_newer_libraries_save(tmp_path):
    path = tmp_path / "tokenizer" / "tokenizer.json"
    path.parent.mkdir()
    with pytest.raises(SourceError, match=r"no spiece\.model"):
        load_tokenizer(tmp_path)
    vocab = [[piece, 0.0] for piece in ("<pad>", "</s>", "<unk>", "▁a", "▁duck")]
    normalizer = {"type": "Precompiled", "precompiled_charsmap": ""}
    content = {"normalizer": normalizer, "model": {"type": "Unigram", "vocab": vocab}}
    path.write_text(json.dumps(content))
    for source in (tmp_path, path.parent):
        assert load_tokenizer(source).encode("A  duck") == [3, 4, 1]
    for wrong in ({"model": {"type": "BPE"}}, {"normalizer": None}, {"model": {"vocab": []}}):
        path.write_text(json.dumps({**content, **wrong}))
        with pytest.raises(SourceError, match=r"tokenizer\.json is not T5's"):
            T5Tokenizer(path)


def test_clip_layout():
    tokenizer = CLIPTokenizer(MERGES)
    assert (tokenizer.start, tokenizer.end, tokenizer.vocab_size) == (517, 518, 519)
    assert tokenizer.encode("Duck  CAT") == ([517, 514, 516, 518] + [0] * 73, 4)
    assert tokenizer.encode("duck " * 100, context=8) == ([517, *[514] * 6, 518], 8)
    assert tokenizer.encode("", 5) == ([517, 518, 0, 0, 0], 2)
    assert CLIPTokenizer([(f"x{i}", "y") for i in range(50000)]).end == 49407  # no more merges than CLIP's


def test_clip_merges_as_pairs_or_files(tmp_path):
    expected = CLIPTokenizer(MERGES)
    pairs = CLIPTokenizer([tuple(line.split()) for line in MERGES])
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
    (tmp_path / "bare.txt").write_bytes("\r\n".join(MERGES).encode())  # as Windows may check it out
    (tmp_path / "bpe.txt.gz").write_bytes(gzip.compress(('"bpe#version: 0.2\n' + "\n".join(MERGES)).encode()))
    (tmp_path / "tokenizer.json").write_text(f'{{"model": {{"merges": {json.dumps(MERGES)}}}}}')
    files = ["bare.txt", "bpe.txt.gz", "merges.txt", "tokenizer.json"]
    for same in (pairs, *(CLIPTokenizer(tmp_path / name) for name in files)):
        assert same.merges == expected.merges
        assert same.encode("a duck's cat") == expected.encode("a duck's cat")
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    with pytest.raises(SourceError, match="merges is not a whole list"):
        CLIPTokenizer([(1, 2)])


def test_clip_file_must_be_there_and_whole(tmp_path):
    path = tmp_path / "merges.txt.gz"
    packed = gzip.compress(("#version: 0.2\n" + "\n".join(f"{i} a" for i in range(500))).encode())
    damaged = packed[:30] + b"\0\0\0\0" + packed[34:]
    wrong = (packed[:200], damaged, b"\xff\xfe\x00", b"", b"a b c\n", b"a b\nab\n", b"a b\na b\n")
    for content in (None, *wrong):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(SourceError, match=r"merges\.txt\.gz is not a whole list of merges.*bpe_simple"):
            CLIPTokenizer(path)


def test_texts_are_checked(model):
    for texts in ("a duck", [], [None], ["\ud800"]):
        with pytest.raises(InputError):
            T5Tokenizer(model)(texts)
    for text, context in ((None, 77), ("\udfff", 77), ("a", 1)):
        with pytest.raises(InputError):
            CLIPTokenizer(MERGES).encode(text, context)


def test_clip_cleaning():
    assert clean("  A\n\tDUCK&amp;amp;co ") == "a duck&co"
    assert clean("don’t “x” e\u0301") == 'don\'t "x" é'
