"""What several test files use."""

import torch


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest absolute difference over the reference's largest magnitude, both (...) of one shape."""
    assert value.shape == reference.shape, f"{tuple(value.shape)} is not {tuple(reference.shape)}"
    return ((value - reference).abs().max() / reference.abs().max().clamp(min=1e-12)).item()
