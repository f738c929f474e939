"""The command mtl-anagram, also `python -m mtl_anagram`."""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import hashlib
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cascade import Cascade
    from .files.outputs import Anagram

log = logging.getLogger("mtl_anagram")


class _Printer(logging.Handler):
    """What is logged, printed: results on stdout, warnings and errors on stderr, each once."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        self.options, self.said = options, set[str]()

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno == logging.INFO:
            print(record.getMessage())
        elif (text := " ".join(record.getMessage().split())) not in self.said:
            self.said.add(text)
            # The library advises its arguments, such as model= and overwrite=True; a reader here has options.
            for name in vars(self.options):
                text = re.sub(rf"\b{name}=(True\b|(?=[\s,;.)]|$))", f"--{name.replace('_', '-')}", text)
            print(f"mtl-anagram: {text}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (None = the process's); returns its exit status."""
    if "torch" not in sys.modules:  # which reads these: threads that spin hold up those that work
        for name, value in (("OMP_WAIT_POLICY", "PASSIVE"), ("GOMP_SPINCOUNT", "0"), ("KMP_BLOCKTIME", "0")):
            os.environ.setdefault(name, value)
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        # glibc keeps what is freed: mapping every large feature map anew is a fifth of stage II's processor time.
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    options = _parser().parse_args(argv)
    printer, level = _Printer(options), log.level
    log.addHandler(printer)
    log.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings():
            return _run(options)
    except KeyboardInterrupt:
        log.warning("interrupted; finished seeds are kept, and the same command goes on with the others")
        return 130
    except BrokenPipeError:  # the reader has gone, as `| head` does: what is still buffered goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    finally:
        log.removeHandler(printer)
        log.setLevel(level)


def _run(options: argparse.Namespace) -> int:
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # nothing here needs it
    import torch

    from .errors import AnagramError, PromptWarning, whole_number

    shown = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **rest: Any) -> None:
        if issubclass(category, PromptWarning) or str(place[0]).startswith(os.path.dirname(__file__)):
            log.warning(str(message))  # of the request, not of a line of code
        else:
            shown(message, category, *place, **rest)

    warnings.showwarning = show
    try:
        if (threads := getattr(options, "threads", None)) is not None:
            torch.set_num_threads(whole_number("--threads", threads, 1))
        options.run(options)
        sys.stdout.flush()
        return 0
    except AnagramError as error:
        log.error("error: %s", error)
        return 2


def _parser() -> argparse.ArgumentParser:
    from . import __version__

    about = "Visual anagrams: one picture that reads as several things."
    parser = argparse.ArgumentParser(prog="mtl-anagram", description=about)
    parser.add_argument("--version", action="version", version=f"mtl-anagram {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run: Callable[..., None], help: str, about: str | None = None) -> argparse.ArgumentParser:
        added = commands.add_parser(run.__name__[1:], help=help, description=about)
        added.set_defaults(run=run)
        return added

    generate = command(_generate, "sample pictures from prompts and views", "Sample pictures that read as the i-th "
        "prompt under the i-th view. Writes OUT/SEED/sample_64.png, sample_64.views.png and metadata.json (and 256 px "
        "where the model has a stage II, 1024 px where it has a stage III too).")  # fmt: skip
    _add_request(generate.add_argument, generate.add_argument_group("stage III").add_argument)
    repeat = command(_repeat, "make a picture again from its metadata.json")
    repeat.add_argument("metadata", type=Path, metavar="METADATA")
    evaluate = command(_evaluate, "measure pairs, views, seeds and recipes", "Sample all pairs of the concepts under "
        "each view with each recipe and seed, and measure alignment, concealment and what the judge reads. Writes "
        "OUT/cells/* and OUT/report.json. The same command goes on where it was stopped.")  # fmt: skip
    _add_protocol(evaluate.add_argument)
    info = command(_info, "what a model needs and what fits this machine", "Print a model's plan: parameters, bytes "
        "on disk, memory of each stage, what fits this machine, and which files are here. Loads nothing.")  # fmt: skip
    add = info.add_argument
    add("--batch-size", type=int, default=1, help="seeds sampled at once (default: 1)")
    add("--views", type=int, default=2, metavar="N", help="how many views (default: 2)")
    add("--size", type=int, default=64, help="stage I's side in px (default: 64)")
    add("--json", action="store_true", help="the plan as one JSON object")
    download = command(_download, "bring a model's files to this machine", "Fetch exactly the files that a model "
        "loads: into the hub's cache, or into a folder that is a model by itself. The IF weights are gated: accept the "
        "licence on their pages at huggingface.co, then `hf auth login` or set HF_TOKEN.")  # fmt: skip
    add = download.add_argument
    add("--to", metavar="FOLDER", help="a folder of its own (default: the hub's cache)")
    add("--quiet", action="store_true", help="no progress bars")

    for added, base in ((generate, "output"), (repeat, "repeated"), (evaluate, "evaluation")):
        add = added.add_argument
        add("--out", metavar="FOLDER", help=f"default: {base}/NAME, a name of the request's own")
        add("--quiet", action="store_true", help="no progress bars, only results")
        add("--threads", type=int, metavar="N", help="threads on a CPU (default: one for each core)")
        if added is not evaluate:
            add("--overwrite", action="store_true", help="replace another request's pictures")
    for added in commands.choices.values():
        _add_sources(added.add_argument_group("model").add_argument)
    return parser


def _add_request(add: Any, add_3: Any) -> None:
    add("prompts", nargs="+", metavar="PROMPT", help="one per view; [brackets] mark the concept")
    add("--views", nargs="+", required=True, metavar="VIEW", help='such as "rotate_cw+negate"')
    add(
        "--view-args", type=json.loads, metavar="JSON", help='a list, one entry per view: [null, {"seed": 3}]'
    )
    add("--style", default="", help='words before every prompt, such as "a sketch of"')
    add("--negative", nargs="+", metavar="PROMPT", help="what not to draw: one for all, or one per view")
    add("--concepts", nargs="+", metavar="WORDS", help="per prompt; default: its last word")
    add("--seed", nargs="+", default=["0"], metavar="N", help="seeds and ranges: 9 12 20-27")
    add("--best-of", type=int, metavar="N", help="of N seeds from --seed on take the best by the CLIP")
    add("--recipe", choices=("released", "corrected", "plain"), help="default: the one the model comes with")
    for option in ("--balancing", "--rectification", "--anti-segregation"):
        add(option, action=argparse.BooleanOptionalAction, help="switch, over the recipe")
    add("--steps", type=int, dest="num_inference_steps", metavar="N", help="default: the recipe's")
    add("--guidance-scale", type=float, metavar="SCALE", help="default: the recipe's")
    add("--solver", choices=("ddpm", "ddim", "dpm_solver_2m"), help="default: the recipe's")
    add("--noise-level", type=int, default=50, help="stage II's, 0 to 999 (default: 50)")
    add("--size", type=int, help="stage I's side in px (default: what it was trained at)")
    add("--stop-after", type=int, metavar="PX", help="64: stage I alone; 256: no stage III")
    add("--batch-size", type=int, default=4, help="seeds sampled at once (default: 4)")
    add_3("--stage-3-steps", type=int, dest="stage_3_num_inference_steps", metavar="N", help="default: 75")
    add_3("--stage-3-guidance-scale", type=float, metavar="SCALE", help="default: 9")
    add_3("--stage-3-noise-level", type=int, metavar="N", help="0 to 350 (default: 0)")
    add_3("--stage-3-views", choices=("first", "all", "all_latents"), help="first: the first prompt alone, as released "
        "(default); all: every view's prompt, through pixels; all_latents: the same on latents, cheap and "
        "approximate")  # fmt: skip
    add_3("--stage-3-exchange-every", type=int, metavar="N", help="steps between all's averages (default: 1)")


def _add_protocol(add: Any) -> None:
    add("--concepts", nargs="+", metavar="NAME", help="default: what the model has learnt to draw")
    add("--pairs", nargs="+", metavar="A/B", help="these pairs instead, such as duck/rabbit")
    add("--pair-count", type=int, metavar="N", help="N pairs by a fixed draw (default: all pairs)")
    add("--pair-seed", type=int, default=0, metavar="N", help="the seed of that draw (default: 0)")
    add("--singles", action="store_true", help="pictures of one reading: no pairs, no views")
    names = "own plain balancing rectification anti_segregation released corrected"
    views = ["flip", "rotate_180", "rotate_ccw"]
    add("--views", nargs="+", default=views, metavar="VIEW", help=f"second reading's ({' '.join(views)})")
    add("--recipes", nargs="+", metavar="RECIPE", help=f"some of: {names}; or the JSON file of a recipe's fields "
        "(default: all of these names; with --singles: plain)")  # fmt: skip
    add("--seed", nargs="+", default=["0-9"], metavar="N", help="seeds and ranges (default: 0-9)")
    add("--style", default="a sketch of", help='words before every name (default: "a sketch of")')
    add("--steps", type=int, help="denoising steps of every recipe (default: the model's)")
    add("--guidance-scale", type=float, help="of every recipe (default: the model's)")
    add("--size", type=int, default=64, help="64, or 256 to measure what stage II makes (default: 64)")
    add("--noise-level", type=int, default=50, help="stage II's, 0 to 999 (default: 50)")
    add("--judge", metavar="FOLDER", help="the judge's folder (default: judge/ in the model's, if there)")
    add("--temperature", type=float, default=0.05, help="of concealment (default: 0.05)")
    add("--batch-size", type=int, default=10, help="pictures sampled at once (default: 10)")


def _add_sources(add: Any) -> None:
    add("--model", help="IF-M, IF-L, IF-XL, a folder, or a hub id of stage I (default: the embedded cascade)")
    add("--stage-2", help='stage II\'s folder, hub id or release, or "none"')
    add("--stage-3", help='the x4 upscaler\'s folder, hub id or release, or "none"')
    add("--noise-clip", help='the noise-aware CLIP\'s folder, "glide" for GLIDE\'s, or "none"')
    add("--variant", help="of the weight files: fp16 (a release's default) or fp32")
    add("--device", help="cpu, cuda, cuda:0, mps (default: the best there is)")
    add("--dtype", help="float32, float16 or bfloat16 (default: float16 on CUDA, else float32)")
    add("--keep", choices=("auto", "all", "one"), default="auto",
        help="networks in memory: all, one stage's, or as there is room (default)")  # fmt: skip
    add("--text-encoder", choices=("auto", "whole", "streamed"), default="auto",
        help="load T5, or run it from its files with little memory (default: the first, where it fits)")  # fmt: skip
    add("--prompt-cache", metavar="FOLDER", help="keep prompts' states there: T5 runs for new ones alone")


def _cascade(options: argparse.Namespace) -> Cascade:
    from .cascade import Cascade

    names = ("stage_2", "stage_3", "noise_clip", "variant", "device", "dtype", "keep", "text_encoder")
    return Cascade.from_pretrained(
        options.model, **{n: getattr(options, n) for n in (*names, "prompt_cache")}
    )


def _generate(options: argparse.Namespace) -> None:
    from .errors import InputError
    from .evaluation.best_of import best_of
    from .generate import generate_anagram
    from .sampling import Recipe, UpscaleRecipe

    seeds, given = parse_seeds(options.seed), {k: v for k, v in vars(options).items() if v is not None}
    if options.best_of is not None and len(seeds) > 1:
        raise InputError(f"--best-of {options.best_of} takes one --seed, the first of its seeds")
    cascade = _cascade(options)
    recipe = cascade.recipe if options.recipe is None else getattr(Recipe, options.recipe)()
    changes = {field.name: given[field.name] for field in dataclasses.fields(Recipe) if field.name in given}
    upscale = {k.removeprefix("stage_3_"): v for k, v in given.items() if k.startswith("stage_3_")}
    names = ("style", "prompts", "views", "view_args", "concepts", "noise_level", "size")
    request = {name: getattr(options, name) for name in names}
    request["negative"] = options.negative[0] if len(options.negative or ()) == 1 else options.negative
    request["recipe"] = dataclasses.replace(recipe, **changes)
    request["upscale"] = UpscaleRecipe(**upscale) if upscale else None
    words = [word for word in (*options.prompts, *options.views) if word != "identity"]
    request["save_dir"] = options.out or _folder("output", words, request, cascade)
    request |= {name: getattr(options, name) for name in ("stop_after", "batch_size", "overwrite")}
    request |= {"model": cascade, "progress": not options.quiet}
    if options.best_of is None:
        made = generate_anagram(**request, seed=seeds)
    else:
        best, candidates = best_of(options.best_of, **request, seed=seeds[0])
        made = [best]
        for one, *figures in candidates:
            log.info("seed %4d  score %.3f  alignment %.3f  concealment %.3f", one.seed, *figures)
    if cascade.sources["stage_2"] is None:
        log.warning(f"{cascade.name} has no stage II: stopped after stage I")
    _report(made)


def _repeat(options: argparse.Namespace) -> None:
    from .files.outputs import read_metadata
    from .generate import repeat_anagram

    path = options.metadata.absolute()
    content = read_metadata(path)
    out = options.out or _folder("repeated", [path.parent.parent.name], {"request": content.get("request")})
    if options.dtype is None and isinstance(made_with := content.get("made_with"), dict):
        options.dtype = made_with.get("dtype")
    given = {"model": _cascade(options), "progress": not options.quiet, "overwrite": options.overwrite}
    _report([repeat_anagram(path, out, **given)])


def _evaluate(options: argparse.Namespace) -> None:
    from .cascade import embedded_folder
    from .errors import InputError
    from .evaluation.protocol import ABLATION, Protocol, as_table, choose_pairs, evaluate
    from .files.hub import read_config
    from .models import load_judge
    from .sampling import Recipe

    cascade, model = _cascade(options), Path(options.model or embedded_folder())
    has_judge = options.judge is not None or (model / "judge" / "judge.json").is_file()
    judge = load_judge(options.judge or model) if has_judge else None
    names = options.concepts or cascade.concepts or (judge.names if judge else [])
    if not names and not options.pairs:
        raise InputError("neither the model nor a judge lists its names: give --concepts or --pairs")
    pairs = tuple(tuple(pair.split("/")) for pair in options.pairs or (names if options.singles else ()))
    pairs = pairs or choose_pairs(names, options.pair_count, options.pair_seed)
    given = {"num_inference_steps": options.steps, "guidance_scale": options.guidance_scale}
    same = {name: getattr(cascade.recipe, name) if value is None else value for name, value in given.items()}
    known = {name: dataclasses.replace(r, **same) for name, r in {"own": cascade.recipe, **ABLATION}.items()}
    recipes = {}
    for name in options.recipes or (["plain"] if options.singles else known):
        if name not in known and not name.endswith(".json"):
            raise InputError(f"--recipes {name}: unknown; there are {', '.join(known)}, and JSON files")
        recipes[Path(name).stem] = known[name] if name in known else read_config(Path(name), Recipe.from_dict)
    protocol = Protocol(
        pairs, tuple(options.views), recipes, tuple(parse_seeds(options.seed)), options.style, options.size,
        options.noise_level, options.temperature,
    )  # fmt: skip
    words = ["-".join(pair) for pair in pairs] if len(pairs) < 3 else [f"{len(pairs)} pairs"]
    out = options.out or _folder("evaluation", [*words, *protocol.views], vars(protocol), cascade)
    work = {"batch_size": options.batch_size, "progress": not options.quiet}
    log.info(as_table(evaluate(cascade, protocol, out, judge=judge, **work)))


def _info(options: argparse.Namespace) -> None:
    from .models.planning import describe, plan
    from .models.releases import RELEASES

    cascade = _cascade(options)
    found = plan(
        cascade.sources, cascade.variants, dtype=cascade.dtype, device=cascade.device, name=cascade.name,
        views=options.views, batch_size=options.batch_size, size=options.size,
    )  # fmt: skip
    log.info(json.dumps(dataclasses.asdict(found), indent=1) if options.json else "\n".join(describe(found)))
    if options.model is None and not options.json:
        log.info(f"\nreleases by name: {', '.join(RELEASES)} (mtl-anagram info --model IF-M)")


def _download(options: argparse.Namespace) -> None:
    from huggingface_hub.utils import disable_progress_bars

    from .models.download import download
    from .models.planning import human_bytes, plan

    if options.quiet:
        disable_progress_bars()
    cascade = _cascade(options)
    planned = plan(cascade.sources, cascade.variants, dtype=cascade.dtype, device=cascade.device)
    paths = download(planned, cascade.sources, cascade.variants, options.to).values()
    sizes = {path: path.stat().st_size for path in paths}
    for path, size in sizes.items():
        log.info(f"{path}  {human_bytes(size)}")
    done = f"{len(sizes)} files, {human_bytes(sum(sizes.values()))}; from now on it works offline, too "
    done += f"(HF_HUB_OFFLINE=1): mtl-anagram generate ... --model {options.to or options.model}"
    log.warning(done if sizes else "nothing to fetch: no part of it is on a hub")


def _report(made: Sequence[Anagram]) -> None:
    for anagram in made:
        for text in anagram.warnings:
            log.warning(text)
        for path in anagram.pictures.values():
            log.info(f"{path}  {path.stem}.views.png{'  (was there)' if anagram.skipped else ''}")


def _folder(base: str, words: Sequence[str], decides: dict[str, Any], cascade: Cascade | None = None) -> str:
    """A folder that the same request finds again and no other has: its words, and 6 digits of its sha256."""
    if cascade is not None:  # stage III goes on with what is there
        sources = [str(source) for name, source in cascade.sources.items() if name != "stage_3"]
        decides = decides | {"model": [*sources, str(cascade.variants), str(cascade.dtype)]}
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()
    name = re.sub(r"(\W|\b(an?|the)\b)+", "-", " ".join(words).lower()).strip("-")[:48].strip("-")
    return os.path.join(base, f"{name}-{digest[:6]}".lstrip("-"))


def parse_seeds(words: Sequence[str]) -> list[int]:
    """Seeds of the command line: numbers and inclusive ranges such as 4-7, in order."""
    from .errors import MAX_SEED, InputError

    seeds: list[int] = []
    for word in words:
        found = re.fullmatch(r"([0-9]{1,19})(?:-([0-9]{1,19}))?", word)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, -1)
        if not first <= last <= min(first + 99_999, MAX_SEED):
            limits = f"a whole number from 0 to {MAX_SEED}, or a range of at most 100000, such as 4-7"
            raise InputError(f"--seed {word[:60]!r} must be {limits}")
        seeds += range(first, last + 1)
    return seeds


if __name__ == "__main__":
    sys.exit(main())
