"""What importing the library adds to importing torch, each in fresh processes that take turns.

python -m benchmarks.import_time --rounds 10
"""

import argparse
import subprocess
import sys

from benchmarks.common import compare, in_turns

TIMED = """
import time
a = time.perf_counter()
import torch
b = time.perf_counter()
{}
print(time.perf_counter() - b, b - a)
"""
NAMES = {
    "ours": "from mtl_anagram import Cascade, Recipe, generate_anagram, get_views",
    "peer": "from diffusers import DDPMScheduler, UNet2DConditionModel; from transformers import T5EncoderModel",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()

    def run(kind: str) -> dict[str, float]:
        out = subprocess.check_output([sys.executable, "-c", TIMED.format(NAMES[kind])], text=True)
        return dict(zip(("added", "torch"), map(float, out.split()), strict=True))

    found = in_turns(list(NAMES), args.rounds, run)
    compare(found, {"added": "an import adds, s", "torch": "to torch's own, s"})


if __name__ == "__main__":
    main()
