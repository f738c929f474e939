"""Devices and dtypes by name, with the machine's own hardware out of the picture."""

import pytest
import torch

from mtl_anagram.errors import InputError
from mtl_anagram.models import load_unet
from mtl_anagram.models.loading import resolve_device, resolve_dtype


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
    machine(cuda=2, mps=True)
    for name in ("cpu", "cuda", "cuda:1", "mps"):
        assert resolve_device(name) == resolve_device(torch.device(name)) == torch.device(name)


@pytest.mark.parametrize("device", ["cuda", torch.device("cuda", 3), "mps", "meta", "gpu", "cpu:1", 0])
def test_devices_that_are_not_there(machine, device):
    with pytest.raises(InputError, match=r"device=.*0 CUDA devices: use 'cpu'"):
        load_unet("no/where", device=device)


def test_dtypes():
    assert resolve_dtype(None) is None
    for name in ("float32", "float16", "bfloat16"):
        assert resolve_dtype(name) is resolve_dtype(getattr(torch, name)) is getattr(torch, name)


@pytest.mark.parametrize("dtype", ["half", torch.float64, 16])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(InputError, match="dtype=.*float32, float16, bfloat16"):
        load_unet("no/where", dtype=dtype)
