"""The IF UNet, stage I and II: a picture and its time, text and noise level in; noise and variance out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..errors import InputError
from .attention import attention, attention_with_columns, sinusoids
from .configs import CROSS_NORM_GROUPS, UNetConfig

Span = tuple[int, int]


@dataclass(frozen=True)
class TextContext:
    """What a UNet makes of a text once and for all steps: `UNet.prepare`'s result, R rows.

    pooled (R, time width): the text's part of the time embedding. keys, values: by attention layer,
    (R, N, L, d). `context[a:b]` are some of the rows.
    """

    pooled: Tensor
    keys: dict[str, Tensor]
    values: dict[str, Tensor]

    def __len__(self) -> int:
        return self.pooled.shape[0]

    def __getitem__(self, rows: slice) -> TextContext:
        return TextContext(
            self.pooled[rows],
            {name: k[rows] for name, k in self.keys.items()},
            {name: v[rows] for name, v in self.values.items()},
        )

    @property
    def length(self) -> int:
        """L, the number of text tokens."""
        return next(iter(self.keys.values())).shape[2]


class _Recorder:
    """Collects the asked columns of the wanted layers' softmax during one forward pass."""

    def __init__(self, wanted: set[str], spans: Sequence[Span], device: torch.device) -> None:
        self.wanted = wanted
        self.maps: dict[str, Tensor] = {}
        longest = max(stop - start for start, stop in spans)
        offsets = torch.arange(longest, device=device)
        starts = torch.tensor([start for start, _ in spans], device=device)
        stops = torch.tensor([stop for _, stop in spans], device=device)
        self.keep = (starts[:, None] + offsets < stops[:, None]).float()  # (R, T)
        self.columns = torch.minimum(starts[:, None] + offsets, stops[:, None] - 1)  # (R, T)

    @property
    def complete(self) -> bool:
        return len(self.maps) == len(self.wanted)


class TimestepEmbedding(nn.Module):
    """Two layers on the sinusoidal code of a time or a noise level, exact GELU between."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_width, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, positions: Tensor) -> Tensor:
        """(R,) numbers -> (R, width)."""
        code = sinusoids(positions, self.linear_1.in_features).to(self.linear_1.weight.dtype)
        return self.linear_2(F.gelu(self.linear_1(code)))


class AttentionPooling(nn.Module):
    """One vector of a text: its mean attends over itself and the tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(1, width) / width**0.5)
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.heads = heads

    def forward(self, text: Tensor) -> Tensor:
        """(R, L, D) -> (R, D)."""
        mean = text.mean(dim=1, keepdim=True) + self.positional_embedding.to(text.dtype)  # (R, 1, D)
        tokens = torch.cat([mean, text], dim=1)  # (R, 1 + L, D)
        q, k, v = (
            rearrange(part, "r l (n d) -> r n l d", n=self.heads)
            for part in (self.q_proj(mean), self.k_proj(tokens), self.v_proj(tokens))
        )
        return rearrange(attention(q, k, v), "r n 1 d -> r (n d)")


class TextTimeEmbedding(nn.Module):
    """The raw text states as one addition to the time embedding."""

    def __init__(self, text_width: int, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(text_width)
        self.pool = AttentionPooling(text_width, heads)
        self.proj = nn.Linear(text_width, width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, text: Tensor) -> Tensor:
        """(R, L, D) -> (R, width)."""
        return self.norm2(self.proj(self.pool(self.norm1(text))))


class Resnet(nn.Module):
    """Two convolutions with time's scale and shift between; resampling, where asked, happens inside."""

    def __init__(
        self, in_width: int, width: int, config: UNetConfig, *, out_scale: float, resample: str | None = None
    ) -> None:
        super().__init__()
        groups, eps = config.norm_num_groups, config.norm_eps
        self.norm1 = nn.GroupNorm(groups, in_width, eps=eps)
        self.conv1 = nn.Conv2d(in_width, width, 3, padding=1)
        self.time_emb_proj = nn.Linear(config.time_width, 2 * width)
        self.norm2 = nn.GroupNorm(groups, width, eps=eps)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        if in_width != width:
            self.conv_shortcut = nn.Conv2d(in_width, width, 1)
        self.has_shortcut = in_width != width
        self.out_scale = out_scale
        self.resample = resample

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x (R, C, H, W), emb (R, time width), activated -> (R, C', H', W')."""
        h = F.gelu(self.norm1(x))
        if self.resample == "down":
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        elif self.resample == "up":
            h, x = F.interpolate(h, scale_factor=2.0), F.interpolate(x, scale_factor=2.0)
        h = self.conv1(h)
        scale, shift = self.time_emb_proj(emb)[:, :, None, None].chunk(2, dim=1)  # each (R, C', 1, 1)
        h = self.conv2(F.gelu(self.norm2(h) * (1 + scale) + shift))
        if self.has_shortcut:
            x = self.conv_shortcut(x)
        h = x + h
        return h if self.out_scale == 1 else h / self.out_scale


class JointAttention(nn.Module):
    """Pixels attend to the text's tokens and to all pixels in one softmax; the text's keys come first."""

    def __init__(self, width: int, config: UNetConfig) -> None:
        super().__init__()
        cross = config.cross_attention_dim
        self.group_norm = nn.GroupNorm(config.norm_num_groups, width)
        self.norm_cross = nn.GroupNorm(CROSS_NORM_GROUPS, cross)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.add_k_proj = nn.Linear(cross, width)
        self.add_v_proj = nn.Linear(cross, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.heads = width // config.attention_head_dim
        self.name = ""  # set by the UNet: the module's own path

    def _split(self, states: Tensor) -> Tensor:
        return rearrange(states, "r l (n d) -> r n l d", n=self.heads)

    def prepare(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Projected text (R, L, cross) -> keys and values (R, N, L, d).

        The norm's statistics run over a group's channels and all L tokens, padding included, as published.
        """
        text = self.norm_cross(text.transpose(1, 2)).transpose(1, 2)
        return self._split(self.add_k_proj(text)), self._split(self.add_v_proj(text))

    def forward(self, x: Tensor, context: TextContext, recorder: _Recorder | None) -> Tensor:
        """x (R, C, H, W) -> (R, C, H, W)."""
        height, width = x.shape[-2:]
        pixels = rearrange(self.group_norm(x), "r c h w -> r (h w) c")
        q = self._split(self.to_q(pixels))
        k = torch.cat([context.keys[self.name], self._split(self.to_k(pixels))], dim=2)
        v = torch.cat([context.values[self.name], self._split(self.to_v(pixels))], dim=2)
        if recorder is not None and self.name in recorder.wanted:
            out, chosen = attention_with_columns(q, k, v, recorder.columns, recorder.keep)
            recorder.maps[self.name] = rearrange(chosen, "r n (h w) t -> r n h w t", h=height)
        else:
            out = attention(q, k, v)
        out = self.to_out[0](rearrange(out, "r n l d -> r l (n d)"))
        return x + rearrange(out, "r (h w) c -> r c h w", h=height, w=width)


class Block(nn.Module):
    """One level of the down or up path: resnets, each followed by attention where the level has it.

    The resampling resnet, if any, is `downsamplers.0` or `upsamplers.0`. The up path hands every resnet the
    skip of its level.
    """

    def __init__(
        self, in_widths: Sequence[int], width: int, config: UNetConfig, *, attend: bool, resample: str | None
    ) -> None:
        super().__init__()
        out_scale = config.resnet_out_scale_factor
        if attend:
            self.attentions = nn.ModuleList([JointAttention(width, config) for _ in in_widths])
        self.resnets = nn.ModuleList([Resnet(w, width, config, out_scale=out_scale) for w in in_widths])
        if resample is not None:
            resampler = Resnet(width, width, config, out_scale=out_scale, resample=resample)
            setattr(self, f"{resample}samplers", nn.ModuleList([resampler]))
        self.attend = attend
        self.resample = resample

    def layers(self) -> Iterator[tuple[nn.Module, nn.Module | None]]:
        """The level's resnets, each with its attention or None."""
        attentions = self.attentions if self.attend else [None] * len(self.resnets)
        yield from zip(self.resnets, attentions, strict=True)

    @property
    def resampler(self) -> nn.Module | None:
        return None if self.resample is None else getattr(self, f"{self.resample}samplers")[0]


class MidBlock(nn.Module):
    """The coarsest level between the two paths: resnet, attention, resnet."""

    def __init__(self, width: int, config: UNetConfig) -> None:
        super().__init__()
        scale = config.mid_block_scale_factor
        self.attentions = nn.ModuleList([JointAttention(width, config)])
        self.resnets = nn.ModuleList([Resnet(width, width, config, out_scale=scale) for _ in range(2)])


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
    ) -> _Recorder:
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
        return _Recorder(wanted, spans, x.device)  # type: ignore[arg-type]

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
        recorder: _Recorder | None,
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

        h = self.conv_in(x.to(self.dtype))
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
