"""A T5 encoder whose weights stay in their files: each matrix is read while the one before it is at work.

T5-XXL has 4.76 billion parameters. Here two of its matrices are in memory at a time, and all prompts of a call
go through each of them together, so that a call reads the files once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import WeightsError
from .shards import Shards, buffer_of, read_into
from .t5 import T5Encoder
from .t5_config import T5Config

# Weights that are cast at a time: their 8 MB of float32 stay in the cache until they are multiplied.
_CHUNK = 1 << 21
# The pieces that are cast and multiplied, norms, and what the reading thread and the C library keep.
_KEPT = 96 << 20


def streamed_bytes(config: T5Config) -> int:
    """Memory that a streamed encoder takes beyond its states: two matrices as wide as files have them, and pieces."""
    largest = config.d_model * max(config.d_ff, config.num_heads * config.d_kv)
    return 2 * 4 * largest + _KEPT


class StreamedT5Encoder(T5Encoder):
    """T5Encoder's call and numbers, its matrices read from safetensors files during the call.

    dtype is what the matrices are cast to and computed in. None = float32 on the CPU, which holds a float16 or
    bfloat16 file's values exactly, and bfloat16 elsewhere; neither overflows where float16 would. The shards'
    names and shapes have been checked (`loading.check_fit`); values are checked during a call, WeightsError
    naming the matrix after which states are not finite. Calls record no gradients and wait for each other.
    """

    def __init__(
        self, config: T5Config, shards: Shards, *, dtype: torch.dtype | None, device: torch.device
    ) -> None:
        with torch.device("meta"):
            super().__init__(config)
        if dtype is None:
            dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        layers = [(name, module) for name, module in self.named_modules() if isinstance(module, nn.Linear)]
        # The order in which the layers were made is the order in which a call uses them.
        self._matrices = Stream(shards, [f"{name}.weight" for name, _ in layers], device)
        self._shards, self._lock = shards, threading.Lock()
        for name, layer in layers:
            parent, _, last = name.rpartition(".")
            setattr(
                self.get_submodule(parent),
                last,
                _StreamedLinear(layer, f"{name}.weight", self._matrices, dtype),
            )
        for name, _ in list(self.named_parameters()):
            if name != "shared.weight" and name not in self._matrices.names:  # norms, position biases: small
                parent, _, last = name.rpartition(".")
                value = shards.read(name).to(device=device, dtype=dtype)
                if not value.isfinite().all():
                    raise WeightsError(f"{shards.origin}: {name} is not finite; download it again")
                setattr(self.get_submodule(parent), last, nn.Parameter(value, requires_grad=False))
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """ids (B, L), mask (B, L) or None -> states (B, L, D), as T5Encoder's."""
        self._check(ids, mask)
        device = self._matrices.device
        # Only the embedding's rows that occur are read.
        rows, index = ids.cpu().unique(return_inverse=True)
        table = self._shards.read_rows("shared.weight", rows).to(self.dtype).float()
        x = F.embedding(index, table).to(device)  # (B, L, D)
        with self._lock, self._matrices.running(self.dtype):
            self._matrices.note(x)
            states = self.encoder(x, None if mask is None else mask.to(device))
            damaged = self._matrices.first_not_finite()
        if damaged is not None:
            raise WeightsError(
                f"{self._shards.origin}: {damaged} gives states that are not finite. The file is damaged: download "
                f"it again (or its values overflow {self.dtype}: load in float32 or bfloat16)"
            )
        return states.to(self.dtype)


class Stream:
    """Matrices of files, handed out in a fixed order, the next one on its way already.

    A thread reads each into one of two buffers; on CUDA the buffers are pinned, and a stream of its own copies
    them to two buffers on the card. A matrix is valid until the next one is taken.
    """

    def __init__(self, shards: Shards, names: Sequence[str], device: torch.device) -> None:
        self.names, self.device = list(names), device
        self._shards = shards
        self._cuda = device.type == "cuda"
        self._taken = len(self.names)  # nothing is handed out before running()

    @contextmanager
    def running(self, dtype: torch.dtype) -> Iterator[None]:
        """From the first matrix on; the buffers live as long as this. dtype: what matrices will be cast to."""
        size = max(self._shards[name].nbytes for name in self.names)
        with torch.inference_mode(False):  # the thread, which is not in that mode, must be able to write here
            self._host = [torch.empty(size, dtype=torch.uint8, pin_memory=self._cuda) for _ in range(2)]
            self._buffers = self._host
            if self._cuda:
                self._buffers = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(2)]
                self._side = torch.cuda.Stream(self.device)
                self._side.wait_stream(torch.cuda.current_stream(self.device))
                self._copied = [torch.cuda.Event() for _ in range(2)]
                self._used = [torch.cuda.Event() for _ in range(2)]
            # Made once, not at each use: among large tensors that come and go, small ones that stay would keep
            # the C library from using freed memory again, and T5-XXL's calls then grow by a gigabyte.
            self._pieces = {dtype: self._piece(dtype) for dtype in (torch.float32, dtype)}
            self._sums = torch.zeros(1 + len(self.names), device=self.device)
        self._taken = 0
        try:
            with ThreadPoolExecutor(1, "t5 weights") as self._thread:
                self._next: Future[Tensor] = self._thread.submit(self._fetch, 0)
                yield
        finally:  # the thread has ended, whatever has happened
            if self._cuda:
                self._side.synchronize()
            del self._host, self._buffers, self._pieces, self._sums, self._next
            self._taken = len(self.names)

    def take(self, name: str) -> Tensor:
        """The next matrix (out, in), which must be this one, in its file's dtype on the device."""
        index = self._taken
        if index == len(self.names) or self.names[index] != name:
            raise RuntimeError(
                f"{name} is out of turn: a streamed layer works within its encoder's call only"
            )
        self._taken += 1
        matrix = self._next.result()
        if self._cuda:
            stream = torch.cuda.current_stream(self.device)
            self._used[1 - index % 2].record(stream)  # all work with the matrix before has been queued
            stream.wait_event(self._copied[index % 2])
        if self._taken < len(self.names):
            self._next = self._thread.submit(self._fetch, self._taken)
        return matrix

    def cast(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of a matrix in another dtype, in memory that the next cast writes over."""
        # By way of float32: the direct cast between the two half precisions is slower than both steps.
        for step in dict.fromkeys((torch.float32, dtype)):
            rows = self._pieces[step][: rows.numel()].view(rows.shape).copy_(rows)
        return rows

    def note(self, states: Tensor) -> None:
        """Remember whether the last matrix's states are finite: their sum then is. Looked at in the end only."""
        self._sums[self._taken] = states.sum(dtype=torch.float32)

    def first_not_finite(self) -> str | None:
        """The first matrix whose states were not finite; before all matrices, the embedding."""
        finite = self._sums.isfinite().tolist()
        return next(
            (name for name, fine in zip(["shared.weight", *self.names], finite, strict=True) if not fine),
            None,
        )

    def _piece(self, dtype: torch.dtype) -> Tensor:
        widest = max(self._shards[name].shape[1] for name in self.names)
        return torch.empty(max(_CHUNK, widest), dtype=dtype, device=self.device)

    def _fetch(self, index: int) -> Tensor:
        """In the thread: matrix `index` into its buffer, in bytes, then seen as what it is."""
        entry, slot = self._shards[self.names[index]], index % 2
        if self._cuda:
            self._copied[slot].synchronize()  # what the pinned buffer held has left it
        host = self._host[slot][: entry.nbytes]
        read_into(entry, buffer_of(host))
        if self._cuda:
            with torch.cuda.stream(self._side):
                self._side.wait_event(self._used[slot])
                self._buffers[slot][: entry.nbytes].copy_(host, non_blocking=True)
                self._copied[slot].record(self._side)
        return self._buffers[slot][: entry.nbytes].view(entry.dtype).view(entry.shape)


class _StreamedLinear(nn.Linear):
    """A layer whose weight, here on the meta device, is taken from a stream."""

    def __init__(self, layer: nn.Linear, name: str, stream: Stream, dtype: torch.dtype) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta", dtype=dtype)
        self._name, self._stream = name, stream

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, in) in this layer's dtype -> (B, L, out)."""
        weight = self._stream.take(self._name).to(x.device)  # there already, but on MPS
        if weight.dtype == x.dtype:
            out = F.linear(x, weight)
        else:
            # Some rows at a time: the cast matrix is never in memory as a whole.
            out = x.new_empty(*x.shape[:-1], self.out_features)
            rows = max(1, _CHUNK // self.in_features)
            for start in range(0, self.out_features, rows):
                piece = self._stream.cast(weight[start : start + rows], x.dtype)
                out[..., start : start + rows] = F.linear(x, piece)
        self._stream.note(out)
        return out
