"""Stage III's UNet: noisy latents, the low-resolution picture, time, noise level and text in; v out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import InputError
from .configs import UpscalerUNetConfig
from .unet_blocks import Attention, Level, Middle, TimestepEmbedding, UpscalerText


class UpscalerUNet(nn.Module):
    """The latent UNet of the Stable Diffusion x4 upscaler (the diffusers layout's names and maths).

    `unet(x, t, text, class_labels)` predicts; `unet.prepare(text)` does once what is the same at every step.
    Levels with only_cross_attention look at the text in both of their attentions and never at each other's
    pixels: at 256 px of latents that is what keeps them affordable.
    """

    def __init__(self, config: UpscalerUNetConfig) -> None:
        super().__init__()
        self.config = config
        widths, layers = config.block_out_channels, config.layers_per_block
        only_cross = cast("tuple[bool, ...]", config.only_cross_attention)
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], config.time_width)
        self.class_embedding = nn.Embedding(config.num_class_embeds, config.time_width)

        skips = [widths[0]]  # widths of what the down path hands over, in order
        self.down_blocks = nn.ModuleList()
        for i, (width, kind) in enumerate(zip(widths, config.down_block_types, strict=True)):
            resample = "down" if i < last else None
            in_widths = [skips[-1]] + [width] * (layers - 1)
            attend = kind == "CrossAttnDownBlock2D"
            self.down_blocks.append(
                Level(in_widths, width, config, attend=attend, only_cross=only_cross[i], resample=resample)
            )
            skips += [width] * (layers + (resample is not None))

        h = widths[-1]
        self.up_blocks = nn.ModuleList()
        for i, kind in enumerate(config.up_block_types):
            width = widths[last - i]
            in_widths = []
            for _ in range(layers + 1):
                in_widths.append(h + skips.pop())
                h = width
            resample = "up" if i < last else None
            attend = kind == "CrossAttnUpBlock2D"
            only = only_cross[last - i]
            self.up_blocks.append(
                Level(in_widths, width, config, attend=attend, only_cross=only, resample=resample)
            )
        self.mid_block = Middle(widths[-1], config)

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)
        for name, module in self.named_modules():
            if isinstance(module, Attention):
                module.name = name

    @property
    def dtype(self) -> torch.dtype:
        return self.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.conv_in.weight.device

    def prepare(self, text: Tensor) -> UpscalerText:
        """Text states (R, L, cross_attention_dim) -> the keys and values of every layer that reads them."""
        width = self.config.cross_attention_dim
        if text.ndim != 3 or text.shape[-1] != width:
            raise InputError(
                f"text of shape {tuple(text.shape)}: expected (rows, tokens, {width}), the states of the text "
                "tower that belongs to this UNet"
            )
        keys, values = {}, {}
        for module in self.modules():
            if isinstance(module, Attention) and module.reads_text:
                keys[module.name], values[module.name] = module.project(text.to(self.dtype))
        return UpscalerText(keys, values)

    def forward(
        self, x: Tensor, t: int | Tensor, text: Tensor | UpscalerText, class_labels: int | Tensor
    ) -> Tensor:
        """Predict v = sqrt(a) eps - sqrt(1 - a) z0 (Salimans & Ho 2022).

        x (R, 7, H, W): noisy latents, then the noisy low-resolution picture, H and W multiples of
        `config.size_factor`; t the timestep 0..999, one for all rows or (R,); text (R, L, D) states of the text
        tower or `prepare`'s result; class_labels: the noise level 0..999 of the low-resolution picture, one or
        (R,). Returns (R, 4, H, W).
        """
        config, factor = self.config, self.config.size_factor
        if x.ndim != 4 or x.shape[1] != config.in_channels:
            raise InputError(f"x of shape {tuple(x.shape)}: expected (rows, {config.in_channels}, H, W)")
        if not all(side >= factor and side % factor == 0 for side in x.shape[-2:]):
            raise InputError(
                f"x of {x.shape[-2]} by {x.shape[-1]}: this UNet of {len(config.block_out_channels)} levels needs "
                f"sides that are multiples of {factor}"
            )
        context = text if isinstance(text, UpscalerText) else self.prepare(text)
        if len(context) != x.shape[0]:
            raise InputError(f"{len(context)} rows of text for {x.shape[0]} pictures: give one per picture")
        emb = self.time_embedding(_numbers("t", t, x.shape[0], self.device))
        emb = emb + self.class_embedding(self._levels(class_labels, x.shape[0]))
        emb = F.silu(emb)  # (R or 1, time width); every resnet activates the same embedding: once is enough

        h = self.conv_in(x.to(self.dtype))
        skips = [h]
        for block in cast("Iterable[Level]", self.down_blocks):
            for resnet, attend in block.layers():
                h = resnet(h, emb)
                h = h if attend is None else attend(h, context)
                skips.append(h)
            if block.resampler is not None:
                h = block.resampler(h)
                skips.append(h)
        h = self.mid_block(h, emb, context)
        for block in cast("Iterable[Level]", self.up_blocks):
            for resnet, attend in block.layers():
                h = resnet(torch.cat([h, skips.pop()], dim=1), emb)
                h = h if attend is None else attend(h, context)
            if block.resampler is not None:
                h = block.resampler(h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))

    def _levels(self, class_labels: int | Tensor, rows: int) -> Tensor:
        """The noise levels as (1,) or (R,) long, checked."""
        limit = self.config.num_class_embeds
        levels = _numbers("class_labels", class_labels, rows, self.device)
        if levels.is_floating_point() or levels.dtype == torch.bool:
            raise InputError(f"class_labels={class_labels!r} must be whole numbers, noise levels")
        if levels.device.type != "meta":
            # A plain number is looked at as it is: reading it back from a GPU would wait for the GPU.
            plain = isinstance(class_labels, int)
            low, high = (class_labels,) * 2 if plain else (int(bound) for bound in levels.aminmax())
            if low < 0 or high >= limit:
                raise InputError(f"class_labels run from {low} to {high}: this UNet knows 0 to {limit - 1}")
        return levels.long()


def _numbers(name: str, value: int | Tensor, rows: int, device: torch.device) -> Tensor:
    """One number for all rows, as (1,), or one per row, as (R,)."""
    numbers = torch.as_tensor(value, device=device)
    if numbers.ndim == 0:
        numbers = numbers[None]
    if numbers.shape not in ((1,), (rows,)):
        raise InputError(f"{name} of shape {tuple(numbers.shape)}: give one number or {rows}, one per row")
    return numbers
