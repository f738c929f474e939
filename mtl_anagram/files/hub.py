"""Where a model's files come from: a folder in the published layout, or a repository on the hub."""

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..errors import InputError, SourceError

Source = str | os.PathLike[str]
T = TypeVar("T")
REPO_ID = re.compile(r"(?a)(?!.*(--|\.\.))\b[\w.-]+\b/\b[\w.-]{1,96}\b(?<!\.git)")  # the hub's own rule
POINTER = b"version https://git-lfs.github.com/"  # how every Git LFS pointer begins
LICENCE = "accept its licence on its page at huggingface.co, then log in with `hf auth login` or set HF_TOKEN"
REMEDIES: dict[str | int | None, str] = {  # by the error's name, or what the server answers; None: nothing
    **dict.fromkeys(["GatedRepoError", 401, 403], LICENCE),
    "RepositoryNotFoundError": f"there is no such repository, or it is private or gated: check the name; {LICENCE}",
    429: "wait some minutes, or set HF_TOKEN, which raises the limit",
    None: "the hub cannot be reached, or the disk not be written to: check the connection, and HF_HUB_OFFLINE",
}


@dataclass
class Folder:
    """Files of a folder on disk."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def get(self, name: str) -> Path | None:
        """The file's path, or None where the folder has no such file. SourceError for a Git LFS pointer."""
        path = self.path / name
        try:
            if not path.is_file():
                return None
            with open(path, "rb") as file:
                pointer = file.read(len(POINTER)) == POINTER
        except OSError as error:
            raise SourceError(f"{path} cannot be read ({error}): allow it") from error
        if pointer:
            raise SourceError(f"{path} is a Git LFS pointer: run `git lfs pull`, or download it again")
        return path

    def listing(self) -> str:
        names = sorted(p.name for p in self.path.iterdir()) if self.path.is_dir() else []
        return f"the folder holds {', '.join(names[:8]) or 'nothing'}{', ...' if len(names) > 8 else ''}"


@dataclass
class Repository:
    """Files of a hub repository's subfolder, downloaded when asked for (fetch) and cached by huggingface_hub."""

    repo_id: str
    subfolder: str
    fetch: bool = True

    def __str__(self) -> str:
        return f"{self.repo_id}/{self.subfolder}".rstrip("/")

    def get(self, name: str) -> Path | None:
        """The file's path in the hub's cache, or None where the repository (fetch=False: the cache) has none."""
        from huggingface_hub import errors, hf_hub_download

        if not self.fetch:
            return self.cached(name)
        with hub_errors(self.repo_id, name):
            try:
                return Path(hf_hub_download(self.repo_id, name, subfolder=self.subfolder or None))
            except errors.EntryNotFoundError as error:
                # Offline, a cached repository that lacks this very file looks the same as an unreachable hub.
                unknown = not (self.cache / "snapshots").is_dir() or _status(error) is not None
                if isinstance(error, errors.LocalEntryNotFoundError) and unknown:
                    raise
                return None

    @property
    def cache(self) -> Path:
        """Where the hub's client keeps the repository."""
        from huggingface_hub.constants import HF_HUB_CACHE

        return Path(HF_HUB_CACHE, f"models--{self.repo_id.replace('/', '--')}")

    def cached(self, name: str) -> Path | None:
        """The file's path if it is in the hub's local cache, else None; asks no network."""
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(self.repo_id, f"{self.subfolder}/{name}".lstrip("/"))
        return Path(path) if isinstance(path, str) else None

    def listing(self) -> str:
        page = f"https://huggingface.co/{self.repo_id}/tree/main/{self.subfolder}"
        return f"see {page}; where HF_HUB_OFFLINE is set, unset it once to download"


Files = Folder | Repository


def _status(error: BaseException | None) -> int | None:
    """What a server answered (429, say), if an error or its causes hold an answer."""
    while error is not None and getattr(error, "response", None) is None:
        error = error.__cause__ or error.__context__
    return None if error is None else int(error.response.status_code)  # type: ignore[attr-defined]


@contextmanager
def hub_errors(repo_id: str, what: str) -> Iterator[None]:
    """Turn what the hub's client raises, its HTTP library's own errors too, into SourceErrors that say what to do."""
    try:
        yield
    except Exception as error:
        kind, status = type(error), _status(error)
        theirs = isinstance(error, OSError | RuntimeError) or kind.__module__.startswith(("http", "urllib3"))
        if not theirs:
            raise
        said = f"{kind.__name__}: {error}" if status is None else f"the hub answers {status}"
        remedy = REMEDIES.get(kind.__name__) or REMEDIES.get(status, "try again later")
        raise SourceError(f"{repo_id}: {what} cannot be had ({said}): {remedy}; or give a folder") from error


def open_source(source: Source, subfolder: str | None, *markers: str, fetch: bool = True) -> Files:
    """Where one of `markers` (config.json, say) and its kin lie: source/subfolder, or source if that is the folder."""
    try:
        path, inner = Path(source).expanduser(), Path(source, subfolder or "").expanduser()
        for folder in (inner, path):  # path: the model's own folder was given
            if source and any((folder / marker).is_file() for marker in markers):
                return Folder(folder)
        if source and inner.is_dir():
            return Folder(inner)
        if isinstance(source, str) and REPO_ID.fullmatch(source) and not path.exists():
            return Repository(source, subfolder or "", fetch)
        said = "is a file" if path.is_file() else "is no folder on this machine and no hub id (owner/name)"
        said += "; check the path"
        if source and path.is_dir():
            said = f"has no folder {subfolder!r}: {Folder(path).listing()}; give a whole release's, or the model's own"
    except TypeError as error:
        said = f"must be a path or a hub id, and {subfolder=} must be a name or None"
        raise InputError(f"source={source!r} {said}") from error
    except (OSError, RuntimeError) as error:  # too long, or "~somebody" who has no home here
        said = f"cannot be read as a path ({error}); give another"
    raise SourceError(f"source={os.fspath(source)!r} {said}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; SourceError for anything else."""
    try:
        return {**json.loads(path.read_text(encoding="utf-8"))}  # TypeError where it is something else
    except (OSError, ValueError, TypeError, RecursionError) as error:
        remedy = "check its path, or download it again"
        raise SourceError(f"{path} is no readable JSON object ({error}): {remedy}") from error


def read_config(path: Path, parse: Callable[[dict[str, Any]], T]) -> T:
    """What `parse` makes of a JSON file's object; its errors then name the file too."""
    content = read_json(path)
    try:
        return parse(content)
    except InputError as error:
        raise type(error)(f"{path}: {error}; change it back, or download the file again") from error


def require(files: Files, *names: str, remedy: str = "") -> Path:
    """The path of the first of these files that is there, or a SourceError that says what is there."""
    if (path := next(filter(None, map(files.get, names)), None)) is None:
        raise SourceError(f"{files} has no {' or '.join(names)}: {files.listing()}{remedy}")
    return path
