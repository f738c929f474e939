"""One 64 px anagram on the embedded cascade, ours beside the published loop on diffusers: time, memory, pixels.

    pip install -c constraints.txt ".[bench]"
    python -m benchmarks.anagram --rounds 3

Each run is a process of its own; the kinds take turns. Load is until models are in memory, sample is the text's
encoding and 30 steps with all techniques ("plain": with none), peak is the process's largest resident memory.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from benchmarks.common import child, compare, in_turns, peak

STYLE, PROMPTS, VIEWS = "a sketch of", ["a duck", "a rabbit"], ["identity", "rotate_ccw"]
KINDS = ("ours", "plain", "peer")


def measured(kind: str, args: argparse.Namespace) -> None:
    """One run; prints its figures as JSON and saves the picture."""
    begin = time.perf_counter()
    import torch

    torch.set_num_threads(args.threads)
    prompts = [f"{STYLE} {prompt}" for prompt in PROMPTS]
    if kind == "peer":
        from benchmarks import reference_loop
        from mtl_anagram.cascade import embedded_folder

        models = reference_loop.load(embedded_folder())
        loaded = time.perf_counter()
        picture = reference_loop.sample(models, prompts, VIEWS, args.seed, args.steps)
    else:
        from mtl_anagram import Cascade, Recipe, get_views
        from mtl_anagram.models.prompts import concept_span
        from mtl_anagram.sampling import sample_stage1

        recipe = Recipe.released if kind == "ours" else Recipe.plain
        cascade = Cascade.from_pretrained(device="cpu", dtype="float32")
        unet, _, tokenizer, clip = cascade.unet_1, cascade.text_encoder, cascade.tokenizer, cascade.noise_clip
        loaded = time.perf_counter()
        text, null = cascade.encode(prompts)
        *_, last = sample_stage1(
            unet, text, null, get_views(VIEWS), score=clip.scorer(prompts),
            spans=[concept_span(tokenizer, prompt) for prompt in prompts],
            generators=[torch.Generator().manual_seed(args.seed)],
            recipe=recipe(num_inference_steps=args.steps), schedule=cascade.schedule(1, args.steps),
        )  # fmt: skip
        picture = last.x[0]
    sample = time.perf_counter() - loaded
    torch.save(picture, args.out)
    print(json.dumps({"load": loaded - begin, "sample": sample, "peak": peak()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--child", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        measured(args.child, args)
        return
    with tempfile.TemporaryDirectory() as folder:
        files = {kind: Path(folder) / f"{kind}.pt" for kind in KINDS}
        same = ("--seed", args.seed, "--threads", args.threads, "--steps", args.steps)
        found = in_turns(
            KINDS, args.rounds, lambda kind: child("anagram", "--child", kind, *same, "--out", files[kind])
        )
        import torch

        ours, peer = (torch.load(files[kind], weights_only=True) for kind in ("ours", "peer"))
    rows = {"load": "start and load, s", "sample": "sample, s", "peak": "peak memory, MiB"}
    compare({kind: found[kind] for kind in ("ours", "peer")}, rows)
    print(f"\nThe two pictures differ by at most {(ours - peer).abs().max().item():.2g}, in [-1, 1]. "
          f"All techniques take {found['ours']['sample'] / found['plain']['sample']:.2f} times plain's "
          f"{found['plain']['sample']:.3g} s. Median of {args.rounds}, {args.threads} threads.")  # fmt: skip


if __name__ == "__main__":
    main()
