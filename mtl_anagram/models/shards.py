"""Where each tensor's bytes lie in safetensors files, and reading them without keeping the files in memory.

A memory-mapped file counts as the process's memory for as long as its pages are mapped, so a model of 10 GB
that is walked through once would look, and to a memory limit be, 10 GB large. Here only the files' headers are
parsed, and bytes are read into a buffer that the caller owns and reuses.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import SourceError, WeightsError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_MAX_HEADER = 100_000_000  # bytes, the format's own limit
_BLOCK = 1 << 24


@dataclass(frozen=True)
class Entry:
    """One tensor's place: its file, where its bytes begin there, its dtype and shape."""

    path: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.bytes_in(self.dtype)

    def bytes_in(self, dtype: torch.dtype) -> int:
        """What the tensor would take up in another dtype."""
        return math.prod(self.shape) * dtype.itemsize


class Shards(Mapping[str, Entry]):
    """The tensors of one model's safetensors files by name; nothing but the headers is read on making it.

    Raises SourceError for a file that is truncated or something else, and WeightsError where two files (or two
    names that `aliases` makes one) hold different values under one name.
    """

    def __init__(self, paths: Sequence[Path], *, aliases: Mapping[str, str] | None = None) -> None:
        self.origin = str(paths[0] if len(paths) == 1 else paths[0].parent)
        self.metadata: dict[str, Any] = {}  # the files' own notes
        self._entries: dict[str, Entry] = {}
        for path in paths:
            entries, metadata = _parse(path)
            self.metadata |= metadata
            for name, entry in entries.items():
                name = (aliases or {}).get(name, name)
                there = self._entries.get(name)
                if there is not None and not _same(there, entry):
                    raise WeightsError(
                        f"{path} holds {name} a second time, with other values; download it again"
                    )
                self._entries[name] = entry

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Any:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        entry = self[name]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        read_into(entry, buffer_of(tensor))
        return tensor

    def read_rows(self, name: str, rows: Tensor) -> Tensor:
        """Some rows of a matrix (V, D): rows (R,) their numbers -> (R, D); the others' bytes are not read."""
        entry = self[name]
        width = entry.shape[1]
        out = torch.empty(len(rows), width, dtype=entry.dtype)
        target, size = buffer_of(out), width * entry.dtype.itemsize
        with _opened(entry.path) as file:
            for i, row in enumerate(rows.tolist()):
                _fill(file, entry.path, entry.start + row * size, target[i * size : (i + 1) * size])
        return out


def read_into(entry: Entry, buffer: memoryview) -> None:
    """Fill the first entry.nbytes of a writable buffer of bytes with the tensor's."""
    with _opened(entry.path) as file:
        _fill(file, entry.path, entry.start, buffer[: entry.nbytes])


def buffer_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, to read a file into or to write out."""
    size = tensor.numel() * tensor.element_size()
    if not size:
        return memoryview(bytearray())
    array = (ctypes.c_char * size).from_address(tensor.data_ptr())
    array.tensor = tensor  # type: ignore[attr-defined]  # lives as long as the view of its memory
    return memoryview(array).cast("B")


def _opened(path: Path) -> Any:
    try:
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error}); allow it, or download it again") from error


def _fill(file: Any, path: Path, start: int, buffer: memoryview) -> None:
    try:
        file.seek(start)
        done = 0
        while done < len(buffer):  # one call reads at most 2 GB
            count = file.readinto(buffer[done:])
            if not count:
                raise OSError(f"it ends {len(buffer) - done} bytes too early")
            done += count
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error}); download it again") from error


def encode_safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file; the package's own function asks for numpy in the versions before 0.8."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    parts, at = [], 0
    for name, tensor in tensors.items():
        parts.append(bytes(buffer_of(tensor.detach().cpu().contiguous())))
        offsets = [at, at + len(parts[-1])]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        at = offsets[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def _parse(path: Path) -> tuple[dict[str, Entry], dict[str, Any]]:
    """A file's header as entries and metadata; SourceError for anything but a whole safetensors file."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise ValueError(f"{size} bytes with a header of {length}")
            header = json.loads(file.read(length))
        metadata = dict(header.pop("__metadata__", {}))
        found, end = {}, 8 + length
        for name, about in header.items():
            start, stop = (8 + length + int(offset) for offset in about["data_offsets"])
            if about["dtype"] not in DTYPES:
                raise ValueError(f"the tensor {name} has the unknown dtype {about['dtype']!r}")
            entry = Entry(path, start, DTYPES[about["dtype"]], tuple(map(int, about["shape"])))
            if start < 8 + length or stop - start != entry.nbytes or min(entry.shape, default=0) < 0:
                raise ValueError(f"the tensor {name} does not fill its place")
            found[name], end = entry, max(end, stop)
        if end != size:
            raise ValueError(f"{size} bytes, where the header describes {end}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SourceError(
            f"{path} is not a whole safetensors file ({type(error).__name__}: {error}); delete it and download "
            "it again"
        ) from error
    return found, metadata


def _same(one: Entry, other: Entry) -> bool:
    """Whether two tensors' shapes, dtypes and bytes are equal, compared block by block."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    blocks = [memoryview(bytearray(min(_BLOCK, one.nbytes))) for _ in range(2)]
    with _opened(one.path) as first, _opened(other.path) as second:
        for at in range(0, one.nbytes, _BLOCK):
            size = min(_BLOCK, one.nbytes - at)
            _fill(first, one.path, one.start + at, blocks[0][:size])
            _fill(second, other.path, other.start + at, blocks[1][:size])
            if blocks[0][:size] != blocks[1][:size]:
                return False
    return True
