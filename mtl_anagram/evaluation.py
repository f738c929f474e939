"""evaluate(): a protocol of pairs, views, seeds and recipes, sampled, measured and kept, cell by cell.

A cell is one recipe under one view with one pair of prompts and all seeds. It is sampled in batches and written
as one PNG, measured and written as one JSON file, each whole or not at all. A later call with the same protocol
goes on with what is not there: with another CLIP or judge it measures the pictures anew that do not depend on
them. `report` turns the cells into one table.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .atomic import write_atomically
from .cascade import MAX_TOKENS, Cascade
from .checks import whole_number
from .checksums import combined_checksum
from .errors import InputError
from .job import check_seeds, check_sizes
from .media import decode_png, encode_png
from .metrics import TEMPERATURE, anagram_score, score_matrix
from .models.judge import Judge
from .models.sources import read_json
from .output import check_folder
from .prompts import concept_span, other_prompts, styled, with_article
from .report import report
from .sampling import Recipe, sample_stage1, sample_stage2
from .sampling.guidance import to_views
from .views import View, get_views

ABLATION: dict[str, Recipe] = {
    "plain": Recipe.plain(),
    "balancing": Recipe.plain(balancing=True),
    "rectification": Recipe.plain(rectification=True),
    "anti_segregation": Recipe.plain(anti_segregation=True),
    "released": Recipe.released(),
    "corrected": Recipe.corrected(),
}
SCORED_AT = 64  # px at which the CLIP looks at a picture


@dataclass(frozen=True)
class Protocol:
    """What is sampled: every pair under every view with every recipe and seed.

    pairs: of names, one or more to an entry; the first is read upright, the others under `views`. views: per
    entry the view of the second reading ("rotate_180"); a single name needs none. recipes by name. style:
    words before every name. size: 64 = stage I alone, 256 = stage II too. article: "a duck" for "duck".
    """

    pairs: tuple[tuple[str, ...], ...]
    views: tuple[str, ...] = ("flip", "rotate_180", "rotate_ccw")
    recipes: Mapping[str, Recipe] = field(default_factory=lambda: dict(ABLATION))
    seeds: tuple[int, ...] = tuple(range(10))
    style: str = "a sketch of"
    size: int = 64
    noise_level: int = 50
    temperature: float = TEMPERATURE

    def __post_init__(self) -> None:
        if not self.pairs or any(len(pair) not in (1, 2) for pair in self.pairs):
            raise InputError(f"pairs={self.pairs!r} must be one or more tuples of one or two names")
        if not self.views or not self.recipes:
            raise InputError(
                f"views={self.views!r} and recipes={list(self.recipes)!r} must name at least one"
            )
        for name, recipe in self.recipes.items():
            if not isinstance(recipe, Recipe):
                raise InputError(f"recipes[{name!r}] is {type(recipe).__name__}: give a Recipe")
        check_seeds(self.seeds)
        get_views(list(self.views))

    def cells(self) -> list[tuple[str, str, tuple[str, ...]]]:
        """(recipe, view, names) of every cell; a single name is read upright once."""
        return [
            (recipe, view, names)
            for names in self.pairs
            for view in (self.views if len(names) > 1 else ("identity",))
            for recipe in self.recipes
        ]


def choose_pairs(
    names: Sequence[str], count: int | None = None, seed: int = 0
) -> tuple[tuple[str, str], ...]:
    """All pairs of a list of names, or `count` of them by a fixed draw, each name about equally often."""
    every = list(combinations(dict.fromkeys(names), 2))
    if len(every) < 1:
        raise InputError(f"names={list(names)!r} make no pair: give at least two different ones")
    if count is None or count >= len(every):
        return tuple(every)
    whole_number("count", count, 1)
    draw = random.Random(seed)
    draw.shuffle(every)
    uses = dict.fromkeys(names, 0)
    chosen: list[tuple[str, str]] = []
    while len(chosen) < count:
        best = min(every, key=lambda pair: uses[pair[0]] + uses[pair[1]])  # the first of the least used
        every.remove(best)
        chosen.append(best if draw.random() < 0.5 else (best[1], best[0]))
        for name in best:
            uses[name] += 1
    return tuple(chosen)


@dataclass
class _Parts:
    """What sampling needs, computed once per text."""

    cascade: Cascade
    judge: Judge | None
    texts: dict[str, Tensor] = field(default_factory=dict)

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.texts]
        if missing:
            text, null = self.cascade.encode(missing)
            self.texts |= dict(zip(missing, text, strict=True))
            self.texts[""] = null[0]
        return torch.stack([self.texts[prompt] for prompt in prompts]), self.texts[""][None]


def evaluate(
    cascade: Cascade,
    protocol: Protocol,
    folder: str | Path,
    *,
    judge: Judge | None = None,
    batch_size: int = 10,
    progress: bool = False,
) -> dict[str, Any]:
    """Sample and measure every cell of a protocol that is not in the folder yet; returns the report.

    Writes FOLDER/cells/*.json and *.png, one a cell, and FOLDER/report.json. A JSON file names its picture, in
    which the seeds stand side by side; what is measured is the picture as it is in the file, in 8 bits. judge:
    classifier that names readings, None = no such columns. The cascade's noise-aware CLIP, at timestep 0, gives
    A and C, and by `embed_finished` the score that the best of N is chosen by.

    Raises InputError before any sampling for names that the judge does not know, views or sizes that cannot
    be, and a cascade without a CLIP.
    """
    out = check_folder(folder)
    whole_number("batch_size", batch_size, 1)
    if not cascade.has_noise_clip:
        raise InputError(
            f"the cascade {cascade.name} has no noise-aware CLIP to measure with: name noise_clip="
        )
    if judge is not None:
        judge.index([name for names in protocol.pairs for name in names])
    sizes = {}
    for name, recipe in protocol.recipes.items():
        views = get_views(["identity", *protocol.views])
        sizes[name] = check_sizes(cascade, views, None, protocol.size, recipe)
    parts = _Parts(cascade, judge)
    checksums = cascade.checksums()
    measured_by = {
        "clip_sha256": combined_checksum(_those_of(checksums, "noise_clip")),
        "clip_concepts": list(cascade.clip_concepts),
        "temperature": protocol.temperature,
        "judge_sha256": _state_sum(judge),
    }
    cells = protocol.cells()
    from tqdm import tqdm

    results = []
    for recipe_name, view, names in tqdm(cells, unit="cell", disable=not progress, dynamic_ncols=True):
        recipe = protocol.recipes[recipe_name]
        # Pictures that end with stage I do not depend on stage II, those without balancing not on the CLIP.
        used = ["stage_1", *["stage_2"] * (len(sizes[recipe_name]) > 1)]
        used += ["noise_clip"] * (recipe.balancing and len(names) > 1)
        request = {
            "recipe": recipe.to_dict(), "view": view, "names": list(names), "style": protocol.style,
            "seeds": list(protocol.seeds), "size": protocol.size, "noise_level": protocol.noise_level,
            "weights_sha256": combined_checksum(_those_of(checksums, *used)),
        }  # fmt: skip
        words = [recipe_name, view, *names]
        picture = out / "cells" / f"{_stem(words, request)}.png"
        path = out / "cells" / f"{_stem(words, request | measured_by)}.json"
        if not path.is_file():
            if not picture.is_file():
                made = _sampled(parts, protocol, recipe, view, names, sizes[recipe_name], batch_size)
                write_atomically(picture, encode_png(torch.cat(list(made), dim=-1)))
            pictures = torch.stack(decode_png(picture.read_bytes()).chunk(len(protocol.seeds), dim=-1))
            samples = _measured(parts, protocol, view, names, pictures)
            content = {
                "recipe_name": recipe_name, "picture": picture.name, "request": request | measured_by,
                "samples": samples,
            }  # fmt: skip
            write_atomically(path, (json.dumps(content) + "\n").encode())
        results.append(read_json(path))
    summary = report(results, protocol.temperature)
    write_atomically(out / "report.json", (json.dumps(summary, indent=1) + "\n").encode())
    return summary


def _those_of(checksums: Mapping[str, str], *parts: str) -> dict[str, str]:
    return {name: value for name, value in checksums.items() if name.split("/")[0] in parts}


def _stem(words: Sequence[str], request: Mapping[str, Any]) -> str:
    """A file's name: what it is of, for people, and a digest of all that it depends on."""
    digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:12]
    return "-".join([*words, digest]).replace(" ", "_").replace("/", "_")


def _prompts(protocol: Protocol, names: Sequence[str]) -> list[str]:
    return [styled(protocol.style, with_article(name)) for name in names]


def _sampled(
    parts: _Parts,
    protocol: Protocol,
    recipe: Recipe,
    view: str,
    names: tuple[str, ...],
    sizes: list[int],
    batch_size: int,
) -> Tensor:
    """A cell's pictures (N, 3, S, S), one a seed."""
    views = get_views(["identity", view][: len(names)])
    prompts = _prompts(protocol, names)
    return torch.cat([
        sample(parts, prompts, names, views, recipe, list(protocol.seeds[i : i + batch_size]), sizes,
               protocol.noise_level)
        for i in range(0, len(protocol.seeds), batch_size)
    ])  # fmt: skip


@torch.no_grad()
def _measured(
    parts: _Parts, protocol: Protocol, view: str, names: tuple[str, ...], pictures: Tensor
) -> list[dict[str, Any]]:
    """What the CLIP and the judge make of a cell's pictures (N, 3, S, S), by seed."""
    views = get_views(["identity", view][: len(names)])
    others = other_prompts(protocol.style, names, parts.cascade.clip_concepts)
    texts = parts.cascade.noise_clip.embed_text([*_prompts(protocol, names), *others])
    scores, best = by_clip(parts.cascade, pictures, views, texts, protocol.temperature)
    samples: list[dict[str, Any]] = [
        {"seed": seed, "scores": [[round(v, 5) for v in row] for row in matrix], "score": round(score, 5)}
        for seed, matrix, score in zip(protocol.seeds, scores.tolist(), best.tolist(), strict=True)
    ]
    if parts.judge is not None:
        seen = to_views(pictures, views)  # (N, V, 3, S, S)
        found = parts.judge(seen.flatten(0, 1)).softmax(1).unflatten(0, seen.shape[:2])  # (N, V, K)
        places = parts.judge.index(list(names))
        for entry, row in zip(samples, found, strict=True):
            entry["named"] = [parts.judge.names[k] for k in row.argmax(1).tolist()]
            entry["probability"] = [round(row[i, k].item(), 5) for i, k in enumerate(places.tolist())]
    return samples


def sample(
    parts: _Parts,
    prompts: Sequence[str],
    names: Sequence[str | None],
    views: list[View],
    recipe: Recipe,
    seeds: list[int],
    sizes: list[int],
    noise_level: int = 50,
) -> Tensor:
    """Pictures (B, 3, S, S) of the last size, one a seed, as `generate_anagram` makes them."""
    cascade = parts.cascade
    text, null = parts.encode(prompts)
    several = len(views) > 1
    spans = None
    if recipe.anti_segregation and several:
        spans = [
            concept_span(cascade.tokenizer, prompt, name, position=None, max_length=MAX_TOKENS)
            for prompt, name in zip(prompts, names, strict=True)
        ]
    score = cascade.noise_clip.scorer(prompts) if recipe.balancing and several else None
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    steps = recipe.num_inference_steps
    for state in sample_stage1(
        cascade.unet_1, text, null, views, score=score, spans=spans, generators=generators, recipe=recipe,
        size=sizes[0], schedule=cascade.schedule(1, steps),
    ):  # fmt: skip
        x = state.x
    if len(sizes) > 1:
        for state in sample_stage2(
            cascade.unet_2, x, text, null, views, score=score, generators=generators, recipe=recipe,
            noise_level=noise_level, size=sizes[1], schedule=cascade.schedule(2, steps),
        ):  # fmt: skip
            x = state.x
    return x.cpu()


def by_clip(
    cascade: Cascade,
    pictures: Tensor,
    views: list[View],
    texts: Tensor,
    temperature: float = TEMPERATURE,
) -> tuple[Tensor, Tensor]:
    """What the cascade's CLIP makes of finished pictures (B, 3, S, S).

    texts (V + K, D): embeddings of the views' prompts, and of K others that a picture might show. Returns S_ij
    (B, V, V) at timestep 0, of which A and C are made, and `anagram_score` (B,) by several looks against all
    texts: what the best of N is chosen by. Both on the CPU.
    """
    clip, small = cascade.noise_clip, at_64(pictures).to(cascade.device)
    scores = score_matrix(small, views, lambda x: clip.embed_image(x, 0), texts[: len(views)])
    looks = score_matrix(small, views, clip.embed_finished, texts)
    return scores.cpu(), anagram_score(looks, temperature).cpu()


def at_64(pictures: Tensor) -> Tensor:
    """Pictures (B, 3, S, S) as the CLIP takes them, (B, 3, 64, 64)."""
    if pictures.shape[-1] == SCORED_AT:
        return pictures
    return F.interpolate(
        pictures, (SCORED_AT, SCORED_AT), mode="bilinear", antialias=True, align_corners=False
    )


def _state_sum(judge: Judge | None) -> str | None:
    if judge is None:
        return None
    from safetensors.torch import save

    state = {name: tensor.cpu().contiguous() for name, tensor in judge.state_dict().items()}
    return hashlib.sha256(json.dumps(judge.names).encode() + save(state)).hexdigest()
