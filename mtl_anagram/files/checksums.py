"""What identifies files."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

from ..errors import SourceError

WHOLE, SAMPLE, SAMPLES = 64 << 20, 1 << 18, 64  # a file up to WHOLE is read whole, else 64 parts of 256 KiB
SAMPLED = "sampled:"


def checksum_of(path: Path, like: str = "") -> str:
    """What identifies a file: its sha256, or of more than 64 MB the size and 64 parts spread evenly ("sampled:...").

    A large file in the hub's cache bears its sha256 as its name and is not read. like: a recorded checksum, whose kind
    is made again, so that a record from another place or an older version can be compared.
    """
    sampled, blob = like.startswith(SAMPLED), path.resolve()
    if not sampled and blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return blob.name
    try:
        size = path.stat().st_size
        whole = not sampled and (bool(like) or size <= WHOLE)
        digest = hashlib.sha256(b"" if whole else str(size).encode())
        # The first sample has the header: all names, shapes and dtypes.
        spread = [max(0, size - SAMPLE) * i // (SAMPLES - 1) for i in range(SAMPLES)]
        with open(path, "rb") as file:
            for start in range(0, size, SAMPLE) if whole else spread:
                file.seek(start)
                digest.update(file.read(SAMPLE))
        return digest.hexdigest() if whole else SAMPLED + digest.hexdigest()
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error}); allow it, or download it again") from error


def combined_checksum(checksums: Mapping[str, str]) -> str:
    """One sha256 for a set of files: of their names and checksums."""
    return hashlib.sha256(json.dumps(dict(checksums), sort_keys=True).encode()).hexdigest()
