"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from .errors import SourceError


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all: a neighbour first, then renamed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    except OSError as error:
        raise SourceError(f"{path} cannot be written ({error}); choose a folder you can write to") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise SourceError(
                f"{path} cannot be written ({error}); make room or choose another folder"
            ) from error
        raise


def remove_leftovers(folder: Path) -> None:
    """Delete the unfinished neighbours that a killed process left in a folder, where that is allowed."""
    for path in folder.glob(".*.part"):
        with contextlib.suppress(OSError):
            path.unlink()


def _umask() -> int:
    current = os.umask(0o022)
    os.umask(current)
    return current
