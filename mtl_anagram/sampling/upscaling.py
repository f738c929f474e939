"""The loop of stage III, as a generator of steps; network, decoder, encoder and scorer are callables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import float_tensor, whole_number
from ..errors import InputError
from .balancing import balance
from .ddim import LatentSchedule, NoiseLevels, ddim_step, move_clean, split_v
from .guidance import combine, from_views, guide, to_views
from .recipe import Recipe
from .rectification import FLOOR, rectify
from .stages import Score, checked_generators, checked_views, for_scorer, no_gradients
from .upscale_recipe import UpscaleRecipe

RANGE = 1.001  # how far from 0 the low-resolution picture's values may be


@dataclass(frozen=True)
class LatentState:
    """What one step of stage III left behind.

    index: 0 first; timestep: the noise level that was predicted at; latents (B, F, C, h, w) float32 after the
    step, F = V for views="all" (every view's own, as its reader sees them), else 1; weights (B, V) and
    scale (B,): of the combined noise; picture (B, 3, H, W) in [-1, 1]: in the last state, else None;
    num_steps: how many states there are.
    """

    index: int
    timestep: int
    latents: Tensor
    weights: Tensor
    scale: Tensor
    picture: Tensor | None
    num_steps: int


def sample_stage3(
    unet: Callable[..., Tensor],
    low_res: Tensor,
    text: Tensor,
    null: Tensor,
    views: Sequence[Any],
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
    """Sample B pictures `factor` times as large as low_res (B, 3, h, w); yields a LatentState per step.

    low_res is in [-1, 1], always. (The published pipeline looks for a negative value, and silently takes a
    tensor without one as [0, 1].) text (V, L, D), the same for all images, null (1, L, D): the text tower's
    states; their device and dtype are where and in what the network runs, all else is float32.

    unet(x (2, C + 3, h, w), t, text, class_labels=noise level) -> v (2, C, h, w), called for one image and
    view at a time, the null text's row first: C = `channels` of latents, then the low-resolution picture with
    noise of upscale.noise_level added once. If it has a method `prepare`, it is called once per view with that
    view's two text rows, and its result is passed on in their place. decode(latents (1, C, h, w)) -> picture
    (1, 3, H, W), about in [-1, 1]; encode is its inverse as far as it has one.

    generators: one CPU generator per image, drawn from in float32 in the published order: the noise on
    low_res (3, h, w), then the latents (C, h, w); DDIM draws nothing more. Image b is what it would be alone.

    upscale.views says what the views are for:

    - "first", as published: the first text, no views. All other texts and the views are left alone.
    - "all": every view has latents of its own, those of the picture as its reader sees it, which begin as the
      viewed common noise. In a step each view predicts its clean latents z_i, by its own text, and these are
      decoded, x_i = decode(z_i), brought back and averaged in pixels, X = sum_i a_i view_i^-1(x_i). Then z_i
      becomes z_i + encode(view_i(X)) - encode(x_i), the noise becomes what that leaves of the latents, and
      the DDIM step follows. Views act on pixels alone, so it is right for each of them, whatever the
      autoencoder is like; what the autoencoder cannot encode cancels in the difference, so that views which
      agree change nothing, and one view alone gives exactly the published sampling of what it sees. The last
      picture is the same average. Needs encode; an exchange costs one decoding and two encodings per view.
      (Exchanging predicted clean pictures between processes that each keep their own noise is SyncTweedies',
      Kim et al. 2024, arXiv 2403.14370; the difference of encodings is ours.)
    - "all_latents": one common latent picture, to which the views are applied as if it were pixels. The
      combination of predictions is stages I and II's: x0 = sum_i a_i x0_i, and for the noise that the step
      keeps, scale * sum_i a_i eps_i. As an algorithm on latents it is exact for every permutation of pixels:
      the noise stays unit noise, and the step commutes with the view. As an algorithm on pictures it is exact
      where decode(view(z)) = view(decode(z)): always for the identity; for flips and quarter turns only if all
      of the decoder's kernels share the symmetry, which training gives them roughly; for views that cut
      the picture up, up to a margin at the cuts that is as wide as the decoder sees. A view that changes
      values (negate) means nothing on latents, and is refused.

    The weights a_i are balancing's (recipe.balancing, and score(pictures (B, V, 3, 64, 64), 0) -> (B, V)): by
    the cosines of the clean viewed low_res, which is all that a scorer of 64 px can tell of the large picture
    as well; the exponent grows over the number of steps. The scale is rectification's, under
    recipe.rectification and rectify_diagonal. It multiplies the noise alone and not the clean latents: with
    v predictions both are at hand, and to put the scale through the division by sqrt(a), as predicting from
    the noise alone would, blows the latents up where little of the picture is left.
    recipe: Recipe.released() if None.

    All is checked at the call. Raises InputError for a value outside its limits, and during the loop for
    numbers that are not finite.
    """
    run = _Run(
        unet,
        text,
        null,
        list(checked_views(views)),
        decode,
        encode,
        score,
        checked_generators(generators),
        UpscaleRecipe() if upscale is None else upscale,
        Recipe.released() if recipe is None else recipe,
        schedule,
        NoiseLevels() if noise_levels is None else noise_levels,
        whole_number("channels", channels, 1),
        whole_number("factor", factor, 1),
    )
    run.check(low_res)
    return run.steps(low_res.detach())


class _Run:
    """One sampling run's arguments and its loop."""

    def __init__(
        self,
        unet: Callable[..., Tensor],
        text: Tensor,
        null: Tensor,
        views: list[Any],
        decode: Callable[[Tensor], Tensor],
        encode: Callable[[Tensor], Tensor] | None,
        score: Score | None,
        generators: list[torch.Generator],
        upscale: UpscaleRecipe,
        recipe: Recipe,
        schedule: LatentSchedule | None,
        noise_levels: NoiseLevels,
        channels: int,
        factor: int,
    ) -> None:
        self.unet, self.text, self.null, self.views = unet, text, null, views
        self.decode, self.encode, self.score = decode, encode, score
        self.generators, self.upscale, self.recipe = generators, upscale, recipe
        self.noise_levels, self.channels, self.factor = noise_levels, channels, factor
        self.count = len(generators)  # B
        if not isinstance(upscale, UpscaleRecipe):
            raise InputError(f"upscale is {type(upscale).__name__}: give an UpscaleRecipe or None")
        if not isinstance(recipe, Recipe):
            raise InputError(f"recipe is {type(recipe).__name__}: give a Recipe such as Recipe.released()")
        if schedule is not None and not isinstance(schedule, LatentSchedule):
            raise InputError(f"schedule is {type(schedule).__name__}: give a LatentSchedule or None")
        if not isinstance(noise_levels, NoiseLevels):
            raise InputError(f"noise_levels is {type(noise_levels).__name__}: give NoiseLevels or None")
        steps = upscale.num_inference_steps
        self.schedule = LatentSchedule(steps) if schedule is None else schedule
        if self.schedule.num_inference_steps != steps:
            raise InputError(
                f"the schedule has {self.schedule.num_inference_steps} steps, the upscale recipe {steps}: make "
                "them equal"
            )

    def check(self, low_res: Tensor) -> None:
        """InputError for anything that would fail later."""
        value: Any
        for name, value in (("unet", self.unet), ("decode", self.decode)):
            if not callable(value):
                raise InputError(f"{name} is {type(value).__name__}: give a callable")
        for name, value in (("encode", self.encode), ("score", self.score)):
            if value is not None and not callable(value):
                raise InputError(f"{name} is {type(value).__name__}: give a callable or None")
        float_tensor(
            "low_res", low_res, (self.count, 3, None, None), "(B, 3, h, w) with one picture per generator"
        )
        peak = low_res.detach().abs().max().item()
        if not peak <= RANGE:  # a nan fails too
            raise InputError(
                f"low_res has values up to {peak:g}: give pictures in [-1, 1], stage II's last x"
            )
        float_tensor("text", self.text, (len(self.views), None, None), "(V, L, D), one per view")
        float_tensor("null", self.null, (1, *self.text.shape[1:]), "(1, L, D) of the text's L and D")
        for name, states in (("text", self.text), ("null", self.null)):
            if not torch.isfinite(states).all():
                raise InputError(f"{name} holds numbers that are not finite: encode in float32 or bfloat16")
        if self.upscale.noise_level >= self.noise_levels.num_train_timesteps:
            raise InputError(
                f"noise_level={self.upscale.noise_level} must be below {self.noise_levels.num_train_timesteps}"
            )
        if self.upscale.views == "first":
            return
        height, width = low_res.shape[-2:]
        if height != width:
            raise InputError(f"low_res of {height} by {width} px: views need square pictures")
        for view in self.views:
            if callable(getattr(view, "check_size", None)):
                view.check_size(height)
                view.check_size(self.factor * height)
        if self.upscale.views == "all" and self.encode is None:
            raise InputError('views="all" goes through pixels and back: give encode, the autoencoder\'s')
        if self.upscale.views == "all_latents":
            check_latent_views(self.views, height)

    def steps(self, low_res: Tensor) -> Iterator[LatentState]:
        """The steps. Work is done in blocks of `no_gradients`, never around a yield."""
        device, upscale = self.text.device, self.upscale
        with no_gradients():
            low_res = low_res.to(device, torch.float32)
            image = self.noise_levels.add_noise(
                low_res, self._noise(3, low_res).to(device), upscale.noise_level
            )
            z = self._noise(self.channels, low_res).to(device)  # (B, C, h, w)
            texts = self.text[:1] if upscale.views == "first" else self.text
            contexts = [self._context(states) for states in texts]
            scores = self._scores(low_res)
            images = image[:, None] if upscale.views == "first" else to_views(image, self.views)
            latents = to_views(z, self.views) if upscale.views == "all" else z[:, None]
        for index, t in enumerate(self.schedule.timesteps):
            with no_gradients():
                last = index + 1 == self.schedule.num_inference_steps
                weights = self._weights(scores, index, device)
                scale = torch.ones_like(weights[:, 0])
                if upscale.views == "all_latents":
                    latents, scale = self._common_step(latents, images, contexts, weights, index, t)
                else:
                    v = self._predict(latents, images, contexts, index, t)
                    x0, noise = split_v(v, latents, t, self.schedule)
                    if upscale.views == "all" and (last or (index + 1) % upscale.exchange_every == 0):
                        shift, own = self._shift(x0, weights), noise
                        x0, noise = move_clean(x0, noise, shift, t, self.schedule)
                        scale = self._own_scale(own, noise, weights)
                        noise = noise * scale[:, None, None, None, None]
                    latents = ddim_step(x0, noise, t, self.schedule)
                picture = self._picture(latents, weights) if last else None
                state = LatentState(
                    index, t, latents, weights, scale, picture, self.schedule.num_inference_steps
                )
            yield state

    def _noise(self, channels: int, like: Tensor) -> Tensor:
        """The next unit noise of every image, (B, channels, h, w) on the CPU."""
        shape = (channels, *like.shape[-2:])
        return torch.stack([torch.randn(shape, generator=g, dtype=torch.float32) for g in self.generators])

    def _context(self, states: Tensor) -> Any:
        """One view's text rows (2, L, D), null first, through the network's `prepare` if it has one."""
        rows = torch.cat([self.null.to(states), states[None]])
        prepare = getattr(self.unet, "prepare", None)
        return prepare(rows) if callable(prepare) else rows

    def _scores(self, low_res: Tensor) -> Tensor | None:
        """The scorer's cosines of the viewed low-resolution pictures (B, V), None where none are needed."""
        count = len(self.views)
        if self.score is None or not self.recipe.balancing or count == 1 or self.upscale.views == "first":
            return None
        scores = self.score(for_scorer(to_views(low_res, self.views), self.recipe), 0)
        if not isinstance(scores, Tensor) or tuple(scores.shape) != (self.count, count):
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise InputError(f"score returned {got} instead of (B, V) = {(self.count, count)} cosines")
        return scores

    def _weights(self, scores: Tensor | None, index: int, device: torch.device) -> Tensor:
        """The views' weights (B, V): by score, all equal, or all the first's."""
        count = len(self.views)
        if scores is not None:
            horizon = self.upscale.num_inference_steps
            return balance(scores, index, horizon=horizon, floor=self.recipe.floor).to(device)
        weights = torch.full((self.count, count), 1 / count, device=device)
        if self.upscale.views == "first":
            weights = torch.zeros_like(weights)
            weights[:, 0] = 1
        return weights

    def _predict(self, latents: Tensor, images: Tensor, contexts: list[Any], index: int, t: int) -> Tensor:
        """Guided v (B, F, C, h, w) of latents and pictures (B, F, ...), one image and view after the other.

        At these sizes two rows keep a device busy, and memory does not grow with images and views.
        """
        guided = []
        for x in torch.cat([latents, images], dim=2):  # (F, C + 3, h, w)
            for i, context in enumerate(contexts):
                rows = x[i].expand(2, *x.shape[1:]).to(self.text.dtype)
                v = self.unet(rows, t, context, class_labels=self.upscale.noise_level)
                wanted = (2, self.channels, *x.shape[-2:])
                if not isinstance(v, Tensor) or tuple(v.shape) != wanted:
                    got = tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__
                    raise InputError(f"the network returned {got} instead of {wanted}: one v per row")
                null, prompt = v.float()
                guided.append(guide(null, prompt, self.upscale.guidance_scale))
        v = torch.stack(guided).unflatten(0, (self.count, len(contexts)))
        if not torch.isfinite(v).all():
            raise InputError(
                f"the network's prediction is not finite at step {index} (t={t}) in {self.text.dtype}: run it in "
                "bfloat16 or float32, and check its weights"
            )
        return v

    def _common_step(
        self,
        latents: Tensor,
        images: Tensor,
        contexts: list[Any],
        weights: Tensor,
        index: int,
        t: int,
    ) -> tuple[Tensor, Tensor]:
        """One step of "all_latents": latents (B, 1, C, h, w) -> the next, and the scale (B,)."""
        v = self._predict(to_views(latents[:, 0], self.views), images, contexts, index, t)
        v = from_views(v, self.views)  # (B, V, C, h, w), canonical
        x0, noise = split_v(v, latents.expand_as(v), t, self.schedule)
        scale = torch.ones_like(weights[:, 0])
        if self.recipe.rectification:
            scale = rectify(noise, weights, diagonal=self.recipe.rectify_diagonal)
        step = ddim_step(combine(x0, weights), combine(noise, weights, scale), t, self.schedule)
        return step[:, None], scale

    def _shift(self, x0: Tensor, weights: Tensor) -> Tensor:
        """How far the average of all pictures moves every view's clean latents, (B, V, C, h, w) like x0."""
        shifts = []
        for z, a in zip(x0, weights, strict=True):  # one image at a time: (V, C, h, w), (V,)
            seen = [self._decoded(one[None]) for one in z]  # (1, 3, H, W) each, as the readers see them
            mean = self._mean(seen, a)
            shifts += [
                self._encoded(view.view(mean), z[0]) - self._encoded(picture, z[0])
                for view, picture in zip(self.views, seen, strict=True)
            ]
        return torch.stack(shifts).unflatten(0, (self.count, len(self.views)))

    def _mean(self, seen: list[Tensor], weights: Tensor) -> Tensor:
        """The weighted mean (1, 3, H, W), canonical, of pictures as the readers see them."""
        back = [view.inverse_view(picture) for view, picture in zip(self.views, seen, strict=True)]
        return torch.stack([a * picture for a, picture in zip(weights, back, strict=True)]).sum(dim=0)

    def _own_scale(self, own: Tensor, noise: Tensor, weights: Tensor) -> Tensor:
        """Rectification's scale (B,) where views have no common latents.

        `rectify` needs the noises' products in one frame. But sum_ij a_i a_j m_ij is the power of the combined
        noise, which every view holds in its own frame, so that both of its definitions can be had from powers:
        m_ii of the views' own noise, and the mean power of what the exchange made of it.
        """
        if not self.recipe.rectification or len(self.views) == 1:
            return torch.ones_like(weights[:, 0])
        powers = own.square().mean(dim=(2, 3, 4))  # m_ii, (B, V)
        combined = (weights * noise.square().mean(dim=(2, 3, 4))).sum(dim=1)  # (B,)
        target = (weights * powers).sum(dim=1)
        if self.recipe.rectify_diagonal == "unit":
            return (combined + (weights.square() * (1 - powers)).sum(dim=1)).clamp(min=FLOOR).rsqrt()
        relative = combined / torch.where(target > 0, target, 1.0)
        return torch.where(target > 0, relative.clamp(min=FLOOR).rsqrt(), 1.0)

    def _picture(self, latents: Tensor, weights: Tensor) -> Tensor:
        """The pictures (B, 3, H, W) in [-1, 1] of the last latents (B, F, C, h, w)."""
        pictures = []
        for z, a in zip(latents, weights, strict=True):
            seen = [self._decoded(one[None]) for one in z]
            pictures.append(self._mean(seen, a) if self.upscale.views == "all" else seen[0])
        return torch.cat(pictures).clamp(-1, 1)

    def _decoded(self, z: Tensor) -> Tensor:
        picture = self.decode(z)
        wanted = (1, 3, *(self.factor * side for side in z.shape[-2:]))
        if not isinstance(picture, Tensor) or tuple(picture.shape) != wanted:
            got = tuple(picture.shape) if isinstance(picture, Tensor) else type(picture).__name__
            raise InputError(f"decode returned {got} instead of {wanted}")
        if not torch.isfinite(picture).all():
            raise InputError("the decoder's picture is not finite: decode in float32")
        return picture.float()

    def _encoded(self, picture: Tensor, like: Tensor) -> Tensor:
        z = self.encode(picture) if self.encode is not None else None
        if not isinstance(z, Tensor) or tuple(z.shape) != (1, *like.shape):
            got = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
            raise InputError(f"encode returned {got} instead of {(1, *like.shape)}")
        return z[0].float()


def check_latent_views(views: Sequence[Any], side: int) -> None:
    """InputError for views that do more than move pixels: on latents of this side they mean nothing."""
    ones = torch.ones(1, 1, side, side)
    for view in views:
        if not torch.equal(view.view(ones), ones):
            raise InputError(
                f'{view!r} changes values, which means nothing on latents: take views="all", which applies it to '
                "pixels"
            )
