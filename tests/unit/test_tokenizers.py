"""The tokenizers' own behaviour: layout of a batch, files that are not theirs, wrong types."""

import gzip
import io
import json

import pytest
import sentencepiece
import torch

from mtl_anagram.errors import InputError, SourceError
from mtl_anagram.models import load_tokenizer
from mtl_anagram.models.tokenizers import CLIPTokenizer, T5Tokenizer, clean, words
from tests.unit.tiny import MERGES


@pytest.fixture
def model(cascade_folder):
    return cascade_folder / "stage_1" / "tokenizer" / "spiece.model"


def test_t5_batch_layout(model):
    tokenizer = T5Tokenizer(model)
    ids, mask = tokenizer(["", "  A DUCK ", "a duck", "duck " * 200])
    assert ids.shape == mask.shape == (4, 77)
    assert ids.dtype == mask.dtype == torch.long
    assert ids[0].tolist() == [1] + 76 * [0]
    assert torch.equal(ids[1], ids[2])
    length = int(mask[2].sum())
    assert ids[2, length - 1 :].tolist() == [1] + [0] * (77 - length)
    assert mask[2].tolist() == [1] * length + [0] * (77 - length)
    assert ids[3, -1] == 1  # the cut keeps the end token
    assert mask[3].all()
    assert tokenizer(["a duck"], max_length=1)[0].tolist() == [[1]]
    with torch.device("meta"):
        assert torch.equal(tokenizer(["a duck"])[0].to("cpu"), ids[2:3])


def test_t5_pieces_and_sentinels(model):
    tokenizer = T5Tokenizer(model)
    ids = tokenizer.encode("the <extra_id_0> duck")
    assert tokenizer.pieces(ids) == ["▁the", "<extra_id_0>", "▁duck", "</s>"]
    assert ids[1] == tokenizer.vocab_size - 1
    assert tokenizer.split("the <extra_id_0> ☃☃") == ["▁the", "<extra_id_0>", "▁", "☃☃"]
    assert tokenizer.encode("☃")[-2:] == [2, 1]


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


def test_t5_from_the_file_that_newer_libraries_save(model, tmp_path):
    """The parity tests compare the ids; here: which file is looked for, and what is no tokenizer.json of T5's."""
    own = tmp_path / "tokenizer"
    own.mkdir()
    with pytest.raises(SourceError, match=r"no spiece\.model"):
        load_tokenizer(tmp_path)
    whole = T5Tokenizer(model)
    pieces = whole.pieces(range(whole.vocab_size - 100))
    vocab = [[piece, whole._model.GetScore(i)] for i, piece in enumerate(pieces)]
    vocab += [[f"<extra_id_{i}>", 0.0] for i in reversed(range(100))]
    content = {
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": ""},
        "model": {"type": "Unigram", "vocab": vocab},
    }
    path = own / "tokenizer.json"
    path.write_text(json.dumps(content))
    for source in (tmp_path, own):
        found = load_tokenizer(source)
        assert found.vocab_size == whole.vocab_size
        for text in ("A  sketch of the <extra_id_3> duck", "☃ x", ""):
            assert found.encode(text) == whole.encode(text)
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
    names = tokenizer.names()
    assert tokenizer.encode("duc", 5)[0][1:3] == [names["du"], names["c</w>"]]
    assert CLIPTokenizer([(f"x{i}", "y") for i in range(50000)]).end == 49407  # no more merges than CLIP's


def test_clip_merges_as_pairs_or_files(tmp_path):
    expected = CLIPTokenizer(MERGES)
    pairs = CLIPTokenizer([tuple(line.split()) for line in MERGES])
    expected.save(tmp_path / "merges.txt")
    (tmp_path / "bare.txt").write_text("\n".join(MERGES))
    (tmp_path / "bpe.txt.gz").write_bytes(gzip.compress(('"bpe#version: 0.2\n' + "\n".join(MERGES)).encode()))
    for same in (pairs, *(CLIPTokenizer(tmp_path / n) for n in ("merges.txt", "bare.txt", "bpe.txt.gz"))):
        assert same.merges == expected.merges
        assert same.encode("a duck's cat") == expected.encode("a duck's cat")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare.txt", "bpe.txt.gz", "merges.txt"]


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


WORDS = {
    "it's 123x²": ["it", "'s", "1", "2", "3", "x", "²"],
    "a_b__c": ["a", "_", "b", "__", "c"],
    "we've 'x' i'm!?": ["we", "'ve", "'", "x", "'", "i", "'m", "!?"],
    "東京🎨🎨 ½Ⅷ": ["東京", "🎨🎨", "½", "Ⅷ"],
    "a\u0301\u0301b \t ": ["a", "\u0301\u0301", "b"],
    "<|endoftext|>a": ["<|endoftext|>", "a"],
}


def test_clip_words_and_cleaning():
    assert {text: words(text) for text in WORDS} == WORDS
    assert clean("  A\n\tDUCK&amp;amp;co ") == "a duck&co"
    assert clean("don’t “x” e\u0301") == 'don\'t "x" é'
