"""Stage III's autoencoder: latents to pictures four times as large (and back), with bounded memory.

A picture of 1024 px has maps of 1 GiB, and a plain convolution holds its input three times. Here every layer works band
by band: a convolution's band reads its rows and one more on either side, and a group norm's mean and variance are taken
over the whole map first. Nothing is approximated or blended; only the maps before and after a layer are whole.
"""

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ...errors import InputError
from ..configs import AutoencoderConfig

BAND = 1 << 24  # values of a band of the wider map, 64 MiB in float32
NORM_EPS = 1e-6  # of every norm; the config has no field for it


def convolve(
    conv: nn.Conv2d,
    x: Tensor,
    band: int | None,
    *,
    norm: nn.GroupNorm | None = None,
    double: bool = False,
    skip: tuple[nn.Module, Tensor] | None = None,
) -> Tensor:
    """conv(x), 3x3, at most `band` values at once (None = all): the whole convolution up to the rounding of sums.

    norm: x is normalised by it and activated first. double: every pixel of x is repeated along both sides first. skip:
    a layer and its map, whose result is added. Zeros are padded all around; by a stride of 2 only after the last.
    """
    stride, times = conv.stride[0], 2 if double else 1
    before, height, width = 2 - stride, times * x.shape[-2], times * x.shape[-1]
    normed = None if norm is None else affine(norm, x)

    def part(start: int, stop: int) -> Tensor:
        top, bottom = start * stride - before, (stop - 1) * stride - before + 3
        first, last = max(top, 0), min(bottom, height)
        h = x[:, :, first // times : (last + times - 1) // times]
        if double:
            h = F.interpolate(h, scale_factor=2.0)[:, :, first % 2 : first % 2 + last - first]
        if normed is not None:
            scale, shift = normed
            h = F.silu(torch.addcmul(shift, h.to(scale.dtype), scale)).to(conv.weight.dtype)
        h = F.pad(h, (before, 1, max(-top, 0), max(bottom - height, 0)))
        h = F.conv2d(h, conv.weight, conv.bias, stride)
        return h if skip is None else h + skip[0](skip[1][:, :, start:stop])

    shape = (x.shape[0], conv.out_channels, height // stride, width // stride)
    widest = x.shape[0] * max(conv.out_channels * shape[-1], conv.in_channels * width * stride)
    rows = shape[2] if band is None else max(1, band // widest)
    if rows >= shape[2]:
        return part(0, shape[2])
    out = x.new_empty(shape, dtype=conv.weight.dtype)
    for start in range(0, shape[2], rows):
        stop = min(start + rows, shape[2])
        out[:, :, start:stop] = part(start, stop)
    return out


def affine(norm: nn.GroupNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """norm(x) = x scale + shift, each (B, C, 1, 1) in float32 or wider."""
    groups = x.unflatten(1, (norm.num_groups, -1))  # (B, G, C/G, H, W)
    wide = torch.promote_types(x.dtype, torch.float32)
    # One group at a time: a wider copy of the whole map would be the largest thing in memory.
    moments = [torch.var_mean(g.to(wide), dim=(1, 2, 3), correction=0) for g in groups.unbind(1)]
    variance, mean = (torch.stack(part, dim=1) for part in zip(*moments, strict=True))  # (B, G)
    repeat = x.shape[1] // norm.num_groups
    scale = norm.weight.to(wide) * torch.rsqrt(variance + norm.eps).repeat_interleave(repeat, dim=1)
    shift = norm.bias.to(wide) - mean.repeat_interleave(repeat, dim=1) * scale  # (B, C)
    return scale[:, :, None, None], shift[:, :, None, None]


class Resnet(nn.Module):
    """Two convolutions and the way around them."""

    def __init__(self, in_width: int, width: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_width, eps=NORM_EPS)
        self.conv1 = nn.Conv2d(in_width, width, 3)
        self.norm2 = nn.GroupNorm(groups, width, eps=NORM_EPS)
        self.conv2 = nn.Conv2d(width, width, 3)
        self.conv_shortcut = nn.Conv2d(in_width, width, 1) if in_width != width else nn.Identity()

    def forward(self, x: Tensor, band: int | None) -> Tensor:
        h = convolve(self.conv1, x, band, norm=self.norm1)
        return convolve(self.conv2, h, band, norm=self.norm2, skip=(self.conv_shortcut, x))


class Attention(nn.Module):
    """One head over all pixels of a map (B, C, H, W), a part of the queries at a time."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, eps=NORM_EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, band: int | None) -> Tensor:
        scale, shift = affine(self.group_norm, x)
        pixels = rearrange(x * scale + shift, "b c h w -> b 1 (h w) c").to(self.to_q.weight.dtype)
        k, v = self.to_k(pixels), self.to_v(pixels)  # (B, 1, H W, C)
        # 256 MiB of logits by default, where a kernel writes them out.
        queries = max(1, 4 * (band or BAND) // (k.shape[0] * k.shape[2]))
        attend = F.scaled_dot_product_attention
        parts = [self.to_out[0](attend(self.to_q(part), k, v)) for part in pixels.split(queries, dim=2)]
        return x + rearrange(torch.cat(parts, dim=2), "b 1 (h w) c -> b c h w", h=x.shape[-2])


class Resampler(nn.Module):
    """Twice the side by repetition and a convolution, or half the side by a strided convolution."""

    def __init__(self, width: int, *, up: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=1 if up else 2)
        self.up = up

    def forward(self, x: Tensor, band: int | None) -> Tensor:
        return convolve(self.conv, x, band, double=self.up)


class Trunk(nn.Module):
    """What `encoder.` and `decoder.` share: convolution, levels and middle in some order, norm, convolution."""

    def __init__(self, in_channels: int, out_channels: int, config: AutoencoderConfig, *, up: bool) -> None:
        super().__init__()
        groups, middle, self.up = config.norm_num_groups, config.block_out_channels[-1], up
        widths = config.block_out_channels[:: -1 if up else 1]
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3)
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()  # one of them stays empty
        for i, width in enumerate(widths):
            # The way up has one more.
            inner = [widths[max(i - 1, 0)]] + [width] * (config.layers_per_block - 1 + up)
            level = nn.ModuleDict({"resnets": nn.ModuleList(Resnet(w, width, groups) for w in inner)})
            if i < len(widths) - 1:
                level["upsamplers" if up else "downsamplers"] = nn.ModuleList([Resampler(width, up=up)])
            (self.up_blocks if up else self.down_blocks).append(level)
        resnets = nn.ModuleList(Resnet(middle, middle, groups) for _ in range(2))
        attentions = nn.ModuleList([Attention(middle, groups)])
        self.mid_block = nn.ModuleDict({"attentions": attentions, "resnets": resnets})
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3)

    def forward(self, x: Tensor, band: int | None) -> Tensor:
        levels = cast("Iterable[nn.ModuleDict]", (*self.down_blocks, *self.up_blocks))
        parts = [cast("nn.ModuleList", part) for level in levels for part in level.values()]
        outer = [layer for part in parts for layer in part]
        (attend,), (before, after) = (cast("nn.ModuleList", part) for part in self.mid_block.values())
        x = convolve(self.conv_in, x, band)
        for layer in [before, attend, after, *outer] if self.up else [*outer, before, attend, after]:
            x = layer(x, band)
        return convolve(self.conv_out, x, band, norm=self.conv_norm_out)


class Half(nn.Module):
    """What both directions share."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


class LatentDecoder(Half):
    """Latents to pictures: `post_quant_conv.` and `decoder.` of the published autoencoder."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__(config)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.decoder = Trunk(config.latent_channels, config.out_channels, config, up=True)

    def forward(self, z: Tensor, *, band: int | None = BAND) -> Tensor:
        """z (B, 4, h, w) latents, not scaled -> pictures (B, 3, 4h, 4w), about in [-1, 1], in z's dtype.

        band None = no bands, which is no faster and takes more memory (at 1024 px 3.0 GiB of tensors instead of 2.2).
        """
        return self.decoder(self.post_quant_conv(z.to(self.dtype)), band).to(z.dtype)

    def picture(self, latents: Tensor, *, band: int | None = BAND) -> Tensor:
        """Latents as the UNet knows them, scaled, (B, 4, h, w) -> pictures (B, 3, 4h, 4w), unclamped, one at a time."""
        return torch.cat([self(z, band=band) for z in (latents / self.config.scaling_factor).split(1)])


class LatentEncoder(Half):
    """Pictures to latents: `encoder.` and `quant_conv.`; published stage III has no use for it, views="all" has."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__(config)
        self.encoder = Trunk(config.in_channels, 2 * config.latent_channels, config, up=False)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)

    def forward(self, x: Tensor, *, band: int | None = BAND) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1], sides multiples of 4 -> latents (B, 4, H/4, W/4), not scaled.

        The mean of the distribution that the encoder describes; nothing is drawn.
        """
        if x.shape[-1] % self.config.factor or x.shape[-2] % self.config.factor:
            raise InputError(f"pictures of {tuple(x.shape)}: sides must be multiples of {self.config.factor}")
        h = self.quant_conv(self.encoder(x.to(self.dtype), band))
        return h[:, : self.config.latent_channels].to(x.dtype)

    def latents(self, pictures: Tensor, *, band: int | None = BAND) -> Tensor:
        """Pictures (B, 3, H, W) -> latents as the UNet knows them, scaled, (B, 4, H/4, W/4), one at a time."""
        return torch.cat([self(x, band=band) for x in pictures.split(1)]) * self.config.scaling_factor
