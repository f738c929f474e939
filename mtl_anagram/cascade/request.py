"""A checked request: what is asked for, refused here where it cannot be done."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import MAX_SEED, InputError, float_tensor, whole_number
from ..models.loading import config_of
from ..models.prompts import parse_concept, styled
from ..models.t5 import T5Config
from ..sampling import Recipe, UpscaleRecipe
from ..sampling.checks import checked_views
from ..sampling.fused import permutations
from ..sampling.upscaling import check_latent_views
from ..views import View
from ..views.base import pixel_numbers
from .given import Given, Size, sides_of
from .models import Models

MAX_SIDE = 1024  # px, of stage I; far above it no machine has the memory


@dataclass(frozen=True)
class Request:
    """A checked request: everything that decides pictures besides the seed and the weights.

    prompts: full ones (with the style), without brackets. concepts, positions: per prompt the concept that was named
    and the character where it begins, or None. negative: per prompt, None = the empty text for all. sizes: of the
    stages that run, each the side in px, or (H, W).
    """

    style: str
    prompts: list[str]
    negative: list[str] | None
    concepts: list[str | None]
    positions: list[int | None]
    views: list[View]
    recipe: Recipe
    noise_level: int
    sizes: list[Size]
    upscale: UpscaleRecipe
    given: Given

    @property
    def averages(self) -> bool:
        """Whether several views' predictions are averaged, not components' added up."""
        return len(self.views) > 1 and self.views[0].reduce == "mean"

    @property
    def balances(self) -> bool:
        return self.recipe.balancing and self.averages

    @property
    def segregates(self) -> bool:
        return self.recipe.anti_segregation and self.averages


def check_seeds(seeds: int | Sequence[int]) -> list[int]:
    """One or several seeds -> a list without repetitions; InputError for anything else."""
    listed = list(seeds) if isinstance(seeds, Sequence) and not isinstance(seeds, str | bytes) else [seeds]
    if not listed:
        raise InputError("seed=[] names no seed: give at least one")
    return list(dict.fromkeys(whole_number("seed", value, 0, MAX_SEED) for value in listed))


def checked_prompts(
    style: str, prompts: Sequence[str], concepts: Sequence[str | None] | None
) -> tuple[list[str], list[str | None], list[int | None]]:
    """Full prompts without brackets; per prompt the concept named, and where it stands, or None."""
    if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not prompts:
        raise InputError(f"prompts={prompts!r} must be a list of strings, one per view")
    named = checked_texts("concepts", concepts or [None] * len(prompts), len(prompts), str, type(None))
    for text in (*prompts, *(concept for concept in named if concept is not None)):
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"the prompt or concept {text!r} must be a string that is not empty")
    parsed = [parse_concept(styled(style, prompt)) for prompt in prompts]
    return (
        [one.prompt for one in parsed],
        [concept or one.concept for one, concept in zip(parsed, named, strict=True)],
        [None if concept else one.position for one, concept in zip(parsed, named, strict=True)],
    )


def checked_texts(name: str, texts: Any, count: int, *kinds: type) -> list[Any]:
    """One per prompt; a string is for all."""
    listed = [texts] * count if isinstance(texts, str) else texts
    if not isinstance(listed, list | tuple) or [isinstance(text, kinds) for text in listed] != [True] * count:
        raise InputError(f"{name}={texts!r} must be a string, or a list of {count}, one per prompt")
    return list(listed)


def checked_sizes(models: Models, views: list[View], size: Size | None, stop_after: int | None) -> list[Size]:
    """What will be made, each one that the UNets and the views allow."""
    config = models.unet_config(1)
    given: Any = (config.sample_size or 64) if size is None else size
    sides = tuple(given) if isinstance(given, tuple | list) else (given, given)
    factor = config.size_factor
    fit = [type(side) is int and factor <= side <= MAX_SIDE and side % factor == 0 for side in sides]
    if fit != [True, True]:
        wanted = f"a multiple of {factor} up to {MAX_SIDE} for this UNet, or two such: (height, width)"
        raise InputError(f"size={size!r} must be {wanted}")
    stops = [sides[0] * times for times in (1, 4, 16)]
    there = [models.sources[f"stage_{stage}"] is not None for stage in (1, 2, 3)]
    if stop_after is not None and (type(stop_after) is not int or stop_after not in stops):
        heights = stops[: [*there, False].index(False)]
        raise InputError(f"stop_after={stop_after!r} must be the height that a stage makes: {heights}")
    last = max(i for i in range(3) if there[i]) if stop_after is None else stops.index(stop_after)
    if not all(there[: last + 1]):
        lacking = there.index(False) + 1
        said = f"the cascade {models.name} has no stage {'I' * lacking}: name one with stage_{lacking}="
        raise InputError(f"stop_after={stop_after}: {said}, or stop before it")
    made = [(sides[0] * times, sides[1] * times) for times in (1, 4, 16)[: last + 1]]
    sizes: list[Size] = [height if height == width else (height, width) for height, width in made]
    for view in views:
        view.check_size(sizes[0])
        _check_inverse(view, made[0])
    checked_views(views, *made)
    return sizes


def _check_inverse(view: View, size: tuple[int, int]) -> None:
    """InputError for a view of one's own whose inverse does not undo it, on a picture of numbers."""
    picture = (pixel_numbers(*size) + 1).float().expand(1, 3, -1, -1)
    try:
        seen = view.view(picture)
        back, shown = view.inverse_view(seen), view.show(picture[0])
        float_tensor(f"what {view.name} shows", shown, (3, None, None), "(3, H, W)")
    except Exception as error:  # whatever a view of one's own raises
        raise InputError(f"{view!r} cannot look at a picture {tuple(picture.shape)}: {error}") from error
    exact = seen.shape == picture.shape and torch.equal(back, picture)
    if not exact and view.reduce == "mean":
        raise InputError(f"{view!r}: inverse_view must undo view, to the bit; look at its move and move_back")


def check_networks(models: Models, request: Request) -> None:
    """InputError for networks that cannot do this, or are not each other's, from their configs; loads none."""
    if models.fused is not None:
        permutations(request.views, sides_of(request.sizes[0]), torch.device("cpu"))  # raises for other views
    if request.balances and models.sources["noise_clip"] is None:
        said = f"balancing needs a noise-aware CLIP and the cascade {models.name} has none"
        raise InputError(f"{said}: name its folder with noise_clip=, or turn balancing off in the recipe")
    if request.segregates:
        side = sides_of(request.sizes[0])[0]
        resolution = request.recipe.map_resolution * side // 64
        have = models.attention_resolutions(side, request.recipe.map_places)
        if resolution not in have:
            said = f"the anti-segregation loss wants attention at {resolution} px, this UNet has it at {have}"
            remedy = "choose another size or map_resolution, or turn anti_segregation off"
            raise InputError(f"size={side}: {said}; {remedy}")
    text_width = config_of(models.source("stage_1"), "text_encoder", T5Config).d_model
    for stage, size in enumerate(request.sizes[:2], start=1):
        config = models.unet_config(stage)
        # Stage II sees stage I's picture, too.
        wanted: dict[str, Any] = {"in_channels": 3 * stage, "out_channels": 6, "encoder_hid_dim": text_width}
        wanted["class_embed_type"] = None if stage == 1 else "timestep"
        found = {name: (getattr(config, name), value) for name, value in wanted.items()}
        _check_fit(models, stage, size, config.size_factor, found)
        schedule = models.schedule(stage, request.recipe.num_inference_steps)
        if stage == 2:
            whole_number("noise_level", request.noise_level, 0, schedule.num_train_timesteps - 1)
    if len(request.sizes) > 2:
        _check_upscaler(models, request.views, request.sizes[1], request.upscale)


def _check_upscaler(models: Models, views: list[View], size: Size, upscale: UpscaleRecipe) -> None:
    upscaler = models.upscaler
    unet, vae = upscaler.unet_config, upscaler.autoencoder_config
    found = {"in_channels": (unet.in_channels, 4 + 3), "out_channels": (unet.out_channels, 4)}
    found |= {"latent_channels": (vae.latent_channels, 4), "px per latent": (vae.factor, 4)}
    found |= {"the autoencoder's out_channels": (vae.out_channels, 3)}
    found |= {"cross_attention_dim": (unet.cross_attention_dim, upscaler.text_config.hidden_size)}
    _check_fit(models, 3, size, unet.size_factor, found)
    highest = min(upscaler.max_noise_level, unet.num_class_embeds - 1)
    whole_number("noise_level of stage III", upscale.noise_level, 0, highest)
    if upscale.views == "all_latents":
        check_latent_views(views, sides_of(size))
    models.latent_schedule(upscale.num_inference_steps)
    upscaler.check_weights(encoder=upscale.views == "all")


def _check_fit(models: Models, stage: int, size: Size, factor: int, found: dict[str, Any]) -> None:
    """found: by the config's field its value, and the one that is needed."""
    name = f"the cascade {models.name}: stage {'I' * stage}"
    for field, (value, needed) in found.items():
        if value != needed:
            raise InputError(f"{name} has {field}={value!r}, but {needed!r} is needed: mix no releases")
    if any(side % factor for side in sides_of(size)):
        raise InputError(f"{name} takes {size} px, but its UNet multiples of {factor}: choose another size")
