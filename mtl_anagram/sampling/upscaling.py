"""Stage III through the same loop: latents and v predictions; network, decoder, encoder and scorer are callables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, whole_number
from .balancing import balance
from .checks import check_kinds, check_result, checked_picture, checked_text, checked_views
from .guidance import ViewLike, from_views, guide, to_views
from .guidance import combine as weighted_sum
from .loop import Combined, Prediction, StepState, no_gradients, sample
from .recipe import Recipe, UpscaleRecipe
from .rectification import rectify, scale_of
from .schedule import LatentSchedule, NoiseLevels
from .solvers import ddim_step, split_v
from .stages import Run, Score


@dataclass(frozen=True)
class LatentState(StepState):
    """Of stage III: x are latents (B, F, C, h, w), F = V for views="all" (each as its reader sees them), else 1;
    picture (B, 3, H, W) in [-1, 1]: in the last state, else None."""

    picture: Tensor | None = None


def sample_stage3(
    unet: Callable[..., Tensor],
    low_res: Tensor,
    text: Tensor,
    null: Tensor,
    views: Sequence[ViewLike],
    *,
    decode: Callable[[Tensor], Tensor],
    encode: Callable[[Tensor], Tensor] | None = None,
    score: Score | None = None,
    generators: Sequence[torch.Generator],
    upscale: UpscaleRecipe | None = None,
    recipe: Recipe | None = None,
    schedule: LatentSchedule | None = None,
    noise_levels: NoiseLevels | None = None,
    channels: int = 4,
    factor: int = 4,
) -> Iterator[LatentState]:
    """Sample B pictures `factor` times as large as low_res (B, 3, h, w) in [-1, 1]; yields a LatentState per step.

    text (V, L, D), null (1, L, D): the text tower's states; their device and dtype are where and in what the network
    runs. unet(x (2, C + 3, h, w), t, text, class_labels=noise level) -> v (2, C, h, w), called for one image and view
    at a time, the null text's row first: C = `channels` of latents, then low_res with noise of upscale.noise_level
    added once; `prepare` as in stage I, once per view. decode(latents (1, C, h, w)) -> picture (1, 3, H, W), about in
    [-1, 1]; encode is its inverse as far as it has one. generators: one CPU generator per image, drawn from in the
    published order: the noise on low_res (3, h, w), then the latents (C, h, w). Image b is what it would be alone.
    upscale.views (docs/stage-3.md): "first", as published: the first text, no views. "all": every view has latents of
    its own; each predicts its clean latents z_i, which are decoded, brought back and averaged in pixels, X; z_i becomes
    z_i + encode(view_i(X)) - encode(decode(z_i)), so that what the autoencoder cannot encode cancels. "all_latents":
    one common latent picture, combined as in stage I; exact where decode(view(z)) = view(decode(z)); a view that
    changes values (negate) is refused. Weights are balancing's, by the scores of the viewed low_res; the scale is
    rectification's, and multiplies the noise alone. recipe: Recipe.released() if None. All is checked at the call.
    """
    upscale = UpscaleRecipe() if upscale is None else upscale
    recipe = Recipe.released() if recipe is None else recipe
    check_kinds(upscale=(upscale, UpscaleRecipe), recipe=(recipe, Recipe), decode=(decode, Callable))
    check_kinds(encode=(encode, Callable, type(None)))
    schedule = LatentSchedule(upscale.num_inference_steps) if schedule is None else schedule
    noise_levels = NoiseLevels() if noise_levels is None else noise_levels
    run = _Run(
        unet, text, null, views, score, generators, recipe, schedule, decode, encode, upscale, noise_levels, channels,
        factor,
    )  # fmt: skip
    low_res = checked_picture(low_res, run.count)
    height, width = low_res.shape[-2:]
    if upscale.views != "first":
        checked_views(run.views, (height, width), (factor * height, factor * width))
    if upscale.views == "all_latents":
        check_latent_views(run.views, (height, width))
    return run.states(low_res)


@dataclass
class _Run(Run):
    """A run of stage III, and the closures that its loop is made of."""

    schedule: LatentSchedule
    decode: Callable[[Tensor], Tensor]
    encode: Callable[[Tensor], Tensor] | None
    upscale: UpscaleRecipe
    noise_levels: NoiseLevels
    channels: int
    factor: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_schedule(LatentSchedule, self.upscale.num_inference_steps)
        check_kinds(noise_levels=(self.noise_levels, NoiseLevels))
        whole_number("noise_level", self.upscale.noise_level, 0, self.noise_levels.num_train_timesteps - 1)
        self.text = checked_text("text", self.text, 1, len(self.views))[0]
        self.null = checked_text("null", self.null, 1, 1, self.text.shape[1:])[0]
        self.mode = self.upscale.views
        if self.mode == "all" and self.encode is None:
            raise InputError('views="all" goes through pixels and back: give encode, the autoencoder\'s')

    def states(self, low_res: Tensor) -> Iterator[LatentState]:
        """The loop, and after it the pictures."""
        with no_gradients():
            low_res = low_res.to(self.text.device, torch.float32)
            noise = self.draw(3, *low_res.shape[-2:])
            image = self.noise_levels.add_noise(low_res, noise, self.upscale.noise_level)
            z = self.draw(self.channels, *low_res.shape[-2:])  # (B, C, h, w)
            viewed = to_views(image, self.views) if self.mode != "first" else image[:, None]
            latents = to_views(z, self.views) if self.mode == "all" else z[:, None]
            texts = self.text[:1] if self.mode == "first" else self.text
            contexts = [self.prepared(torch.cat([self.null.to(states), states[None]])) for states in texts]
            predict = partial(self.predict, viewed, contexts, self.number(self.upscale.noise_level))
            self.cosines = self.scores(to_views(low_res, self.views), 0) if self.mode != "first" else None

        def step(combined: Combined, x: Tensor, t: int, t_next: int) -> Tensor:
            assert combined.x0 is not None
            return ddim_step(combined.x0, combined.noise, t, self.schedule)

        combine = self.common if self.mode == "all_latents" else self.exchanged
        for state in self.looked(sample(latents, self.schedule.timesteps, predict, combine, step)):
            with no_gradients():
                last = state.index + 1 == state.num_steps
                picture = self.picture(state.x, state.weights) if last else None
            yield LatentState(**vars(state), picture=picture)

    def predict(self, images: Tensor, contexts: list[Any], level: Tensor, x: Tensor, t: int) -> Prediction:
        """The guided prediction of pictures (B, F, 3, h, w) and latents; one by one, so that memory does not grow."""
        latents = to_views(x[:, 0], self.views) if self.mode == "all_latents" else x
        seen = torch.cat([latents, images], dim=2)  # (B, F, C + 3, h, w)
        guided = []
        for image in seen:
            for one, context in zip(image, contexts, strict=True):
                row = one.expand(2, *one.shape).to(self.text.dtype)
                v = self.unet(row, self.number(t), context, class_labels=level)
                wanted = (2, self.channels, *one.shape[-2:])
                null, prompt = check_result(v, wanted, "the network", "one v per row").float()
                guided.append(guide(null, prompt, self.upscale.guidance_scale))
        v = torch.stack(guided).unflatten(0, (self.count, len(contexts)))
        v = self.finite(v, "the network's prediction", t)
        if self.mode == "all_latents":
            v = from_views(v, self.views)  # (B, V, C, h, w), canonical
        x0, noise = split_v(v, x.expand_as(v), t, self.schedule)
        return Prediction(seen, noise, None, x0)

    def common(self, prediction: Prediction, index: int, t: int) -> Combined:
        """The combine of "all_latents": the weighted means of clean latents and of noise, (B, 1, C, h, w)."""
        x0, noise, weights, recipe = prediction.x0, prediction.noise, self.weights(index), self.recipe
        assert x0 is not None
        scale = rectify(noise, weights, diagonal=recipe.rectify_diagonal) if recipe.rectification else None
        mean, noise = weighted_sum(x0, weights)[:, None], weighted_sum(noise, weights, scale)[:, None]
        return Combined(noise, None, weights, scale, mean)

    def exchanged(self, prediction: Prediction, index: int, t: int) -> Combined:
        """The combine of "first", where nothing is combined, and of "all", where clean pictures are exchanged."""
        x0, own, weights = prediction.x0, prediction.noise, self.weights(index)
        assert x0 is not None
        last = index + 1 == self.schedule.num_inference_steps
        if self.mode == "first" or not (last or (index + 1) % self.upscale.exchange_every == 0):
            return Combined(own, None, weights, None, x0)
        # The same noisy latents, split anew: x0 + shift, and the noise that is left.
        shift, (kept, noisy) = self.shift(x0, weights), self.schedule.roots(t)
        x0, noise = x0 + shift, own - (kept / noisy) * shift
        scale = torch.ones_like(weights[:, 0])
        if self.recipe.rectification and len(self.views) > 1 and not self.sums:
            # Here views have no common frame. But sum_ij a_i a_j m_ij is the power of the combined noise, which
            # every view holds in its own frame, so that powers alone give the scale.
            powers = own.square().mean(dim=(2, 3, 4))  # m_ii, (B, V)
            combined = (weights * noise.square().mean(dim=(2, 3, 4))).sum(dim=1)  # (B,)
            if self.recipe.rectify_diagonal == "unit":
                scale = scale_of(combined + (weights.square() * (1 - powers)).sum(dim=1))
            else:
                scale = scale_of(combined, (weights * powers).sum(dim=1))
        return Combined(noise * scale[:, None, None, None, None], None, weights, scale, x0)

    def weights(self, index: int) -> Tensor:
        """The views' weights (B, V): by score, all equal, or all the first's."""
        if self.cosines is not None:
            horizon = self.upscale.num_inference_steps
            return balance(self.cosines, index, horizon=horizon, floor=self.recipe.floor).to(self.text.device)
        count = len(self.views)
        row = [1.0 if self.sums else 1 / count] * count
        row = [1.0] + [0.0] * (count - 1) if self.mode == "first" else row
        return torch.tensor([row] * self.count, dtype=torch.float32, device=self.text.device)

    def shift(self, x0: Tensor, weights: Tensor) -> Tensor:
        """How far the average of all pictures moves every view's clean latents, (B, V, C, h, w) like x0."""
        shifts = []
        for z, a in zip(x0, weights, strict=True):  # one image at a time: (V, C, h, w), (V,)
            seen = [self.decoded(one[None]) for one in z]  # (1, 3, H, W) each, as the readers see them
            mean = self.mean(seen, a)
            shifts += [
                self.encoded(view.view(mean), z[0]) - self.encoded(picture, z[0])
                for view, picture in zip(self.views, seen, strict=True)
            ]
        return torch.stack(shifts).unflatten(0, (self.count, len(self.views)))

    def mean(self, seen: list[Tensor], weights: Tensor) -> Tensor:
        """The weighted mean (1, 3, H, W), canonical, of pictures as the readers see them."""
        parts = zip(weights, self.views, seen, strict=True)
        return torch.stack([a * view.inverse_view(picture) for a, view, picture in parts]).sum(dim=0)

    def picture(self, latents: Tensor, weights: Tensor) -> Tensor:
        """The pictures (B, 3, H, W) in [-1, 1] of the last latents (B, F, C, h, w)."""
        pictures = []
        for z, a in zip(latents, weights, strict=True):
            seen = [self.decoded(one[None]) for one in z]
            pictures.append(self.mean(seen, a) if self.mode == "all" else seen[0])
        return torch.cat(pictures).clamp(-1, 1)

    def decoded(self, z: Tensor) -> Tensor:
        wanted = (1, 3, *(self.factor * side for side in z.shape[-2:]))
        picture = check_result(self.decode(z), wanted, "decode", "a picture per row of latents")
        if not torch.isfinite(picture).all():
            self.look()  # latents that were not finite before are the reason
            raise InputError("the decoder's picture is not finite: decode in float32")
        return picture.float()

    def encoded(self, picture: Tensor, like: Tensor) -> Tensor:
        z = None if self.encode is None else self.encode(picture)
        return check_result(z, (1, *like.shape), "encode", "latents per picture")[0].float()


def check_latent_views(views: Sequence[ViewLike], size: tuple[int, int]) -> None:
    """InputError for views that do more than move pixels: on latents of this size they mean nothing."""
    ones = torch.ones(1, 1, *size, dtype=torch.float32, device="cpu")
    for view in views:
        if not torch.equal(view.view(ones), ones) or getattr(view, "reduce", "mean") == "sum":
            remedy = 'take views="all", which applies it to pixels'
            raise InputError(f"{view!r} changes values, which means nothing on latents: {remedy}")
