"""Stage III's tokenizer: CLIP's byte pairs as the hub's CLIPTokenizer reads them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError, SourceError
from ..sources import Source, open_source, read_json, require
from ..tokenizers import END, START, CLIPTokenizer, checked_text, words

PAD = "!"  # the released special_tokens_map.json's, over tokenizer_config.json's end token


class UpscalerTokenizer:
    """Prompts to token ids, from `vocab.json` and `merges.txt`.

    Other than GLIDE's CLIP tokenizer, which has the same merges: no HTML escapes are resolved and no quotes
    straightened; texts are padded with the token "!", id 0; and since that is a special token, every "!" in a
    prompt is cut out and read as id 0, too.
    """

    def __init__(self, merges: str | Path, vocab: Mapping[str, int] | None = None, *, pad: str = PAD) -> None:
        """merges: a `merges.txt`; vocab: the content of `vocab.json`, which must be the merges' own.

        Raises SourceError where the two do not belong together, or pad is no token.
        """
        self._pairs = CLIPTokenizer(merges)
        names = self._pairs.names()
        if vocab is not None and dict(vocab) != names:
            differ = [name for name in {**names, **vocab} if names.get(name) != vocab.get(name)]
            raise SourceError(
                f"{merges} and its vocab.json do not belong together: they differ in {len(differ)} tokens, such as "
                f"{differ[0]!r}; download both again"
            )
        if pad not in names:
            raise SourceError(f"the padding token {pad!r} is none of the vocabulary's {len(names)} tokens")
        self.pad = names[pad]
        self.vocab_size = len(names)
        self._special = {START: names[START], END: names[END], pad: self.pad}
        self._split = re.compile("|".join(map(re.escape, sorted(self._special, key=len, reverse=True))))

    @classmethod
    def from_source(cls, source: Source, *, subfolder: str | None = "tokenizer") -> UpscalerTokenizer:
        """From a folder or a hub repository with vocab.json, merges.txt and maybe special_tokens_map.json."""
        files = open_source(source, subfolder, "vocab.json")
        pad = PAD
        special = files.get("special_tokens_map.json")
        if special is not None:
            pad = _name(read_json(special).get("pad_token", PAD), special)
        return cls(require(files, "merges.txt"), read_json(require(files, "vocab.json")), pad=pad)

    def __call__(self, texts: Sequence[str], max_length: int = 77) -> Tensor:
        """B texts -> ids (B, max_length) long: the start, at most max_length - 2 tokens, the end, padding."""
        if isinstance(texts, str) or not isinstance(texts, Sequence) or not texts:
            raise InputError(f"texts={texts!r} must be a list of at least one str")
        if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 2:
            raise InputError(f"max_length={max_length!r} must be a whole number, at least 2")
        ids = torch.full((len(texts), max_length), self.pad, dtype=torch.long)
        for row, text in enumerate(texts):
            tokens = [self._special[START], *self.encode(text)[: max_length - 2], self._special[END]]
            ids[row, : len(tokens)] = torch.tensor(tokens)
        return ids

    def encode(self, text: str) -> list[int]:
        """The text's ids, without start and end, neither cut nor padded."""
        text = checked_text(text)
        ids: list[int] = []
        start = 0
        for special in [*self._split.finditer(text), None]:
            part = text[start : special.start() if special else len(text)]
            ids += [i for word in words(_clean(part)) for i in self._pairs.word(word)]
            if special:
                ids.append(self._special[special[0]])
                start = special.end()
        return ids


def tokenizer_files(source: Source, subfolder: str | None = "tokenizer") -> dict[str, Path]:
    """The files that decide the ids, by name."""
    files = open_source(source, subfolder, "vocab.json")
    found = {name: files.get(name) for name in ("vocab.json", "merges.txt", "special_tokens_map.json")}
    return {name: path for name, path in found.items() if path is not None}


def _clean(text: str) -> str:
    """Composed characters, single spaces, lower case."""
    return re.sub(r"\s+", " ", unicodedata.normalize("NFC", text)).lower()


def _name(token: Any, path: Path) -> str:
    name = token.get("content") if isinstance(token, Mapping) else token
    if not isinstance(name, str):
        raise SourceError(f"{path}: pad_token={token!r} is no token; download it again")
    return name
