"""best_of(): sample many, score each by the cascade's own CLIP, and take the best one through all stages."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .cascade import Cascade
from .checks import MAX_SEED, whole_number
from .errors import InputError, PromptWarning
from .evaluation import by_clip
from .generate import generate_anagram
from .media import decode_png
from .metrics import TEMPERATURE, alignment, concealment
from .models.sources import Source
from .output import Anagram
from .prompts import other_prompts, parse_concept, styled
from .views import View, get_views

CANDIDATES = "candidates"  # the folder of stage I's pictures, in save_dir
MAX_COUNT = 10_000


@dataclass(frozen=True)
class Candidate:
    """One seed's picture of stage I and its scores: `metrics.anagram_score`, alignment A, concealment C."""

    anagram: Anagram
    score: float
    alignment: float
    concealment: float


def best_of(
    count: int,
    style: str,
    prompts: Sequence[str],
    views: Sequence[str | View],
    save_dir: str | Path,
    device: str | torch.device | None = None,
    seed: int = 0,
    *,
    view_args: Sequence[Any] | None = None,
    model: Cascade | Source | None = None,
    size: int | None = None,
    batch_size: int = 8,
    **arguments: Any,
) -> tuple[Anagram, list[Candidate]]:
    """The best of `count` anagrams, and all candidates, best first.

    Seeds seed, seed + 1, ... are sampled through stage I into SAVE_DIR/candidates, scored by the cascade's
    noise-aware CLIP (`embed_finished`) against everything else that it has learnt, and the
    best is sampled through all stages into SAVE_DIR. Arguments as `generate_anagram`'s; needs two readings or
    more. What is there already is not made again.

    Raises what generate_anagram raises, and InputError where there is no CLIP to score with.
    """
    count = whole_number("count", count, 1, MAX_COUNT)
    whole_number("seed", seed, 0, MAX_SEED + 1 - count)
    made_views = get_views(views, view_args)
    if len(made_views) < 2:
        raise InputError(f"views={list(views)!r}: the best of {count} is a question of two readings or more")
    cascade = model if isinstance(model, Cascade) else Cascade.from_pretrained(model, device=device)
    if not cascade.has_noise_clip:
        raise InputError(
            f"the cascade {cascade.name} has no noise-aware CLIP to choose by: name its folder with noise_clip="
        )
    last = {name: arguments.pop(name, None) for name in ("stop_after", "upscale")}
    side = (cascade.layout(1).config.sample_size or 64) if size is None else size
    common: dict[str, Any] = {"view_args": view_args, "model": cascade, "size": size, **arguments}
    made = generate_anagram(
        style, prompts, views, Path(save_dir) / CANDIDATES, device, list(range(seed, seed + count)),
        stop_after=side, batch_size=batch_size, **common,
    )  # fmt: skip
    clean = [parse_concept(prompt).prompt for prompt in prompts]
    wanted = [parse_concept(styled(style, prompt)).prompt for prompt in prompts]
    others = other_prompts(parse_concept(style).prompt, clean, cascade.clip_concepts)
    texts = cascade.noise_clip.embed_text([*wanted, *others])
    candidates = []
    for anagram in made:
        picture = decode_png(anagram.pictures[side].read_bytes())[None]
        scores, score = by_clip(cascade, picture, made_views, texts)
        values = (score, alignment(scores), concealment(scores, TEMPERATURE))
        candidates.append(Candidate(anagram, *(value.item() for value in values)))
    candidates.sort(key=lambda candidate: -candidate.score)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PromptWarning)  # once is enough
        best = generate_anagram(
            style, prompts, views, save_dir, device, candidates[0].anagram.seed, **last, **common
        )[0]
    return best, candidates
