"""The IF UNet, stage I and II: a picture and its time, text and noise level in; noise and variance out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from . import unet_blocks as parts
from .attention import columns_by
from .configs import UNetConfig
from .rows import Apart, each
from .unet_blocks import JointAttention, Number, Recorder, Resnet, Span, TextContext

BLOCK_VALUES = 1 << 19  # of a block of rows' first map: 2 MB in float32
WEIGHTS_PER_VALUE = 100  # of a large network, whose blocks may have more values


class UNet(parts.UNetBase):
    """The UNet of IF's stages I and II for any config, under the published names (the diffusers layout).

    `unet(x, t, text)` predicts; `unet.prepare(text)` does once what is the same at every step;
    `unet.text_maps(...)` gives attention from pixels to text tokens, differentiable; `unet.token_maps = "triton"`
    computes them by a Triton kernel (CUDA; without a GPU tested by Triton's interpreter alone), not by torch's.
    `unet.side_by_side = True`, as a Cascade has it for small ones: on a CPU torch's threads share out the rows
    (`models.rows`), out of sight of the calling thread's tracers and modes.
    """

    config: UNetConfig
    token_maps = "fused"
    side_by_side = False

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        widths, time, text = config.block_out_channels, config.time_width, config.encoder_hid_dim
        self.time_embedding = parts.TimestepEmbedding(widths[0], time)
        if config.class_embed_type is not None:
            self.class_embedding = parts.TimestepEmbedding(widths[0], time)
        self.encoder_hid_proj = nn.Linear(text, config.cross_attention_dim)
        self.add_embedding = parts.TextTimeEmbedding(text, time, config.addition_embed_type_num_heads)

        def level(inner: list[int], i: int, kind: str, resample: str | None) -> parts.Block:
            middle = kind == parts.MIDDLE
            scale = config.mid_block_scale_factor if middle else config.resnet_out_scale_factor
            resnet = partial(Resnet, width=widths[i], config=config, out_scale=scale)
            attend = partial(JointAttention, widths[i], config)
            resampler = partial(resnet, widths[i], resample=resample)
            return parts.Block(inner, kind, resample, resnet=resnet, attend=attend, resampler=resampler)

        self.add_levels(config.layers_per_block, level)
        self.parameter_count = sum(parameter.numel() for parameter in self.parameters())

    @property
    def reads_text(self) -> bool:
        """Whether predictions depend on the text; not where its entries are all zero, as in the embedded stage II."""
        return bool(self.encoder_hid_proj.weight.any() or self.add_embedding.norm2.weight.any())

    def prepare(self, text: Tensor) -> TextContext:
        """T5's states (R, L, encoder_hid_dim) -> what every step needs of them."""
        width = self.config.encoder_hid_dim
        if text.ndim != 3 or text.shape[-1] != width:
            wanted = f"(rows, tokens, {width}), the states of the text encoder that belongs to this UNet"
            raise InputError(f"text of shape {tuple(text.shape)}: expected {wanted}")
        text = text.to(self.dtype)
        projected = self.encoder_hid_proj(text)  # (R, L, cross)
        keys, values = {}, {}
        for module in self.modules():
            if isinstance(module, JointAttention):
                keys[module.name], values[module.name] = module.prepare(projected)
        return TextContext(self.add_embedding(text), keys, values)

    def forward(
        self, x: Tensor, t: Number, text: Tensor | TextContext, class_labels: Number | None = None
    ) -> Tensor:
        """Predict noise and variance.

        x (R, C, H, W), H and W multiples of `config.size_factor`; t the timestep 0..999, one for all rows or
        (R,), an int or a tensor of them (a compiled network makes a new graph for every int); text (R, L, D) T5 states
        or `prepare`'s result; class_labels stage II's noise level 0..999, as t. Returns (R, 6, H, W): 3 channels of
        noise, 3 of variance between its bounds (-1..1).
        """
        context = text if isinstance(text, TextContext) else self.prepare(text)
        x, emb = self._inputs(x, t, context, class_labels)
        blocks = None if self._records(x, context) else self._blocks(x)
        if blocks is None:
            return self._predict(x, emb, context)
        return torch.cat(each(lambda r: self._predict(x[r], emb[r], context[r]), blocks, self.side_by_side))

    def text_maps(
        self,
        x: Tensor,
        t: Number,
        text: Tensor | TextContext,
        spans: Tensor | Sequence[Span] | Span,
        class_labels: Number | None = None,
        *,
        resolution: int = 32,
        places: Sequence[str] = ("down", "up"),
    ) -> dict[str, Tensor]:
        """Attention from pixels to text tokens, by layer, differentiable; stops after the last layer needed.

        spans: half-open token ranges, one (start, stop) for all rows or one per row, or `TextContext.columns`' result
        for them. resolution: the height of the layers asked for; places: "down", "mid", "up", or beginnings of paths
        such as "up_blocks.2". Returns {layer's path: (R, N, h, w, T)} with T the longest span's length; columns past a
        shorter span's end are 0. The values are columns of the joint softmax over text and pixel keys.
        """
        context = text if isinstance(text, TextContext) else self.prepare(text)
        columns = spans if isinstance(spans, Tensor) else context.columns(spans)
        layers = self.attention_layers(x.shape[-2])
        inside = [tuple(name for name in layers if place and name.startswith(place)) for place in places]
        wanted = {name for names in inside for name in names if layers[name] == resolution}
        if isinstance(places, str) or not all(inside) or not wanted:
            said = f"a picture of side {x.shape[-2]} has no such layers; ask for one of {sorted({*layers.values()})}"
            remedy = f"and for a list of 'down', 'mid', 'up', or paths such as {max(layers)!r}"
            raise InputError(f"resolution={resolution}, places={places!r}: {said}, {remedy}")
        x, emb = self._inputs(x, t, context, class_labels)
        attend = columns_by(self.token_maps, x.device)

        def maps(x: Tensor, rows: slice) -> Sequence[Tensor]:
            recorder = Recorder(wanted, columns[rows], attend)
            self.walk(x, emb[rows], context[rows], recorder)
            return [recorder.maps[name] for name in named]

        named = [name for name in layers if name in wanted]
        apart = self.side_by_side and not any(y.requires_grad for y in (*self.parameters(), emb))
        blocks = self._blocks(x) if apart else None
        found = maps(x, slice(None)) if blocks is None else Apart.apply(x, maps, blocks)
        return dict(zip(named, found, strict=True))

    def attention_layers(self, size: int) -> dict[str, int]:
        """Path of every attention layer -> its resolution for a picture of this size, in order of use."""
        layers, level = {}, 0
        for _, resnet, attend in self.steps():
            level += {"down": 1, "up": -1, None: 0}[cast(Resnet, resnet).resample]
            if attend is not None:
                layers[cast(JointAttention, attend).name] = size >> level
        return layers

    def _predict(self, x: Tensor, emb: Tensor, context: TextContext) -> Tensor:
        return self.conv_out(F.gelu(self.conv_norm_out(self.walk(x, emb, context))))

    def _blocks(self, x: Tensor) -> list[slice] | None:
        """Which rows go through together, None = all.

        On a CPU maps should stay in its cache. But each block reads all weights, so a large network's may be larger.
        """
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return None
        rows, values = len(x), self.config.block_out_channels[0] * x.shape[-2] * x.shape[-1]
        most = max(1, max(BLOCK_VALUES, self.parameter_count // WEIGHTS_PER_VALUE) // values)
        count = max(-(-rows // most), min(rows, torch.get_num_threads()) if self.side_by_side else 1)
        size = -(-rows // count)
        return [slice(start, start + size) for start in range(0, rows, size)]

    def _records(self, x: Tensor, context: TextContext) -> bool:
        """Whether a graph is recorded for gradients."""
        given = x.requires_grad or context.pooled.requires_grad
        return torch.is_grad_enabled() and (given or any(p.requires_grad for p in self.parameters()))

    def _inputs(
        self, x: Tensor, t: Number, context: TextContext, class_labels: Number | None
    ) -> tuple[Tensor, Tensor]:
        """A call's picture, as the network takes it; time, level and pooled text as one activated embedding."""
        config, x = self.config, self.picture(x)
        rows = context.pooled.shape[0]  # not len(), which would fix the number in a graph
        if rows != x.shape[0]:
            raise InputError(f"{rows} rows of text for {x.shape[0]} pictures: give one per picture")
        if (class_labels is None) != (config.class_embed_type is None):
            raise InputError("class_labels: a stage II needs its noise level (0 to 999), a stage I has none")
        emb = self.time_embedding(self.numbers("t", t, rows))
        if class_labels is not None:
            emb = emb + self.class_embedding(self.numbers("class_labels", class_labels, rows))
        emb = emb + context.pooled  # (R, time width)
        if config.time_embedding_act_fn is not None:
            emb = F.gelu(emb)
        # Every resnet of a stage I activates the same embedding; once is enough.
        emb = emb if config.resnet_skip_time_act else F.gelu(emb)
        if x.device.type == "cpu" and not self._records(x, context):
            # Convolutions on a CPU are faster where a pixel's channels lie together, and hand that layout on; so
            # the weights can lie as they are. Gradients are not: 2 to 16% more time a step of training.
            x = x.contiguous(memory_format=torch.channels_last)
        return x, emb
