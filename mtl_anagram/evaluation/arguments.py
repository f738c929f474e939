"""What the command is asked for; nothing heavy is imported before it is asked."""

from __future__ import annotations

import argparse
import dataclasses
import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..cascade import Cascade
    from ..models.judge import Judge
    from .protocol import Protocol


def add_protocol(add: Any) -> None:
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
    add("--style", default="a poster of", help='words before every name (default: "a poster of")')
    add("--steps", type=int, help="denoising steps of every recipe (default: the model's)")
    add("--guidance-scale", type=float, help="of every recipe (default: the model's)")
    add("--size", type=int, default=64, help="64, or 256 to measure what stage II makes (default: 64)")
    add("--noise-level", type=int, default=50, help="stage II's, 0 to 999 (default: 50)")
    add("--judge", metavar="FOLDER", help="the judge's folder (default: judge/ in the model's, if there)")
    add("--temperature", type=float, default=0.05, help="of concealment (default: 0.05)")
    add("--batch-size", type=int, default=10, help="pictures sampled at once (default: 10)")


def protocol_of(options: Any, cascade: Cascade, seeds: list[int]) -> tuple[Protocol, Judge | None]:
    """The protocol that the command's words stand for, and its judge; InputError for names that nobody lists."""
    from ..cascade import embedded_folder
    from ..errors import InputError
    from ..files.hub import read_config
    from ..sampling import Recipe
    from .protocol import ABLATION, Protocol, choose_pairs

    judge = judge_of(options, Path(options.model or embedded_folder()).expanduser())
    names = options.concepts or cascade.concepts or (judge.names if judge else [])
    if not names and not options.pairs:
        raise InputError("neither the model nor a judge lists its names: give --concepts or --pairs")
    pairs = tuple(tuple(pair.split("/")) for pair in options.pairs or (names if options.singles else ()))
    pairs = pairs or choose_pairs(names, options.pair_count, options.pair_seed)
    asked = {"num_inference_steps": options.steps, "guidance_scale": options.guidance_scale}
    given = {name: value for name, value in asked.items() if value is not None}
    same = {name: getattr(cascade.recipe, name) for name in asked} | given
    known = {name: dataclasses.replace(r, **same) for name, r in {"own": cascade.recipe, **ABLATION}.items()}
    recipes = {}
    for name in options.recipes or (["plain"] if options.singles else known):
        if name not in known and not name.endswith(".json"):
            raise InputError(f"--recipes {name}: unknown; there are {', '.join(known)}, and JSON files")
        if (stem := Path(name).stem) in recipes:
            raise InputError(f"--recipes {name}: there is a {stem} already; give the file another name")
        own = known[name] if name in known else read_config(Path(name), Recipe.from_dict)
        recipes[stem] = dataclasses.replace(own, **given)
    more = (options.style, options.size, options.noise_level, options.temperature)
    return Protocol(pairs, tuple(options.views), recipes, tuple(seeds), *more), judge


def judge_of(options: argparse.Namespace, model: Path) -> Judge | None:
    """The judge of --judge's folder, else the model's own, if it has one."""
    from ..models import load_judge

    has_judge = options.judge is not None or (model / "judge" / "judge.json").is_file()
    return load_judge(options.judge or model) if has_judge else None


def add_request(add: Any, add_3: Any) -> None:
    add("prompts", nargs="+", metavar="PROMPT", help="one per view; [brackets] mark the concept")
    add("--views", nargs="+", required=True, metavar="VIEW", help="rotate:135, rotate_cw+negate, ...")
    add("--view-args", type=_json, metavar="JSON", help='a list, one per view: [null, {"seed": 3}]')
    add("--style", default="", help='words before every prompt, such as "a poster of"')
    add("--negative", nargs="+", metavar="PROMPT", help="what not to draw: one for all, or one per view")
    add("--concepts", nargs="+", metavar="WORDS", help="per prompt; default: its last word")
    add("--seed", nargs="+", default=["0"], metavar="N", help="seeds and ranges: 9 12 20-27")
    add("--best-of", type=int, metavar="N", help="of N seeds from --seed on take the best by the CLIP")
    add("--recipe", choices=("released", "corrected", "plain"), help="default: the one the model comes with")
    for option in ("--balancing", "--rectification", "--anti-segregation", "--stage-2-noise-fit"):
        add(option, action=argparse.BooleanOptionalAction, help="switch, over the recipe")
    add("--steps", type=int, dest="num_inference_steps", metavar="N", help="default: the recipe's")
    add("--guidance-scale", type=float, metavar="SCALE", help="default: the recipe's")
    add("--stage-2-guidance-scale", type=float, metavar="SCALE", help="default: --guidance-scale's")
    add("--guidance-interval", type=float, nargs=2, metavar=("FIRST", "LAST"),
        help="guidance in these fractions of the steps alone, such as 0.1 0.8 (default: in all)")  # fmt: skip
    add("--solver", choices=("ddpm", "ddim", "dpm_solver_2m"), help="default: the recipe's")
    add("--noise-level", type=int, default=50, help="stage II's, 0 to 999 (default: 50)")
    add("--size", type=_size, metavar="PX", help="stage I's side, or HxW (default: what it was trained at)")
    add("--stop-after", type=int, metavar="PX", help="64: stage I alone; 256: no stage III")
    add("--batch-size", type=int, default=4, help="seeds sampled at once (default: 4)")
    add("--start-from", metavar="FILE", help="a picture to vary, or (--strength 0) to take to 256 px")
    add("--strength", type=float, nargs="+", metavar="S", help="0 to 1, of stage I, and II (default: 0.6)")
    add("--reference", metavar="FILE", help="a picture that gives one component, kept at every step")
    add("--reference-view", metavar="VIEW", help="which component (default: low_pass)")
    add("--preview", metavar="FILE", help="a PNG that shows the picture as it forms")
    add_3("--stage-3-steps", type=int, dest="stage_3_num_inference_steps", metavar="N", help="default: 75")
    add_3("--stage-3-guidance-scale", type=float, metavar="SCALE", help="default: 9")
    add_3("--stage-3-noise-level", type=int, metavar="N", help="0 to 350 (default: 0)")
    add_3("--stage-3-views", choices=("first", "all", "all_latents"), help="first: the first prompt alone, as released "
        "(default); all: every view's prompt, through pixels; all_latents: the same on latents, cheap and "
        "approximate")  # fmt: skip
    add_3("--stage-3-exchange-every", type=int, metavar="N", help="steps between all's averages (default: 1)")


def add_sources(add: Any) -> None:
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


def add_work(add: Any) -> None:
    bases = "output, repeated, evaluation, batch or partners"
    add("--out", metavar="FOLDER", help=f"default: in {bases}, by a name of the request's own")
    add("--quiet", dest="progress", action="store_false", help="no progress bars, only results")
    add("--threads", type=int, metavar="N", help="threads on a CPU (default: one for each core)")


def _size(word: str) -> Any:
    """A side of the command line, or height x width; other words and counts are refused later."""
    with suppress(ValueError):
        return tuple(map(int, word.split("x"))) if "x" in word else int(word)
    return word


def _json(word: str) -> Any:
    with suppress(ValueError):
        return json.loads(word)
    return word  # which is refused later


def add_partners(add: Any) -> None:
    add("name", nargs="?", metavar="NAME", help='such as "a duck" (default: all)')
    add("--top", type=int, default=20, metavar="N", help="how many are shown (default: 20)")
    add("--table", metavar="FILE", help="a partners.json (default: the model's own)")
    add("--measure", action="store_true", help="make one in --out from sampled pictures; it goes on")
    add("--concepts", nargs="+", metavar="NAME", help="whose (default: what the model has learnt to draw)")
    add("--views", nargs="+", default=["flip", "rotate_180", "rotate_ccw", "rotate_cw"], metavar="VIEW")
    add("--style", default="a poster of", help='words before every name (default: "a poster of")')
    add("--seed", nargs="+", default=["0-7"], metavar="N", help="seeds and ranges (default: 0-7)")
    add("--judge", metavar="FOLDER", help="the judge's folder (default: judge/ in the model's, if there)")
    add("--batch-size", type=int, default=8, help="pictures sampled at once (default: 8)")
