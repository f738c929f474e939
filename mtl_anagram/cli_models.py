"""The commands info and download: what a model needs, what this machine has, and bringing the files here."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .planning import Plan, PlannedNetwork


def add_model_commands(commands: Any) -> None:
    """Add `info` and `download` to the command's subparsers."""
    info = commands.add_parser(
        "info",
        help="what a model needs and what fits this machine",
        description="Print a model's plan: parameters, bytes on disk, peak memory of each stage, what fits this "
        "machine, and which files are here. Loads nothing; the releases need no connection either.",
    )
    add_sources(info)
    info.add_argument("--batch-size", type=int, default=1, help="seeds sampled at once (default: 1)")
    info.add_argument("--views", type=int, default=2, metavar="N", help="how many views (default: 2)")
    info.add_argument("--size", type=int, help="stage I's side in px (default: what it was trained at)")
    info.add_argument("--json", action="store_true", help="the plan as one JSON object")
    info.set_defaults(run=_info)

    download = commands.add_parser(
        "download",
        help="bring a model's files to this machine",
        description="Fetch exactly the files that a model loads: into the hub's cache, or into a folder that is a "
        "model by itself. Goes on where it was interrupted, compares sizes and checksums with the hub's, and says "
        "beforehand what does not fit. The IF weights are gated: accept the licence on their pages at "
        "huggingface.co, then `hf auth login` or set HF_TOKEN.",
    )
    add_sources(download)
    download.add_argument("--to", metavar="FOLDER", help="a folder of its own (default: the hub's cache)")
    download.add_argument("--quiet", action="store_true", help="no progress bars")
    download.set_defaults(run=_download)


def add_sources(parser: argparse.ArgumentParser) -> None:
    """The options that say which networks, and where and how they run."""
    parser.add_argument(
        "--model", help="IF-M, IF-L, IF-XL, a folder, or a hub id of stage I (default: the embedded cascade)"
    )
    parser.add_argument("--stage-2", help='stage II\'s folder, hub id or release, or "none"')
    parser.add_argument("--stage-3", help='the x4 upscaler\'s folder, hub id or release, or "none"')
    parser.add_argument(
        "--noise-clip", help='the noise-aware CLIP\'s folder, "glide" for GLIDE\'s, or "none"'
    )
    parser.add_argument("--variant", help="of the weight files: fp16 (a release's default) or fp32")
    parser.add_argument("--device", help="cpu, cuda, cuda:0, mps (default: the best there is)")
    parser.add_argument(
        "--dtype", help="float32, float16 or bfloat16 (default: float16 on CUDA, else float32)"
    )
    parser.add_argument(
        "--keep",
        choices=("auto", "all", "one"),
        default="auto",
        help="networks in memory: all, one stage's, or as there is room (default)",
    )
    parser.add_argument(
        "--text-encoder",
        default="auto",
        choices=("auto", "whole", "streamed"),
        help="load T5, or run it from its files with little memory (default: the first, where it fits)",
    )
    parser.add_argument(
        "--prompt-cache",
        metavar="FOLDER",
        help="keep prompts' states there: T5 then runs for new prompts only",
    )
    parser.add_argument(
        "--ignore-memory", action="store_true", help="go on where the machine looks too small for a stage"
    )


def cascade_of(arguments: argparse.Namespace) -> Any:
    """The cascade that the options of `add_sources` describe."""
    from .cascade import Cascade

    return Cascade.from_pretrained(
        arguments.model,
        stage_2=arguments.stage_2,
        stage_3=arguments.stage_3,
        noise_clip=arguments.noise_clip,
        variant=arguments.variant,
        device=arguments.device,
        dtype=arguments.dtype,
        keep=arguments.keep,
        ignore_memory=arguments.ignore_memory,
        text_encoder=arguments.text_encoder,
        prompt_cache=arguments.prompt_cache,
    )


def _info(arguments: argparse.Namespace) -> int:
    plan = cascade_of(arguments).plan(
        views=arguments.views, batch_size=arguments.batch_size, size=arguments.size
    )
    if arguments.json:
        print(json.dumps(plan.to_dict(), indent=1))
        return 0
    for line in describe(plan):
        print(line)
    if arguments.model is None:
        from .releases import RELEASES

        print(f"\nreleases by name: {', '.join(RELEASES)} (mtl-anagram info --model {next(iter(RELEASES))})")
    return 0


def describe(plan: Plan) -> list[str]:
    """A plan as lines of text."""
    from .planning import human_bytes as size

    lines = [f"{plan.name}, {plan.dtype} on {plan.device}", ""]
    rows: list[tuple[str, ...]]
    rows = [("network", "source", "parameters", "on disk", "in memory", "files here")]
    for network in plan.networks:
        source = network.source if network.variant is None else f"{network.source} ({network.variant})"
        name = f"{network.name}, streamed" if network.streamed else network.name
        count = "?" if network.parameters is None else f"{network.parameters:,}"
        rows.append((name, source, count, size(network.disk), size(network.memory), _present(network)))
    lines += [*_table(rows), ""]
    rows = [("in memory together", "weights", "activations", "needed", "on this machine")]
    for stage in plan.stages:
        name = f"{stage.name}: {', '.join(stage.networks)}"
        numbers = (size(stage.weights), size(stage.activations), size(stage.needed))
        rows.append((name, *numbers, stage.verdict))
    lines += [*_table(rows), ""]
    machine = plan.machine
    if machine is not None:
        lines.append(
            f"this machine ({machine.device}): {size(machine.total)}, of which {size(machine.free)} free"
        )
    kept = (
        "all networks stay in memory"
        if plan.keep == "all"
        else "one stage's networks are in memory at a time"
    )
    lines.append(f"all together need {size(plan.together)}: {kept} (keep={plan.keep})")
    lines.append(
        f"needed: weights, the activations' peak for {plan.batch_size} picture(s) of {plan.views} view(s), counted "
        "tensor by tensor without computing them, and the process itself"
    )
    return lines


def _present(network: PlannedNetwork) -> str:
    here = sum(file.present for file in network.files)
    if here == len(network.files):
        return "all"
    return f"{here} of {len(network.files)}" if here else "none"


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    """Columns of equal width: words to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    right = [all(row[i][:1].isdigit() or row[i] == "?" for row in rows[1:]) for i in range(len(widths))]
    return [
        "  ".join(
            cell.rjust(width) if to_the_right else cell.ljust(width)
            for cell, width, to_the_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in rows
    ]


def _download(arguments: argparse.Namespace) -> int:
    from .download import download
    from .planning import human_bytes as size

    fetched = download(cascade_of(arguments), arguments.to, progress=not arguments.quiet)
    for file in fetched:
        print(f"{file.path}  {size(file.bytes)}")
    model = arguments.to or arguments.model
    if not fetched:
        print("nothing to fetch: every file is on this machine", file=sys.stderr)
        return 0
    print(
        f"{len(fetched)} files, {size(sum(file.bytes for file in fetched))}; from now on it works offline, too "
        f"(HF_HUB_OFFLINE=1): mtl-anagram generate ... --model {model}",
        file=sys.stderr,
    )
    return 0
