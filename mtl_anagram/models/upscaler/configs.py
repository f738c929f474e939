"""The configs of stage III's networks: the fields of the published config.json files, checked and frozen."""

from dataclasses import dataclass
from typing import Any, Literal

from ..configs import FIXED, Config, UNetSizes

# Fields of which one value is implemented: the released upscaler's. A file that omits one means that value.
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
BLOCKS = ("block_out_channels", "down_block_types", "up_block_types")


@dataclass(frozen=True)
class UpscalerUNetConfig(
    UNetSizes, owner="the x4 upscaler's UNet", fixed=UNET_FIXED, levels=(*BLOCKS, "only_cross_attention")
):
    """Sizes of the latent UNet of stage III, by the names of the published config.json.

    attention_head_dim: the NUMBER of heads of every layer, as in all Stable Diffusion configs. only_cross_attention:
    per level, whether its first attention too looks at the text alone; the middle block's looks at its own pixels
    whatever this says. num_class_embeds: how many noise levels it knows.
    """

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
            for divisor in ("norm_num_groups", "attention_head_dim"):
                self.check_divides(divisor, "a width of block_out_channels", width)

    @classmethod
    def spelled(cls, config: dict[str, Any], levels: int) -> dict[str, Any]:
        # One false for all levels; one true would hold for the middle block as well, which is not implemented.
        own = config.get("only_cross_attention", False)
        return {**config, "only_cross_attention": [False] * levels if own is False else own}


@dataclass(frozen=True)
class AutoencoderConfig(Config, owner="the x4 upscaler's autoencoder", fixed=VAE_FIXED, levels=BLOCKS):
    """Sizes of the autoencoder, by the names of the published config.json.

    scaling_factor: what the UNet's latents are multiplied by. force_upcast: half precision overflows here, so float16
    is decoded in float32.
    """

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

    def check(self) -> None:
        for width in self.block_out_channels:
            self.check_divides("norm_num_groups", "a width of block_out_channels", width)

    @property
    def factor(self) -> int:
        """Pixels per latent on a side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def spelled(cls, config: dict[str, Any], levels: int) -> dict[str, Any]:
        kinds = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
        return {**{name: [kind] * levels for name, kind in kinds.items()}, **config}  # a file may lack them


@dataclass(frozen=True)
class CLIPTextConfig(
    Config, owner="the upscaler's text tower", fixed=TEXT_FIXED, required=["hidden_act"], unused=None
):
    """Sizes of the text tower, by the names of the published config.json.

    Training's fields are not read. A file without hidden_act means quick_gelu, which is not implemented.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    layer_norm_eps: float = 1e-5

    def check(self) -> None:
        self.check_divides("num_attention_heads", "hidden_size", self.hidden_size)
