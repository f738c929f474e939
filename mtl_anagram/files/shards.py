"""safetensors files, memory-mapped: names, shapes and dtypes at once, values when they are used."""

import ctypes
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import SourceError, WeightsError


def read_safetensors(path: Path, *names: str) -> dict[str, Tensor]:
    """A file's tensors by name (none named = all), memory-mapped, on the CPU; SourceError for a cut or other file."""
    try:
        # Whatever the host has set: else tensors could be on another device, or take part in no gradient.
        with torch.device("cpu"), torch.inference_mode(False), safe_open(path, "pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in names or file.keys()}
    except (SafetensorError, OSError, TypeError, ValueError, RuntimeError) as error:
        raise SourceError(f"{path} is not a whole safetensors file ({error}); download it again") from error


class Shards(dict[str, Tensor]):
    """The tensors of one model's files by name, memory-mapped: making it reads the files' headers alone.

    aliases: the files' names -> the model's. ignored: names that are left out. WeightsError where two files, or
    two names of one tensor, hold different values.
    """

    def __init__(
        self, paths: list[Path], *, aliases: Mapping[str, str] | None = None, ignored: Collection[str] = ()
    ) -> None:
        super().__init__()
        self.origin = str(paths[0] if len(paths) == 1 else paths[0].parent)
        self._places: dict[str, tuple[Path, str]] = {}
        for path in paths:
            for key, tensor in read_safetensors(path).items():
                name = (aliases or {}).get(key, key)
                if name in self:
                    one, other = self.fresh(name), read_safetensors(path, key)[key]
                    if one.dtype != other.dtype or not torch.equal(one, other):
                        raise WeightsError(f"{path}: {name} a second time, with other values: get it again")
                if name not in ignored:
                    self[name], self._places[name] = tensor, (path, key)

    def fresh(self, name: str) -> Tensor:
        """One tensor on a mapping of its own, with which its pages leave the process's memory."""
        path, key = self._places[name]
        return read_safetensors(path, key)[key]


def bytes_of(tensor: Tensor) -> bytes:
    """A copy of a tensor's bytes, row by row; tensor.numpy() needs numpy, which this library does not."""
    tensor = tensor.detach().cpu().contiguous()
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes)
