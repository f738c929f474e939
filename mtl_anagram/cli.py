"""The command mtl-anagram."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from .cli_models import add_model_commands, add_sources, cascade_of

EXIT_ERROR, EXIT_INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (None = the process's); returns its exit status."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    from .errors import AnagramError, PromptWarning

    shown = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **rest: Any) -> None:
        if issubclass(category, PromptWarning):  # of the request, not of a line of code
            print(f"mtl-anagram: {message}", file=sys.stderr)
        else:
            shown(message, category, *place, **rest)

    try:
        with warnings.catch_warnings():
            # torch says so at every start where numpy is not installed, and nothing here needs it.
            warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
            warnings.showwarning = show
            return arguments.run(arguments)
    except AnagramError as error:
        print(f"mtl-anagram: error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print(
            "\nmtl-anagram: interrupted; finished pictures are whole, and the same command goes on from there",
            file=sys.stderr,
        )
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    from . import __version__

    parser = argparse.ArgumentParser(
        prog="mtl-anagram", description="Visual anagrams: one picture that reads as several things."
    )
    parser.add_argument("--version", action="version", version=f"mtl-anagram {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    generate = commands.add_parser(
        "generate",
        help="sample pictures from prompts and views",
        description="Sample pictures that read as the i-th prompt under the i-th view, and write "
        "OUT/SEED/sample_64.png, sample_64.views.png and metadata.json (and 256 px where the model has a stage II, "
        "1024 px where it has a stage III too).",
    )
    generate.add_argument(
        "prompts", nargs="+", metavar="PROMPT", help="one per view; [brackets] mark the concept"
    )
    generate.add_argument(
        "--views", nargs="+", required=True, metavar="VIEW", help='such as "rotate_cw+negate"'
    )
    generate.add_argument(
        "--view-args", metavar="JSON", help='a list, one entry per view: [null, {"seed": 3}]'
    )
    generate.add_argument("--style", default="", help='words before every prompt, such as "a sketch of"')
    generate.add_argument("--concepts", nargs="+", metavar="WORDS", help="per prompt; default: its last word")
    generate.add_argument(
        "--seed", nargs="+", default=["0"], metavar="N", help="seeds and ranges: 9 12 20-27"
    )
    generate.add_argument("--steps", type=int, help="denoising steps, 1 to 1000 (default: the recipe's, 30)")
    generate.add_argument("--guidance-scale", type=float, help="default: the recipe's (released: 10)")
    generate.add_argument("--noise-level", type=int, default=50, help="stage II's, 0 to 999 (default: 50)")
    generate.add_argument("--recipe", choices=RECIPES, help="default: the one the model comes with")
    for name in TECHNIQUES:
        generate.add_argument(
            f"--{name.replace('_', '-')}",
            action=argparse.BooleanOptionalAction,
            help="switch, over the recipe",
        )
    generate.add_argument("--size", type=int, help="stage I's side in px (default: what it was trained at)")
    generate.add_argument("--stop-after", type=int, metavar="PX", help="64: stage I alone; 256: no stage III")
    generate.add_argument("--batch-size", type=int, default=4, help="seeds sampled at once (default: 4)")
    generate.add_argument(
        "--best-of",
        type=int,
        metavar="N",
        help="sample N seeds from --seed on, keep the best by the model's CLIP",
    )
    generate.add_argument("--overwrite", action="store_true", help="replace another request's pictures")
    _stage_3(generate)
    _where(generate)
    generate.set_defaults(run=_generate)

    repeat = commands.add_parser("repeat", help="make a picture again from its metadata.json")
    repeat.add_argument("metadata", metavar="METADATA")
    repeat.add_argument("--overwrite", action="store_true", help="replace another request's pictures")
    _where(repeat)
    repeat.set_defaults(run=_repeat)
    add_model_commands(commands)

    from . import cli_evaluate

    cli_evaluate.add_parser(commands, _where)
    return parser


RECIPES = ("released", "corrected", "plain")
TECHNIQUES = ("balancing", "rectification", "anti_segregation")


def _stage_3(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("stage III")
    group.add_argument("--stage-3-steps", type=int, metavar="N", help="1 to 999 (default: 75)")
    group.add_argument("--stage-3-guidance-scale", type=float, metavar="SCALE", help="default: 9")
    group.add_argument("--stage-3-noise-level", type=int, metavar="N", help="0 to 350 (default: 0)")
    group.add_argument(
        "--stage-3-views",
        choices=("first", "all", "all_latents"),
        help="first: the first prompt alone, as released (default); all: every view's prompt, through pixels; "
        "all_latents: the same on latents, cheap and approximate",
    )
    group.add_argument(
        "--stage-3-exchange-every", type=int, metavar="N", help="steps between all's averages (default: 1)"
    )


def _upscale(arguments: argparse.Namespace) -> Any:
    """The stage III options as an UpscaleRecipe, None where none is given."""
    from .sampling import UpscaleRecipe

    names = {"num_inference_steps": "steps"}
    names |= {name: name for name in ("guidance_scale", "noise_level", "views", "exchange_every")}
    given = {name: getattr(arguments, f"stage_3_{option}") for name, option in names.items()}
    given = {name: value for name, value in given.items() if value is not None}
    return UpscaleRecipe(**given) if given else None


def _where(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="output", metavar="FOLDER", help="default: output")
    add_sources(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress bar, only the files' names")


def _generate(arguments: argparse.Namespace) -> int:
    from .best_of import best_of
    from .errors import InputError
    from .generate import generate_anagram

    seeds = parse_seeds(arguments.seed)
    view_args = _view_args(arguments.view_args)
    if arguments.best_of is not None and len(seeds) > 1:
        raise InputError(f"--best-of {arguments.best_of} takes one --seed, the first of its seeds")
    cascade = cascade_of(arguments)
    request = (arguments.style, arguments.prompts, arguments.views, arguments.out)
    options: dict[str, Any] = {
        "noise_level": arguments.noise_level,
        "view_args": view_args,
        "model": cascade,
        "recipe": _recipe(arguments, cascade),
        "upscale": _upscale(arguments),
        "concepts": arguments.concepts,
        "stop_after": arguments.stop_after,
        "size": arguments.size,
        "batch_size": arguments.batch_size,
        "overwrite": arguments.overwrite,
        "progress": not arguments.quiet,
    }
    if arguments.best_of is None:
        made = generate_anagram(*request, seed=seeds, **options)
    else:
        best, candidates = best_of(arguments.best_of, *request, seed=seeds[0], **options)
        for candidate in candidates:
            print(
                f"seed {candidate.anagram.seed:4d}  score {candidate.score:.3f}  alignment {candidate.alignment:.3f}"
                f"  concealment {candidate.concealment:.3f}"
            )
        made = [best]
    if not cascade.has_stage_2:
        print(f"{cascade.name} has no stage II: stopped after stage I", file=sys.stderr)
    for anagram in made:
        _report(anagram)
    return 0


def _repeat(arguments: argparse.Namespace) -> int:
    from .generate import repeat_anagram

    anagram = repeat_anagram(
        arguments.metadata,
        arguments.out,
        model=cascade_of(arguments),
        progress=not arguments.quiet,
        overwrite=arguments.overwrite,
    )
    _report(anagram)
    return 0


def _report(anagram: Any) -> None:
    for path in anagram.pictures.values():
        views = path.with_name(f"{path.stem}.views.png")
        print(f"{path}  {views.name}{'  (was there)' if anagram.skipped else ''}")


def _recipe(arguments: argparse.Namespace, cascade: Any) -> Any:
    import dataclasses

    from .sampling import Recipe

    base = cascade.recipe if arguments.recipe is None else getattr(Recipe, arguments.recipe)()
    changes = {name: getattr(arguments, name) for name in TECHNIQUES}
    changes |= {"num_inference_steps": arguments.steps, "guidance_scale": arguments.guidance_scale}
    return dataclasses.replace(base, **{name: value for name, value in changes.items() if value is not None})


def _view_args(text: str | None) -> Any:
    from .errors import InputError

    if text is None:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"--view-args {text[:200]!r} is not JSON ({error}); give a list, one entry per view"
        ) from None


def parse_seeds(words: Sequence[str]) -> list[int]:
    """Seeds of the command line: numbers and inclusive ranges such as 4-7, in order."""
    from .checks import MAX_SEED
    from .errors import InputError

    seeds: list[int] = []
    for word in words:
        first, dash, last = word.partition("-")
        if not (first.isascii() and first.isdigit()) or (dash and not (last.isascii() and last.isdigit())):
            raise InputError(f"--seed {word!r} is neither a whole number from 0 up nor a range such as 4-7")
        if max(len(first), len(last)) > 19:
            raise InputError(f"--seed {word[:60]!r} is too large; seeds go from 0 to {MAX_SEED}")
        stop = int(last) if dash else int(first)
        if not int(first) <= stop < int(first) + 100_000:
            raise InputError(f"--seed {word!r}: a range goes upwards and names at most 100000 seeds")
        seeds.extend(range(int(first), stop + 1))
    return seeds


if __name__ == "__main__":
    sys.exit(main())
