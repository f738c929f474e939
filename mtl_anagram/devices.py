"""Where tensors live: names of devices and dtypes, checked before any work starts."""

from __future__ import annotations

import torch

from .errors import InputError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def resolve_device(device: str | torch.device | None) -> torch.device:
    """A device that is there. None = the best there is: CUDA, then MPS, then the CPU."""
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if not isinstance(device, str | torch.device):
        raise InputError(f"device={device!r} must be a name such as 'cpu' or 'cuda:0', or None for the best")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise InputError(f"device={device!r} is no device; use 'cpu', 'cuda', 'cuda:0' or 'mps'") from None
    if str(resolved) != str(device):  # torch counts modulo 256: cuda:256 would be cuda:0
        raise InputError(f"device={device!r} is no device; use 'cpu', 'cuda', 'cuda:0' or 'mps'")
    if resolved.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (resolved.index or 0) >= count:
            raise InputError(f"device={str(resolved)!r}: this machine has {count} CUDA devices; use 'cpu'")
    elif resolved.type == "mps":
        if not torch.backends.mps.is_available():
            raise InputError("device='mps' is not available on this machine; use 'cpu'")
    elif resolved.type != "cpu" or (resolved.index or 0) > 0:
        raise InputError(f"device={str(resolved)!r} is not supported; use 'cpu', 'cuda', 'cuda:0' or 'mps'")
    return resolved


def resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A floating dtype by name or as it is; None stays None."""
    if dtype is None:
        return None
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    raise InputError(f"dtype={dtype!r} is not supported; use one of {', '.join(DTYPES)}, or None")
