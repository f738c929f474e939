"""One 64 px anagram on the embedded cascade, ours beside the published loop on diffusers: time, memory, pixels.

    pip install -c constraints.txt ".[bench]"
    python -m benchmarks.anagram --rounds 3

Each run is a process of its own; the two take turns. Load is from the interpreter's start to models in memory,
sample is the text's encoding and 30 steps with all techniques, peak is the process's largest resident memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STYLE, PROMPTS, VIEWS = "a sketch of", ["a duck", "a rabbit"], ["identity", "rotate_ccw"]
KINDS = ("ours", "reference")


def child(kind: str, seed: int, threads: int, out: str) -> None:
    """One run; prints its figures as JSON and saves the picture."""
    import torch

    torch.set_num_threads(threads)
    prompts = [f"{STYLE} {prompt}" for prompt in PROMPTS]
    if kind == "ours":
        from mtl_anagram import Cascade, Recipe, get_views
        from mtl_anagram.models.prompts import concept_span
        from mtl_anagram.sampling import sample_stage1

        cascade = Cascade.from_pretrained(device="cpu", dtype="float32")
        models = (cascade.unet_1, cascade.text_encoder, cascade.tokenizer, cascade.noise_clip)
        loaded = time.time()
        text, null = cascade.encode(prompts)
        *_, last = sample_stage1(
            models[0], text, null, get_views(VIEWS), score=models[3].scorer(prompts),
            spans=[concept_span(models[2], prompt) for prompt in prompts],
            generators=[torch.Generator().manual_seed(seed)], recipe=Recipe.released(),
            schedule=cascade.schedule(1, 30),
        )  # fmt: skip
        picture = last.x[0]
    else:
        from benchmarks import reference_loop
        from mtl_anagram.cascade import embedded_folder

        models = reference_loop.load(embedded_folder())
        loaded = time.time()
        picture = reference_loop.sample(models, prompts, VIEWS, seed)
    done = time.time()
    torch.save(picture, out)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"loaded_at": loaded, "sample": done - loaded, "peak": peak}))


def run(kind: str, seed: int, threads: int, out: Path) -> dict[str, float]:
    """A fresh process's figures: load and sample in seconds, peak in MiB."""
    begin = time.time()
    command = [sys.executable, "-m", "benchmarks.anagram", "--child", kind, "--seed", str(seed)]
    command += ["--threads", str(threads), "--out", str(out)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    figures = json.loads(done.stdout.splitlines()[-1])
    figures["load"] = figures.pop("loaded_at") - begin
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.seed, args.threads, args.out)
        return
    import torch

    with tempfile.TemporaryDirectory() as folder:
        files = {kind: Path(folder) / f"{kind}.pt" for kind in KINDS}
        figures: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
        for _ in range(args.rounds):
            for kind in KINDS:
                figures[kind].append(run(kind, args.seed, args.threads, files[kind]))
        ours, reference = (torch.load(files[kind], weights_only=True) for kind in KINDS)
    print(f"torch {torch.__version__}, {args.threads} threads, median of {args.rounds} (min to max)")
    for what, unit in (("load", "s"), ("sample", "s"), ("peak", "MiB")):
        rows = {kind: [f[what] for f in figures[kind]] for kind in KINDS}
        medians = {kind: statistics.median(rows[kind]) for kind in KINDS}
        shown = "; ".join(
            f"{kind} {medians[kind]:.2f} {unit} ({min(rows[kind]):.2f} to {max(rows[kind]):.2f})"
            for kind in KINDS
        )
        print(f"{what}: {shown}; reference / ours = {medians['reference'] / medians['ours']:.2f}")
    print(f"largest difference of the two pictures, in [-1, 1]: {(ours - reference).abs().max().item():.2g}")


if __name__ == "__main__":
    main()
