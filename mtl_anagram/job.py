"""A checked request: what generate_anagram is asked for, refused here where it cannot be done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .cascade import Cascade
from .checks import MAX_SEED
from .checksums import combined_checksum
from .errors import InputError
from .prompts import parse_concept, styled
from .sampling import Recipe, Schedule, UpscaleRecipe
from .sampling.stages import SCORER_SIZE
from .views import View

MAX_SIDE = 1024  # px, of stage I; far above it no machine has the memory


@dataclass(frozen=True)
class Job:
    """A checked request: everything that the loops need but the models."""

    prompts: list[str]
    concepts: list[str | None]
    positions: list[int | None]
    views: list[View]
    recipe: Recipe
    noise_level: int
    sizes: list[int]
    upscale: UpscaleRecipe = UpscaleRecipe()  # noqa: RUF009 (frozen)

    @property
    def upscales(self) -> bool:
        """Whether stage III is asked for."""
        return len(self.sizes) > 2

    def request(self, style: str, cascade: Cascade) -> dict[str, Any]:
        """What decides a picture besides its seed, as JSON; stage III by itself, where it is asked for."""
        stage_3 = {}
        if self.upscales:
            weights = combined_checksum(cascade.upscaler_checksums())
            stage_3 = {"stage_3": {**self.upscale.to_dict(), "weights_sha256": weights}}
        return {
            "style": style,
            "prompts": self.prompts,
            "concepts": self.concepts,
            "concept_positions": self.positions,
            "views": [view.to_metadata() for view in self.views],
            "recipe": self.recipe.to_dict(),
            "noise_level": self.noise_level,
            "size": self.sizes[0],
            "weights_sha256": combined_checksum(cascade.checksums()),
            **stage_3,
        }


def column(values: dict[str, Any], name: str, *kinds: type, length: int | None = None) -> list[Any]:
    """A list of the metadata whose entries are all of these kinds; InputError for anything else."""
    column = values[name]
    fits = isinstance(column, list) and bool(column) and all(type(entry) in kinds for entry in column)
    if not fits or (length is not None and len(column) != length):
        number = "1 or more" if length is None else str(length)
        words = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
        raise InputError(f"{name}={column!r} must be a list of {number}, each {words}")
    return column


def check_seeds(seed: int | Sequence[int]) -> list[int]:
    """One or several seeds -> a list without repetitions; InputError for anything else."""
    seeds = list(seed) if isinstance(seed, Sequence) and not isinstance(seed, str | bytes) else [seed]
    if not seeds:
        raise InputError("seed=[] names no seed: give at least one")
    for value in seeds:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_SEED:
            raise InputError(f"seed={value!r} must be a whole number from 0 to {MAX_SEED}")
    return list(dict.fromkeys(seeds))  # type: ignore[arg-type]


def check_noise_level(noise_level: int) -> None:
    if isinstance(noise_level, bool) or not isinstance(noise_level, int) or not 0 <= noise_level <= 999:
        raise InputError(f"noise_level={noise_level!r} must be a whole number from 0 to 999 (50 is usual)")


def parse_prompts(
    style: str, prompts: Sequence[str], concepts: Sequence[str | None] | None
) -> tuple[list[str], list[str | None], list[int | None]]:
    """Full prompts without brackets; per prompt the concept named, and where it stands, or None."""
    if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not prompts:
        raise InputError(f"prompts={prompts!r} must be a list of strings, one per view")
    for prompt in prompts:
        if not isinstance(prompt, str) or not prompt.strip():
            raise InputError(f"prompt {prompt!r} must be a string that is not empty")
    parsed = [parse_concept(styled(style, prompt)) for prompt in prompts]
    clean, marked, positions = (list(column) for column in zip(*parsed, strict=True))
    if concepts is not None:
        if not isinstance(concepts, list | tuple) or len(concepts) != len(prompts):
            raise InputError(
                f"concepts={concepts!r} must be a list of {len(prompts)}, one per prompt, or None"
            )
        for i, concept in enumerate(concepts):
            if concept is None:
                continue
            if not isinstance(concept, str) or not concept.strip():
                raise InputError(f"concept {concept!r} must be words of the prompt {clean[i]!r}, or None")
            marked[i], positions[i] = concept, None
    return clean, marked, positions


def check_sizes(
    cascade: Cascade, views: list[View], size: int | None, stop_after: int | None, recipe: Recipe
) -> list[int]:
    """The sides in px that will be made, each one that the UNets and the views allow."""
    layout = cascade.layout(1)
    config = layout.config
    side = (config.sample_size or 64) if size is None else size
    factor = config.size_factor
    if isinstance(side, bool) or not isinstance(side, int) or not factor <= side <= MAX_SIDE or side % factor:
        raise InputError(
            f"size={side!r} must be a multiple of {factor} up to {MAX_SIDE} for this stage I UNet"
        )
    sizes = [side, 4 * side] if cascade.has_stage_2 else [side]
    if cascade.has_stage_3 and cascade.has_stage_2:
        sizes.append(16 * side)
    if stop_after is not None:
        if stop_after not in (side, 4 * side, 16 * side):
            raise InputError(
                f"stop_after={stop_after!r} must be {side} (stage I) or {4 * side} (stage II) or {16 * side} "
                "(stage III)"
            )
        if stop_after not in sizes:
            lacking = "II" if stop_after == 4 * side or not cascade.has_stage_2 else "III"
            raise InputError(
                f"stop_after={stop_after}: the cascade {cascade.name} has no stage {lacking}; name one with "
                f"stage_{len(lacking)}=, or stop after {sizes[-1]}"
            )
        sizes = sizes[: sizes.index(stop_after) + 1]
    elif cascade.has_stage_3 and not cascade.has_stage_2:
        raise InputError(
            f"the cascade {cascade.name} has a stage III and no stage II, whose pictures it enlarges; name one "
            f"with stage_2=, or stop after {side}"
        )
    if len(sizes) > 1 and sizes[1] % (factor := cascade.layout(2).config.size_factor):
        raise InputError(
            f"size={side} makes {sizes[1]} px in stage II, whose UNet needs a multiple of {factor}"
        )
    if len(sizes) > 2 and sizes[1] % cascade.upscaler.unet_config.size_factor:
        raise InputError(
            f"size={side} makes {sizes[1]} px for stage III, whose UNet needs a multiple of "
            f"{cascade.upscaler.unet_config.size_factor}"
        )
    for view in views:
        for made in sizes:
            view.check_size(made)
    if recipe.anti_segregation and len(views) > 1:
        resolution = recipe.map_resolution * side // 64
        layers = layout.attention_layers(side)
        have = {res for name, res in layers.items() if name.startswith(tuple(recipe.map_places))}
        if resolution not in have:
            raise InputError(
                f"size={side}: the anti-segregation loss wants attention at {resolution} px, this UNet has it at "
                f"{sorted(have)}; choose another size or map_resolution, or turn anti_segregation off"
            )
    return sizes


def check_networks(cascade: Cascade, job: Job, schedules: list[Schedule], text_width: int) -> None:
    """InputError for networks that are not each other's, which would else show when work is half done."""
    for stage, schedule in enumerate(schedules, start=1):
        config = cascade.layout(stage).config
        wanted = {
            "in_channels": 3 * stage,  # stage II sees stage I's picture too
            "out_channels": 6,
            "encoder_hid_dim": text_width,
            "class_embed_type": None if stage == 1 else "timestep",
        }
        for name, value in wanted.items():
            if getattr(config, name) != value:
                raise InputError(
                    f"the cascade {cascade.name}: its UNet of stage {'I' * stage} has "
                    f"{name}={getattr(config, name)!r}, but {value!r} is needed here; take all parts from one release"
                )
        if stage == 2 and job.noise_level >= schedule.num_train_timesteps:
            raise InputError(
                f"noise_level={job.noise_level} must be below stage II's {schedule.num_train_timesteps} timesteps"
            )
    if job.recipe.balancing and len(job.views) > 1:
        encoder = cascade.noise_clip.image_encoder
        first = max(schedule.timesteps[0] for schedule in schedules)
        if encoder.image_size != SCORER_SIZE or encoder.n_timesteps <= first:
            raise InputError(
                f"the cascade {cascade.name}: its noise-aware CLIP is for {encoder.image_size} px and "
                f"{encoder.n_timesteps} timesteps, but {SCORER_SIZE} px and timesteps up to {first} are needed; "
                "name another with noise_clip=, or turn balancing off"
            )
