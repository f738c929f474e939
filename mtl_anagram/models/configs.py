"""The config of an IF UNet: every field of the published config.json, checked and frozen."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..errors import ConfigError

# Fields of which one value is implemented: the one that all released IF UNets have. A config that omits
# such a field (older files do) means that value.
FIXED: dict[str, Any] = {
    "act_fn": "gelu",
    "addition_embed_type": "text",
    "addition_time_embed_dim": None,
    "attention_type": "default",
    "center_input_sample": False,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": "group_norm",
    "downsample_padding": 1,
    "dropout": 0.0,
    "dual_cross_attention": False,
    "encoder_hid_dim_type": "text_proj",
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_only_cross_attention": None,
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "projection_class_embeddings_input_dim": None,
    "resnet_time_scale_shift": "scale_shift",
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": 1,
    "upcast_attention": False,
    "use_linear_projection": False,
}
# A null in the file means the same as the fixed value here: diffusers resolves these two that way.
NULL_IS_FIXED = {"encoder_hid_dim_type", "mid_block_only_cross_attention"}

DOWN_TYPES = ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D")
UP_TYPES = ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D")
CROSS_NORM_GROUPS = 32  # of the text's group norm; the published class has no field for it


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of an IF UNet, by the names of the published config.json.

    Fields without a default must be in the file; the defaults are stage I's, which is what a file that
    omits the field means. `attention_head_dim` is the size of one head (the number of heads of a layer is
    its width over it); `norm_num_groups` divides every width, and 32 divides `cross_attention_dim`.
    """

    block_out_channels: tuple[int, ...]
    layers_per_block: tuple[int, ...]
    cross_attention_dim: int
    encoder_hid_dim: int
    down_block_types: tuple[str, ...]
    up_block_types: tuple[str, ...]
    in_channels: int
    out_channels: int = 6
    attention_head_dim: int = 64
    addition_embed_type_num_heads: int = 64
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    sample_size: int | None = 64
    class_embed_type: str | None = None
    time_embedding_dim: int | None = None
    time_embedding_act_fn: str | None = None
    resnet_skip_time_act: bool = False
    resnet_out_scale_factor: float = 1.0
    mid_block_scale_factor: float = 1.0

    def __post_init__(self) -> None:
        depth = len(self.block_out_channels)
        if depth < 1:
            raise ConfigError("block_out_channels=[] is empty: give one width per block")
        for name in ("layers_per_block", "down_block_types", "up_block_types"):
            if len(getattr(self, name)) != depth:
                raise ConfigError(
                    f"{name}={list(getattr(self, name))!r} has {len(getattr(self, name))} entries, "
                    f"but block_out_channels has {depth}: give one per block"
                )
        for name, allowed in (("down_block_types", DOWN_TYPES), ("up_block_types", UP_TYPES)):
            for kind in getattr(self, name):
                if kind not in allowed:
                    raise ConfigError(f"{name} holds {kind!r}; implemented are {', '.join(allowed)}")
        for name in ("class_embed_type", "time_embedding_act_fn"):
            allowed_value = {"class_embed_type": "timestep", "time_embedding_act_fn": "gelu"}[name]
            if getattr(self, name) not in (None, allowed_value):
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} is not implemented; use null or {allowed_value!r}"
                )
        for width in self.block_out_channels:
            _divides("norm_num_groups", self.norm_num_groups, "a width of block_out_channels", width)
        if self.block_out_channels[0] % 2:
            raise ConfigError(
                f"block_out_channels[0]={self.block_out_channels[0]} is odd; the time embedding's sines and "
                "cosines need an even width"
            )
        for width in self.attention_widths:
            _divides("attention_head_dim", self.attention_head_dim, "an attention layer's width", width)
        _divides("the text norm's groups", CROSS_NORM_GROUPS, "cross_attention_dim", self.cross_attention_dim)
        _divides(
            "addition_embed_type_num_heads",
            self.addition_embed_type_num_heads,
            "encoder_hid_dim",
            self.encoder_hid_dim,
        )

    @property
    def attention_widths(self) -> tuple[int, ...]:
        """Widths of the blocks with attention; the middle block has the last width."""
        down = [w for w, kind in zip(self.block_out_channels, self.down_block_types, strict=True)
                if kind == "SimpleCrossAttnDownBlock2D"]  # fmt: skip
        up = [w for w, kind in zip(reversed(self.block_out_channels), self.up_block_types, strict=True)
              if kind == "SimpleCrossAttnUpBlock2D"]  # fmt: skip
        return (*down, self.block_out_channels[-1], *up)

    @property
    def time_width(self) -> int:
        """Width of the time embedding: 4 times the first block's unless the config says otherwise."""
        return 4 * self.block_out_channels[0] if self.time_embedding_dim is None else self.time_embedding_dim

    @property
    def size_factor(self) -> int:
        """The picture's side must be a multiple of this: one halving per block but the last."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> UNetConfig:
        """Read a config.json's content. Raises ConfigError for a field or a value that is not implemented."""
        if not isinstance(config, Mapping):
            raise ConfigError(f"a UNet's config is a JSON object, not {type(config).__name__}")
        known = {field.name for field in fields(cls)}
        values: dict[str, Any] = {}
        for name, value in config.items():
            if name == "_class_name" and value != "UNet2DConditionModel":
                raise ConfigError(
                    f"_class_name={value!r}: this is no IF UNet (UNet2DConditionModel); give the folder of one"
                )
            if not isinstance(name, str) or name.startswith("_"):
                continue  # notes of the program that wrote the file
            if name in FIXED:
                if value is None and name in NULL_IS_FIXED:
                    continue
                if value != FIXED[name] or isinstance(value, bool) != isinstance(FIXED[name], bool):
                    raise ConfigError(
                        f"{name}={value!r} is not implemented; the IF UNets have {FIXED[name]!r}"
                    )
            elif name in known:
                values[name] = value
            else:
                close = difflib.get_close_matches(name, [*known, *FIXED], n=1)
                hint = f" (did you mean {close[0]!r}?)" if close else ""
                raise ConfigError(
                    f"unknown config field {name!r} = {value!r}{hint}: nothing here implements it, so it is "
                    "refused rather than ignored"
                )
        missing = sorted(f.name for f in fields(cls) if f.name not in values and f.name in _REQUIRED)
        if missing:
            raise ConfigError(f"the config lacks {', '.join(missing)}: a UNet cannot be built without")
        return cls(**_typed(values))

    def to_dict(self) -> dict[str, Any]:
        """The content of a config.json in the published layout, all fields spelled."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        own = {name: list(value) if isinstance(value, tuple) else value for name, value in own.items()}
        return {"_class_name": "UNet2DConditionModel", **dict(sorted({**FIXED, **own}.items()))}


_REQUIRED = {
    "block_out_channels", "layers_per_block", "cross_attention_dim", "encoder_hid_dim", "down_block_types",
    "up_block_types", "in_channels",
}  # fmt: skip
_OPTIONAL_INTS = {"sample_size", "time_embedding_dim"}
_INTS = {
    "cross_attention_dim", "encoder_hid_dim", "in_channels", "out_channels", "attention_head_dim",
    "addition_embed_type_num_heads", "norm_num_groups", *_OPTIONAL_INTS,
}  # fmt: skip
_FLOATS = {"norm_eps", "resnet_out_scale_factor", "mid_block_scale_factor"}
_MAX_SIZE = 1 << 20  # no width, count or side comes near; a larger number is a damaged file
_MAX_LAYERS = 64  # per block, likewise; a million would take hours before a tensor is looked at


def _divides(divisor_name: str, divisor: int, name: str, value: int) -> None:
    if value % divisor:
        raise ConfigError(
            f"{divisor_name}={divisor} does not divide {name} ({value}): change one of the two in the config"
        )


def _size(name: str, value: Any, limit: int = _MAX_SIZE) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
        raise ConfigError(f"{name}={value!r} must be a whole number from 1 to {limit}")
    return value


def _typed(values: dict[str, Any]) -> dict[str, Any]:
    """Check the types of a config's values; lists become tuples, one layers_per_block one per block."""
    typed = dict(values)
    for name, value in values.items():
        if name in _INTS:
            if not (value is None and name in _OPTIONAL_INTS):
                typed[name] = _size(name, value)
        elif name in _FLOATS:
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ConfigError(f"{name}={value!r} must be a number above 0")
            if not 0 < value <= sys.float_info.max:  # JSON's whole numbers have no end
                raise ConfigError(f"{name}={value!r} must be finite and above 0")
            typed[name] = float(value)
        elif name == "resnet_skip_time_act":
            if not isinstance(value, bool):
                raise ConfigError(f"{name}={value!r} must be true or false")
        elif name in ("block_out_channels", "down_block_types", "up_block_types"):
            if not isinstance(value, (list, tuple)):
                raise ConfigError(f"{name}={value!r} must be a list with one entry per block")
            if not 1 <= len(value) <= 16:
                raise ConfigError(f"{name}={value!r} has {len(value)} entries; 1 to 16 blocks are possible")
            if name == "block_out_channels":
                typed[name] = tuple(_size(f"{name}[{i}]", item) for i, item in enumerate(value))
            else:
                typed[name] = tuple(value)
    layers = values["layers_per_block"]
    if isinstance(layers, (list, tuple)):
        typed["layers_per_block"] = tuple(
            _size(f"layers_per_block[{i}]", item, _MAX_LAYERS) for i, item in enumerate(layers)
        )
    else:
        layers = _size("layers_per_block", layers, _MAX_LAYERS)
        typed["layers_per_block"] = (layers,) * len(typed["block_out_channels"])
    return typed
