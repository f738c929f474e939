"""Text to token ids: T5's sentencepiece pieces and CLIP's byte pairs."""

from __future__ import annotations

import gzip
import html
import os
import re
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError, SourceError

PAD, EOS, UNK = 0, 1, 2  # T5's special ids
CLIP_MERGES = 49152 - 256 - 2  # that CLIP keeps of the 262,144 in its file
START, END = "<|startoftext|>", "<|endoftext|>"


class T5Tokenizer:
    """T5's tokenizer from a `spiece.model`, as IF uses it: lower case, stripped, padded to 77.

    Ids: 0 pads, 1 ends a text, 2 is unknown; `<extra_id_0>`, the first of T5's sentinels, is the last id of
    all (32099 with the published file) and the others count down from there. As in the published (slow)
    tokenizer, the special tokens' names in a text stand for the tokens, and each stretch between them is
    read by itself.
    """

    def __init__(self, path: str | Path, *, extra_ids: int = 100) -> None:
        """Raises SourceError where the file is missing or no sentencepiece model, or not laid out as T5's."""
        from sentencepiece import SentencePieceProcessor

        path = Path(path)
        if not path.is_file():
            raise SourceError(f"there is no file {path}: give the path of T5's spiece.model")
        self._model = SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(path.read_bytes())
            size = self._model.GetPieceSize()
        except Exception as error:  # RuntimeError, but the binding leaves its kind open
            raise SourceError(
                f"{path} is not a whole sentencepiece model ({error}); delete it and download it again"
            ) from error
        found = (self._model.pad_id(), self._model.eos_id(), self._model.unk_id())
        if found != (PAD, EOS, UNK):
            raise SourceError(
                f"{path} has the pad, end and unknown ids {found}, T5's are {(PAD, EOS, UNK)}: it is damaged "
                "or another model's; download T5's spiece.model"
            )
        self.vocab_size: int = size + extra_ids
        self._special = {self._model.IdToPiece(i): i for i in (PAD, EOS, UNK)}
        self._special |= {f"<extra_id_{i}>": size + extra_ids - 1 - i for i in range(extra_ids)}
        self._special_names = {i: name for name, i in self._special.items()}
        self._split = re.compile("|".join(map(re.escape, sorted(self._special, key=len, reverse=True))))

    def __call__(self, texts: Sequence[str], max_length: int = 77) -> tuple[Tensor, Tensor]:
        """B texts -> ids (B, max_length) long and mask (B, max_length) long, 1 = token, 0 = padding.

        Texts are lower-cased and stripped. What does not fit is cut; the end token stays.
        """
        if isinstance(texts, str) or not isinstance(texts, Sequence) or not texts:
            raise InputError(f"texts={texts!r} must be a list of at least one str")
        if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
            raise InputError(f"max_length={max_length!r} must be a whole number, at least 1")
        ids = torch.full((len(texts), max_length), PAD, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            tokens = [*self.encode(text)[:-1][: max_length - 1], EOS]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        return ids, mask

    def encode(self, text: str, *, clean: bool = True) -> list[int]:
        """The text's ids, the end token last, neither cut nor padded; clean = lower-case and strip first."""
        text = checked_text(text)
        ids: list[int] = []
        for part, special in self._parts(text.lower().strip() if clean else text):
            ids += [special] if special is not None else self._model.EncodeAsIds(part)
        return [*ids, EOS]

    def split(self, text: str) -> list[str]:
        """The text's pieces as they stand in it, one per id of `encode(text, clean=False)` but the end's.

        Unlike `pieces`, an unknown stretch keeps its characters, so that the pieces join to the whole text
        (as normalised, with `▁` for the spaces).
        """
        found: list[str] = []
        for part, special in self._parts(checked_text(text)):
            found += [part] if special is not None else self._model.EncodeAsPieces(part)
        return found

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """The pieces by name; `▁` begins a word. Raises InputError for an id outside the vocabulary."""
        names = []
        for i in ids:
            i = int(i)
            if not 0 <= i < self.vocab_size:
                raise InputError(f"token id {i} is outside the vocabulary, 0..{self.vocab_size - 1}")
            names.append(self._special_names.get(i) or self._model.IdToPiece(i))
        return names

    def _parts(self, text: str) -> Iterator[tuple[str, int | None]]:
        """The stretches of a text, and the id of those that name a special token."""
        start = 0
        for special in self._split.finditer(text):
            if start < special.start():
                yield text[start : special.start()], None
            yield special[0], self._special[special[0]]
            start = special.end()
        if start < len(text):
            yield text[start:], None


class CLIPTokenizer:
    """CLIP's byte-pair encoding (Sennrich et al. 2016, on bytes), as GLIDE's noise-aware CLIP reads it.

    The vocabulary is 256 bytes, 256 bytes that end a word, one entry for each merge, then the start and the
    end token: these are 49406 and 49407 with CLIP's own 48,894 merges, and lower with fewer.
    """

    def __init__(self, merges: str | Path | Sequence[str | tuple[str, str]]) -> None:
        """merges: a file, or the merges themselves, most frequent first, as pairs or as "left right".

        Files: CLIP's `bpe_simple_vocab_16e6.txt`, gzipped or not, of which the first 48,894 merges are used
        as in CLIP, or a `merges.txt`. Raises SourceError for a file that is missing, cut, or something else.
        """
        if isinstance(merges, (str, Path)):
            lines: Sequence[str | tuple[str, str]] = _merge_lines(Path(merges))
            where = str(merges)
        else:
            lines, where = list(merges), "merges"
        self.merges = [_merge(line, where, number) for number, line in enumerate(lines[:CLIP_MERGES])]
        self._rank = {pair: rank for rank, pair in enumerate(self.merges)}
        if len(self._rank) != len(self.merges):
            raise SourceError(
                f"{where}: a merge stands there twice; a list of byte-pair merges has each once"
            )
        self._byte_names = _byte_names()
        names = list(self._byte_names.values())
        names += [name + "</w>" for name in names] + ["".join(pair) for pair in self.merges]
        self._ids = {name: i for i, name in enumerate(names)}
        self.start, self.end = len(names), len(names) + 1
        self.vocab_size = len(names) + 2
        self._known: dict[str, list[int]] = {START: [self.start], END: [self.end]}

    def encode(self, text: str, context: int = 77) -> tuple[list[int], int]:
        """The text as `context` ids and their number: start, at most context - 2 pairs, end, then zeros."""
        if isinstance(context, bool) or not isinstance(context, int) or context < 2:
            raise InputError(f"context={context!r} must be a whole number, at least 2")
        pairs = [i for word in words(clean(checked_text(text))) for i in self.word(word)]
        ids = [self.start, *pairs[: context - 2], self.end]
        return ids + [0] * (context - len(ids)), len(ids)

    def save(self, path: str | Path) -> None:
        """Write the merges as a `merges.txt`, whole or not at all."""
        path = Path(path)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        lines = ["#version: 0.2", *(" ".join(pair) for pair in self.merges)]
        try:
            part.write_text("\n".join(lines) + "\n", encoding="utf-8")
            part.replace(path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise SourceError(f"cannot write {path} ({error}); give a file in a writable folder") from error

    def names(self) -> dict[str, int]:
        """Every token's name and id, as a `vocab.json` holds them."""
        return {**self._ids, START: self.start, END: self.end}

    def word(self, word: str) -> list[int]:
        """A word's ids: its bytes, merged pair by pair, the earliest-ranked pair first."""
        if word not in self._known:
            parts = [self._byte_names[byte] for byte in word.encode("utf-8")]
            parts[-1] += "</w>"
            while len(parts) > 1:
                ranks = [self._rank.get(pair, CLIP_MERGES) for pair in pairwise(parts)]
                best = min(ranks)
                if best == CLIP_MERGES:
                    break
                left, right = self.merges[best]
                merged, i = [], 0
                while i < len(parts):
                    together = parts[i] == left and parts[i + 1 : i + 2] == [right]
                    merged.append(left + right if together else parts[i])
                    i += 2 if together else 1
                parts = merged
            self._known[word] = [self._ids[part] for part in parts]
        return self._known[word]


def clean(text: str) -> str:
    """A text as CLIP's encoding sees it: straight quotes, HTML escapes resolved, single spaces, lower case.

    The released code first runs ftfy over it. Of that, this does what well-formed text needs: composed
    characters (NFC) and straight quotes. Garbled encodings (mojibake) are not repaired.
    """
    text = unicodedata.normalize("NFC", text).translate(_QUOTES)
    text = html.unescape(html.unescape(text))
    return re.sub(r"\s+", " ", text).strip().lower()


def words(text: str) -> list[str]:
    """CLIP's split: contractions' ends, runs of letters, single numerals, runs of anything else but space.

    Letters and numerals are Unicode's categories L and N, which the standard library's patterns cannot
    name (`\\w` mixes both), hence the two passes: classes first, then a pattern over them.
    """
    kinds = "".join(_kind(char) for char in text)
    found, i = [], 0
    while i < len(text):
        fixed = _FIXED.match(text, i)
        if fixed is not None:
            end = fixed.end()
        else:
            end = i + 1
            if kinds[i] in "LO":
                while end < len(text) and kinds[end] == kinds[i]:
                    end += 1
        if fixed is not None or kinds[i] != " ":
            found.append(text[i:end])
        i = end
    return found


_FIXED = re.compile(r"<\|startoftext\|>|<\|endoftext\|>|'(?:s|t|re|ve|m|ll|d)", re.IGNORECASE)
_QUOTES = {ord(c): "'" for c in "ʼ‘’‚‛"} | {ord(c): '"' for c in "“”„‟"}


def _kind(char: str) -> str:
    if char.isspace():
        return " "
    category = unicodedata.category(char)[0]
    return category if category in "LN" else "O"


def _byte_names() -> dict[int, str]:
    """A printable character for each byte: itself where it prints in Latin-1, else one from U+0100 on."""
    printing = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    names = {byte: chr(byte) for byte in printing}
    others = (byte for byte in range(256) if byte not in names)
    return names | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _merge_lines(path: Path) -> list[str]:
    if not path.is_file():
        raise SourceError(
            f"there is no file {path}: give CLIP's bpe_simple_vocab_16e6.txt.gz or a merges.txt"
        )
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise SourceError(
            f"{path} is not a whole list of merges, gzipped or plain ({error}); download it again"
        ) from error
    lines = text.rstrip("\n").split("\n")
    lines = lines[1:] if "#version" in lines[0] else [line for line in lines if line]
    if not lines:
        raise SourceError(f"{path} holds no merges: it is cut or another file; download it again")
    return lines


def _merge(line: str | tuple[str, str], where: str, number: int) -> tuple[str, str]:
    pair = tuple(line.split(" ")) if isinstance(line, str) else tuple(line)
    if len(pair) != 2 or not all(isinstance(part, str) and part for part in pair):
        raise SourceError(
            f"{where}: merge {number} is {str(line)[:80]!r}; two parts and one space between are expected"
        )
    return pair


def checked_text(text: str) -> str:
    if not isinstance(text, str):
        raise InputError(f"a text must be a str, not {type(text).__name__} ({text!r})")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"the text {text!r} holds half a character ({error.reason}); remove it") from error
    return text
