"""The tokenizers' own behaviour: layout of a batch, files that are not theirs, wrong types."""

import gzip

import pytest
import torch

from mtl_anagram.errors import InputError, SourceError
from mtl_anagram.models.tokenizers import CLIPTokenizer, T5Tokenizer, clean, words
from tests.unit.tiny import sentencepiece_model

MERGES = ["d u", "du c", "duc k</w>", "c a", "ca t</w>"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("t5") / "spiece.model"
    path.write_bytes(sentencepiece_model())
    return path


def test_t5_batch_layout(model):
    tokenizer = T5Tokenizer(model)
    ids, mask = tokenizer(["", "  A DUCK ", "a duck", "duck " * 200])
    assert ids.shape == mask.shape == (4, 77)
    assert ids.dtype == mask.dtype == torch.long
    assert ids[0].tolist() == [1] + 76 * [0]
    assert mask.sum(1).tolist()[0] == 1
    assert torch.equal(ids[1], ids[2])
    length = int(mask[2].sum())
    assert ids[2, length - 1] == 1
    assert not ids[2, length:].any()
    assert not mask[2, length:].any()
    assert ids[3, -1] == 1  # the cut keeps the end token
    assert mask[3].all()
    assert tokenizer(["a duck"], max_length=1)[0].tolist() == [[1]]


def test_t5_pieces_and_sentinels(model):
    tokenizer = T5Tokenizer(model)
    ids = tokenizer.encode("the <extra_id_0> duck")
    assert tokenizer.pieces(ids) == ["▁the", "<extra_id_0>", "▁duck", "</s>"]
    assert ids[1] == tokenizer.vocab_size - 1
    assert tokenizer.split("the <extra_id_0> ☃☃") == ["▁the", "<extra_id_0>", "▁", "☃☃"]
    assert tokenizer.encode("☃")[-2:] == [2, 1]
    fewer = T5Tokenizer(model, extra_ids=0)
    assert fewer.vocab_size == tokenizer.vocab_size - 100
    assert 2 in fewer.encode("<extra_id_0>")  # without sentinels it is mere text
    for outside in (-1, tokenizer.vocab_size):
        with pytest.raises(InputError, match=f"token id {outside}"):
            tokenizer.pieces([outside])


def test_t5_file_must_be_there_and_whole_and_t5s(model, tmp_path):
    with pytest.raises(SourceError, match="there is no file"):
        T5Tokenizer(tmp_path / "none.model")
    with pytest.raises(SourceError, match="there is no file"):
        T5Tokenizer(tmp_path)
    path = tmp_path / "spiece.model"
    whole = model.read_bytes()
    for content in (b"", b"no model at all\n" * 20, whole[: len(whole) // 2], whole[:1000], whole[:-7]):
        path.write_bytes(content)
        with pytest.raises(SourceError, match=r"spiece\.model"):
            T5Tokenizer(path)
    path.write_bytes(sentencepiece_with_other_ids())
    with pytest.raises(SourceError, match="pad, end and unknown ids"):
        T5Tokenizer(path)


def sentencepiece_with_other_ids():
    import io

    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a duck", "a cat"] * 20), model_writer=out, vocab_size=20,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return out.getvalue()


@pytest.mark.parametrize("texts", ["a duck", [], None, [None], [3], ["a", b"b"], ["\ud800"]])
def test_t5_texts_are_checked(model, texts):
    with pytest.raises(InputError):
        T5Tokenizer(model)(texts)


@pytest.mark.parametrize("max_length", [0, -3, True, 7.0, "77", None])
def test_t5_length_is_checked(model, max_length):
    with pytest.raises(InputError, match="max_length="):
        T5Tokenizer(model)(["a duck"], max_length)


def test_clip_layout():
    tokenizer = CLIPTokenizer(MERGES)
    assert (tokenizer.start, tokenizer.end, tokenizer.vocab_size) == (517, 518, 519)
    ids, length = tokenizer.encode("Duck  CAT")
    assert len(ids) == 77
    assert ids[:4] == [517, 514, 516, 518]
    assert length == 4
    assert not any(ids[4:])
    ids, length = tokenizer.encode("duck " * 100, context=8)
    assert ids == [517, *[514] * 6, 518]
    assert length == 8
    assert tokenizer.encode("", 5) == ([517, 518, 0, 0, 0], 2)
    assert tokenizer.encode("duc", 5)[0][1:3] == [tokenizer._ids["du"], tokenizer._ids["c</w>"]]


def test_clip_merges_as_pairs_or_files(tmp_path):
    expected = CLIPTokenizer(MERGES)
    pairs = CLIPTokenizer([tuple(line.split()) for line in MERGES])
    expected.save(tmp_path / "merges.txt")
    (tmp_path / "bare.txt").write_text("\n".join(MERGES))
    (tmp_path / "bpe.txt.gz").write_bytes(gzip.compress(('"bpe#version: 0.2\n' + "\n".join(MERGES)).encode()))
    for same in (pairs, *(CLIPTokenizer(tmp_path / n) for n in ("merges.txt", "bare.txt", "bpe.txt.gz"))):
        assert same.merges == expected.merges
        assert same.encode("a duck's cat") == expected.encode("a duck's cat")
    assert CLIPTokenizer([]).vocab_size == 514
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare.txt", "bpe.txt.gz", "merges.txt"]


def test_clip_takes_no_more_merges_than_clip():
    many = [(f"x{i}", "y") for i in range(50000)]
    assert CLIPTokenizer(many).end == 49407


def test_clip_file_must_be_there_and_whole(tmp_path):
    with pytest.raises(SourceError, match="there is no file"):
        CLIPTokenizer(tmp_path / "none.txt")
    path = tmp_path / "merges.txt.gz"
    packed = gzip.compress(("#version: 0.2\n" + "\n".join(f"{i} a" for i in range(500))).encode())
    for content in (packed[:200], packed[:30] + b"\0\0\0\0" + packed[34:], b"\xff\xfe\x00binary"):
        path.write_bytes(content)
        with pytest.raises(SourceError, match="not a whole list of merges"):
            CLIPTokenizer(path)
    for content, match in (
        ("#version: 0.2\na b c\n", "merge 0"),
        ("a b\nab\n", "merge 1"),
        ("a b\na b\n", "twice"),
    ):
        path.write_text(content)
        with pytest.raises(SourceError, match=match):
            CLIPTokenizer(path)
    with pytest.raises(SourceError, match="cannot write"):
        CLIPTokenizer(MERGES).save(tmp_path / "no folder" / "merges.txt")


@pytest.mark.parametrize("text", [None, 3, b"a", ["a"], "\udfff"])
def test_clip_text_is_checked(text):
    with pytest.raises(InputError, match="text"):
        CLIPTokenizer(MERGES).encode(text)


@pytest.mark.parametrize("context", [1, 0, True, 77.0, None])
def test_clip_context_is_checked(context):
    with pytest.raises(InputError, match="context="):
        CLIPTokenizer(MERGES).encode("a", context)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("it's 123x²", ["it", "'s", "1", "2", "3", "x", "²"]),
        ("a_b__c", ["a", "_", "b", "__", "c"]),
        ("we've 'x' i'm!?", ["we", "'ve", "'", "x", "'", "i", "'m", "!?"]),
        ("東京🎨🎨 ½Ⅷ", ["東京", "🎨🎨", "½", "Ⅷ"]),
        ("a\u0301\u0301b", ["a", "\u0301\u0301", "b"]),
        ("", []),
        (" \t ", []),
        ("<|endoftext|>a", ["<|endoftext|>", "a"]),
    ],
)
def test_clip_words(text, expected):
    assert words(text) == expected


def test_clip_cleaning():
    assert clean("  A\n\tDUCK&amp;amp;co ") == "a duck&co"
    assert clean("don’t “x” e\u0301") == 'don\'t "x" é'
