"""A T5 encoder whose weights stay in their files: each matrix is read while the one before it is at work.

T5-XXL has 4.76 billion parameters. Here two of its matrices are in memory at a time, and all prompts of a call
go through each of them together, so that a call reads the files once.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import WeightsError
from ..files.shards import Shards
from .t5 import T5Config, T5Encoder

# Weights that are cast at a time: their 8 MB of float32 stay in the cache until they are multiplied.
_CHUNK = 1 << 21


class StreamedT5Encoder(T5Encoder):
    """T5Encoder's call and numbers, its matrices read from safetensors files during the call.

    dtype is what the matrices are computed in. None = float32 on the CPU, which holds a half precision file's values
    exactly, and bfloat16 elsewhere; neither overflows where float16 would. Values are checked during a call,
    WeightsError naming the matrix after which states are not finite. Calls record no gradients and wait for each other.
    """

    def __init__(
        self, config: T5Config, shards: Shards, *, dtype: torch.dtype | None, device: torch.device
    ) -> None:
        with torch.device("meta"):
            super().__init__(config)
        dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
        self._shards, self._device, self._lock = shards, device, threading.Lock()
        layers = {name: layer for name, layer in self.named_modules() if isinstance(layer, nn.Linear)}
        # The order in which the layers were made is the order in which a call uses them.
        self._matrices = _Matrices(shards, [f"{name}.weight" for name in layers])
        for name, layer in layers.items():
            self.set_submodule(name, _StreamedLinear(layer, f"{name}.weight", self._matrices, dtype))
        for name in shards.keys() - self._matrices.names - {"shared.weight"}:  # norms, position biases: small
            value = shards.fresh(name).to(device=device, dtype=dtype, copy=True)
            if not value.isfinite().all():
                raise WeightsError(f"{shards.origin}: {name} is not finite; download it again")
            self.get_submodule(name.rpartition(".")[0]).weight = nn.Parameter(value)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        self._check(ids, mask)
        # Only the embedding's rows that occur are read.
        rows, index = ids.cpu().unique(return_inverse=True)
        table = self._shards.fresh("shared.weight")[rows].to(self.dtype).float()
        x = F.embedding(index, table).to(self._device)  # (B, L, D)
        _check_finite(x, "shared.weight", self._shards)
        with self._lock, ThreadPoolExecutor(1, "t5 weights") as self._matrices.thread:
            self._matrices.ahead.clear()  # of a call that failed
            return self.encoder(x, None if mask is None else mask.to(self._device)).to(self.dtype)


class _Matrices:
    """Matrices of files by name; a call's thread reads the one after the last that was taken."""

    thread: ThreadPoolExecutor

    def __init__(self, shards: Shards, names: list[str]) -> None:
        self.shards, self.names, self._after = shards, set(names), dict(pairwise(names))
        self.ahead: dict[str, Future[Tensor]] = {}

    def take(self, name: str) -> Tensor:
        """A matrix (out, in) as its file has it, on a mapping that goes with it."""
        ahead = self.ahead.pop(name, None)
        if (following := self._after.get(name)) is not None:
            self.ahead[following] = self.thread.submit(self._read, following)
        return self.shards.fresh(name) if ahead is None else ahead.result()

    def _read(self, name: str) -> Tensor:
        matrix = self.shards.fresh(name)
        for piece in matrix.flatten().view(torch.uint8).split(1 << 26):
            piece[::4096].sum()  # a byte of every page: the system then has them all
        return matrix


class _StreamedLinear(nn.Linear):
    """A layer whose weight, here on the meta device, is taken from files."""

    def __init__(self, layer: nn.Linear, name: str, matrices: _Matrices, dtype: torch.dtype) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta", dtype=dtype)
        self._name, self._matrices = name, matrices

    def forward(self, x: Tensor) -> Tensor:
        weight = self._matrices.take(self._name)
        if (weight.dtype, weight.device) == (x.dtype, x.device):
            out = F.linear(x, weight)
        else:
            # Some rows at a time: the cast matrix is never in memory as a whole. By way of float32: the direct
            # cast between the two half precisions is slower than both steps.
            pieces = weight.split(max(1, _CHUNK // self.in_features))
            out = torch.cat([F.linear(x, piece.to(x.device).float().to(x.dtype)) for piece in pieces], dim=-1)
        _check_finite(out, self._name, self._matrices.shards)
        return out


def _check_finite(states: Tensor, name: str, shards: Shards) -> None:
    if not states.sum(dtype=torch.float32).isfinite():
        remedy = (
            f"download the file again (or its values overflow {states.dtype}: load in float32 or bfloat16)"
        )
        raise WeightsError(f"{shards.origin}: {name} gives states that are not finite: {remedy}")
