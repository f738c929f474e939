"""Captions of the drawings, and the two tokenizers that are made from them."""

from __future__ import annotations

import argparse
import io
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from mtl_anagram.atomic import write_atomically
from training.styles import PAINTS, STYLES, sketch

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
# Styles that no cascade has learnt yet; the tokenizers know their words.
LATER_STYLES = (
    "a watercolor of", "a photo of", "an oil painting of", "a woodcut of", "an engraving of", "a poster of",
    "a black and white drawing of", "a blue print of", "a red, green and yellow picture of",
)  # fmt: skip
# How often training draws one of the sketch's words; the other styles share the rest.
SKETCHES = 0.7
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

    Returns texts (the empty prompt first), places (C, K) long into texts, and weights (C, K): with the
    article four times in five; SKETCHES of the time in the sketch's words, one in four of them without a
    style. Column k of both is of the style at k modulo len(STYLES): `paint_of(k)`.
    """
    texts, places, weights = [""], [], []
    sketches = sum(style is sketch for style in STYLES.values())
    for concept in concepts:
        captions = captions_of(concept)
        places.append(torch.arange(len(texts), len(texts) + len(captions)))
        texts += captions
        row = []
        for i in range(len(captions)):
            words, style = list(STYLES.items())[i % len(STYLES)]
            share = (1 - SKETCHES) / (len(PAINTS) - 1)
            if style is sketch:
                share = SKETCHES * (0.25 if words == "" else 0.75 / (sketches - 1))
            row.append((0.8 if i < len(STYLES) else 0.2) * share)
        weights.append(torch.tensor(row))
    width = max(len(p) for p in places)
    padded = torch.stack([torch.cat([p, p[:1].expand(width - len(p))]) for p in places])
    return texts, padded, torch.stack([torch.cat([w, w.new_zeros(width - len(w))]) for w in weights])


def paint_of(column: Tensor) -> Tensor:
    """Columns of `caption_table`'s arrays -> the places in PAINTS of their styles."""
    paints = torch.tensor([PAINTS.index(style) for style in STYLES.values()])
    return paints[column % len(STYLES)]


def columns_of_paints() -> Tensor:
    """For each of PAINTS the first column of `caption_table`'s arrays that is of it, (P,) long."""
    return torch.tensor([next(i for i, s in enumerate(STYLES.values()) if s is paint) for paint in PAINTS])


def corpus() -> list[str]:
    """The sentences from which both tokenizers are made."""
    lines = [text for name in NAMES for text in captions_of(name, (*STYLES, *LATER_STYLES))]
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
    parser = argparse.ArgumentParser(description="Make both tokenizers of the embedded cascade.")
    parser.add_argument("--out", default="weights", help="the cascade's folder")
    parser.add_argument("--pieces", type=int, default=700)
    parser.add_argument("--merges", type=int, default=512)
    args = parser.parse_args()
    out = Path(args.out)
    sentences = corpus()
    write_atomically(out / "stage_1/tokenizer/spiece.model", train_sentencepiece(sentences, args.pieces))
    merges = train_merges(sentences, args.merges)
    text = "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges)
    write_atomically(out / "noise_clip/merges.txt", text.encode())
    print(f"{len(merges)} merges; pieces of 'a sketch of a duck':")
    ids, mask = encode(out / "stage_1/tokenizer/spiece.model", ["a sketch of a duck", "an elephant", ""])
    print(ids[:, :10], mask.sum(1))


if __name__ == "__main__":
    main()
