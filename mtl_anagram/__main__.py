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
import shlex
import signal
import sys
import threading
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
    if "torch" not in sys.modules:
        # It reads these. Threads that spin long hold up those that work; not at all costs an idle machine a seventh.
        waits = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000", "KMP_BLOCKTIME": "0"}
        for name, value in waits.items():
            os.environ.setdefault(name, value)
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        # glibc keeps what is freed, for all threads: mapping every large map anew is a fifth of stage II's time.
        for option, most in ((-4, 0), (-1, 2**31 - 1), (-8, 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_ARENA_MAX
            libc.mallopt(option, most)
    options = _parser().parse_args(argv)
    own = threading.current_thread() is threading.main_thread()
    # SIGTERM is a scheduler's notice: what is under way is dropped, what is finished stays.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)) if own else None
    printer, level = _Printer(options), log.level
    log.addHandler(printer)
    log.setLevel(logging.INFO)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names that the terminal cannot show
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
        if before is not None:
            signal.signal(signal.SIGTERM, before)
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
            torch.set_num_threads(whole_number("--threads", threads, 1, 4096))
        options.run(options)
        sys.stdout.flush()
        return 0
    except AnagramError as error:
        log.error("error: %s", error)
        return 2


def _parser() -> argparse.ArgumentParser:
    from . import __version__
    from .evaluation.arguments import add_partners, add_protocol, add_request, add_sources, add_work

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
    add_request(generate.add_argument, generate.add_argument_group("stage III").add_argument)
    repeat = command(_repeat, "make a picture again from its metadata.json")
    repeat.add_argument("metadata", type=Path, metavar="METADATA")
    evaluate = command(_evaluate, "measure pairs, views, seeds and recipes", "Sample all pairs of the concepts under "
        "each view with each recipe and seed, and measure alignment, concealment and what the judge reads. Writes "
        "OUT/cells/* and OUT/report.json. The same command goes on where it was stopped.")  # fmt: skip
    add_protocol(evaluate.add_argument)
    batch = command(_batch, "make the pictures of many requests", "Make all anagrams of a JSON Lines file: a request a "
        "line, generate_anagram's arguments and a name. Writes OUT/NAME/SEED/* and OUT/manifest.jsonl. Any number of "
        "processes share the work (torchrun ... -m mtl_anagram batch), and the same command goes on.")  # fmt: skip
    batch.add_argument("requests", type=Path, metavar="REQUESTS")
    batch.add_argument("--batch-size", type=int, default=4, help="pictures sampled at once (default: 4)")
    partners = command(_partners, "which names go together under which view, best first")
    add_partners(partners.add_argument)
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
    download.add_argument("--to", metavar="FOLDER", help="a folder of its own (default: the hub's cache)")
    download.add_argument("--quiet", action="store_true", help="no progress bars")
    for added in (generate, repeat):
        added.add_argument("--overwrite", action="store_true", help="replace another request's pictures")
    for added in (generate, repeat, evaluate, batch, partners):
        add_work(added.add_argument)
    command(_concepts, "what a model has learnt to draw")
    for added in commands.choices.values():
        add_sources(added.add_argument_group("model").add_argument)
    _add_showing(command)
    return parser


def _add_showing(command: Callable[..., argparse.ArgumentParser]) -> None:
    animate = command(_animate, "films of what was made, from reading to reading", "Write a GIF, a WebP and, where "
        "ffmpeg is found, an MP4 beside each seed's picture: its views in turn, with their prompts.")  # fmt: skip
    animate.add_argument("folder", metavar="FOLDER", help="a seed's, or one that holds several")
    animate.add_argument("--seconds", type=float, default=1.5, help="of one movement (default: 1.5)")
    page = command(_page, "one HTML file of all that was made, to be turned by hand")
    page.add_argument("folders", nargs="+", metavar="FOLDER", help="all seeds below them are shown")
    page.add_argument("--out", default="page.html", metavar="FILE", help="default: page.html")
    for added in (animate, page):
        added.add_argument("--size", type=int, default=256, metavar="PX", help="at most (default: 256)")
        added.add_argument("--overwrite", action="store_true", help="replace another file")
    views = command(_views, "the views, and what each allows")
    views.add_argument("--sheet", metavar="FILE", help="a PNG on which all of them are drawn")


def _cascade(options: argparse.Namespace) -> Cascade:
    from .cascade import Cascade

    if (rank := os.environ.get("LOCAL_RANK")) and options.device is None:  # torchrun's: each has a card
        import torch

        options.device = f"cuda:{rank}" if int(rank) < torch.cuda.device_count() else None
    names = ("stage_2", "stage_3", "noise_clip", "variant", "device", "dtype", "keep", "text_encoder")
    return Cascade.from_pretrained(options.model, **_given(options, *names, "prompt_cache"))


def _generate(options: argparse.Namespace) -> None:
    from .errors import InputError, whole_number
    from .evaluation.best_of import best_of
    from .files.images import Preview
    from .generate import generate_anagram
    from .sampling import Recipe, UpscaleRecipe

    seeds, given = parse_seeds(options.seed), {k: v for k, v in vars(options).items() if v is not None}
    if options.best_of is not None and whole_number("--best-of", options.best_of, 1) and len(seeds) > 1:
        raise InputError(f"--best-of {options.best_of} takes one --seed, the first of its seeds")
    cascade = _cascade(options)
    recipe = cascade.recipe if options.recipe is None else getattr(Recipe, options.recipe)()
    changes = {field.name: given[field.name] for field in dataclasses.fields(Recipe) if field.name in given}
    upscale = {k.removeprefix("stage_3_"): v for k, v in given.items() if k.startswith("stage_3_")}
    names = ("style", "prompts", "views", "view_args", "concepts", "noise_level", "size")
    own = ("start_from", "strength", "reference", "reference_view")
    request = _given(options, *names) | {name: given[name] for name in own if name in given}
    request["negative"] = options.negative[0] if len(options.negative or ()) == 1 else options.negative
    request["recipe"] = dataclasses.replace(recipe, **changes)
    request["upscale"] = UpscaleRecipe(**upscale) if upscale else None
    words = [word for word in (*options.prompts, *options.views) if word != "identity"]
    decides = {k: value for k, value in request.items() if k != "upscale"}  # stage III goes on with the rest
    request["save_dir"] = options.out or _folder("output", words, decides, cascade)
    request |= _given(options, "stop_after", "batch_size", "overwrite", "progress")
    request |= {"model": cascade, "on_step": Preview(options.preview) if options.preview else None}
    if options.best_of is None:
        made = generate_anagram(**request, seed=seeds)
    else:
        *made, candidates = best_of(options.best_of, **request, seed=seeds[0])
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
    cascade, weights = _cascade(options), content.get("weights")
    recorded = weights.get("variant") if isinstance(weights, dict) else None
    if options.variant is None and recorded != cascade.variants["stage_1"]:
        options.variant = recorded or "fp32"
        cascade = _cascade(options)
    _report([repeat_anagram(path, out, model=cascade, **_given(options, "progress", "overwrite"))])


def _evaluate(options: argparse.Namespace) -> None:
    from .evaluation.arguments import protocol_of
    from .evaluation.protocol import as_table, evaluate

    cascade = _cascade(options)
    protocol, judge = protocol_of(options, cascade, parse_seeds(options.seed))
    pairs = ["-".join(pair) for pair in protocol.pairs]
    words = [*(pairs if len(pairs) < 3 else [f"{len(pairs)} pairs"]), *protocol.views]
    out = options.out or _folder("evaluation", words, vars(protocol), cascade)
    work = _given(options, "batch_size", "progress")
    log.info(as_table(evaluate(cascade, protocol, out, judge=judge, **work)))


def _batch(options: argparse.Namespace) -> None:
    from .evaluation.batch import batch

    out = options.out or os.path.join("batch", options.requests.stem)
    lines = batch(options.requests, out, model=_cascade(options), **_given(options, "batch_size", "progress"))
    for line in lines:
        if "error" in line:
            log.warning("%s, seed %s, failed: %s", line["name"], line["seed"], line["error"])
    done = sum(line["status"] == "done" for line in lines)
    log.info(f"{os.path.join(out, 'manifest.jsonl')}  {done} of {len(lines)} pictures are done")


def _partners(options: argparse.Namespace) -> None:
    from .cascade import embedded_folder
    from .errors import whole_number
    from .evaluation.arguments import judge_of
    from .evaluation.partners import TABLE, listed, measure_partners, partners_of
    from .files.hub import read_json
    from .models.prompts import with_article

    model, top = Path(options.model or embedded_folder()).expanduser(), whole_number("--top", options.top, 1)
    if options.measure:
        cascade = _cascade(options)
        out = options.out or os.path.join("partners", Path(cascade.name).name)
        given = _given(options, "views", "style", "batch_size", "progress")
        given |= {"names": options.concepts or cascade.concepts, "seeds": parse_seeds(options.seed)}
        listed(options.name, given["names"], cascade.name)  # InputError for another name
        measure_partners(cascade, out, judge=judge_of(options, model), **given)
    table = os.path.join(out, TABLE) if options.measure else options.table or model / TABLE
    rows = partners_of(table, options.name)
    for row in rows[:top]:
        read = "" if row.read is None else f"  read both ways {row.read:4.0%}"
        log.info(f"{row.first} / {row.second}, {row.view}{read}  score {row.score:.2f}")
    if rows:
        best = rows[0]
        asked = f'"{with_article(best.first)}" "{with_article(best.second)}" --views identity {best.view}'
        source = "" if options.model is None else f" --model {shlex.quote(options.model)}"
        style = read_json(Path(table)).get("style", "")
        log.info(f'\nmtl-anagram generate {asked} --style "{style}" --best-of 8{source}')


def _animate(options: argparse.Namespace) -> None:
    from .evaluation.gallery import animate

    for path, there in animate(options.folder, **_given(options, "size", "seconds", "overwrite")):
        log.info(f"{path}{'  (was there)' * there}")


def _page(options: argparse.Namespace) -> None:
    from .evaluation.gallery import write_page

    count = write_page(options.folders, options.out, **_given(options, "size", "overwrite"))
    log.info(f"{options.out}  {count} anagrams")


def _views(options: argparse.Namespace) -> None:
    from .evaluation.gallery import describe_views, views_sheet
    from .files.images import save_picture

    log.info("\n".join(describe_views()))
    if options.sheet:
        save_picture(options.sheet, views_sheet())
        log.info(options.sheet)


def _concepts(options: argparse.Namespace) -> None:
    for what, names in _given(_cascade(options), "concepts", "styles", "clip_concepts").items():
        log.info(f"{what}: {', '.join(names) or 'not listed'}")


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
    named = _given(options, "model", "stage_2", "stage_3", "noise_clip", "variant")
    named = {"model": options.to} if options.to else named
    words = "".join(f" --{n.replace('_', '-')} {shlex.quote(v)}" for n, v in named.items() if v)
    done += f"(HF_HUB_OFFLINE=1): mtl-anagram generate ...{words}"
    log.warning(done if sizes else "nothing to fetch: no part of it is on a hub")


def _given(options: object, *names: str) -> dict[str, Any]:
    return {name: getattr(options, name) for name in names}


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
