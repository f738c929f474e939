"""best_of(): sample many, score each by the cascade's own CLIP, and take the best one through all stages."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cascade import Cascade, SamplingRun
from ..errors import MAX_SEED, InputError, whole_number
from ..files.hub import Source, read_json
from ..files.images import read_picture
from ..files.outputs import SCORES, Anagram, check_folder, write_new
from ..generate import OnStep, cascade_of, write_run
from ..models import NoiseCLIP
from ..models.prompts import other_prompts, parse_concept
from ..sampling.schedule import cosine_alpha_bar
from ..sampling.stages import SCORER_SIZE
from ..views import View
from .metrics import TEMPERATURE, alignment, anagram_score, concealment, score_matrix

AT_ONCE = 64  # pictures that the CLIP looks at
# Where each look is shifted to, in 32nds of the side, and the looks' timestep as a share of all.
LOOKS = ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1), (0, 0))
LOOKS_NOISE = 0.15


class Candidate(NamedTuple):
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
    model: Cascade | Source | None = None,
    overwrite: bool = False,
    progress: bool = False,
    on_step: OnStep | None = None,
    **options: Any,
) -> tuple[Anagram, list[Candidate]]:
    """The best of `count` anagrams of two readings or more, and all candidates, best first.

    Seeds seed, seed + 1, ... go through stage I into SAVE_DIR/candidates, are scored (`by_clip`), and the best goes
    through all stages into SAVE_DIR. options: `Cascade.sample`'s; all else as in `generate_anagram`.
    """
    whole_number("count", count, 1)
    whole_number("seed", seed, 0, MAX_SEED + 1 - count)
    folder, cascade = check_folder(save_dir), cascade_of(model, device)
    cascade.source("noise_clip")  # InputError where there is none
    run = cascade.sample(prompts, views, range(seed, seed + count), style=style, **options)
    if len(run.views) < 2:
        raise InputError(f"views={list(views)!r}: the best of {count} is a question of two readings or more")
    run.begun = {}  # so that stage I of the best is not sampled again
    first, apart = run.only(run.seeds, stages=1), folder / "candidates"
    kept = read_json(apart / SCORES) if (apart / SCORES).is_file() and not overwrite else {}
    made = write_run(first, apart, overwrite, progress, on_step)
    pictures = [read_picture(anagram.pictures[run.sizes[0]]) for anagram in made]
    scores, best = by_clip(run, torch.stack(pictures))
    rows = torch.stack([best, alignment(scores), concealment(scores, TEMPERATURE)], dim=1).tolist()
    found = [Candidate(anagram, *row) for anagram, row in zip(made, rows, strict=True)]
    candidates = sorted(found, key=lambda candidate: -candidate.score)
    kept |= {str(candidate.anagram.seed): candidate.score for candidate in candidates}
    write_new(apart / SCORES, json.dumps(kept, indent=1).encode(), overwrite=True)
    winner = run.only([candidates[0].anagram.seed])
    return write_run(winner, folder, overwrite, progress, on_step)[0], candidates


@torch.no_grad()
def by_clip(run: SamplingRun, pictures: Tensor, temperature: float = TEMPERATURE) -> tuple[Tensor, Tensor]:
    """What the cascade's CLIP makes of a run's finished pictures (B, 3, H, W) in [-1, 1], on the CPU.

    -> S_ij (B, V, V) at timestep 0; `anagram_score` (B,) by several looks, against all that the CLIP has learnt.
    """
    clip, scores, looks = run.models.noise_clip, [], []
    others = other_prompts(parse_concept(run.request.style).prompt, run.prompts, run.models.clip_concepts)
    texts = clip.embed_text([*run.prompts, *others])
    own, sides = texts[: len(run.views)], (SCORER_SIZE, SCORER_SIZE)
    small = partial(F.interpolate, size=sides, mode="bilinear", antialias=True)
    for part in pictures.split(AT_ONCE):
        part = part.to(texts.device)
        scores.append(score_matrix(part, run.views, lambda x: clip.embed_image(small(x), 0), own))
        looks.append(score_matrix(part, run.views, lambda x: embed_finished(clip, small(x)), texts))
    return torch.cat(scores).cpu(), anagram_score(torch.cat(looks), temperature).cpu()


def embed_finished(clip: NoiseCLIP, pictures: Tensor) -> Tensor:
    """Finished pictures (R, 3, S, S) in [-1, 1] -> unit vectors (R, D) float32, for choosing among them.

    The mean of the LOOKS' embeddings, every second look mirrored, under a little noise, always the same. What one look
    takes for another thing, all of them seldom do.
    """
    size, count = clip.image_encoder.image_size, clip.image_encoder.n_timesteps
    step, t = max(1, size // 32), round(LOOKS_NOISE * count)
    kept = cosine_alpha_bar(t / count)
    generator = torch.Generator("cpu").manual_seed(0)
    around, looks = F.pad(pictures, (step,) * 4, mode="replicate"), []
    for look, (right, down) in enumerate(LOOKS):
        top, left = step * (1 - down), step * (1 - right)
        seen = around[..., top : top + size, left : left + size]
        seen = seen.flip(-1) if look % 2 else seen
        noise = torch.randn(1, *seen.shape[1:], generator=generator, device="cpu", dtype=torch.float32)
        looks.append(clip.embed_image(math.sqrt(kept) * seen + math.sqrt(1 - kept) * noise.to(seen), t))
    return F.normalize(torch.stack(looks).mean(0), dim=-1)
