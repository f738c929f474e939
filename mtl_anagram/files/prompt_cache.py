"""Prompts' text states kept on disk, so that a prompt that was read once needs no text encoder again."""

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import SourceError, whole_number
from .atomic import remove_leftovers, write_atomically
from .outputs import check_folder
from .shards import bytes_of, open_safetensors

FORMAT = "1"


class PromptCache:
    """A folder of text states, one safetensors file per prompt, at most max_bytes of them: else the oldest go.

    A file's name is a sha256 of the prompt and of all that its states depend on; a damaged file is named in a
    warning, and made anew. 2 GiB are 1,700 prompts of T5-XXL's. The folder may be deleted at any time.
    """

    def __init__(self, folder: str | Path, max_bytes: int = 2 << 30) -> None:
        self.folder = check_folder(folder, "prompt_cache")
        self.max_bytes = whole_number("max_bytes", max_bytes, 0)

    def states(
        self, texts: Sequence[str], about: Mapping[str, str], encode: Callable[[list[str]], Tensor]
    ) -> Tensor:
        """States (V, L, D) of V texts, in their order, on the CPU; `encode` is called for those not here, once.

        about: what they depend on besides the text. SourceError, before `encode`, for a folder one cannot write to.
        """
        about = {**about, "format": FORMAT}
        keys = {text: json.dumps({**about, "text": text}, sort_keys=True).encode() for text in texts}
        paths = {t: self.folder / f"{hashlib.sha256(key).hexdigest()}.safetensors" for t, key in keys.items()}
        found = {text: states for text in paths if (states := self._read(paths[text], text)) is not None}
        missing = [text for text in paths if text not in found]
        if missing:
            check_folder(self.folder, "prompt_cache", write=True)
            for text, states in zip(missing, encode(missing).detach().cpu(), strict=True):
                write_atomically(paths[text], encode_safetensors(states, {**about, "text": text}))
                found[text] = states
            self._prune(set(paths.values()))
        return torch.stack([found[text] for text in texts])

    def _read(self, path: Path, text: str) -> Tensor | None:
        if not path.is_file():
            return None
        try:
            with open_safetensors(path) as file:
                states, kept = file.get_tensor("states").clone(), file.metadata() or {}
            if (kept.get("text"), kept.get("sha256")) != (text, hashlib.sha256(bytes_of(states)).hexdigest()):
                raise SourceError(f"{path} does not hold what was written to it")
        except SourceError as error:
            warnings.warn(f"the prompt cache's file is made anew: {error}", stacklevel=4)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # used now: deleted late
        return states

    def _prune(self, keep: set[Path]) -> None:
        """Delete what was used longest ago until the rest fits, but nothing of this call."""
        remove_leftovers(self.folder, older=3600)
        with contextlib.suppress(OSError):  # another process may be pruning, too
            known = [(path.stat(), path) for path in self.folder.glob("[0-9a-f]" * 64 + ".safetensors")]
            total = sum(stat.st_size for stat, _ in known)
            for stat, path in sorted(known, key=lambda entry: entry[0].st_mtime_ns):
                if total > self.max_bytes and path not in keep:
                    path.unlink()
                    total -= stat.st_size


def encode_safetensors(states: Tensor, metadata: Mapping[str, str]) -> bytes:
    """A safetensors file of one floating tensor, "states"; safetensors.torch.save needs numpy, also in 0.8."""
    dtype = f"{'BF' if states.dtype == torch.bfloat16 else 'F'}{8 * states.element_size()}"
    content = bytes_of(states)
    about = {"dtype": dtype, "shape": list(states.shape), "data_offsets": [0, len(content)]}
    metadata = {**metadata, "sha256": hashlib.sha256(content).hexdigest()}
    header = json.dumps({"__metadata__": metadata, "states": about}).encode()
    header += b" " * (-len(header) % 8)  # the tensor begins at a multiple of 8
    return len(header).to_bytes(8, "little") + header + content
