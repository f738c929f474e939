"""What several test files use."""

import hashlib
import math
import os
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Operations(TorchDispatchMode):
    """Tells seen(name, tensors) of every operation, gradients' too: its name, and the tensors that it makes."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        tensors = [value for value in tree_leaves(made) if isinstance(value, torch.Tensor)]
        self.seen(function.overloadpacket._qualified_op_name.partition("::")[2], tensors)
        return made


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest absolute difference over the reference's largest magnitude, both (...) of one shape."""
    assert value.shape == reference.shape, f"{tuple(value.shape)} is not {tuple(reference.shape)}"
    return ((value - reference).abs().max() / reference.abs().max().clamp(min=1e-12)).item()


def facts(*modules: torch.nn.Module) -> tuple[int, int, str]:
    """Tensors, parameters, and the first 16 digits of the SHA-256 of all "name [shape]" lines, sorted by name."""
    shapes = sorted((n, list(t.shape)) for module in modules for n, t in module.state_dict().items())
    lines = "\n".join(f"{name} {shape}" for name, shape in shapes)
    count = sum(math.prod(shape) for _, shape in shapes)
    return len(shapes), count, hashlib.sha256(lines.encode()).hexdigest()[:16]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def published(name: str) -> Path:
    """A file of the published tokenizers, which the repository does not hold; skips the test where it is not here.

    The environment variable MTL_ANAGRAM_DATA names the folder; else shared/data beside the repository is tried.
    """
    named = os.environ.get("MTL_ANAGRAM_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (folder / name).is_file():
        pytest.skip(f"{name} is not here; MTL_ANAGRAM_DATA names the folder that holds it")
    return folder / name
