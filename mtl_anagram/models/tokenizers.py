"""Text to token ids: T5's sentencepiece pieces and CLIP's byte pairs."""

import base64
import gzip
import html
import re
import struct
import unicodedata
import zlib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, SourceError, whole_number
from ..files.hub import read_json

PAD, EOS, UNK = 0, 1, 2  # T5's special ids
CLIP_MERGES = 49152 - 256 - 2  # that CLIP keeps of the 262,144 in its file
START, END = "<|startoftext|>", "<|endoftext|>"


class T5Tokenizer:
    """T5's tokenizer as IF uses it: lower case, stripped, padded to 77.

    Ids: 0 pads, 1 ends a text, 2 is unknown; T5's 100 sentinels count down from the last, `<extra_id_0>`. As in the
    published (slow) tokenizer, special tokens' names stand for them, and each stretch between is read by itself.
    """

    def __init__(self, path: str | Path) -> None:
        """path: a `spiece.model`, or a `tokenizer.json`, which has the same pieces. SourceError for anything else."""
        from sentencepiece import SentencePieceProcessor

        path, self._model = Path(path), SentencePieceProcessor()
        try:
            proto = _proto_of(read_json(path)) if path.suffix == ".json" else path.read_bytes()
            self._model.LoadFromSerializedProto(proto)
            found = self._model.pad_id(), self._model.eos_id(), self._model.unk_id()
            if found != (PAD, EOS, UNK):
                raise ValueError(f"its pad, end and unknown ids are {found}, T5's {(PAD, EOS, UNK)}")
        except Exception as error:  # RuntimeError, but the binding leaves its kind open
            remedy = "copy spiece.model from the published release's tokenizer/ folder"
            raise SourceError(f"{path} is not T5's, or not whole ({error!r}); {remedy}") from error
        self.vocab_size: int = self._model.GetPieceSize() + 100
        self._special = {self._model.IdToPiece(i): i for i in (PAD, EOS, UNK)}
        self._special |= {f"<extra_id_{i}>": self.vocab_size - 1 - i for i in range(100)}
        self._parts = re.compile(f"({'|'.join(map(re.escape, self._special))})")

    def __call__(self, texts: Sequence[str], max_length: int = 77) -> tuple[Tensor, Tensor]:
        """B texts, cut to fit before their end token -> ids and mask (1 = token), both (B, max_length) long."""
        check_texts(texts)
        whole_number("max_length", max_length, 1)
        rows = [[*self.encode(text)[:-1][: max_length - 1], EOS] for text in texts]
        padded = [row + [PAD] * (max_length - len(row)) for row in rows]
        mask = [[i < len(row) for i in range(max_length)] for row in rows]
        ids, kept = (torch.tensor(table, dtype=torch.long, device="cpu") for table in (padded, mask))
        return ids, kept

    def encode(self, text: str, *, clean: bool = True) -> list[int]:
        """The text's ids, the end token last, neither cut nor padded; clean = lower-case and strip first."""
        text, ids = checked_text(text), self._model.EncodeAsIds
        parts = self._parts.split(text.lower().strip() if clean else text)
        return [i for p in parts for i in ([self._special[p]] if p in self._special else ids(p))] + [EOS]

    def split(self, text: str) -> list[str]:
        """The text's pieces as they stand in it, one per id of `encode(text, clean=False)` but the end's.

        They join to the text, with `▁` for spaces: an unknown stretch keeps its characters.
        """
        parts, pieces = self._parts.split(checked_text(text)), self._model.EncodeAsPieces
        return [piece for p in parts for piece in ([p] if p in self._special else pieces(p))]


def _proto_of(content: dict[str, Any]) -> bytes:
    """A tokenizer.json's content as a sentencepiece model of the same pieces, scores and rules.

    Field numbers: sentencepiece_model.proto of github.com/google/sentencepiece; written without the protobuf package.
    """
    vocabulary = [entry for entry in content["model"]["vocab"] if not entry[0].startswith("<extra_id_")]
    kinds = {PAD: 3, EOS: 3, UNK: 2}  # control, unknown; 1 = a normal piece
    fields = [((1, n.encode()), (2, float(s)), (3, kinds.get(i, 1))) for i, (n, s) in enumerate(vocabulary)]
    # Unigram; the ids of the unknown, start (none), end and padding token, and the names of three of them.
    trainer = [(3, 1), (40, UNK), (41, -1), (42, EOS), (43, PAD)]
    names = [(number, vocabulary[i][0].encode()) for number, i in ((45, UNK), (47, EOS), (48, PAD))]
    rules = content["normalizer"].get("normalizers", [content["normalizer"]])
    table = next(rule["precompiled_charsmap"] for rule in rules if rule["type"] == "Precompiled")
    # The table of characters; a space in front, single spaces, and spaces as a visible character.
    normalizer = _message((2, base64.b64decode(table)), (3, 1), (4, 1), (5, 1))
    pieces = [(1, _message(*piece)) for piece in fields]
    return _message(*pieces, (2, _message(*trainer, *names)), (3, normalizer))


def _message(*fields: tuple[int, int | float | bytes]) -> bytes:
    """A protobuf message of (number, value): varints for ints, 4 bytes for floats, else length and bytes."""
    parts = []
    for number, value in fields:
        if isinstance(value, bytes):
            parts += [_varint(number << 3 | 2), _varint(len(value)), value]
        elif isinstance(value, int):
            parts += [_varint(number << 3), _varint(value)]
        else:
            parts += [_varint(number << 3 | 5), struct.pack("<f", value)]
    return b"".join(parts)


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + _varint(value >> 7)


class CLIPTokenizer:
    """CLIP's byte-pair encoding (Sennrich et al. 2016, on bytes), as GLIDE's noise-aware CLIP reads it.

    Ids: 256 bytes, 256 bytes that end a word, the merges (CLIP's own are 48,894), then the start and the end token.
    """

    def __init__(self, merges: str | Path | Sequence[str | tuple[str, str]]) -> None:
        """merges: most frequent first, as pairs or as "left right", or a file of them; SourceError for others.

        Files: `merges.txt`, `tokenizer.json`, or CLIP's `bpe_simple_vocab_16e6.txt[.gz]`, whose first 48,894 count.
        """
        where = merges if isinstance(merges, str | Path) else "merges"
        try:
            listed = _lines(Path(merges)) if isinstance(merges, str | Path) else merges
            pairs = [line.split(" ") if isinstance(line, str) else line for line in listed[:CLIP_MERGES]]
            self.merges = [(left, right) for left, right in pairs]  # ValueError where a line is no pair
            joined = ["".join(pair) for pair in self.merges]
            if not all(map(all, pairs)) or len({*self.merges}) < max(1, len(pairs)):
                raise ValueError("it is empty, or a merge stands there twice or has an empty part")
        except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
            said = f"{where} is not a whole list of merges ({error}): pairs with one space between"
            raise SourceError(f"{said}; give CLIP's bpe_simple_vocab_16e6.txt.gz or a merges.txt") from error
        self._rank = {pair: rank for rank, pair in enumerate(self.merges)}
        # A printable character for each byte: itself, if it is one in Latin-1, else one from U+0100 on.
        printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = (byte for byte in range(256) if byte not in printing)
        self._bytes = {b: chr(b) for b in printing} | {b: chr(256 + i) for i, b in enumerate(others)}
        names = [*self._bytes.values(), *(name + "</w>" for name in self._bytes.values())]
        names += [*joined, START, END]
        self.ids = {name: i for i, name in enumerate(names)}  # as a `vocab.json` holds them
        self.vocab_size = len(names)
        self.start, self.end = self.vocab_size - 2, self.vocab_size - 1

    def encode(self, text: str, context: int = 77) -> tuple[list[int], int]:
        """The text as `context` ids and their number: start, at most context - 2 pairs, end, then zeros."""
        whole_number("context", context, 2)
        pairs = [i for word in words(clean(checked_text(text))) for i in self.word(word)]
        ids = [self.start, *pairs[: context - 2], self.end]
        return ids + [0] * (context - len(ids)), len(ids)

    def word(self, word: str) -> list[int]:
        """A word's ids: its bytes, merged pair by pair, the earliest-ranked pair first."""
        if word in (START, END):
            return [self.ids[word]]
        parts = [self._bytes[byte] for byte in word.encode("utf-8")]
        parts[-1] += "</w>"
        while ranked := [pair for pair in pairwise(parts) if pair in self._rank]:
            best = min(ranked, key=self._rank.__getitem__)
            for i in range(len(parts)):  # which get fewer
                if tuple(parts[i : i + 2]) == best:
                    parts[i : i + 2] = ["".join(best)]
        return [self.ids[part] for part in parts]


def _lines(path: Path) -> list[Any]:
    if path.suffix == ".json":
        return [*read_json(path)["model"]["merges"]]
    data = path.read_bytes()
    text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8")
    lines = text.replace("\r\n", "\n").rstrip("\n").split("\n")
    return lines[1:] if "#version" in lines[0] else [line for line in lines if line]


def clean(text: str) -> str:
    """A text as CLIP sees it: straight quotes, no HTML escapes, single spaces, lower case; without ftfy's repairs."""
    text = html.unescape(html.unescape(unicodedata.normalize("NFC", text).translate(_QUOTES)))
    return re.sub(r"\s+", " ", text).strip().lower()


def words(text: str) -> list[str]:
    """CLIP's split: contractions' ends, runs of letters, single numerals, runs of anything else but space."""
    # Letters and numerals are Unicode's categories L and N, which the standard library's patterns cannot name.
    kinds = "".join(" " if char.isspace() else unicodedata.category(char)[0] for char in text)
    found, i = [], 0
    while i < len(text):
        end = (_FIXED.match(text, i) or _RUN.match(kinds, i)).end()  # type: ignore[union-attr]
        found += [text[i:end]] if kinds[i] != " " else []
        i = end
    return found


_FIXED = re.compile(r"<\|startoftext\|>|<\|endoftext\|>|'(?:s|t|re|ve|m|ll|d)", re.IGNORECASE)
_RUN = re.compile("L+|N| +|[^LN ]+")
_QUOTES = str.maketrans("ʼ‘’‚‛“”„‟", "'''''\"\"\"\"")


def check_texts(texts: Any) -> None:
    if isinstance(texts, str) or not isinstance(texts, Sequence) or not texts:
        raise InputError(f"texts={texts!r} must be a list of at least one str")


def checked_text(text: str) -> str:
    if not isinstance(text, str) or re.search("[\ud800-\udfff]", text):
        raise InputError(f"the text {text!r} must be a str that holds no half characters; change it")
    return text
