"""Stage III's autoencoder: latents to pictures four times as large (and back), with bounded memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn

from ...errors import InputError
from ..attention import attention
from .bands import BAND, affine, convolve, doubled, normalised
from .configs import AutoencoderConfig

NORM_EPS = 1e-6  # of every norm; the config has no field for it
MAX_LOGITS = 1 << 26  # queries times keys at once: 256 MiB in float32, where a kernel writes them out


class Resnet(nn.Module):
    """Two convolutions and the way around them."""

    def __init__(self, in_width: int, width: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_width, eps=NORM_EPS)
        self.conv1 = nn.Conv2d(in_width, width, 3)
        self.norm2 = nn.GroupNorm(groups, width, eps=NORM_EPS)
        self.conv2 = nn.Conv2d(width, width, 3)
        if in_width != width:
            self.conv_shortcut = nn.Conv2d(in_width, width, 1)
        self.has_shortcut = in_width != width

    def forward(self, x: Tensor, band: int | None) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W)."""
        height = x.shape[-2]

        def around(start: int, stop: int) -> Tensor:
            rows = x[:, :, start:stop]
            return self.conv_shortcut(rows) if self.has_shortcut else rows

        h = convolve(self.conv1, normalised(self.norm1, x, silu=True), height, band=band)
        return convolve(self.conv2, normalised(self.norm2, h, silu=True), height, band=band, add=around)


class Attention(nn.Module):
    """One head over all pixels, a part of the queries at a time."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, eps=NORM_EPS)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, max_logits: int) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        scale, shift = affine(self.group_norm, x)
        pixels = rearrange(x * scale + shift, "b c h w -> b 1 (h w) c").to(self.to_q.weight.dtype)
        k, v = self.to_k(pixels), self.to_v(pixels)  # (B, 1, H W, C)
        queries = max(1, max_logits // (k.shape[0] * k.shape[2]))
        parts = [self.to_out[0](attention(self.to_q(part), k, v)) for part in pixels.split(queries, dim=2)]
        return x + rearrange(torch.cat(parts, dim=2), "b 1 (h w) c -> b c h w", h=x.shape[-2])


class Middle(nn.Module):
    """Resnet, attention over the whole map, resnet."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Attention(width, groups)])
        self.resnets = nn.ModuleList([Resnet(width, width, groups), Resnet(width, width, groups)])

    def forward(self, x: Tensor, band: int | None, max_logits: int) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = self.resnets[0](x, band)
        x = self.attentions[0](x, max_logits)
        return self.resnets[1](x, band)


class Resampler(nn.Module):
    """Twice the side by repetition and a convolution, or half the side by a strided convolution."""

    def __init__(self, width: int, *, down: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2 if down else 1)
        self.down = down

    def forward(self, x: Tensor, band: int | None) -> Tensor:
        """(B, C, H, W) -> (B, C, 2H, 2W) or (B, C, H/2, W/2)."""
        height = x.shape[-2]
        if not self.down:
            return convolve(self.conv, doubled(x), 2 * height, band=band)
        # As published: zeros after the last row and column only.
        return convolve(self.conv, lambda a, b: x[:, :, a:b], height, band=band, padding=(0, 1))


class Level(nn.Module):
    """Resnets, then a resampler where the level is not the last."""

    def __init__(self, in_width: int, width: int, layers: int, groups: int, *, resample: str | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            [Resnet(in_width if i == 0 else width, width, groups) for i in range(layers)]
        )
        if resample is not None:
            resampler = Resampler(width, down=resample == "down")
            setattr(self, f"{resample}samplers", nn.ModuleList([resampler]))
        self.resample = resample

    def layers(self) -> list[nn.Module]:
        """The level's modules in order, each called with a map and a band."""
        return [*self.resnets] if self.resample is None else [*self.resnets, self.resampler]

    @property
    def resampler(self) -> nn.Module:
        return getattr(self, f"{self.resample}samplers")[0]


class _Half(nn.Module):
    """What `encoder.` and `decoder.` share: convolution, levels and middle in some order, norm, convolution."""

    def __init__(self, in_channels: int, out_channels: int, config: AutoencoderConfig, *, up: bool) -> None:
        super().__init__()
        groups = config.norm_num_groups
        widths = config.block_out_channels[::-1] if up else config.block_out_channels
        layers = config.layers_per_block + up  # the way up has one more, as published
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3)
        last = len(widths) - 1
        levels = nn.ModuleList()
        for i, width in enumerate(widths):
            resample = None if i == last else ("up" if up else "down")
            levels.append(Level(widths[max(i - 1, 0)], width, layers, groups, resample=resample))
        setattr(self, "up_blocks" if up else "down_blocks", levels)
        self.mid_block = Middle(config.block_out_channels[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3)
        self.up = up

    def forward(self, x: Tensor, band: int | None, max_logits: int) -> Tensor:
        inputs = x
        x = convolve(self.conv_in, lambda a, b: inputs[:, :, a:b], x.shape[-2], band=band)
        if self.up:
            x = self.mid_block(x, band, max_logits)
        for level in cast("Iterable[Level]", self.up_blocks if self.up else self.down_blocks):
            for (
                layer
            ) in level.layers():  # here, not in a method of the level: that would keep its input alive
                x = layer(x, band)
        if not self.up:
            x = self.mid_block(x, band, max_logits)
        rows = normalised(self.conv_norm_out, x, silu=True)
        return convolve(self.conv_out, rows, x.shape[-2], band=band)


class _Part(nn.Module):
    """Shared by the two parts of the autoencoder."""

    config: AutoencoderConfig
    max_logits = MAX_LOGITS

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


class LatentDecoder(_Part):
    """Latents to pictures: `post_quant_conv.` and `decoder.` of the published autoencoder.

    What a group norm and the attention in the middle see is the whole picture, so a decoder applied to tiles
    gives other pictures than one applied to the whole. Here only the order of work is changed (`bands`), and
    the attention's queries come in parts: the result is the whole decoding, up to the rounding of sums.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.decoder = _Half(config.latent_channels, config.out_channels, config, up=True)

    def forward(self, z: Tensor, *, band: int | None = BAND) -> Tensor:
        """z (B, 4, h, w) latents, not scaled -> pictures (B, 3, 4h, 4w), about in [-1, 1], in z's dtype.

        band: how many values of a feature map are worked on at once; None = all of them, which is no faster
        and takes more memory (at 1024 px 3.0 GiB of tensors instead of 2.2, and the kernels' workspaces).
        """
        _check("latents", z, self.config.latent_channels, 1)
        h = self.decoder(self.post_quant_conv(z.to(self.dtype)), band, self.max_logits)
        return h.to(z.dtype)

    def picture(self, latents: Tensor, *, band: int | None = BAND) -> Tensor:
        """Latents as the UNet knows them, scaled, (B, 4, h, w) -> pictures (B, 3, 4h, 4w), unclamped.

        One picture at a time, so that memory does not grow with B.
        """
        z = latents / self.config.scaling_factor
        return torch.cat([self(one, band=band) for one in z.split(1)])


class LatentEncoder(_Part):
    """Pictures to latents: `encoder.` and `quant_conv.` of the published autoencoder.

    Published stage III has no use for it; the one that takes all views into account has.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = _Half(config.in_channels, 2 * config.latent_channels, config, up=False)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)

    def forward(self, x: Tensor, *, band: int | None = BAND) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1], sides multiples of 4 -> latents (B, 4, H/4, W/4), not scaled.

        The mean of the distribution that the encoder describes; nothing is drawn.
        """
        _check("pictures", x, self.config.in_channels, self.config.factor)
        h = self.quant_conv(self.encoder(x.to(self.dtype), band, self.max_logits))
        return h[:, : self.config.latent_channels].to(x.dtype)

    def latents(self, pictures: Tensor, *, band: int | None = BAND) -> Tensor:
        """Pictures (B, 3, H, W) -> latents as the UNet knows them, scaled, (B, 4, H/4, W/4), one at a time."""
        parts = [self(one, band=band) for one in pictures.split(1)]
        return torch.cat(parts) * self.config.scaling_factor


def _check(name: str, x: Tensor, channels: int, factor: int) -> None:
    if x.ndim != 4 or x.shape[1] != channels or not all(s and s % factor == 0 for s in x.shape[-2:]):
        raise InputError(
            f"{name} of shape {tuple(x.shape)}: expected (B, {channels}, H, W), H and W multiples of {factor}"
        )
