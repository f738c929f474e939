"""One file from a plain URL to a path: with resume, size and checksum checks, and whole or not at all."""

from __future__ import annotations

import base64
import hashlib
import http.client
import os
import shutil
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from ..errors import CapacityError, SourceError

CHUNK = 1 << 20
TIMEOUT = 60  # seconds without a byte


def fetch(url: str, path: Path, *, progress: bool | None = None) -> Path:
    """Download `url` to `path` unless it is there. Returns the path.

    An interrupted download leaves `.NAME.part` beside it, and the next call goes on from its end if the
    server says that the file is still the same (its ETag or date); else it starts anew. The length is compared
    with Content-Length, the content with Content-MD5 where the server gives one. progress None = a bar where there
    is a terminal, as the hub's client shows one. SourceError says what went
    wrong; CapacityError that the disk is too small, before anything is written.
    """
    if path.is_file():
        return path
    part = path.with_name(f".{path.name}.part")
    mark = path.with_name(f".{path.name}.part.mark")  # what the server called the version that part is of
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        have = part.stat().st_size if part.is_file() else 0
        version = mark.read_text() if mark.is_file() else ""
    except OSError as error:
        raise SourceError(f"{path} cannot be written ({error}); choose a folder you can write to") from error
    headers = {"User-Agent": "mtl_anagram"}
    if have and version:
        headers |= {"Range": f"bytes={have}-", "If-Range": version}
    try:
        answer = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # the part is as long as the file, or longer
            _remove(part, mark)
            return fetch(url, path, progress=progress)
        raise SourceError(
            f"{url}: the server answers {error.code} {error.reason}; try again later, or give a folder that "
            "holds the file"
        ) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise SourceError(
            f"{url} cannot be reached ({error}); check the connection, or give a folder that holds the file"
        ) from error
    with answer:
        resumed = getattr(answer, "status", None) == 206 and have > 0
        start = have if resumed else 0
        length = answer.headers.get("Content-Length")
        total = start + int(length) if length is not None and length.isdigit() else None
        free = shutil.disk_usage(path.parent).free
        if total is not None and free < total - have:
            raise CapacityError(
                f"{path.parent} has {free:,} bytes free, but {path.name} needs {total - have:,} more: make room, or "
                "choose another folder"
            )
        if not resumed:
            version = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
        _receive(answer, url, part, mark, version, start, total, progress)
        _check_content(answer.headers.get("Content-MD5"), resumed, url, part, mark)
    os.replace(part, path)
    mark.unlink(missing_ok=True)
    return path


def _receive(
    answer: Any,
    url: str,
    part: Path,
    mark: Path,
    version: str,
    start: int,
    total: int | None,
    progress: bool | None,
) -> None:
    from tqdm import tqdm

    bar = tqdm(
        total=total,
        initial=start,
        unit="B",
        unit_scale=True,
        desc=url.rpartition("/")[2],
        disable=None if progress is None else not progress,
    )
    done = start
    try:
        with bar, open(part, "r+b" if start else "wb") as file:
            mark.write_text(version)
            file.seek(start)
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                done += len(chunk)
                bar.update(len(chunk))
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
    except (OSError, http.client.HTTPException) as error:
        raise SourceError(
            f"{url} broke off after {done:,} bytes ({error}); the same call goes on from there"
        ) from error
    if total is not None and done != total:
        raise SourceError(
            f"{url} broke off after {done:,} of {total:,} bytes; the same call goes on from there"
        )


def _check_content(expected: str | None, resumed: bool, url: str, part: Path, mark: Path) -> None:
    """Compare the whole file with the server's MD5; of a resumed answer the header would be of the rest alone."""
    if expected is None or resumed:
        return
    digest = hashlib.md5(usedforsecurity=False)
    with open(part, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    if base64.b64encode(digest.digest()).decode() != expected.strip():
        _remove(part, mark)
        raise SourceError(f"{url}: what arrived has another MD5 than the server names; try again")


def _remove(*paths: Path) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
