"""One idea of the sampler changed at a time, each by one function; nothing of the library is touched.

Run it: every rule draws the same anagram on the embedded cascade, into output/own_rules.png.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

from mtl_anagram import Cascade, Recipe
from mtl_anagram.sampling import DDIM, Combined, DPMSolver2M, Prediction, Schedule, combine


def worst_takes_all(score):
    """Another combination rule: at every step the view that fits its prompt least decides alone."""

    def rule(prediction: Prediction, index: int, t: int) -> Combined:
        cosines = score(prediction.seen[:, :, :3], t)  # (B, V)
        weights = torch.nn.functional.one_hot(cosines.argmin(1), cosines.shape[1]).to(cosines)
        return Combined(combine(prediction.noise, weights), combine(prediction.variance, weights), weights)

    return rule


def left_and_right(prediction: Prediction, index: int, t: int) -> Combined:
    """Weights per pixel: the first view counts more on the left, the second on the right."""
    images, views, _, height, width = prediction.noise.shape
    ramp = torch.linspace(0.25, 0.75, width, device=prediction.noise.device)
    weights = torch.stack([1 - ramp, ramp]).expand(images, height, views, width).transpose(1, 2)[:, :, None]
    return Combined(combine(prediction.noise, weights), combine(prediction.variance, weights), weights)


def brighter(schedule: Schedule, strength: float = 2.0):
    """A loss of one's own on x0: the clean picture's mean should be 0.5; its gradient moves the noise."""

    def rule(prediction: Prediction, index: int, t: int) -> Combined:
        kept, noisy = schedule.roots(t)
        noise, x = prediction.noise.mean(1), prediction.seen[:, 0, :3]  # the first view is the identity
        with torch.enable_grad():
            x0 = ((x - noisy * noise) / kept).detach().requires_grad_()
            loss = (x0.clamp(-1, 1).mean(dim=(1, 2, 3)) - 0.5).square()
            (gradient,) = torch.autograd.grad(loss.sum(), x0)
        moved = strength * gradient * x0[0].numel() / 100  # per pixel, in the picture's own units
        return Combined(noise + kept / noisy * moved, prediction.variance.mean(1))

    return rule


def keep(picture: Tensor, mask: Tensor, schedule: Schedule, generator: torch.Generator):
    """Inpainting: where mask (H, W) is 1, x stays the known picture (3, H, W), noised to the step's level."""

    def after(x: Tensor, index: int, t_next: int) -> tuple[Tensor, None]:
        known = picture.to(x).expand_as(x)
        if t_next >= 0:
            noise = torch.randn(x.shape, generator=generator)
            known = schedule.add_noise(known, noise.to(x), t_next)
        return torch.where(mask.to(x) > 0, known, x), None

    return after


def preview(run, stop_after: int | None = None) -> list[Tensor]:
    """The clean picture that each step predicts, as it forms; the run is cancelled by asking for no more."""
    previews = []
    for _, _, state in run:
        previews.append(state.x0)
        if len(previews) == stop_after:
            break
    return previews


def main(out: str = "output/own_rules.png", steps: int = 30) -> None:
    from mtl_anagram.files.images import save_picture

    cascade = Cascade.from_pretrained(device="cpu")
    recipe, schedule = Recipe.plain(num_inference_steps=steps, guidance_scale=5.0), cascade.schedule(1, steps)
    request = {"recipe": recipe, "stop_after": 64, "style": "a poster of"}
    prompts, views = ["a cat", "a sea turtle"], ["identity", "rotate_180"]

    def made(**rules) -> Tensor:
        return cascade.sample(prompts, views, 6, **request, **rules).pictures[64][0]

    known, mask = -torch.ones(3, 64, 64), torch.zeros(64, 64)
    mask[:, :16] = 1
    pictures = [
        made(),
        made(combine=worst_takes_all(cascade.noise_clip.scorer([f"a poster of {p}" for p in prompts]))),
        made(combine=left_and_right),
        made(combine=brighter(schedule)),
        made(step=DDIM(schedule)),
        made(step=DPMSolver2M(schedule)),
        made(after=keep(known, mask, schedule, torch.Generator().manual_seed(0))),
        preview(cascade.sample(prompts, views, 6, **request), stop_after=steps // 2)[-1][0],
    ]
    save_picture(Path(out), torch.cat(pictures, dim=-1))
    print(
        f"{out}: as the recipe is, worst takes all, left and right, brighter, DDIM, DPM-Solver++, inpainting, a preview"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
