"""Stage III of a request: the upscaler's parts checked, its prompts encoded once, pictures enlarged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .cascade import Cascade
from .errors import InputError
from .job import Job
from .models.sources import read_config
from .sampling import LatentSchedule, LatentState, NoiseLevels, sample_stage3
from .sampling.upscaling import check_latent_views


class Upscaling:
    """What all pictures of a request share in stage III. Making one checks the parts and encodes the prompts."""

    def __init__(self, cascade: Cascade, job: Job, score: Any) -> None:
        """Raises InputError for parts that are not each other's, before the first stage has run."""
        self.job, self.score, self.upscaler = job, score, cascade.upscaler
        check_upscaler(cascade, job)
        self.upscaler.check_weights(encoder=job.upscale.views == "all")
        if job.upscale.views == "all_latents":
            check_latent_views(job.views, job.sizes[1])
        steps = job.upscale.num_inference_steps
        path = self._config("scheduler")
        self.schedule = LatentSchedule(steps)
        if path is not None:
            self.schedule = read_config(path, lambda config: LatentSchedule.from_config(config, steps))
        path = self._config("low_res_scheduler")
        self.noise_levels = NoiseLevels() if path is None else read_config(path, NoiseLevels.from_config)
        if job.upscale.noise_level >= self.noise_levels.num_train_timesteps:
            raise InputError(
                f"noise_level={job.upscale.noise_level} must be below stage III's "
                f"{self.noise_levels.num_train_timesteps} levels"
            )
        self.text, self.null = self.upscaler.encode(job.prompts)

    def sample(self, low_res: Tensor, generators: list[torch.Generator]) -> Iterator[LatentState]:
        """Stage II's pictures (B, 3, h, w) to ones four times as large; the last state has them."""
        return sample_stage3(
            self.upscaler.unet,
            low_res,
            self.text,
            self.null,
            self.job.views,
            decode=self.upscaler.decoder.picture,
            encode=self.upscaler.encoder.latents if self.job.upscale.views == "all" else None,
            score=self.score,
            generators=generators,
            upscale=self.job.upscale,
            recipe=self.job.recipe,
            schedule=self.schedule,
            noise_levels=self.noise_levels,
        )

    def _config(self, name: str) -> Path | None:
        found = self.upscaler.scheduler_config(name)
        return None if found is None else found[0]


def check_upscaler(cascade: Cascade, job: Job) -> None:
    """InputError for parts of stage III that do not fit each other or the request, from their configs alone."""
    upscaler, upscale = cascade.upscaler, job.upscale
    unet, vae = upscaler.unet_config, upscaler.autoencoder_config
    wanted = {
        "the UNet's in_channels": (unet.in_channels, 4 + 3),
        "the UNet's out_channels": (unet.out_channels, 4),
        "the autoencoder's latent_channels": (vae.latent_channels, 4),
        "the autoencoder's out_channels": (vae.out_channels, 3),
        "the autoencoder's px per latent": (vae.factor, 4),
        "the UNet's cross_attention_dim": (unet.cross_attention_dim, upscaler.text_config.hidden_size),
    }
    for name, (value, needed) in wanted.items():
        if value != needed:
            raise InputError(
                f"the cascade {cascade.name}: in its stage III {name} is {value}, but {needed} is needed here; take "
                "all parts from one release"
            )
    highest = min(upscaler.max_noise_level, unet.num_class_embeds - 1)
    if upscale.noise_level > highest:
        raise InputError(
            f"noise_level={upscale.noise_level} of stage III is above {highest}, the highest that this upscaler "
            "was made for"
        )
