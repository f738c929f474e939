"""The IF UNet, stage I and II: a picture and its time, text and noise level in; noise and variance out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from .configs import UNetConfig
from .unet_blocks import (
    Block,
    JointAttention,
    MidBlock,
    Recorder,
    Span,
    TextContext,
    TextTimeEmbedding,
    TimestepEmbedding,
)


class UNet(nn.Module):
    """The UNet of IF's stages I and II for any config (WEIGHTS: the diffusers layout's names and maths).

    `unet(x, t, text)` predicts; `unet.prepare(text)` does once what is the same at every step;
    `unet.text_maps(...)` gives attention from pixels to text tokens, differentiable.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], config.time_width)
        if config.class_embed_type is not None:
            self.class_embedding = TimestepEmbedding(widths[0], config.time_width)
        self.encoder_hid_proj = nn.Linear(config.encoder_hid_dim, config.cross_attention_dim)
        self.add_embedding = TextTimeEmbedding(
            config.encoder_hid_dim, config.time_width, config.addition_embed_type_num_heads
        )

        skips = [widths[0]]  # widths of what the down path hands over, in order
        self.down_blocks = nn.ModuleList()
        for i, (width, kind) in enumerate(zip(widths, config.down_block_types, strict=True)):
            layers = config.layers_per_block[i]
            in_widths = [skips[-1]] + [width] * (layers - 1)
            resample = "down" if i < last else None
            attend = kind == "SimpleCrossAttnDownBlock2D"
            self.down_blocks.append(Block(in_widths, width, config, attend=attend, resample=resample))
            skips += [width] * (layers + (resample is not None))

        h = widths[-1]
        self.up_blocks = nn.ModuleList()
        for i, kind in enumerate(config.up_block_types):
            width = widths[last - i]
            in_widths = []
            for _ in range(config.layers_per_block[last - i] + 1):
                in_widths.append(h + skips.pop())
                h = width
            resample = "up" if i < last else None
            attend = kind == "SimpleCrossAttnUpBlock2D"
            self.up_blocks.append(Block(in_widths, width, config, attend=attend, resample=resample))
        self.mid_block = MidBlock(widths[-1], config)

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)
        for name, module in self.named_modules():
            if isinstance(module, JointAttention):
                module.name = name

    @property
    def dtype(self) -> torch.dtype:
        return self.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.conv_in.weight.device

    def prepare(self, text: Tensor) -> TextContext:
        """T5's states (R, L, encoder_hid_dim) -> what every step needs of them."""
        width = self.config.encoder_hid_dim
        if text.ndim != 3 or text.shape[-1] != width:
            raise InputError(
                f"text of shape {tuple(text.shape)}: expected (rows, tokens, {width}), the states of the text "
                "encoder that belongs to this UNet"
            )
        text = text.to(self.dtype)
        projected = self.encoder_hid_proj(text)  # (R, L, cross)
        keys, values = {}, {}
        for module in self.modules():
            if isinstance(module, JointAttention):
                keys[module.name], values[module.name] = module.prepare(projected)
        return TextContext(self.add_embedding(text), keys, values)

    def forward(
        self,
        x: Tensor,
        t: int | Tensor,
        text: Tensor | TextContext,
        class_labels: int | Tensor | None = None,
    ) -> Tensor:
        """Predict noise and variance.

        x (R, C, H, W), H and W multiples of `config.size_factor`; t the timestep 0..999, one for all rows or
        (R,); text (R, L, D) T5 states or `prepare`'s result; class_labels stage II's noise level 0..999, one
        or (R,). Returns (R, 6, H, W): 3 channels of noise, 3 of variance between its bounds (-1..1).
        """
        prediction, _ = self._run(x, t, text, class_labels, None, stop_early=False)
        return prediction

    def forward_with_maps(
        self,
        x: Tensor,
        t: int | Tensor,
        text: Tensor | TextContext,
        spans: Sequence[Span] | Span,
        class_labels: int | Tensor | None = None,
        *,
        resolution: int = 32,
        places: Sequence[str] = ("down", "up"),
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The prediction as `forward` gives it, and the maps as `text_maps` gives them, from one pass."""
        recorder = self._recorder(x, spans, resolution, places, text)
        return self._run(x, t, text, class_labels, recorder, stop_early=False)

    def text_maps(
        self,
        x: Tensor,
        t: int | Tensor,
        text: Tensor | TextContext,
        spans: Sequence[Span] | Span,
        class_labels: int | Tensor | None = None,
        *,
        resolution: int = 32,
        places: Sequence[str] = ("down", "up"),
    ) -> dict[str, Tensor]:
        """Attention from pixels to text tokens, by layer, differentiable; stops after the last layer needed.

        spans: half-open token ranges, one (start, stop) for all rows or one per row. resolution: the height
        of the layers asked for; places: "down", "mid", "up", or beginnings of paths such as "up_blocks.2".
        Returns {layer's path: (R, N, h, w, T)} with T the longest span's length; columns past a shorter
        span's end are 0. The values are columns of the joint softmax over text and pixel keys, so they do not
        sum to 1 over the tokens.
        """
        recorder = self._recorder(x, spans, resolution, places, text)
        return self._run(x, t, text, class_labels, recorder, stop_early=True)[1]

    def attention_layers(self, size: int) -> dict[str, int]:
        """Path of every attention layer -> its resolution for a picture of this size, in order of use."""
        layers: dict[str, int] = {}
        last = len(self.down_blocks) - 1
        for path, blocks in (("down", self.down_blocks), ("mid", [self.mid_block]), ("up", self.up_blocks)):
            for i, block in enumerate(blocks):
                halvings = {"down": i, "mid": last, "up": last - i}[path]
                for module in block.modules():
                    if isinstance(module, JointAttention):
                        layers[module.name] = size >> halvings
        return layers

    def _recorder(
        self,
        x: Tensor,
        spans: Sequence[Span] | Span,
        resolution: int,
        places: Sequence[str],
        text: Tensor | TextContext,
    ) -> Recorder:
        rows = x.shape[0]
        tokens = text.length if isinstance(text, TextContext) else text.shape[1]
        if len(spans) == 2 and all(isinstance(end, int) for end in spans):
            spans = [spans] * rows  # type: ignore[list-item]
        if len(spans) != rows:
            raise InputError(f"{len(spans)} token ranges for {rows} rows: give one for all or one per row")
        for span in spans:
            if not (isinstance(span, tuple | list) and len(span) == 2 and 0 <= span[0] < span[1] <= tokens):
                raise InputError(f"token range {span!r}: expected 0 <= start < stop <= {tokens} tokens")
        layers = self.attention_layers(x.shape[-2])
        if isinstance(places, str):
            raise InputError(f"places={places!r} must be a list such as ['down', 'up']")
        for place in places:
            if not place or not any(name.startswith(place) for name in layers):
                raise InputError(
                    f"place {place!r} begins no attention layer's path; use 'down', 'mid', 'up', or paths such as "
                    f"{next(reversed(layers))!r}"
                )
        wanted = {
            name
            for name, side in layers.items()
            if side == resolution and any(name.startswith(place) for place in places)
        }
        if not wanted:
            have = sorted({side for name, side in layers.items() if name.startswith(tuple(places))})
            raise InputError(
                f"no attention layer of {'/'.join(places)} has resolution {resolution} for a picture of side "
                f"{x.shape[-2]}; ask for one of {have}"
            )
        return Recorder(wanted, spans, x.device)  # type: ignore[arg-type]

    def _embed(
        self, rows: int, t: int | Tensor, context: TextContext, class_labels: int | Tensor | None
    ) -> Tensor:
        """Time, noise level and pooled text as one activated embedding (R, time width)."""
        config = self.config
        emb = self.time_embedding(_numbers("t", t, rows, self.device))
        if config.class_embed_type is not None:
            if class_labels is None:
                raise InputError("this UNet is a stage II: give class_labels, the noise level (0 to 999)")
            emb = emb + self.class_embedding(_numbers("class_labels", class_labels, rows, self.device))
        elif class_labels is not None:
            raise InputError("this UNet is a stage I, it has no noise level: leave class_labels out")
        emb = emb + context.pooled  # (R, time width)
        if config.time_embedding_act_fn is not None:
            emb = F.gelu(emb)
        # Every resnet of a stage I activates the same embedding; once is enough.
        return emb if config.resnet_skip_time_act else F.gelu(emb)

    def _run(
        self,
        x: Tensor,
        t: int | Tensor,
        text: Tensor | TextContext,
        class_labels: int | Tensor | None,
        recorder: Recorder | None,
        *,
        stop_early: bool,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        config, factor = self.config, self.config.size_factor
        if x.ndim != 4 or x.shape[1] != config.in_channels:
            raise InputError(f"x of shape {tuple(x.shape)}: expected (rows, {config.in_channels}, H, W)")
        if not all(side >= factor and side % factor == 0 for side in x.shape[-2:]):
            raise InputError(
                f"x of {x.shape[-2]} by {x.shape[-1]} px: this UNet of {len(config.block_out_channels)} levels "
                f"needs sides that are multiples of {factor}"
            )
        context = text if isinstance(text, TextContext) else self.prepare(text)
        if len(context) != x.shape[0]:
            raise InputError(f"{len(context)} rows of text for {x.shape[0]} pictures: give one per picture")
        maps = {} if recorder is None else recorder.maps
        emb = self._embed(x.shape[0], t, context, class_labels)

        x = x.to(self.dtype)
        graph = torch.is_grad_enabled() and (x.requires_grad or self.conv_in.weight.requires_grad)
        if x.device.type == "cpu" and not graph:
            # Convolutions on a CPU are faster where a pixel's channels lie together, and hand that layout on; so
            # the weights can lie as they are. Gradients are not: 2 to 16% more time a step of training.
            x = x.contiguous(memory_format=torch.channels_last)
        h = self.conv_in(x)
        skips = [h]
        for block in cast("Iterable[Block]", self.down_blocks):
            for resnet, attend in block.layers():
                h = resnet(h, emb)
                h = h if attend is None else attend(h, context, recorder)
                skips.append(h)
                if stop_early and recorder is not None and recorder.complete:
                    return h, maps
            if block.resampler is not None:
                h = block.resampler(h, emb)
                skips.append(h)

        h = self.mid_block.resnets[0](h, emb)
        h = self.mid_block.attentions[0](h, context, recorder)
        if stop_early and recorder is not None and recorder.complete:
            return h, maps
        h = self.mid_block.resnets[1](h, emb)

        for block in cast("Iterable[Block]", self.up_blocks):
            for resnet, attend in block.layers():
                h = resnet(torch.cat([h, skips.pop()], dim=1), emb)
                h = h if attend is None else attend(h, context, recorder)
                if stop_early and recorder is not None and recorder.complete:
                    return h, maps
            if block.resampler is not None:
                h = block.resampler(h, emb)
        return self.conv_out(F.gelu(self.conv_norm_out(h))), maps


def _numbers(name: str, value: int | Tensor, rows: int, device: torch.device) -> Tensor:
    """One number for all rows, as (1,), or one per row, as (R,)."""
    numbers = torch.as_tensor(value, device=device)
    if numbers.ndim == 0:
        numbers = numbers[None]
    if numbers.shape not in ((1,), (rows,)):
        raise InputError(f"{name} of shape {tuple(numbers.shape)}: give one number or {rows}, one per row")
    return numbers
