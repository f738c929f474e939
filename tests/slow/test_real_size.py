"""At the released size: a whole step of stage I equals the published loop's on diffusers (6 GB, minutes)."""

import argparse

import pytest

from benchmarks import step


@pytest.mark.slow
def test_a_step_at_the_size_of_if_i_m():
    pytest.importorskip("diffusers")
    given = argparse.Namespace(device="cpu", dtype="float32", threads=1, fused=None)
    found = step.both(given, "IF-I-M", 1)
    assert step.difference(found) < 1e-4
    assert found["ours"]["x"].std() > 0.1  # no empty agreement
