"""The networks' configs, read from config.json by one reader, checked and frozen: IF's UNet, stage III's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, ClassVar, Literal, TypeVar, get_type_hints

from ..errors import ConfigError, as_type, number, read_fields, whole_number

C = TypeVar("C", bound="Config")
# No width, count or side comes near; a larger number is a damaged file. A million layers would take minutes.
MAX_SIZE, MAX_LAYERS, MAX_LEVELS = 1 << 20, 256, 16
CROSS_NORM_GROUPS = 32  # of the text's group norm; the published class has no field for it
# Fields of which one value is implemented, that of all released IF UNets. A file that omits one means it.
FIXED: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "gelu", "addition_embed_type": "text", "addition_time_embed_dim": None, "attention_type": "default",
    "center_input_sample": False, "class_embeddings_concat": False, "conv_in_kernel": 3, "conv_out_kernel": 3,
    "cross_attention_norm": "group_norm", "downsample_padding": 1, "dropout": 0.0, "dual_cross_attention": False,
    "encoder_hid_dim_type": "text_proj", "flip_sin_to_cos": True, "freq_shift": 0,
    "mid_block_only_cross_attention": None, "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "num_attention_heads": None, "num_class_embeds": None, "only_cross_attention": False,
    "projection_class_embeddings_input_dim": None, "resnet_time_scale_shift": "scale_shift",
    "reverse_transformer_layers_per_block": None, "time_cond_proj_dim": None, "time_embedding_type": "positional",
    "timestep_post_act": None, "transformer_layers_per_block": 1, "upcast_attention": False,
    "use_linear_projection": False,
}  # fmt: skip
# The same of stage III's networks: the released upscaler's values.
UNET_FIXED: dict[str, Any] = {
    **{name: value for name, value in FIXED.items() if name not in ("num_class_embeds", "only_cross_attention")},
    "act_fn": "silu", "addition_embed_type": None, "addition_embed_type_num_heads": 64, "class_embed_type": None,
    "cross_attention_norm": None, "encoder_hid_dim": None, "encoder_hid_dim_type": None, "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn", "resnet_out_scale_factor": 1.0, "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default", "time_embedding_act_fn": None, "time_embedding_dim": None,
    "use_linear_projection": True,
}  # fmt: skip
VAE_FIXED: dict[str, Any] = {
    "_class_name": "AutoencoderKL", "act_fn": "silu", "latents_mean": None, "latents_std": None,
    "mid_block_add_attention": True, "shift_factor": None, "use_post_quant_conv": True, "use_quant_conv": True,
}  # fmt: skip
TEXT_FIXED: dict[str, Any] = {"hidden_act": "gelu", "model_type": "clip_text_model"}
BLOCKS = ["block_out_channels", "down_block_types", "up_block_types"]


class Config:
    """Base of the configs: frozen dataclasses of the fields that are read, by their published names and types.

    A subclass names its owner, for the errors, and the fields of which one value is implemented.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    _owner: ClassVar[str]
    _fixed: ClassVar[dict[str, Any]]
    _required: ClassVar[list[str]] = []  # besides the fields without default
    _unused: ClassVar[list[str] | None] = []  # fields of no effect, None = all others
    _levels: ClassVar[list[str]] = []  # fields that are lists of one entry per level

    def __post_init__(self) -> None:
        """Every field of its annotation's type, every number above 0 and not absurd, one entry per level."""
        kinds = get_type_hints(type(self))
        for name in (field.name for field in fields(self)):
            value = as_type(name, getattr(self, name), kinds[name])
            object.__setattr__(self, name, value)
            most = MAX_LAYERS if "layers" in name else MAX_SIZE
            for item in value if isinstance(value, tuple) else (value,):
                if isinstance(item, float):
                    number(name, item, above=True, error=ConfigError)
                elif type(item) is int:
                    whole_number(name, item, 1, most, error=ConfigError)
        counts = {name: len(getattr(self, name)) for name in self._levels}
        if counts and not (len(set(counts.values())) == 1 and 1 <= max(counts.values()) <= MAX_LEVELS):
            said = ", ".join(f"{name} has {count}" for name, count in counts.items())
            raise ConfigError(f"entries: {said}; give one per level, 1 to {MAX_LEVELS} levels")
        for width in getattr(self, "block_out_channels", ()):
            self.check_divides("norm_num_groups", "a width of block_out_channels", width)
        self.check()

    def check(self) -> None:
        """Rules between fields."""

    @classmethod
    def from_dict(cls: type[C], config: Mapping[str, Any]) -> C:
        """Read a config.json's content. Raises ConfigError for a field or a value that is not implemented."""
        if isinstance(config, Mapping):
            widths = config.get("block_out_channels")
            config = cls.spelled(dict(config), len(widths) if isinstance(widths, list | tuple) else 0)
        own, kinds = fields(cls), get_type_hints(cls)
        required = [*(field.name for field in own if field.default is MISSING), *cls._required]
        read = {field.name: kinds[field.name] for field in own}
        options: dict[str, Any] = {"owner": cls._owner, "fixed": cls._fixed, "unused": cls._unused}
        return cls(**read_fields(config, read=read, required=required, **options))

    @classmethod
    def spelled(cls, config: dict[str, Any], levels: int) -> dict[str, Any]:
        """A file's content with what it says in short spelled out; levels: how many widths it has."""
        return config

    def to_dict(self) -> dict[str, Any]:
        """The content of a config.json in the published layout, all fields spelled, sorted."""
        own = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}
        return dict(sorted({**self._fixed, **own}.items()))

    def check_divides(self, divisor: str | int, name: str, value: int) -> None:
        """ConfigError unless a field, or a fixed number, divides another number of the config."""
        by = getattr(self, divisor) if isinstance(divisor, str) else divisor
        if value % by:
            said = f"{divisor}={by}" if isinstance(divisor, str) else f"{by}"
            raise ConfigError(f"{said} does not divide {name} ({value}): change one of the two")


class UNetSizes(Config):
    """What the configs of all UNets have."""

    block_out_channels: tuple[int, ...]
    down_block_types: tuple[str, ...]
    up_block_types: tuple[str, ...]
    in_channels: int
    out_channels: int
    norm_num_groups: int
    norm_eps: float
    time_embedding_dim: int | None = None

    @property
    def time_width(self) -> int:
        """Width of the time embedding: 4 times the first block's unless the config says otherwise."""
        return 4 * self.block_out_channels[0] if self.time_embedding_dim is None else self.time_embedding_dim

    @property
    def size_factor(self) -> int:
        """The picture's side must be a multiple of this: one halving per block but the last."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class UNetConfig(UNetSizes):
    """Sizes of an IF UNet, by the names of the published config.json; the defaults are stage I's.

    `attention_head_dim` is the size of one head (the number of heads of a layer is its width over it);
    `norm_num_groups` divides every width, and 32 divides `cross_attention_dim`.
    """

    _owner, _fixed, _levels = "an IF UNet", FIXED, [*BLOCKS, "layers_per_block"]

    block_out_channels: tuple[int, ...]
    layers_per_block: tuple[int, ...]
    cross_attention_dim: int
    encoder_hid_dim: int
    down_block_types: tuple[Literal["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"], ...]
    up_block_types: tuple[Literal["ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"], ...]
    in_channels: int
    out_channels: int = 6
    attention_head_dim: int = 64
    addition_embed_type_num_heads: int = 64
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    sample_size: int | None = 64
    class_embed_type: Literal["timestep"] | None = None
    time_embedding_dim: int | None = None
    time_embedding_act_fn: Literal["gelu"] | None = None
    resnet_skip_time_act: bool = False
    resnet_out_scale_factor: float = 1.0
    mid_block_scale_factor: float = 1.0

    def check(self) -> None:
        widths = self.block_out_channels
        kinds = (*self.down_block_types, "SimpleCrossAttnMid", *self.up_block_types)
        for width, kind in zip((*widths, widths[-1], *widths[::-1]), kinds, strict=True):
            if "Attn" in kind:
                self.check_divides("attention_head_dim", "an attention layer's width", width)
        self.check_divides(2, "block_out_channels[0]", widths[0])  # half sines, half cosines
        self.check_divides(CROSS_NORM_GROUPS, "cross_attention_dim", self.cross_attention_dim)
        self.check_divides("addition_embed_type_num_heads", "encoder_hid_dim", self.encoder_hid_dim)

    @classmethod
    def spelled(cls, config: dict[str, Any], levels: int) -> dict[str, Any]:
        layers = config.get("layers_per_block")
        if type(layers) is int:  # one number for all levels
            config["layers_per_block"] = [layers] * levels
        if config.get("encoder_hid_dim_type", "") is None:  # the published class reads null as text_proj
            del config["encoder_hid_dim_type"]
        return config


@dataclass(frozen=True)
class UpscalerUNetConfig(UNetSizes):
    """Sizes of the latent UNet of stage III, by the names of the published config.json.

    attention_head_dim: the NUMBER of heads of every layer, as in all Stable Diffusion configs. only_cross_attention:
    per level, whether its first attention too looks at the text alone; the middle block's looks at its own pixels
    whatever this says. num_class_embeds: how many noise levels it knows.
    """

    _owner, _fixed, _levels = "the x4 upscaler's UNet", UNET_FIXED, [*BLOCKS, "only_cross_attention"]

    block_out_channels: tuple[int, ...]
    down_block_types: tuple[Literal["DownBlock2D", "CrossAttnDownBlock2D"], ...]
    up_block_types: tuple[Literal["UpBlock2D", "CrossAttnUpBlock2D"], ...]
    only_cross_attention: tuple[bool, ...]
    cross_attention_dim: int
    in_channels: int = 7
    out_channels: int = 4
    layers_per_block: int = 2
    attention_head_dim: int = 8
    num_class_embeds: int = 1000
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    sample_size: int | None = None

    def check(self) -> None:
        for width in self.block_out_channels:
            self.check_divides("attention_head_dim", "a width of block_out_channels", width)

    @classmethod
    def spelled(cls, config: dict[str, Any], levels: int) -> dict[str, Any]:
        # One false for all levels; one true would hold for the middle block as well, which is not implemented.
        own = config.get("only_cross_attention", False)
        return {**config, "only_cross_attention": [False] * levels if own is False else own}


@dataclass(frozen=True)
class AutoencoderConfig(Config):
    """Sizes of the autoencoder, by the names of the published config.json.

    scaling_factor: what the UNet's latents are multiplied by. force_upcast: half precision overflows here, so float16
    is decoded in float32.
    """

    _owner, _fixed, _levels = "the x4 upscaler's autoencoder", VAE_FIXED, BLOCKS

    block_out_channels: tuple[int, ...]
    down_block_types: tuple[Literal["DownEncoderBlock2D"], ...]
    up_block_types: tuple[Literal["UpDecoderBlock2D"], ...]
    layers_per_block: int = 2
    latent_channels: int = 4
    in_channels: int = 3
    out_channels: int = 3
    norm_num_groups: int = 32
    sample_size: int | None = None
    scaling_factor: float = 0.08333
    force_upcast: bool = True

    @property
    def factor(self) -> int:
        """Pixels per latent on a side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def spelled(cls, config: dict[str, Any], levels: int) -> dict[str, Any]:
        kinds = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
        return {**{name: [kind] * levels for name, kind in kinds.items()}, **config}  # a file may lack them


@dataclass(frozen=True)
class CLIPTextConfig(Config):
    """Sizes of the text tower, by the names of the published config.json.

    Training's fields are not read. A file without hidden_act means quick_gelu, which is not implemented.
    """

    _owner, _fixed = "the upscaler's text tower", TEXT_FIXED
    _required, _unused = ["hidden_act"], None

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    layer_norm_eps: float = 1e-5

    def check(self) -> None:
        self.check_divides("num_attention_heads", "hidden_size", self.hidden_size)
