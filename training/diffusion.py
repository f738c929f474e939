"""The diffusion that training needs: cosine schedule, noising, learned-range loss, a plain guided sampler."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from mtl_anagram.sampling.schedule import cosine_alpha_bar

STEPS = 1000
VLB_WEIGHT = 1e-3  # Nichol and Dhariwal 2021, equation 16


@dataclass(frozen=True)
class Diffusion:
    """Per-timestep numbers, each (1000,) float32, of the squared-cosine schedule (betas at most 0.999).

    posterior_log_variance is of q(x_{t-1} | x_t, x_0); its first entry, which would be minus infinity,
    repeats the second.
    """

    alpha_bar: Tensor
    alpha_bar_before: Tensor
    log_beta: Tensor
    posterior_log_variance: Tensor
    from_x0: Tensor
    from_xt: Tensor

    @classmethod
    def cosine(cls) -> "Diffusion":
        kept = [cosine_alpha_bar(i / STEPS) for i in range(STEPS + 1)]
        betas = [min(1 - after / before, 0.999) for before, after in pairwise(kept)]
        beta = torch.tensor(betas, dtype=torch.float64)
        alpha_bar = (1 - beta).cumprod(0)
        before = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
        variance = beta * (1 - before) / (1 - alpha_bar)
        variance[0] = variance[1]
        numbers = (
            alpha_bar, before, beta.log(), variance.log(),
            before.sqrt() * beta / (1 - alpha_bar), (1 - beta).sqrt() * (1 - before) / (1 - alpha_bar),
        )  # fmt: skip
        return cls(*(n.float() for n in numbers))

    def to(self, device: torch.device) -> "Diffusion":
        return Diffusion(*(getattr(self, field.name).to(device) for field in fields(self)))

    def noised(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t of pictures (B, C, H, W) at timesteps (B,)."""
        a = column(self.alpha_bar, t)
        return a.sqrt() * x0 + (1 - a).sqrt() * noise

    def astray(self, x0: Tensor, t: Tensor, generator: torch.Generator) -> Tensor:
        """A coarse part for the noise of pictures (B, C, H, W) at timesteps (B,), as sampling brings it about.

        Sampling begins with white noise, but x_t holds sqrt(a) x_0 even at the last timestep (Lin et al. 2023,
        Common diffusion noise schedules are flawed, section 3): averaged over many pixels that is far from white,
        and a network that trusts it draws grey for white. Here a random share of it is missing, and a random
        field is added, so that the tone is learnt from the low-resolution picture, which has it.
        """
        height, width = x0.shape[-2:]
        coarse = F.interpolate(F.avg_pool2d(x0, 16), (height, width), mode="bilinear")
        share = torch.rand(len(x0), 1, 1, 1, generator=generator, device=x0.device)
        field = F.interpolate(
            torch.randn(len(x0), x0.shape[1], 4, 4, generator=generator, device=x0.device),
            (height, width),
            mode="bilinear",
        )
        a = column(self.alpha_bar, t)
        return (a * (1 - a)).sqrt() * (0.3 * field - share * coarse)

    def weight_of_error(self, t: Tensor) -> Tensor:
        """How much a noise error at timesteps (B,) counts, (B,): 0.25 where there is little noise, 13 where it is all.

        Unweighted, two thirds of the loss come from the tenth of the timesteps with the least noise, much of it from
        paper's grain, which nobody can tell from noise, and they drown what is left to learn of edges. (Karras et al.
        2024, arXiv 2312.02696, learn such weights.) The floor is for flat areas, which stay flat by it.
        """
        a = self.alpha_bar[t]
        return (2 * (1 - a).sqrt() / (0.15 + 0.85 * a)).clamp(min=0.25)

    def losses(
        self, prediction: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """L_simple and L_vlb per picture, each (B,), of a UNet's output (B, 6, H, W).

        L_simple is the noise's mean squared error. L_vlb is one term of the bound, in bits a number: the
        divergence of q(x_{t-1} | x_t, x_0) from the model's step, at t = 0 the likelihood of the 8-bit
        picture. The model's mean is held fixed in it, so it trains the variance alone (Nichol and Dhariwal
        2021, section 3.1); log variance = f log beta_t + (1 - f) log posterior variance, f = (v + 1) / 2.
        """
        eps, v = prediction.float().chunk(2, dim=1)
        simple = (eps - noise).square().flatten(1).mean(1)
        a = column(self.alpha_bar, t)
        fraction = (v + 1) / 2
        low, high = column(self.posterior_log_variance, t), column(self.log_beta, t)
        log_variance = fraction * high + (1 - fraction) * low
        model_x0 = ((x_t - (1 - a).sqrt() * eps.detach()) / a.sqrt()).clamp(-1, 1)
        mean = column(self.from_x0, t) * model_x0 + column(self.from_xt, t) * x_t
        true_mean = column(self.from_x0, t) * x0 + column(self.from_xt, t) * x_t
        divergence = 0.5 * (
            log_variance - low - 1 + torch.exp(low - log_variance)
            + (true_mean - mean).square() * torch.exp(-log_variance)
        )  # fmt: skip
        likelihood = -log_likelihood_8_bit(x0, mean, log_variance)
        bound = torch.where((t == 0)[:, None, None, None], likelihood, divergence)
        return simple, bound.flatten(1).mean(1) / math.log(2)


def column(numbers: Tensor, t: Tensor) -> Tensor:
    """Each row's number, (B, 1, 1, 1)."""
    return numbers[t][:, None, None, None]


def log_likelihood_8_bit(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log probability of x, one of 256 levels in [-1, 1], under a normal integrated over the level's cell."""
    scale = torch.exp(-0.5 * log_variance)
    above = normal_cdf((x + 1 / 255 - mean) * scale)
    below = normal_cdf((x - 1 / 255 - mean) * scale)
    inside = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return inside.clamp(min=1e-12).log()


def normal_cdf(z: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(z / math.sqrt(2)))


def timestep_weights() -> Tensor:
    """How often training draws each timestep, (1000,): never seldom, most often where the layout is decided.

    A large, simple drawing shows through the noise up to t = 950 once neighbouring pixels are averaged, so
    its layout is decided early; the last steps only sharpen strokes, which is learnt from few pictures.
    """
    t = torch.arange(STEPS, dtype=torch.float32)
    return 0.4 + torch.exp(-(((t - 780) / 220) ** 2))


@torch.no_grad()
def sample(
    predict: Callable[[Tensor, int], tuple[Tensor, Tensor]],
    shape: tuple[int, ...],
    generator: torch.Generator,
    *,
    steps: int,
    guidance: float,
) -> Tensor:
    """Plain guided DDPM sampling with the picture kept in [-1, 1] on `steps` evenly spaced timesteps.

    predict(x, t) -> the UNet's output without and with the text, each (B, 6, H, W). Returns pictures in
    [-1, 1].
    """
    device = generator.device
    schedule = Diffusion.cosine().to(device)
    stride = STEPS // steps
    x = torch.randn(shape, generator=generator, device=device)
    for t in range((steps - 1) * stride, -1, -stride):
        null, text = predict(x, t)
        eps = null[:, :3] + guidance * (text[:, :3] - null[:, :3])
        fraction = (text[:, 3:] + 1) / 2
        a = schedule.alpha_bar[t]
        before = schedule.alpha_bar[t - stride] if t >= stride else torch.ones((), device=device)
        x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
        x0 = x0.clamp(-1, 1)
        beta = 1 - a / before
        mean = before.sqrt() * beta / (1 - a) * x0 + (a / before).sqrt() * (1 - before) / (1 - a) * x
        low = ((1 - before) / (1 - a) * beta).clamp(min=1e-20).log()
        std = torch.exp(0.5 * (fraction * beta.log() + (1 - fraction) * low))
        x = mean + std * torch.randn(shape, generator=generator, device=device) if t else x0
    return x
