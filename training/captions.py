"""Captions of the drawings, and the two tokenizers that are made from them."""

import argparse
import io
import re
import struct
from collections import Counter
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from mtl_anagram.files.atomic import write_atomically
from training.styles import PAINTS, STYLES

LENGTH = 77  # tokens of a padded prompt, IF's
# Names of the data set's drawings: the tokenizers know them all, so later cascades can learn more.
NAMES = (
    "airplane", "alarm clock", "apple", "banana", "bear", "bed", "bee", "bicycle", "bird", "book",
    "boomerang", "bowtie", "butterfly", "cake", "car", "cat", "chair", "clock", "cloud", "diamond",
    "dog", "donut", "dragon", "duck", "elephant", "eye", "face", "fish", "flower", "frog", "guitar",
    "hat", "headphones", "horse", "house", "house plant", "kangaroo", "knife", "lion", "lollipop",
    "monkey", "moon", "mouth", "pants", "penguin", "piano", "pig", "rabbit", "radio", "rainbow",
    "sea turtle", "sheep", "skull", "snowflake", "snowman", "squirrel", "star", "sun", "the mona lisa",
    "tiger", "tractor", "train", "tree", "whale", "windmill", "wine bottle", "wine glass",
)  # fmt: skip
_BARE = {"the mona lisa"}
_PLURAL = {"headphones", "pants"}
_ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'\"()-&/+"


def with_article(name: str) -> str:
    """'duck' -> 'a duck', 'elephant' -> 'an elephant'; names that take no article stay as they are."""
    if name in _BARE or name in _PLURAL:
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def captions_of(name: str, styles: tuple[str, ...] = tuple(STYLES)) -> list[str]:
    """All captions of a drawing of `name`: every style, with the article and without, the name last."""
    subjects = dict.fromkeys((with_article(name), name))
    return [f"{style} {subject}".strip() for subject in subjects for style in styles]


def caption_table(concepts: tuple[str, ...]) -> tuple[list[str], Tensor, Tensor]:
    """Every caption of every concept, and how training draws one.

    Returns texts (the empty prompt first), places (C, K) long into texts, and weights (C, K): every style, and
    each of its wordings, equally often; with the article four times in five. Column k of both is of the style at
    k modulo len(STYLES): `paint_of(k)`.
    """
    texts, places, weights = [""], [], []
    wordings = Counter(STYLES.values())
    share = [1 / len(PAINTS) / wordings[style] for style in STYLES.values()]
    for concept in concepts:
        captions = captions_of(concept)
        places.append(torch.arange(len(texts), len(texts) + len(captions)))
        texts += captions
        bare = len(captions) > len(STYLES)  # some names never take an article
        row = [(0.8, 0.2)[i // len(STYLES)] if bare else 1.0 for i in range(len(captions))]
        weights.append(torch.tensor([w * share[i % len(STYLES)] for i, w in enumerate(row)]))
    width = max(len(p) for p in places)
    padded = torch.stack([torch.cat([p, p[:1].expand(width - len(p))]) for p in places])
    return texts, padded, torch.stack([torch.cat([w, w.new_zeros(width - len(w))]) for w in weights])


def paint_of(column: Tensor) -> Tensor:
    """Columns of `caption_table`'s arrays -> the places in PAINTS of their styles."""
    paints = torch.tensor([PAINTS.index(style) for style in STYLES.values()])
    return paints.to(column.device)[column % len(STYLES)]


def columns_of_paints() -> Tensor:
    """For each of PAINTS the first column of `caption_table`'s arrays that is of it, (P,) long."""
    return torch.tensor([next(i for i, s in enumerate(STYLES.values()) if s is paint) for paint in PAINTS])


def corpus() -> list[str]:
    """The sentences from which both tokenizers are made."""
    lines = [text for name in NAMES for text in captions_of(name)]
    lines += [text for name in NAMES for text in captions_of(name, ("", "a sketch of", "a drawing of"))] * 3
    words = dict.fromkeys(word for line in lines for word in re.findall("[a-z]+", line))
    # A unigram model's candidates are substrings of two different words: the plural makes each word one.
    lines += [f"{word} {word}s" for word in words for _ in range(20)]
    return [*lines, *_ALPHABET]


def train_sentencepiece(sentences: list[str], size: int = 700) -> bytes:
    """A unigram sentencepiece model of at most `size` pieces with T5's special ids (pad 0, </s> 1, unk 2)."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, model_type="unigram", vocab_size=size,
        hard_vocab_limit=False, character_coverage=1.0, required_chars=_ALPHABET,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, pad_piece="<pad>",
        normalization_rule_name="nmt_nfkc", num_threads=1, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def with_words(model: bytes, texts: list[str]) -> bytes:
    """A sentencepiece model that knows every word of the texts; what it knew keeps its number.

    So a text encoder that was trained with the model goes on with the longer one. A model's file is a message
    whose pieces (field 1: text, score, kind) may stand anywhere in it.
    """
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    for word in dict.fromkeys(word for text in texts for word in text.lower().split()):
        if len(processor.EncodeAsIds(word)) > 1:
            piece = f"\u2581{word}".encode()
            fields = b"\x0a" + bytes([len(piece)]) + piece + b"\x15" + struct.pack("<f", 0.0)
            model += b"\x0a" + bytes([len(fields)]) + fields
    return model


def encode(model: bytes | str | Path, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Prompts -> ids and mask, each (B, 77) long: lower case, stripped, </s> appended, padded with 0."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    if isinstance(model, bytes):
        processor.LoadFromSerializedProto(model)
    else:
        processor.Load(str(model))
    ids = torch.zeros(len(texts), LENGTH, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        pieces = [*processor.EncodeAsIds(text.lower().strip())[: LENGTH - 1], 1]
        ids[row, : len(pieces)] = torch.tensor(pieces)
        mask[row, : len(pieces)] = 1
    return ids, mask


def train_merges(sentences: list[str], count: int = 512) -> list[tuple[str, str]]:
    """Byte-pair merges by greedy frequency (Sennrich et al. 2016, algorithm 1), word ends marked `</w>`.

    Sentences are ASCII here, so a byte is a character. Ties are broken by the pair itself, which makes the
    list the same on every machine.
    """
    words = Counter(
        word for line in sentences for word in re.findall(r"[a-z]+|[0-9]|[^\sa-z0-9]+", line.lower())
    )
    split = {word: (*word[:-1], word[-1] + "</w>") for word in words}
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, symbols in split.items():
            for pair in pairwise(symbols):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        split = {word: merge(symbols, best) for word, symbols in split.items()}
    return merges


def merge(symbols: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """Join every occurrence of the pair, from the left."""
    out: list[str] = []
    for symbol in symbols:
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return tuple(out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Make both tokenizers of the embedded cascade, or add the captions' words to the text encoder's."
    )
    parser.add_argument("--out", default="weights", help="the cascade's folder")
    parser.add_argument("--pieces", type=int, default=700)
    parser.add_argument("--merges", type=int, default=512)
    args = parser.parse_args()
    out = Path(args.out)
    spiece, sentences = out / "stage_1/tokenizer/spiece.model", corpus()
    if spiece.is_file():
        model = with_words(spiece.read_bytes(), [text for name in NAMES for text in captions_of(name)])
    else:
        model = train_sentencepiece(sentences, args.pieces)
    write_atomically(spiece, model)
    merges = out / "noise_clip/merges.txt"
    if not merges.is_file():
        lines = "".join(f"{left} {right}\n" for left, right in train_merges(sentences, args.merges))
        write_atomically(merges, f"#version: 0.2\n{lines}".encode())
    ids, mask = encode(spiece, ["a stained glass window of a duck", "an elephant", ""])
    print(ids[:, :10], mask.sum(1))


if __name__ == "__main__":
    main()
