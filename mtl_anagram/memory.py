"""How much memory a forward pass takes, found by running it on the meta device; and what a machine has."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .models.configs import UNetConfig
from .models.t5 import T5Encoder
from .models.unet import UNet
from .models.upscaler import AutoencoderConfig, LatentDecoder, UpscalerUNet, UpscalerUNetConfig

C = TypeVar("C")


@dataclass(frozen=True)
class Machine:
    """A device's memory in bytes: all there is for this process, and what is free of it now."""

    device: str
    total: int
    free: int


def machine_of(device: torch.device) -> Machine | None:
    """The memory where a device's tensors live, or None where the system does not tell.

    CUDA: the card's. MPS: what Metal recommends as the most. CPU: the machine's, or the control group's limit
    where that is lower (a container).
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Machine(str(device), total, free)
    if device.type == "mps":
        total = torch.mps.recommended_max_memory()
        return Machine(str(device), total, max(0, total - torch.mps.driver_allocated_memory()))
    found = _meminfo() or _sysconf()
    if found is None:
        return None
    total, free = found
    for limit, used in _control_group():
        if limit < total:
            total, free = limit, min(free, max(0, limit - used))
    return Machine("cpu", total, min(free, total))


def peak_of(work: Callable[[], Any]) -> int:
    """Bytes of the tensors that `work`, run on the meta device, holds at the same time, at its worst moment.

    Tensors that are there before do not count. What a kernel takes for itself while it runs does not show but for
    convolutions, which count twice; attention counts as the fused kernel that writes no probabilities down.
    """
    with _Meter() as meter, _FusedAttention():
        work()
    return meter.peak


def unet_activations(config: UNetConfig, *, rows: int, size: int, guided: bool, dtype: torch.dtype) -> int:
    """Bytes that one sampling step of a UNet needs beyond its weights.

    rows: pictures times views; the network runs on twice as many (null and prompt). size: the pictures' side
    in px. guided: also the anti-segregation's pass with its gradient, on `rows`; it reads attention at half the
    side, and where the network has none there it counts nothing.
    """
    labels = 0 if config.class_embed_type is not None else None

    def step() -> None:
        text = torch.empty(2 * rows, 77, config.encoder_hid_dim, dtype=dtype, device="meta")
        with torch.no_grad():
            context = unet.prepare(text)
            x = torch.empty(2 * rows, config.in_channels, size, size, dtype=dtype, device="meta")
            unet(x, 0, context, labels)
        if guided and size // 2 in unet.attention_layers(size).values():
            x = torch.empty(rows, config.in_channels, size, size, device="meta", requires_grad=True)
            maps = unet.text_maps(x.to(dtype), 0, context[rows:], (0, 1), labels, resolution=size // 2)
            torch.autograd.grad(torch.stack([layer.sum() for layer in maps.values()]).sum(), x)

    # The caller may be loading something, without gradients or in inference mode.
    with torch.device("meta"), torch.inference_mode(False), torch.enable_grad():
        unet = UNet(config).to(dtype).requires_grad_(False)
        return peak_of(step)


def text_activations(kind: Callable[[C], nn.Module], config: C, *, rows: int, tokens: int = 77) -> int:
    """Bytes that a text encoder needs beyond its weights for (rows, tokens); T5's stream is float32 in any dtype."""

    def encode() -> None:
        with torch.no_grad():
            encoder(torch.empty(rows, tokens, dtype=torch.int64), *more)

    with torch.device("meta"):
        encoder = kind(config)
        more = [torch.ones(rows, tokens, dtype=torch.int64)] if isinstance(encoder, T5Encoder) else []
        return peak_of(encode)


def upscaler_activations(
    config: UpscalerUNetConfig, vae: AutoencoderConfig, *, size: int, dtype: torch.dtype
) -> int:
    """Bytes that stage III needs beyond its weights: a step of its UNet, or the decoding, if that is more.

    size: the side in px of stage II's pictures, which is that of the latents. One picture and one view at a time,
    as stage III works.
    """
    wide = torch.float32 if vae.force_upcast and dtype == torch.float16 else dtype

    def step() -> None:
        x = torch.empty(2, config.in_channels, size, size, dtype=dtype)
        text = torch.empty(2, 77, config.cross_attention_dim, dtype=dtype)
        with torch.no_grad():
            unet(x, 0, text, 0)

    def decode() -> None:
        with torch.no_grad():
            decoder(torch.empty(1, vae.latent_channels, size, size, dtype=wide))

    with torch.device("meta"), torch.inference_mode(False):
        unet, decoder = UpscalerUNet(config).to(dtype), LatentDecoder(vae).to(wide)
        return max(peak_of(step), peak_of(decode))


def parameters_of(build: Callable[[], nn.Module]) -> int:
    """How many numbers a module has, built on the meta device."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build().parameters())


# Convolution libraries copy inputs and outputs to a memory layout of their own while they run.
_CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)


class _Meter(TorchDispatchMode):
    """Adds up the storages that operations make, until they are gone."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}  # of the storages that live, by their address

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_address(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and _address(tensor) not in given:
                self._add(tensor)
        if func in _CONVOLUTIONS:
            tensors = [t for t in tree_leaves((args[:2], out)) if isinstance(t, Tensor)]
            self.peak = max(self.peak, self.live + sum(t.nbytes for t in tensors))
        return out

    def _add(self, tensor: Tensor) -> None:
        address, storage = _address(tensor), tensor.untyped_storage()
        if address in self._sizes:
            return
        self._sizes[address] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, address)

    def _drop(self, address: int) -> None:
        self.live -= self._sizes.pop(address, 0)


class _FusedAttention(TorchFunctionMode):
    """Puts an operation of the fused kernel's inputs and output in the place of the explicit attention.

    On the meta device torch would choose the kernel that writes all probabilities down, which no other device
    does here.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _Attention.apply(*args[:3])
        return func(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        q, k, v, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _meminfo() -> tuple[int, int] | None:
    """Linux: all memory, and what new work can have without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        values = {name: int(rest.split()[0]) * 1024 for name, rest in (x.split(":", 1) for x in lines)}
        return values["MemTotal"], values["MemAvailable"]
    except (OSError, ValueError, KeyError, IndexError):
        return None


def _sysconf() -> tuple[int, int] | None:
    """Other systems with POSIX names: all memory; what is free they do not tell this way."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
    return (total, total) if total > 0 else None


def _control_group() -> Iterator[tuple[int, int]]:
    """A container's memory limit and use, where there is one (control groups version 2, then 1)."""
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            yield int(Path(limit).read_text()), int(Path(used).read_text())
        except (OSError, ValueError):  # no such file; "max" means no limit
            continue
