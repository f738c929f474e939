"""At the released size: one step of stage I equals diffusers' with the same random weights (4 GB, a minute)."""

import pytest

from benchmarks import real_size


@pytest.mark.slow
def test_a_step_at_the_size_of_if_i_m(tmp_path):
    pytest.importorskip("diffusers")
    real_size.write_folder(tmp_path / "model")
    found = real_size.measure(tmp_path / "model", threads=1)
    difference = real_size.differences(found)
    assert set(difference) == {"prediction", "x"}
    assert max(difference.values()) < 1e-4
    assert found["ours"]["outputs"]["prediction"].abs().max() > 0.01  # no empty agreement
