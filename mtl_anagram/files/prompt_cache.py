"""Prompts' text states kept on disk, so that a prompt that was read once needs no text encoder again."""

import hashlib
import io
import json
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .atomic import write_atomically
from .outputs import check_folder


class PromptCache:
    """A folder of text states, one file (torch.save) per prompt; it may be deleted at any time.

    A file's name is a sha256 of the prompt and of all that its states depend on; a damaged file is named in a
    warning, and made anew. A prompt of T5-XXL's takes 1.2 MB.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = check_folder(folder, "prompt_cache")

    def states(
        self, texts: Sequence[str], about: Mapping[str, str], encode: Callable[[list[str]], Tensor]
    ) -> Tensor:
        """States (V, L, D) of V texts, in their order, on the CPU; `encode` is called for those not here, once.

        about: what they depend on besides the text. SourceError, before `encode`, for a folder one cannot write to.
        """
        keys = {text: json.dumps({**about, "text": text}, sort_keys=True).encode() for text in texts}
        paths = {text: self.folder / f"{hashlib.sha256(key).hexdigest()}.pt" for text, key in keys.items()}
        found = {text: states for text in paths if (states := _read(paths[text])) is not None}
        missing = [text for text in paths if text not in found]
        if missing:
            check_folder(self.folder, "prompt_cache", write=True)
            for text, states in zip(missing, encode(missing).detach().cpu(), strict=True):
                found[text] = states.clone()
                torch.save(found[text], content := io.BytesIO())
                write_atomically(paths[text], content.getvalue())
        return torch.stack([found[text] for text in texts])


def _read(path: Path) -> Tensor | None:
    if not path.is_file():
        return None
    try:
        with torch.device("cpu"), torch.inference_mode(False):
            states = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(states, Tensor) or zipfile.ZipFile(path).testzip() is not None:
            raise ValueError("it does not hold what was written to it")
        return states
    except Exception as error:  # whatever the bytes lead it to
        warnings.warn(f"the prompt cache's file is made anew: {path} ({error})", stacklevel=4)
        return None
