"""Prompts' text states kept on disk, so that a prompt that was read once needs no text encoder again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .atomic import write_atomically
from .checks import whole_number
from .errors import InputError, SourceError
from .models.shards import Shards, buffer_of, encode_safetensors

FORMAT = "1"
_REMEMBERED = "checksums.json"
_HOUR = 3600.0


class PromptCache:
    """A folder of text states, one safetensors file per prompt, at most max_bytes of them.

    A file's name is a sha256 of the prompt and of all that its states depend on, so that another model, dtype or
    prompt never finds it. Files are written atomically, and checked when they are read: a damaged one is
    named in a warning, and made anew. When the folder grows beyond max_bytes (2 GiB: 1,700 prompts of
    T5-XXL in float32), what was not used for longest is deleted. The folder may be deleted at any time.
    """

    def __init__(self, folder: str | Path, max_bytes: int = 2 << 30) -> None:
        if not isinstance(folder, str | Path) or not str(folder) or "\0" in str(folder):
            raise InputError(f"prompt_cache={folder!r} must be a folder's path, or None for no cache")
        self.max_bytes = whole_number("max_bytes", max_bytes, 0)
        try:
            self.folder = Path(folder).expanduser()
            if self.folder.exists() and not self.folder.is_dir():
                raise SourceError(f"prompt_cache={str(folder)!r} is a file; name a folder")
        except (OSError, RuntimeError) as error:
            if isinstance(error, SourceError):
                raise
            raise SourceError(
                f"prompt_cache={str(folder)!r} cannot be used ({error}); name another folder"
            ) from error

    def states(
        self, texts: Sequence[str], about: Mapping[str, str], encode: Callable[[list[str]], Tensor]
    ) -> Tensor:
        """States (V, L, D) of V texts, in their order, on the CPU; `encode` is called for those not here, once.

        about: what the states depend on besides the text (weights, dtypes, length). encode(texts) must return
        (number of texts, L, D). Raises SourceError, before it is called, where the folder cannot be written to.
        """
        unique = list(dict.fromkeys(texts))
        found = {text: states for text in unique if (states := self._read(text, about)) is not None}
        missing = [text for text in unique if text not in found]
        if missing:
            self._check_room()
            made = encode(missing).detach().cpu()
            for text, states in zip(missing, made, strict=True):
                self._write(text, about, states)
                found[text] = states
            self._prune(keep={self._path(text, about) for text in unique})
        return torch.stack([found[text] for text in texts])

    def checksum(self, path: Path, compute: Callable[[Path], str]) -> str:
        """`compute(path)`, remembered until the file's size, times or place on the disk change."""
        try:
            absolute, about = str(path.resolve()), path.stat()
        except OSError:
            return compute(path)  # whose error says it better
        stamp = [about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino]
        remembered = self._remembered()
        entry = remembered.get(absolute)
        if isinstance(entry, list) and entry[:-1] == stamp and isinstance(entry[-1], str):
            return entry[-1]
        value = compute(path)
        # A file so young could change once more within the clock's tick, and would look the same.
        if time.time_ns() - max(about.st_mtime_ns, about.st_ctime_ns) > 2_000_000_000:
            with contextlib.suppress(SourceError):  # the next start reads it again, that is all
                content = {**remembered, absolute: [*stamp, value]}
                write_atomically(self.folder / _REMEMBERED, json.dumps(content, indent=1).encode())
        return value

    def clear(self) -> int:
        """Delete all states; returns how many there were."""
        files = self._files()
        for path in files:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
        return len(files)

    def _path(self, text: str, about: Mapping[str, str]) -> Path:
        key = json.dumps({**about, "format": FORMAT, "text": text}, sort_keys=True)
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"

    def _read(self, text: str, about: Mapping[str, str]) -> Tensor | None:
        path = self._path(text, about)
        if not path.is_file():
            return None
        try:
            shards = Shards([path])
            states = shards.read("states")
            if shards.metadata.get("sha256") != _sha256(states):
                raise SourceError(f"{path} does not hold what was written to it")
            if states.ndim != 2 or not states.is_floating_point() or shards.metadata.get("text") != text:
                raise SourceError(f"{path} holds something else than this prompt's states")
        except (SourceError, KeyError) as error:
            warnings.warn(f"the prompt cache's {path} is damaged and is made anew: {error}", stacklevel=4)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # used now: deleted late
        return states

    def _write(self, text: str, about: Mapping[str, str], states: Tensor) -> None:
        states = states.contiguous()
        metadata = {**about, "format": FORMAT, "text": text, "sha256": _sha256(states)}
        write_atomically(self._path(text, about), encode_safetensors({"states": states}, metadata))

    def _check_room(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SourceError(
                f"prompt_cache={str(self.folder)!r} cannot be made ({error}); name another folder"
            ) from error
        if not os.access(self.folder, os.W_OK | os.X_OK):
            raise SourceError(
                f"prompt_cache={str(self.folder)!r} cannot be written to; name a folder that you can write to"
            )

    def _prune(self, keep: set[Path]) -> None:
        """Delete what was used longest ago until the rest fits, but nothing of this call."""
        for part in self.folder.glob(".*.part"):  # a killed process's; a living one's is younger
            with contextlib.suppress(OSError):
                if time.time() - part.stat().st_mtime > _HOUR:
                    part.unlink()
        known = []
        for path in self._files():
            with contextlib.suppress(OSError):  # another process may be pruning, too
                about = path.stat()
                known.append((about.st_mtime_ns, about.st_size, path))
        total = sum(size for _, size, _ in known)
        for _, size, path in sorted(known):
            if total <= self.max_bytes:
                break
            if path not in keep:
                path.unlink(missing_ok=True)
                total -= size

    def _files(self) -> list[Path]:
        return [path for path in self.folder.glob("*.safetensors") if len(path.stem) == 64]

    def _remembered(self) -> dict[str, object]:
        try:
            content = json.loads((self.folder / _REMEMBERED).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}  # absent or damaged: everything is read again
        return content if isinstance(content, dict) else {}


def _sha256(states: Tensor) -> str:
    return hashlib.sha256(buffer_of(states)).hexdigest()
