"""One step of a stage at a release's size, random weights, two views: ours beside the published loop on diffusers.

    python -m benchmarks.step --size IF-I-M --threads 2
    python -m benchmarks.step --size IF-I-XL IF-II-L --device cuda --dtype float16 --batch 1 8 --minutes 6

A stage I's step has all techniques but the scorer: the prediction with guidance, rectification, the DDPM step, and the
gradient step on the token maps. The second of two is timed. The published loop samples one picture after the other.
On a CPU each kind is a process of its own, peak is its largest resident memory; on a GPU both are in one, peak is what
was allocated during the step. Operations are of ours (torch.utils.flop_counter), beside the rate of one large product.
"""

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import (
    SIZES,
    Figures,
    child,
    head,
    matrix_rate,
    peak,
    peer_unet,
    random_unet,
    say,
    synchronized,
)  # fmt: skip

KINDS, LIMIT = ("ours", "peer"), 1e-4  # the limit for float32
VIEWS, SPANS, STEPS = ("identity", "rotate_cw"), [(1, 3), (2, 4)], 30
KIND_OF = {  # an operation's kind, by a word in its name
    "conv": "convolutions", "attention": "attention", "gelu": "GELU", "norm": "norms", "mm": "matrix products",
    "softmax": "softmax", "cat": "copies", "copy": "copies", "sort": "sort", "upsample": "resampling",
    "pool": "resampling", "mul": "pointwise", "add": "pointwise", "div": "pointwise",
}  # fmt: skip


def inputs(args: argparse.Namespace, size: str) -> dict[str, Any]:
    """Text of null and prompts (4, 77, D), and for a stage II the small picture."""
    import torch

    draws, width = torch.Generator().manual_seed(1), 64 if "tiny" in size else 4096
    text = 0.1 * torch.randn(2, 77, width, generator=draws)
    null, side = 0.1 * torch.randn(1, 77, width, generator=draws), 16 if "tiny" in size else 64
    low_res = torch.rand(1, 3, side, side, generator=draws) * 2 - 1 if "II" in size else None
    place = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    return {"text": text.to(**place), "null": null.to(**place), "low_res": low_res}


def ours(unet: Any, args: argparse.Namespace, size: str, batch: int) -> Iterator[Any]:
    import torch

    from mtl_anagram import Recipe, get_views
    from mtl_anagram.sampling import sample_stage1, sample_stage2

    given, views = inputs(args, size), get_views(list(VIEWS))
    shared: dict[str, Any] = {
        "score": None, "generators": [torch.Generator().manual_seed(seed) for seed in range(batch)],
        "recipe": Recipe.released(num_inference_steps=STEPS), "fused": args.fused,
    }  # fmt: skip
    if given["low_res"] is None:
        return sample_stage1(unet, given["text"], given["null"], views, spans=SPANS, **shared)
    low_res = given["low_res"].expand(batch, -1, -1, -1)
    side = 4 * low_res.shape[-1]
    return sample_stage2(unet, low_res, given["text"], given["null"], views, size=side, **shared)


def peer(unet: Any, args: argparse.Namespace, size: str, batch: int) -> Iterator[Any]:
    import torch
    from diffusers import DDPMScheduler

    from benchmarks import reference_loop
    from mtl_anagram import get_views

    given, stage_1 = inputs(args, size), "II" not in size
    text = torch.cat([given["null"].expand(2, -1, -1), given["text"]])
    scheduler = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", variance_type="learned_range", thresholding=True,
        dynamic_thresholding_ratio=0.95, sample_max_value=1.5 if stage_1 else 1.0,
    )  # fmt: skip
    maps = reference_loop.recorded(unet) if stage_1 else {}
    unet.requires_grad_(stage_1)
    low_res, spans = given["low_res"], SPANS if stage_1 else None
    low_res = None if low_res is None else low_res.to(args.device)
    pictures = [
        reference_loop.states(
            unet, maps, scheduler, text, get_views(list(VIEWS)), spans, seed, STEPS, low_res=low_res
        )
        for seed in range(batch)
    ]
    return map(torch.cat, zip(*pictures, strict=True))


def measure(kind: str, unet: Any, args: argparse.Namespace, size: str, batch: int) -> Figures:
    """Two steps; the second's seconds, processor seconds, GPU memory in MiB, and the pictures after the first."""
    import torch

    cuda = args.device.startswith("cuda")
    steps = (ours if kind == "ours" else peer)(unet, args, size, batch)
    state = next(steps)
    x = (state.x if kind == "ours" else state).detach().float().cpu()  # (B, 3, H, W)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    synchronized(args.device)
    begin, busy = time.perf_counter(), time.process_time()
    next(steps)
    synchronized(args.device)
    figures = {"step": time.perf_counter() - begin, "busy": time.process_time() - busy}
    if cuda:
        figures["peak"] = torch.cuda.max_memory_allocated() / 2**20
    return figures | {"x": x}


def operations(unet: Any, args: argparse.Namespace, size: str) -> float:
    """Floating-point operations of one of our steps, one picture."""
    from torch.utils.flop_counter import FlopCounterMode

    steps = ours(unet, args, size, 1)
    with FlopCounterMode(display=False) as counter:
        next(steps)
    return float(counter.get_total_flops())


def shares(unet: Any, args: argparse.Namespace, size: str) -> dict[str, float]:
    """Where one of our steps spends its time, by kind of operation, the eight largest."""
    from torch.profiler import ProfilerActivity, profile

    cuda = args.device.startswith("cuda")
    steps = ours(unet, args, size, 1)
    next(steps)
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as found:
        next(steps)
        synchronized(args.device)
    kinds: dict[str, float] = {}
    for event in found.key_averages():
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        kind = next((kind for word, kind in KIND_OF.items() if word in event.key.lower()), "other")
        kinds[kind] = kinds.get(kind, 0.0) + spent
    total = sum(kinds.values()) or 1.0
    return dict(sorted(((kind, t / total) for kind, t in kinds.items()), key=lambda item: -item[1])[:8])


def both(args: argparse.Namespace, size: str, batch: int) -> dict[str, Figures]:
    """Both kinds' figures: on a GPU in this process, on the same weights, else each in a process of its own."""
    if args.device.startswith("cuda"):
        found = {}
        for kind in KINDS:
            network = args.network if kind == "ours" else peer_unet(args.network)
            found[kind] = measure(kind, network, args, size, batch)
            del network
            gc.collect()
        return found
    words = ("--size", size, "--threads", args.threads, "--batch", batch, "--dtype", args.dtype)
    words += ("--fused", args.fused) if args.fused else ()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        import torch

        for kind in KINDS:
            out = Path(folder) / f"{kind}.pt"
            found[kind] = child("step", *words, "--child", kind, "--out", out)
            found[kind]["x"] = torch.load(out, weights_only=True)
    return found


def difference(found: dict[str, Figures]) -> float:
    """Largest difference of the pictures after one step over the peer's largest magnitude."""
    a, b = (found[kind]["x"] for kind in KINDS)
    return ((a - b).abs().max() / b.abs().max()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", nargs="+", default=["IF-I-M"], choices=SIZES)
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--fused", choices=("torch", "triton"), help="ours with fused passes")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no case after so many")
    parser.add_argument("--child", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    import torch

    begin = time.perf_counter()
    torch.set_num_threads(args.threads)
    if args.child:
        unet = random_unet(args.size[0], args.device, args.dtype)
        unet = peer_unet(unet) if args.child == "peer" else unet
        figures = measure(args.child, unet, args, args.size[0], args.batch[0])
        torch.save(figures.pop("x"), args.out)
        print(json.dumps(figures | {"peak": peak()}))
        return
    side = 256 if "tiny" in args.size[0] else 2048 if args.device == "cpu" else 8192
    rate = matrix_rate(args.device, args.dtype, side, 0.05 if side == 256 else 1.0)
    print(f"{args.dtype}, {args.device}, a large product's rate {rate:.4g} GFLOP/s")
    head("", "ours, s", "peer, s", "peer / ours", "ours, MiB", "peer, MiB", "ours / peer", "ours, GFLOP", "of the rate",
         "difference")  # fmt: skip
    where = {}
    for size in args.size:
        args.network = random_unet(size, args.device, args.dtype)
        count = operations(args.network, args, size) / 1e9
        where[size] = shares(args.network, args, size)
        if args.device == "cpu":
            args.network = None
        for batch in args.batch:
            if time.perf_counter() - begin > 60 * args.minutes:
                sys.exit("out of time")
            found = both(args, size, batch)
            a, b = (found[kind] for kind in KINDS)
            say(
                f"{size}, {batch} at once", a["step"], b["step"], b["step"] / a["step"], a["peak"], b["peak"],
                a["peak"] / b["peak"], count * batch, count * batch / a["step"] / rate, difference(found),
            )  # fmt: skip
            if args.dtype == "float32" and difference(found) > LIMIT:
                raise SystemExit("the two differ")
    head("where our step's time goes", *(f"{i}." for i in range(1, 9)))
    for size, kinds in where.items():
        named = [f"{kind} {share:.0%}" for kind, share in kinds.items()]
        say(size, *named, *[""] * (8 - len(named)))


if __name__ == "__main__":
    main()
