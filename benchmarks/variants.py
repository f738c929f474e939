"""64 px anagrams on the embedded cascade: in batches, of more views, in other dtypes; seconds, memory, pictures.

    python -m benchmarks.variants

Each row is a process of its own, after one anagram of two steps that warms it up. PSNR: of the pictures in [0, 1] to
float32's of the same seeds. The CLIP's share: of samples whose every view it reads as its own prompt among the two.
"""

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import Figures, child, head, peak, say

PROMPTS = ["a duck", "a rabbit", "a house", "a cat"]
VIEWS = ["identity", "rotate_180", "rotate_cw", "rotate_ccw"]
BATCHES = [(1, 2), (4, 2), (16, 2), (4, 3), (4, 4), (16, 4)]  # anagrams, views
KINDS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "float16, 1 at once": {"dtype": "float16", "count": 1},  # which a CPU without it takes minutes for
    "float32, fused": {"fused": "torch"},
    "float32, guidance in 0 to 0.7 of the steps": {"interval": (0.0, 0.7)},
    "float32, guidance in 0.2 to 0.8": {"interval": (0.2, 0.8)},
}


def measured(given: dict[str, Any], args: argparse.Namespace) -> Figures:
    """Samples in a fresh process: seconds an anagram, peak, and the pictures, saved."""
    import torch

    from mtl_anagram import Cascade, Recipe

    torch.set_num_threads(args.threads)
    count, views = given["count"], given["views"]
    cascade = Cascade.from_pretrained(
        device=args.device, dtype=given.get("dtype", "float32"), fused=given.get("fused")
    )
    prompts = PROMPTS[:views]

    def run(steps: int, seeds: list[int]) -> Any:
        recipe = Recipe.released(
            num_inference_steps=steps, guidance_scale=5.0, guidance_interval=given.get("interval", (0.0, 1.0))
        )
        return cascade.sample(
            prompts, VIEWS[:views], seeds, style="a poster of", recipe=recipe, stop_after=64, batch_size=count
        ).pictures[64]

    run(2, [0])
    begin = time.perf_counter()
    pictures = run(args.steps, list(range(count)))
    seconds = (time.perf_counter() - begin) / count
    torch.save(pictures, args.out)
    return {"seconds": seconds, "peak": peak()}


def run(args: argparse.Namespace, out: Path, **given: Any) -> Figures:
    words = ("--threads", args.threads, "--steps", args.steps, "--device", args.device, "--out", out)
    return child("variants", "--child", json.dumps(given), *words)


def psnr(one: Path, other: Path) -> float:
    import torch

    a, b = (torch.load(path, weights_only=True) / 2 for path in (one, other))
    error = (a - b[: len(a)]).square().mean().item()
    return math.inf if error == 0 else -10 * math.log10(error)


def read(path: Path) -> float:
    """The share of pictures of which the noise-aware CLIP reads every view as its own prompt."""
    import torch

    from mtl_anagram import Cascade, get_views

    clip, pictures = Cascade.from_pretrained().noise_clip, torch.load(path, weights_only=True)
    with torch.no_grad():
        seen = torch.stack([view.view(pictures) for view in get_views(VIEWS[:2])])  # (V, B, 3, 64, 64)
        images = torch.stack([clip.embed_image(view, 0) for view in seen])
        cosines = images @ clip.embed_text([f"a poster of {prompt}" for prompt in PROMPTS[:2]]).T  # (V, B, V)
    own = cosines.argmax(-1) == torch.arange(2)[:, None]
    return own.all(0).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--count", type=int, default=8, help="pictures for PSNR")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: two steps, few rows")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measured(args.child, args)))
        return
    args.steps, args.count = (2, 2) if args.tiny else (args.steps, args.count)
    with tempfile.TemporaryDirectory() as folder:
        head("64 px, all techniques", "views", "seconds an anagram", "peak memory, MiB")
        for count, views in BATCHES[:1] if args.tiny else BATCHES:
            found = run(args, Path(folder) / "batch.pt", count=count, views=views)
            say(f"{count} at once", views, found["seconds"], found["peak"])
        head(
            f"{args.count} at once, 2 views",
            "seconds an anagram",
            "peak memory, MiB",
            "PSNR to float32, dB",
            "read by the CLIP",
        )
        for kind, given in KINDS.items():
            out = Path(folder) / f"{kind}.pt"
            found = run(args, out, **{"count": args.count, "views": 2, **given})
            say(
                kind,
                found["seconds"],
                found["peak"],
                psnr(out, Path(folder) / "float32.pt"),
                f"{read(out):.0%}",
            )


if __name__ == "__main__":
    main()
