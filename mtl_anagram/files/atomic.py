"""Files that are there whole or not at all."""

import contextlib
import os
import secrets
from pathlib import Path

from ..errors import SourceError


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all: a neighbour first, then renamed."""
    part = path.parent / f".{path.name}.{secrets.token_hex(4)}.part"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise SourceError(f"{path} cannot be written ({error}); make room, or name another folder") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def remove_leftovers(folder: Path) -> None:
    """Delete the unfinished neighbours that a killed process left, where that is allowed."""
    for path in folder.glob(".*.part"):
        with contextlib.suppress(OSError):
            path.unlink()
