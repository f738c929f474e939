"""Preview: the picture as it forms, in a file that is rewritten, and in a notebook."""

import sys
from pathlib import Path
from typing import Any

import torch

from .atomic import write_atomically
from .images import encode_png


class Preview:
    """An `on_step` that shows the clean pictures which each step predicts, those of a batch in a row.

    path: a PNG that is written anew at every step, or None. In a notebook an image below the cell changes, too.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path, self._shown = path and Path(path), None

    def __call__(self, seeds: list[int], stage: int, state: Any) -> None:
        pictures = state.x0 if stage < 3 else state.picture
        if pictures is None:
            return
        content = encode_png(torch.cat(list(pictures), dim=-1))
        if self.path:
            write_atomically(self.path, content)
        if (notebook := sys.modules.get("IPython")) and notebook.get_ipython():
            image = notebook.display.Image(content)
            if self._shown is None:
                self._shown = notebook.display.display(image, display_id=True)
            else:
                self._shown.update(image)
