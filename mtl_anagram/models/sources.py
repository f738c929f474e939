"""Where a model's files come from: a folder in the published layout, or a repository on the hub."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from ..errors import InputError, SourceError

Source = str | os.PathLike[str]
T = TypeVar("T")


class Folder:
    """Files of a folder on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def get(self, name: str) -> Path | None:
        """The file's path, or None where the folder has no such file."""
        path = self.path / name
        try:
            return path if path.is_file() else None
        except OSError as error:  # a name that is too long, say
            raise SourceError(f"{path} cannot be looked up ({error}); give another name or folder") from error

    def listing(self) -> str:
        """What is there instead, for error messages."""
        names = sorted(p.name for p in self.path.iterdir()) if self.path.is_dir() else []
        shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        return f"the folder holds {shown}" if names else "the folder is empty"


class Repository:
    """Files of a hub repository's subfolder, downloaded when asked for and cached by huggingface_hub."""

    def __init__(self, repo_id: str, subfolder: str) -> None:
        self.repo_id = repo_id
        self.subfolder = subfolder

    def __str__(self) -> str:
        return f"{self.repo_id}/{self.subfolder}".rstrip("/")

    def get(self, name: str, local: Path | None = None) -> Path | None:
        """The file's path, or None where the repository has no such file.

        It lies in the hub's cache, or below the folder `local`, in the repository's own layout.
        """
        from huggingface_hub import errors as hub
        from huggingface_hub import hf_hub_download

        place: dict[str, Any] = {} if local is None else {"local_dir": local}
        with hub_errors(self.repo_id, name):
            try:
                return Path(hf_hub_download(self.repo_id, name, subfolder=self.subfolder or None, **place))
            except hub.LocalEntryNotFoundError as error:
                # Offline, a cached repository that lacks this very file looks the same as an unreachable hub.
                if self.cached("config.json") is not None:
                    return None
                raise SourceError(
                    f"{self.repo_id}: the hub cannot be reached and {name} is not in the local cache; check the "
                    "connection (and HF_HUB_OFFLINE), or give a folder that holds the files"
                ) from error
            except hub.EntryNotFoundError:
                return None

    def cached(self, name: str) -> Path | None:
        """The file's path if it is in the hub's local cache, else None; asks no network."""
        from huggingface_hub import errors as hub
        from huggingface_hub import try_to_load_from_cache

        prefix = f"{self.subfolder}/" if self.subfolder else ""
        try:
            path = try_to_load_from_cache(self.repo_id, f"{prefix}{name}")
        except hub.HFValidationError as error:
            raise InputError(f"{self.repo_id!r} is neither a folder nor a hub id (owner/name)") from error
        return Path(path) if isinstance(path, str) else None

    def listing(self) -> str:
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            return "it is not in the hub's local cache, and HF_HUB_OFFLINE is set: unset it once to download"
        return f"see https://huggingface.co/{self.repo_id}/tree/main/{self.subfolder}"


Files = Folder | Repository


@contextmanager
def hub_errors(repo_id: str, what: str) -> Iterator[None]:
    """Turn what the hub's client raises into errors that say what to do."""
    from huggingface_hub import errors as hub

    try:
        yield
    except (SourceError, hub.EntryNotFoundError):
        raise
    except hub.GatedRepoError as error:
        raise SourceError(
            f"{repo_id} is gated: accept its licence on its page at huggingface.co, then log in with "
            "`hf auth login` or set HF_TOKEN"
        ) from error
    except hub.RepositoryNotFoundError as error:
        raise SourceError(
            f"{repo_id}: no such repository on the hub, or it is private or gated and no token is set; "
            "check the name, accept the licence on its page, and set HF_TOKEN"
        ) from error
    except hub.HFValidationError as error:
        raise InputError(f"{repo_id!r} is neither a folder nor a hub id (owner/name)") from error
    except (OSError, hub.HfHubHTTPError) as error:
        raise SourceError(
            f"{repo_id}: {what} could not be fetched ({type(error).__name__}: {error}); try again, or "
            "give a folder that holds the files"
        ) from error
    except Exception as error:
        # The hub's client raises its HTTP library's own errors for a dead connection.
        if type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3")):
            raise SourceError(
                f"{repo_id}: the hub cannot be reached ({type(error).__name__}); check the "
                "connection, or give a folder that holds the files"
            ) from error
        raise


def open_source(source: Source, subfolder: str | None, marker: str) -> Files:
    """Where `marker` (config.json, say) and its kin lie: source/subfolder, or source if that is the folder.

    Raises InputError for what is neither a path nor a hub id, SourceError for a folder that is not there.
    """
    if not isinstance(source, str | os.PathLike) or not os.fspath(source):
        raise InputError(f"source={source!r} must be a folder's path or a hub id such as 'owner/name'")
    if subfolder is not None and not isinstance(subfolder, str):
        raise InputError(f"subfolder={subfolder!r} must be a name, or None for the source itself")
    text = os.fspath(source)
    if "\0" in str(text) or "\0" in (subfolder or ""):
        raise InputError(f"source={source!r} holds a null character, which no path can have")
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:  # "~somebody" who has no home here
        raise SourceError(
            f"source={text!r} cannot be read as a path: {error}; write it without '~'"
        ) from error
    try:
        exists, is_dir = path.exists(), path.is_dir()
    except OSError as error:
        raise SourceError(f"source={text!r} cannot be read as a path: {error}") from error
    if is_dir:
        inner = path / subfolder if subfolder else path
        if (inner / marker).is_file() or not (path / marker).is_file():
            if not inner.is_dir():
                raise SourceError(
                    f"{path} has no folder {subfolder!r}: {Folder(path).listing()}; give the folder of a whole "
                    "release, or of the model itself"
                )
            return Folder(inner)
        return Folder(path)  # the model's own folder was given
    if exists:
        raise SourceError(f"{path} is a file; give the folder that holds it")
    if isinstance(source, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", text) and text[0] not in "./~":
        return Repository(text, subfolder or "")
    raise SourceError(
        f"{text!r} is no folder on this machine and no hub id (owner/name); check the path, or give an id"
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; SourceError for anything else."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{path} is not readable as JSON ({error}); download or write it again") from error
    if not isinstance(content, dict):
        raise SourceError(
            f"{path} holds a JSON {type(content).__name__}, not an object; download or write it again"
        )
    return content


def read_config(path: Path, parse: Callable[[dict[str, Any]], T]) -> T:
    """What `parse` makes of a JSON file's object; its errors then name the file too."""
    content = read_json(path)
    try:
        return parse(content)
    except InputError as error:
        raise type(error)(f"{path}: {error}; change it back, or download the file again") from error


def require(files: Files, name: str) -> Path:
    """The file's path, or a SourceError that says what is there."""
    path = files.get(name)
    if path is None:
        raise SourceError(f"{files} has no {name}: {files.listing()}")
    return path
