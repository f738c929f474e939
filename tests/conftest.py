"""For all tests: threads that wait without spinning, and a tiny cascade, written and loaded once."""

import os
import shutil

# Read when torch loads its OpenMP library: a spinning thread holds up the others where cores are busy.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:  # a process a core: each has one thread
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from mtl_anagram import Cascade
from tests.unit.tiny import write_cascade
from tests.unit.tiny_requests import maker


def pytest_collection_modifyitems(config, items):
    """Slow tests run where they are asked for: `-m slow`, or MTL_ANAGRAM_SLOW=1 for all."""
    if "slow" in config.getoption("-m") or os.environ.get("MTL_ANAGRAM_SLOW"):
        return
    for item in items:
        if item.get_closest_marker("slow") is not None:
            item.add_marker(pytest.mark.skip(reason="slow: -m slow, or MTL_ANAGRAM_SLOW=1"))


@pytest.fixture(scope="session")
def cascade_folder(tmp_path_factory):
    """The tiny cascade's folder; tests that change files take own_folder."""
    return write_cascade(tmp_path_factory.mktemp("cascade"))


@pytest.fixture
def own_folder(cascade_folder, tmp_path):
    """A copy of the tiny cascade whose files a test may change."""
    return shutil.copytree(cascade_folder, tmp_path / "own")


@pytest.fixture(scope="session")
def cascade(cascade_folder):
    """The tiny cascade on the CPU; its models are loaded once for all tests."""
    return Cascade.from_pretrained(cascade_folder, device="cpu")


@pytest.fixture
def make(tmp_path, cascade):
    """make(folder="out", **changes) calls generate_anagram with a small request for the tiny cascade."""
    return maker(tmp_path, cascade)


@pytest.fixture(autouse=True)
def one_thread():
    """Toy tensors gain nothing from a second thread, and lose much to it on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
