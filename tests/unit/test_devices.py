"""Devices and dtypes by name, with the machine's own hardware out of the picture."""

import pytest
import torch

from mtl_anagram.devices import resolve_device, resolve_dtype
from mtl_anagram.errors import InputError


@pytest.fixture
def machine(monkeypatch):
    """machine(cuda=2, mps=True) makes torch say that it has these."""

    def has(cuda=0, mps=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    has()
    return has


def test_none_is_the_best_there_is(machine):
    assert resolve_device(None) == torch.device("cpu")
    machine(mps=True)
    assert resolve_device(None) == torch.device("mps")
    machine(cuda=1, mps=True)
    assert resolve_device(None) == torch.device("cuda")


def test_named_devices(machine):
    machine(cuda=2, mps=True)
    for name in ("cpu", "cuda", "cuda:1", "mps"):
        assert resolve_device(name) == torch.device(name)
        assert resolve_device(torch.device(name)) == torch.device(name)


@pytest.mark.parametrize(
    "device, match",
    [
        ("cuda", "0 CUDA devices"),
        ("cuda:0", "0 CUDA devices"),
        (torch.device("cuda", 3), "0 CUDA devices"),
        ("mps", "not available"),
        ("meta", "not supported"),
        ("gpu", "is no device"),
        ("", "is no device"),
        ("cuda:x", "is no device"),
        (0, "must be a name"),
        (True, "must be a name"),
        (["cpu"], "must be a name"),
    ],
)
def test_devices_that_are_not_there(machine, device, match):
    with pytest.raises(InputError, match=match):
        resolve_device(device)


def test_an_index_beyond_the_last_device(machine):
    machine(cuda=2)
    with pytest.raises(InputError, match="2 CUDA devices"):
        resolve_device("cuda:2")


def test_dtypes():
    assert resolve_dtype(None) is None
    for name in ("float32", "float16", "bfloat16"):
        assert resolve_dtype(name) is getattr(torch, name)
        assert resolve_dtype(getattr(torch, name)) is getattr(torch, name)


@pytest.mark.parametrize("dtype", ["half", "float64", torch.float64, torch.int8, 16, "", ["float32"], {}])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(InputError, match="dtype=.*float32, float16, bfloat16"):
        resolve_dtype(dtype)
