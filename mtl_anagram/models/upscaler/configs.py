"""The configs of stage III's networks: the fields of the published config.json files, checked and frozen."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Collection, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from ...errors import ConfigError
from ..t5_config import IGNORED as TRANSFORMERS_NOTES

# Fields of which one value is implemented: the released upscaler's. A file that omits one means that value.
UNET_FIXED: dict[str, Any] = {
    "act_fn": "silu",
    "addition_embed_type": None,
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": None,
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dropout": 0.0,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "projection_class_embeddings_input_dim": None,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": 1,
    "upcast_attention": False,
    "use_linear_projection": True,
}
DOWN_TYPES = ("DownBlock2D", "CrossAttnDownBlock2D")
UP_TYPES = ("UpBlock2D", "CrossAttnUpBlock2D")

VAE_FIXED: dict[str, Any] = {
    "act_fn": "silu",
    "latents_mean": None,
    "latents_std": None,
    "mid_block_add_attention": True,
    "shift_factor": None,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}

TEXT_FIXED: dict[str, Any] = {"hidden_act": "gelu", "model_type": "clip_text_model"}
# Training, and a projection that this model does not have.
TEXT_IGNORED = TRANSFORMERS_NOTES | {"attention_dropout", "dropout", "initializer_range", "projection_dim"}

_MAX_SIZE = 1 << 20  # no width, count or side comes near; a larger number is a damaged file
_MAX_LAYERS = 1024


@dataclass(frozen=True)
class UpscalerUNetConfig:
    """Sizes of the latent UNet of stage III, by the names of the published config.json.

    attention_head_dim: the NUMBER of heads of every attention layer, as in all Stable Diffusion configs.
    only_cross_attention: per level, whether its first attention too looks at the text alone; the middle block
    looks at its own pixels whatever this says. num_class_embeds: how many noise levels it knows. in_channels:
    the latents', then the low-resolution picture's.
    """

    block_out_channels: tuple[int, ...]
    down_block_types: tuple[str, ...]
    up_block_types: tuple[str, ...]
    cross_attention_dim: int
    in_channels: int = 7
    out_channels: int = 4
    layers_per_block: int = 2
    attention_head_dim: int = 8
    only_cross_attention: tuple[bool, ...] | bool = False
    num_class_embeds: int = 1000
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    sample_size: int | None = None

    def __post_init__(self) -> None:
        widths = _sizes("block_out_channels", self.block_out_channels)
        object.__setattr__(self, "block_out_channels", widths)
        for name, allowed in (("down_block_types", DOWN_TYPES), ("up_block_types", UP_TYPES)):
            kinds = getattr(self, name)
            if not isinstance(kinds, (list, tuple)) or len(kinds) != len(widths):
                raise ConfigError(f"{name}={kinds!r} must be a list of {len(widths)}, one entry per block")
            for kind in kinds:
                if kind not in allowed:
                    raise ConfigError(f"{name} holds {kind!r}; implemented are {', '.join(allowed)}")
            object.__setattr__(self, name, tuple(kinds))
        only: Any = self.only_cross_attention
        only = [only] * len(widths) if isinstance(only, bool) else only
        if not isinstance(only, (list, tuple)) or len(only) != len(widths) or set(map(type, only)) != {bool}:
            raise ConfigError(f"only_cross_attention={only!r} must be true, false, or one of them per block")
        if isinstance(self.only_cross_attention, bool) and self.only_cross_attention:
            # There the published class takes the one value for the middle block as well.
            raise ConfigError(
                "only_cross_attention=true is not implemented; give a list, one entry per block"
            )
        object.__setattr__(self, "only_cross_attention", tuple(only))
        for name in ("cross_attention_dim", "in_channels", "out_channels", "num_class_embeds"):
            _size(name, getattr(self, name))
        _size("layers_per_block", self.layers_per_block, _MAX_LAYERS)
        if self.sample_size is not None:
            _size("sample_size", self.sample_size)
        _positive("norm_eps", self.norm_eps)
        for width in widths:
            _divides("norm_num_groups", self.norm_num_groups, "a width of block_out_channels", width)
            _divides("attention_head_dim", self.attention_head_dim, "a width of block_out_channels", width)
        if widths[0] % 2:
            raise ConfigError(f"block_out_channels[0]={widths[0]} is odd; the time embedding needs it even")
        if self.in_channels <= self.out_channels:
            raise ConfigError(
                f"in_channels={self.in_channels} must be above out_channels={self.out_channels}: the input is "
                "the latents and the low-resolution picture"
            )

    @property
    def time_width(self) -> int:
        """Width of the time embedding."""
        return 4 * self.block_out_channels[0]

    @property
    def size_factor(self) -> int:
        """The latents' side must be a multiple of this: one halving per block but the last."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> UpscalerUNetConfig:
        """Read a config.json's content. Raises ConfigError for a field or a value that is not implemented."""
        return cls(**read_fields(cls, config, UNET_FIXED, (), "UNet2DConditionModel"))

    def to_dict(self) -> dict[str, Any]:
        """The content of a config.json in the published layout, all fields spelled."""
        return _spelled(self, UNET_FIXED, "UNet2DConditionModel")


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of the autoencoder, by the names of the published config.json.

    scaling_factor: latents are multiplied by it for the UNet and divided by it again before they are decoded.
    force_upcast: half precision overflows here, so float16 is decoded in float32. A file that lacks these two
    means the upscaler's: 0.08333 and true. The picture has 2^(levels - 1) px per latent on a side.
    """

    block_out_channels: tuple[int, ...]
    layers_per_block: int = 2
    latent_channels: int = 4
    in_channels: int = 3
    out_channels: int = 3
    norm_num_groups: int = 32
    sample_size: int | None = None
    scaling_factor: float = 0.08333
    force_upcast: bool = True
    down_block_types: tuple[str, ...] | None = None
    up_block_types: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        widths = _sizes("block_out_channels", self.block_out_channels)
        object.__setattr__(self, "block_out_channels", widths)
        kinds = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
        for name, kind in kinds.items():
            value = getattr(self, name)
            value = [kind] * len(widths) if value is None else value
            if not isinstance(value, (list, tuple)) or list(value) != [kind] * len(widths):
                raise ConfigError(f"{name}={value!r} is not implemented; give {kind!r} once per block")
            object.__setattr__(self, name, tuple(value))
        for name in ("latent_channels", "in_channels", "out_channels"):
            _size(name, getattr(self, name))
        _size("layers_per_block", self.layers_per_block, _MAX_LAYERS)
        if self.sample_size is not None:
            _size("sample_size", self.sample_size)
        _positive("scaling_factor", self.scaling_factor)
        if not isinstance(self.force_upcast, bool):
            raise ConfigError(f"force_upcast={self.force_upcast!r} must be true or false")
        for width in widths:
            _divides("norm_num_groups", self.norm_num_groups, "a width of block_out_channels", width)

    @property
    def factor(self) -> int:
        """Pixels per latent on a side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> AutoencoderConfig:
        """Read a config.json's content. Raises ConfigError for a field or a value that is not implemented."""
        return cls(**read_fields(cls, config, VAE_FIXED, (), "AutoencoderKL"))

    def to_dict(self) -> dict[str, Any]:
        """The content of a config.json in the published layout, all fields spelled."""
        return _spelled(self, VAE_FIXED, "AutoencoderKL")


@dataclass(frozen=True)
class CLIPTextConfig:
    """Sizes of the text tower, by the names of the published config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings"):
            _size(name, getattr(self, name))
        _size("num_hidden_layers", self.num_hidden_layers, _MAX_LAYERS)
        _positive("layer_norm_eps", self.layer_norm_eps)
        _divides("num_attention_heads", self.num_attention_heads, "hidden_size", self.hidden_size)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> CLIPTextConfig:
        """Read a config.json's content. Raises ConfigError for a field or a value that is not implemented."""
        values = read_fields(cls, config, TEXT_FIXED, TEXT_IGNORED, None)
        if "hidden_act" not in config:
            raise ConfigError(
                "the config lacks hidden_act, which means 'quick_gelu'; only 'gelu' is implemented"
            )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The content of a config.json in the published layout."""
        return dict(sorted({**TEXT_FIXED, "architectures": ["CLIPTextModel"], **asdict(self)}.items()))


def read_fields(
    kind: type, config: Any, fixed: Mapping[str, Any], ignored: Collection[str], class_name: str | None
) -> dict[str, Any]:
    """A config.json's fields that `kind` has, the others checked. Raises ConfigError."""
    if not isinstance(config, Mapping):
        raise ConfigError(f"a config is a JSON object, not {type(config).__name__}")
    own = {field.name: field for field in fields(kind)}
    values: dict[str, Any] = {}
    for name, value in config.items():
        if name == "_class_name" and class_name is not None and value != class_name:
            raise ConfigError(
                f"_class_name={value!r}: {class_name!r} is needed here; give the upscaler's folder"
            )
        if not isinstance(name, str) or name.startswith("_"):
            continue  # notes of the program that wrote the file
        if name in own:
            values[name] = value
        elif name in fixed:
            if value != fixed[name] or isinstance(value, bool) != isinstance(fixed[name], bool):
                raise ConfigError(f"{name}={value!r} is not implemented; the x4 upscaler has {fixed[name]!r}")
        elif name not in ignored:
            close = difflib.get_close_matches(name, [*own, *fixed], n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ConfigError(
                f"unknown config field {name!r} = {value!r}{hint}: nothing here implements it, so it is refused "
                "rather than ignored"
            )
    required = [name for name, field in own.items() if name not in values and field.default is MISSING]
    if required:
        raise ConfigError(f"the config lacks {', '.join(required)}: a network cannot be built without")
    return values


def _spelled(config: Any, fixed: Mapping[str, Any], class_name: str) -> dict[str, Any]:
    own = {n: list(v) if isinstance(v, tuple) else v for n, v in asdict(config).items()}
    return {"_class_name": class_name, **dict(sorted({**fixed, **own}.items()))}


def _size(name: str, value: Any, limit: int = _MAX_SIZE) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
        raise ConfigError(f"{name}={value!r} must be a whole number from 1 to {limit}")
    return value


def _sizes(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= 16:
        raise ConfigError(f"{name}={value!r} must be a list of 1 to 16 widths, one per block")
    return tuple(_size(f"{name}[{i}]", item) for i, item in enumerate(value))


def _positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{name}={value!r} must be a number above 0")
    if not 0 < value <= sys.float_info.max:  # JSON's whole numbers have no end
        raise ConfigError(f"{name}={value!r} must be finite and above 0")


def _divides(divisor_name: str, divisor: Any, name: str, value: int) -> None:
    if value % _size(divisor_name, divisor):
        raise ConfigError(
            f"{divisor_name}={divisor} does not divide {name} ({value}): change one of the two in the config"
        )
