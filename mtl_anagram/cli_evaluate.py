"""The command mtl-anagram evaluate: a protocol from the command line, its report as a table."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any


def add_parser(commands: Any, where: Any) -> None:
    """Add the command to the subparsers; `where` adds the arguments that say which model runs where."""
    parser = commands.add_parser(
        "evaluate",
        help="measure pairs, views, seeds and recipes",
        description="Sample all pairs of the concepts under each view with each recipe and seed, measure alignment, "
        "concealment and what the judge names, and write OUT/cells/* and OUT/report.json. The same command goes on "
        "where it was stopped.",
    )
    parser.add_argument("--concepts", nargs="+", metavar="NAME", help="default: what the model has learnt")
    parser.add_argument("--pairs", nargs="+", metavar="A/B", help="these pairs instead, such as duck/rabbit")
    parser.add_argument("--pair-count", type=int, metavar="N", help="N pairs by a fixed draw (default: all)")
    parser.add_argument("--pair-seed", type=int, default=0, help="of that draw (default: 0)")
    parser.add_argument("--singles", action="store_true", help="one reading a picture: no pairs, no views")
    parser.add_argument(
        "--views", nargs="+", default=["flip", "rotate_180", "rotate_ccw"], help="of the second reading"
    )
    parser.add_argument("--recipes", nargs="+", metavar="RECIPE", help="of: own plain balancing rectification "
                        "anti_segregation released corrected, or a recipe's JSON file (default: all; with --singles: "
                        "plain)")  # fmt: skip
    parser.add_argument("--seed", nargs="+", default=["0-9"], metavar="N", help="default: 0-9")
    parser.add_argument("--style", default="a sketch of", help='default: "a sketch of"')
    parser.add_argument("--steps", type=int, help="denoising steps of every recipe (default: the model's)")
    parser.add_argument("--guidance-scale", type=float, help="of every recipe (default: the model's)")
    parser.add_argument("--size", type=int, default=64, help="64 or, with stage II, 256 (default: 64)")
    parser.add_argument("--noise-level", type=int, default=50, help="stage II's, 0 to 999 (default: 50)")
    parser.add_argument("--judge", help="the judge's folder (default: judge/ in the model's)")
    parser.add_argument("--temperature", type=float, help="of concealment (default: 0.05)")
    parser.add_argument("--batch-size", type=int, default=10, help="pictures sampled at once (default: 10)")
    where(parser)
    parser.set_defaults(run=run, out="evaluation")


def run(arguments: argparse.Namespace) -> int:
    from .cascade import embedded_folder
    from .cli import parse_seeds
    from .cli_models import cascade_of
    from .errors import InputError
    from .evaluation import ABLATION, Protocol, choose_pairs, evaluate
    from .metrics import TEMPERATURE
    from .models.sources import read_config
    from .report import as_table
    from .sampling import Recipe

    cascade = cascade_of(arguments)
    folder = embedded_folder() if arguments.model is None else Path(arguments.model)
    judge = _judge(arguments.judge, folder)
    names = arguments.concepts or list(cascade.concepts) or (judge.names if judge is not None else [])
    if not names and not arguments.pairs:
        raise InputError("neither the model nor a judge lists its names: give --concepts or --pairs")
    if arguments.pairs:
        pairs = tuple(tuple(pair.split("/")) for pair in arguments.pairs)
    elif arguments.singles:
        pairs = tuple((name,) for name in names)
    else:
        pairs = choose_pairs(names, arguments.pair_count, arguments.pair_seed)
    own = cascade.recipe
    known = {"own": own, **ABLATION}
    wanted = arguments.recipes or (["plain"] if arguments.singles else list(known))
    for name in wanted:
        if name.endswith(".json"):
            known[name] = read_config(Path(name), Recipe.from_dict)
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise InputError(f"--recipes {' '.join(unknown)}: unknown; there are {', '.join(known)}")
    changes = {
        "num_inference_steps": own.num_inference_steps if arguments.steps is None else arguments.steps,
        "guidance_scale": own.guidance_scale
        if arguments.guidance_scale is None
        else arguments.guidance_scale,
    }
    recipes = {
        Path(name).stem: known[name]
        if name.endswith(".json")
        else dataclasses.replace(known[name], **changes)
        for name in wanted
    }
    protocol = Protocol(
        pairs=pairs, views=tuple(arguments.views), recipes=recipes, seeds=tuple(parse_seeds(arguments.seed)),
        style=arguments.style, size=arguments.size, noise_level=arguments.noise_level,
        temperature=TEMPERATURE if arguments.temperature is None else arguments.temperature,
    )  # fmt: skip
    summary = evaluate(
        cascade, protocol, arguments.out, judge=judge, batch_size=arguments.batch_size,
        progress=not arguments.quiet,
    )  # fmt: skip
    print(as_table(summary))
    return 0


def _judge(source: str | None, folder: Path) -> Any:
    from .models import load_judge

    if source is not None:
        return load_judge(source)
    return load_judge(folder) if (folder / "judge" / "judge.json").is_file() else None
