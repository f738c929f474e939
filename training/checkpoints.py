"""Checkpoints in pieces: whole or not at all, no file above 15 MB, so that they travel like the code does."""

import io
import json
from pathlib import Path
from typing import Any

import torch

from mtl_anagram.files.atomic import write_atomically

PIECE = 15_000_000  # bytes


def save(state: dict[str, Any], folder: Path) -> None:
    """Write a state as folder/checkpoint-N.00, .01, ... and then checkpoint.json, which names them.

    The pieces of the checkpoint before are deleted last, so that one whole checkpoint is there at any moment.
    """
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    old = _index(folder)
    number = old["number"] + 1 if old else 0
    names = [f"checkpoint-{number}.{i:02d}" for i in range(-(-len(content) // PIECE))]
    for i, name in enumerate(names):
        write_atomically(folder / name, content[i * PIECE : (i + 1) * PIECE])
    index = {"number": number, "bytes": len(content), "pieces": names}
    write_atomically(folder / "checkpoint.json", (json.dumps(index) + "\n").encode())
    for name in old["pieces"] if old else []:
        (folder / name).unlink(missing_ok=True)


def load(folder: Path) -> dict[str, Any] | None:
    """The state that lies in the folder, or None. SystemExit where a piece is missing or cut short."""
    index = _index(folder)
    if index is None:
        return None
    missing = [name for name in index["pieces"] if not (folder / name).is_file()]
    content = b"".join((folder / name).read_bytes() for name in index["pieces"] if name not in missing)
    if missing or len(content) != index["bytes"]:
        raise SystemExit(
            f"{folder}: the checkpoint has {len(content)} of {index['bytes']} bytes; bring all of "
            f"{', '.join(index['pieces'])}, or delete checkpoint.json to begin anew"
        )
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _index(folder: Path) -> dict[str, Any] | None:
    path = folder / "checkpoint.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
