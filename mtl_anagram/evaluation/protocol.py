"""evaluate(): a protocol of pairs, views, seeds and recipes, sampled, measured and kept, cell by cell.

A cell is one recipe under one view with one pair of prompts and all seeds: a PNG, and a JSON file of what was measured.
A later call goes on with what is not there; another CLIP or judge measures anew the pictures that do not depend on it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..cascade import Cascade, SamplingRun, check_seeds
from ..errors import InputError, SourceError, number, whole_number
from ..files.atomic import write_atomically
from ..files.checksums import combined_checksum
from ..files.claims import Claims
from ..files.hub import read_json
from ..files.images import read_picture, save_picture
from ..files.outputs import check_folder
from ..files.shards import bytes_of
from ..generate import request_of
from ..models import Judge
from ..models.prompts import with_article
from ..sampling import Recipe, to_views
from ..views import get_views
from .best_of import by_clip
from .metrics import TEMPERATURE, alignment, concealment

log = logging.getLogger("mtl_anagram")
Rules = Mapping[str, Any]  # by seam, each a function for both stages, or functions by stage
Names = tuple[str, ...]
Json = dict[str, Any]
TECHNIQUES = ("balancing", "rectification", "anti_segregation")
ABLATION = {"plain": Recipe.plain(), **{name: Recipe.plain(**{name: True}) for name in TECHNIQUES}}
ABLATION |= {"released": Recipe.released(), "corrected": Recipe.corrected()}
DRAWS, SEED, AT_ONCE = 4_000, 0, 1 << 23  # of the bootstrap: draws, their seed, values drawn at once
BASELINE, MEAN, TOP = "plain", partial(torch.mean, dim=-1), partial(torch.quantile, q=0.9, dim=-1)
# Heading: the row's figure ("over": less the baseline's, pair by pair; ".9": the 90th percentile, else the mean).
COLUMNS = {
    "A": "A", "A over plain": "A_over_plain", "A.9": "A.9", "C": "C", "C over plain": "C_over_plain", "C.9": "C.9",
    "all read": "all_named", "over plain": "all_named_over_plain", "any of N": "any_of_n",
    "best of N": "best_of_n", "best over plain": "best_of_n_over_plain",
}  # fmt: skip
floats = partial(torch.tensor, dtype=torch.float32, device="cpu")
RULES = ("combine", "step", "after")


@dataclass(frozen=True)
class Protocol:
    """What is sampled: every pair under every view with every recipe and seed.

    pairs: of names, one or two to an entry ("duck" is drawn as "a duck"): the first is read upright, the second under
    each of `views`. recipes by name, each a Recipe, or (Recipe, {"combine": f, "step": g, "after": h}), some or all of
    `Cascade.sample`'s rules, which a cell knows by their qualified names: after a change give the recipe another name.
    style: words before every name. size: 64 = stage I alone, 256 = stage II too.
    """

    pairs: tuple[Names, ...]
    views: Names = ("flip", "rotate_180", "rotate_ccw")
    recipes: Mapping[str, Recipe | tuple[Recipe, Rules]] = field(default_factory=lambda: dict(ABLATION))
    seeds: tuple[int, ...] = tuple(range(10))
    style: str = "a poster of"
    size: int = 64
    noise_level: int = 50
    temperature: float = TEMPERATURE

    def __post_init__(self) -> None:
        object.__setattr__(self, "seeds", tuple(check_seeds(self.seeds)))
        if not (self.pairs and self.recipes) or not {*map(len, self.pairs)} <= {1, 2}:
            said = "must be tuples of one or two names, and there must be recipes"
            raise InputError(f"pairs={self.pairs!r} {said}; recipes={[*self.recipes]}")
        for name, given in self.recipes.items():
            recipe, rules = self.recipe(name)
            if not (isinstance(recipe, Recipe) and isinstance(rules, Mapping) and {*rules} <= {*RULES}):
                raise InputError(f"recipes[{name!r}]={given!r} is no Recipe, nor one with {RULES}")
        get_views(list(self.views))
        number("temperature", self.temperature, above=True)

    def recipe(self, name: str) -> tuple[Recipe, Rules]:
        given = self.recipes[name]
        return given if isinstance(given, tuple) and len(given) == 2 else (given, {})

    def cells(self) -> list[tuple[str, str, Names]]:
        """(recipe, view, names) of every cell; a single name is read upright once."""
        views = {1: ("identity",), 2: self.views}
        return [(r, view, names) for names in self.pairs for view in views[len(names)] for r in self.recipes]

    def run(self, cascade: Cascade, recipe: str, view: str, names: Names, batch_size: int) -> SamplingRun:
        """A cell's pictures to be, checked and not begun."""
        own, rules = self.recipe(recipe)
        return cascade.sample(
            [with_article(name) for name in names], get_views(["identity", view][: len(names)]), self.seeds,
            style=self.style, concepts=names, recipe=own, stop_after=self.size, noise_level=self.noise_level,
            batch_size=batch_size, **rules,
        )  # fmt: skip


def choose_pairs(names: Sequence[str], count: int | None = None, seed: int = 0) -> tuple[Names, ...]:
    """All pairs of a list of names, or `count` of them by a fixed draw, each name about equally often."""
    every = list(combinations(dict.fromkeys(names), 2))
    if not every:
        raise InputError(f"names={list(names)!r} make no pair: give at least two different ones")
    if count is None or whole_number("count", count, 1) >= len(every):
        return tuple(every)
    draw, uses, chosen = random.Random(seed), Counter[str](), list[Names]()
    draw.shuffle(every)
    for _ in range(count):
        best = min(every, key=lambda pair: uses[pair[0]] + uses[pair[1]])  # the first of the least used
        every.remove(best)
        uses.update(best)
        chosen.append(best if draw.random() < 0.5 else best[::-1])
    return tuple(chosen)


def evaluate(cascade: Cascade, protocol: Protocol, folder: str | Path, **options: Any) -> Json:
    """Sample and measure every cell of a protocol that is not in the folder yet; returns the report.

    Writes what `measure` does, whose options it takes, and FOLDER/report.json.
    """
    summary = report(measure(cascade, protocol, folder, **options), protocol.temperature)
    write_atomically(check_folder(folder) / "report.json", (json.dumps(summary, indent=1) + "\n").encode())
    return summary


def measure(
    cascade: Cascade, protocol: Protocol, folder: str | Path, *, judge: Judge | None = None, batch_size: int = 10,
    progress: bool = False,
) -> list[Json]:  # fmt: skip
    """Every cell of a protocol, sampled and measured where it is not in the folder yet.

    Writes FOLDER/cells/*.png (a cell's seeds side by side) and *.json (what is measured of the file's 8 bits), which
    any number of processes may do together. judge: classifier that names readings, None = no such columns. The
    cascade's noise-aware CLIP gives the others. Prompts are encoded cell by cell: give a cascade with a large text
    encoder a prompt_cache.
    """
    out, cells = check_folder(folder), protocol.cells()
    cascade.source("noise_clip")  # InputError where there is none
    if judge is not None:
        judge.index([name for names in protocol.pairs for name in names])
    checksums = cascade.checksums()
    clip = {name: value for name, value in checksums.items() if name.startswith("noise_clip/")}
    weights = judge and [json.dumps(judge.names).encode(), *map(bytes_of, judge.state_dict().values())]
    measured_by = {
        "clip_sha256": combined_checksum(clip), "clip_concepts": list(cascade.clip_concepts),
        "temperature": protocol.temperature, "judge_sha256": weights and hashlib.sha256(b"".join(weights)).hexdigest(),
    }  # fmt: skip
    units: dict[str, tuple[SamplingRun, Path, Path, Json]] = {}
    for recipe, view, names in cells:
        run = protocol.run(cascade, recipe, view, names, batch_size)
        # Without balancing a picture depends not on the CLIP, and at 64 px not on stage II.
        used = ("stage_1/", "stage_2/")[: len(run.sizes)] + ("noise_clip/",) * run.request.balances
        files = {name: value for name, value in checksums.items() if name.startswith(used)}
        request = request_of(run, files, {}) | {
            "dtype": str(cascade.dtype).removeprefix("torch."), "seeds": run.seeds, "size": protocol.size,
            "names": list(names), "view": view,
        }  # fmt: skip
        words = "-".join([recipe, view, *names]).replace(" ", "_").replace("/", "_")
        words = str(out / "cells" / words[:70])  # a file's name may have 255 bytes
        picture = Path(f"{words}-{combined_checksum(request)[:12]}.png")
        path = Path(f"{words}-{combined_checksum(request | measured_by)[:12]}.json")
        units[path.stem] = run, picture, path, {"recipe_name": recipe, "request": request | measured_by}
    for _, _, path, _ in units.values():
        _whole(path, read_json)
    with tqdm(total=len(units), unit="cell", disable=not progress, dynamic_ncols=True) as bar:

        def done(name: str) -> bool:
            return units[name][2].is_file()

        for name in Claims(out / ".claims").share(list(units), done):
            bar.update(sum(map(done, units)) - bar.n)
            run, picture, path, content = units[name]
            if not _whole(picture, read_picture):
                save_picture(picture, torch.cat(list(run.pictures[protocol.size]), dim=-1))
            samples = _measured(run, judge, read_picture(picture), protocol.temperature)
            content |= {"picture": picture.name, "samples": samples}
            write_atomically(path, (json.dumps(content) + "\n").encode())
            for made in run.made.values():  # there may be thousands of cells
                made.clear()
        bar.update(len(units) - bar.n)
    return [read_json(path) for _, _, path, _ in units.values()]


def _whole(path: Path, read: Callable[[Path], object]) -> bool:
    """Whether a file is there, and whole; a damaged one is said, and goes."""
    try:
        return path.is_file() and read(path) is not None
    except SourceError:
        log.warning("%s is damaged; it is made again", path)
        path.unlink(missing_ok=True)
        return False


@torch.no_grad()
def _measured(run: SamplingRun, judge: Judge | None, strip: Tensor, temperature: float) -> list[Json]:
    """What the CLIP and the judge make of a cell's pictures (3, S, N S), by seed."""
    pictures, columns = torch.stack(strip.chunk(len(run.seeds), dim=-1)), dict[str, list[Any]](seed=run.seeds)
    figures = dict(zip(("scores", "score"), by_clip(run, pictures, temperature), strict=True))
    if judge is not None:
        wanted = judge.index([str(name) for name in run.request.concepts])
        seen = to_views(pictures, run.views)
        found = judge(seen.flatten(0, 1)).softmax(1).cpu().unflatten(0, seen.shape[:2])  # (N, V, K)
        figures["probability"] = found[:, range(len(wanted)), wanted]
        columns["named"] = [[judge.names[k] for k in row] for row in found.argmax(2).tolist()]
    columns |= {name: value.double().round(decimals=5).tolist() for name, value in figures.items()}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def report(cells: Sequence[Json], temperature: float) -> Json:
    """Rows by recipe, over all views and for each view alone; every figure with its 95% interval.

    cells: `evaluate`'s JSON files: every recipe with every pair under every view, the same seeds. The intervals draw
    pairs, not samples: all samples of one pair, under every view, stand or fall together.
    """
    rows = []
    for readings in sorted({len(cell["request"]["names"]) for cell in cells}):
        mine = [cell for cell in cells if len(cell["request"]["names"]) == readings]
        recipes = dict.fromkeys(cell["recipe_name"] for cell in mine)
        views = dict.fromkeys(cell["request"]["view"] for cell in mine)
        for view in ["all", *views] if len(views) > 1 else views:
            seen = [cell for cell in mine if view in ("all", cell["request"]["view"])]
            found = {r: _values([c for c in seen if c["recipe_name"] == r], temperature) for r in recipes}
            for recipe, own in found.items():
                row = {"readings": readings, "view": view, "recipe": recipe}
                row |= {"pairs": len(own["A"]), "samples": own["A"].numel()}
                if recipe != BASELINE and BASELINE in found:
                    own |= {f"{k}_over_{BASELINE}": v - found[BASELINE][k] for k, v in own.items()}
                for name in COLUMNS.values():
                    if (of := name.removesuffix(".9")) in own:
                        row[name] = interval(own[of], MEAN if of == name else TOP)
                rows.append(row)
    return {"temperature": temperature, "bootstrap_draws": DRAWS, "rows": rows}


def as_table(summary: Json) -> str:
    """The report's rows as a Markdown table."""
    lines = [["view", "recipe", "samples", *COLUMNS], ["---"] * (3 + len(COLUMNS))]
    for row in summary["rows"]:
        view = row["view"] if row["readings"] > 1 else "one reading"
        lines.append([view, row["recipe"], str(row["samples"])])
        for name in COLUMNS.values():
            form = ("{:+" if "_over_" in name else "{:") + (".3f}" if name[0] in "AC" else ".1%}")
            text = f"{form} ({form} to {form})".format(*row[name].values()) if name in row else ""
            lines[-1].append(text.replace("% to", " to").replace("%)", ")"))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def interval(values: Tensor, of: Callable[[Tensor], Tensor] = MEAN) -> dict[str, float]:
    """A statistic of G groups' values, (G,) or (G, S), and its 95% interval: draws are groups, or one's values."""
    values = values.reshape(-1, 1) if len(values) == 1 else values
    generator = torch.Generator("cpu").manual_seed(SEED)
    places = torch.randint(len(values), (DRAWS, len(values)), generator=generator, device="cpu")
    parts = places.split(max(1, AT_ONCE // values.numel()))
    drawn = torch.cat([of(values[part].flatten(1)) for part in parts])
    ends = {"value": of(values.flatten()), "low": drawn.quantile(0.025), "high": drawn.quantile(0.975)}
    return {name: round(figure.item(), 6) for name, figure in ends.items()}


def _values(cells: Sequence[Json], temperature: float) -> dict[str, Tensor]:
    """What was measured of P pairs, (P, S): A and C of every sample, the shares of each cell's seeds."""
    cells = sorted(cells, key=lambda cell: (cell["request"]["names"], cell["request"]["view"]))
    samples, names = [cell["samples"] for cell in cells], [cell["request"]["names"] for cell in cells]
    scores = floats([[one["scores"] for one in cell] for cell in samples]).flatten(0, 1)  # (cells N, V, V)
    found = {"A": alignment(scores), "C": concealment(scores, temperature)}
    if "named" in samples[0][0]:  # there is a judge
        read = [[one["named"] == own for one in cell] for cell, own in zip(samples, names, strict=True)]
        named, best = floats(read), floats([[one["score"] for one in cell] for cell in samples]).argmax(1)
        found |= {"all_named": named.mean(1), "any_of_n": named.amax(1)}
        found["best_of_n"] = named.take_along_dim(best[:, None], 1)
    return {name: value.reshape(len({*map(tuple, names)}), -1) for name, value in found.items()}
