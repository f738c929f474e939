"""What importing the library adds to importing torch, each in fresh processes that take turns.

python -m benchmarks.import_time --rounds 10
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

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
    "reference": "from diffusers import DDPMScheduler, UNet2DConditionModel; from transformers import T5EncoderModel",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    added: dict[str, list[float]] = {kind: [] for kind in NAMES}
    torch_alone = []
    for _ in range(args.rounds):
        for kind, name in NAMES.items():
            code = TIMED.format(name)
            out = subprocess.run(
                [sys.executable, "-c", code], check=True, capture_output=True, text=True
            ).stdout
            seconds, torch_seconds = map(float, out.split())
            added[kind].append(seconds)
            torch_alone.append(torch_seconds)
    print(
        f"import torch: {statistics.median(torch_alone):.2f} s; added by, median of {args.rounds} (min to max):"
    )
    for kind, rows in added.items():
        print(f"{kind}: {statistics.median(rows):.3f} s ({min(rows):.3f} to {max(rows):.3f})")
    print(
        f"reference / ours = {statistics.median(added['reference']) / statistics.median(added['ours']):.1f}"
    )


if __name__ == "__main__":
    main()
