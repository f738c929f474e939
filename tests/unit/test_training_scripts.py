"""The two scripts: the background training's turns, with a stand-in for Python, and a GPU's ten minutes on the CPU."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.unit.processes import until
from training import drawings

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("stage_1", "stage_2", "judge", "teacher", "noise_clip")
pytestmark = pytest.mark.skipif(shutil.which("flock") is None, reason="the scripts need bash and util-linux")
# Notes what it is asked; a training is done at its second stretch; stage II's first one lasts until it is told to end.
STAND_IN = """#!/bin/bash
[ "$1" = -m ] || exit 0
echo "$2" >> "$RUNS/asked"
while [ $# -gt 0 ]; do [ "$1" = --run ] && run=$2; shift; done
[ -n "$run" ] || exit 0
mkdir -p "$run"
if [ -e "$run/begun" ]; then touch "$run/done"; exit; fi
touch "$run/begun"
trap 'touch "$run/told"; exit' TERM
[ "$run" = "$RUNS/stage_2" ] && while :; do sleep 0.1; done
exit 0
"""


def test_the_background_training_starts_stops_and_goes_on_to_its_end(tmp_path) -> None:
    runs, python = tmp_path / "runs", tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    env = os.environ | {"RUNS": str(runs), "PYTHON": str(python)}

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(ROOT / "training/background.sh"), *words]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)

    assert call().returncode == 2
    assert "MTL_ANAGRAM_DATA" in call("start").stderr
    assert call("start", str(tmp_path)).returncode == 0
    until((runs / "stage_2/begun").exists)
    assert call("status").stdout.startswith("running")
    assert "runs already" in call("start", str(tmp_path)).stderr
    assert call("stop").returncode == 0
    assert (runs / "stage_2/told").exists()
    assert not (runs / "judge").exists()
    assert call("status").stdout.startswith("not running")
    assert (runs / "export/stage_1/unet/config.json").is_file()

    assert call("start", str(tmp_path), "2").returncode == 0
    until(lambda: all((runs / part / "done").exists() for part in PARTS))
    until(lambda: call("status").stdout.startswith("not running"))
    asked = (runs / "asked").read_text().split()
    assert asked.count("training.captions") == 1
    assert asked.count("training.train_stage1") == 2
    assert asked.count("training.train_judge") == 4


def test_ten_minutes_of_a_gpu_are_rehearsed(tmp_path) -> None:
    rng = np.random.default_rng(0)
    for name in drawings.CONCEPTS:
        strokes = np.zeros((12, 28, 28), dtype=np.uint8)
        for i, (top, left) in enumerate(rng.integers(1, 12, (12, 2))):
            strokes[i, top : top + 15, left] = strokes[i, top, left : left + 15] = 255
        np.save(tmp_path / f"{name}.npy", strokes)
    start = shutil.copytree(
        ROOT / "weights", tmp_path / "start"
    )  # another cascade's, so that pictures count from 0
    (start / "cascade.json").write_text((start / "cascade.json").read_text().replace("embedded-v", "older-v"))
    env = os.environ | {
        "RUNS": str(tmp_path / "runs"), "PYTHON": sys.executable, "DEVICE": "cpu", "MINUTES": "5", "START": str(start),
        "TRAIN_OPTIONS": "--batch 1 --pictures 50 --typical 1 --concepts duck whale", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = ["bash", str(ROOT / "training/gpu.sh"), str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "pictures a second: [" in done.stdout
    index = json.loads((tmp_path / "runs/export/cascade.json").read_text())
    assert index["concepts"] == ["duck", "whale"]
    assert index["training"]["stage_1"]["pictures"] == 50
