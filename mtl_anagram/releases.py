"""The released weights by name: which repositories a release is made of, and what is known of their files.

The sizes are facts about the published files, so that a plan can be made without reaching a hub. What is loaded
is read from the files themselves: a repository's own config.json goes before the config written down here.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import SourceError
from .models.configs import DOWN_TYPES, UP_TYPES, UNetConfig
from .models.glide import GLIDE
from .models.sources import Source
from .models.t5_config import T5Config
from .models.upscaler.configs import AutoencoderConfig, CLIPTextConfig, UpscalerUNetConfig

NetworkConfig = UNetConfig | T5Config | UpscalerUNetConfig | AutoencoderConfig | CLIPTextConfig

# Which networks work at the same time, and in which order the stages follow each other.
STAGES = {
    "text": ("text_encoder",),
    "stage I": ("unet_1", "noise_clip"),
    "stage II": ("unet_2", "noise_clip"),
    "text III": ("text_encoder_3", "noise_clip"),  # before stage I, beside the CLIP that scores
    "stage III": ("unet_3", "autoencoder_3", "noise_clip"),
}
# Where a network lies: the cascade's part, and the subfolder. The noise-aware CLIP has files of its own kind.
PLACES = {
    "text_encoder": ("stage_1", "text_encoder"),
    "unet_1": ("stage_1", "unet"),
    "unet_2": ("stage_2", "unet"),
    "text_encoder_3": ("stage_3", "text_encoder"),
    "unet_3": ("stage_3", "unet"),
    "autoencoder_3": ("stage_3", "vae"),
}
# Which of models.upscaler.Upscaler's networks each of stage III's is.
UPSCALER_PARTS = {
    "text_encoder_3": ("text_encoder",),
    "unet_3": ("unet",),
    "autoencoder_3": ("decoder", "encoder"),
}
WITHOUT_VARIANT = ("stage_3",)  # parts that were published in one precision
UNET_BASE, TRANSFORMER_BASE = "diffusion_pytorch_model", "model"
NONE = "none"  # in the place of a source: leave this part out


@dataclass(frozen=True)
class Network:
    """One network's place in a repository.

    base: how its weight files' names begin. parameters, half_bytes (of the fp16 variant's tensors), shards
    and config are the published files', None where a repository of the same layout has its own.
    """

    subfolder: str
    base: str
    config: NetworkConfig | None = None
    parameters: int | None = None
    half_bytes: int | None = None
    shards: int = 1

    def tensor_bytes(self, variant: str | None) -> int | None:
        """Of the published files of a variant; None = float32, the files without one."""
        if self.parameters is None:
            return None
        return 4 * self.parameters if variant is None else self.half_bytes if variant == "fp16" else None

    def names(self, variant: str | None) -> list[str]:
        """The weight files' paths in the repository, the index of the shards first."""
        dot = "" if variant is None else f".{variant}"
        if self.shards == 1:
            return [f"{self.subfolder}/{self.base}{dot}.safetensors"]
        shards = [
            f"{self.base}{dot}-{i + 1:05d}-of-{self.shards:05d}.safetensors" for i in range(self.shards)
        ]
        return [f"{self.subfolder}/{name}" for name in (f"{self.base}.safetensors.index{dot}.json", *shards)]


@dataclass(frozen=True)
class Layout:
    """What a part of a cascade consists of in a repository or a folder: networks, and small files beside them.

    Every network has a config.json too. required files must be there, optional ones may be missing.
    """

    networks: tuple[Network, ...]
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


@dataclass(frozen=True)
class Release:
    """The sources of a release's parts: hub ids, and the name of GLIDE's noise-aware CLIP."""

    name: str
    stage_1: str
    stage_2: str
    stage_3: str
    noise_clip: str = GLIDE

    def part(self, part: str) -> str:
        return getattr(self, part)


SCHEDULER = "scheduler/scheduler_config.json"
# What every stage I and II of the published layout holds; the sizes are each repository's own.
LAYOUTS = {
    "stage_1": Layout(
        (Network("text_encoder", TRANSFORMER_BASE), Network("unet", UNET_BASE)),
        required=("tokenizer/spiece.model",),
        optional=(SCHEDULER,),
    ),
    "stage_2": Layout((Network("unet", UNET_BASE),), optional=(SCHEDULER,)),
    "stage_3": Layout(
        (
            Network("unet", UNET_BASE),
            Network("vae", UNET_BASE),
            Network("text_encoder", TRANSFORMER_BASE),
        ),
        required=("tokenizer/merges.txt", "tokenizer/vocab.json"),
        optional=(
            SCHEDULER,
            "low_res_scheduler/scheduler_config.json",
            "tokenizer/special_tokens_map.json",
            "model_index.json",
        ),
    ),
}


def _stage_1(*widths: int, parameters: int) -> Layout:
    config = UNetConfig(
        block_out_channels=widths,
        layers_per_block=(3, 3, 3, 3),
        cross_attention_dim=widths[-1],
        encoder_hid_dim=4096,
        down_block_types=(DOWN_TYPES[0], *3 * DOWN_TYPES[1:]),
        up_block_types=(*3 * UP_TYPES[1:], UP_TYPES[0]),
        in_channels=3,
    )
    unet = Network("unet", UNET_BASE, config, parameters, 2 * parameters)
    layout = LAYOUTS["stage_1"]
    return Layout((T5_XXL, unet), layout.required, layout.optional)


def _stage_2(*widths: int, layers: tuple[int, ...], parameters: int) -> Layout:
    config = UNetConfig(
        block_out_channels=widths,
        layers_per_block=layers,
        cross_attention_dim=widths[-1],
        encoder_hid_dim=4096,
        down_block_types=(*3 * DOWN_TYPES[:1], *2 * DOWN_TYPES[1:]),
        up_block_types=(*2 * UP_TYPES[1:], *3 * UP_TYPES[:1]),
        in_channels=6,
        sample_size=256,
        class_embed_type="timestep",
        time_embedding_dim=widths[-1],
        time_embedding_act_fn="gelu",
        resnet_skip_time_act=True,
        resnet_out_scale_factor=1.4142271248762552,  # 1 / 0.7071, not the square root of 2
        mid_block_scale_factor=1.4142271248762552,
    )
    unet = Network("unet", UNET_BASE, config, parameters, 2 * parameters)
    return Layout((unet,), optional=LAYOUTS["stage_2"].optional)


T5_XXL = Network(
    "text_encoder",
    TRANSFORMER_BASE,
    T5Config(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64),
    parameters=4_762_310_656,
    half_bytes=2 * 4_762_310_656 + 2 * 24 * 4096 * 10240,  # the feed-forwards' output weights are float32
    shards=2,
)
X4_UPSCALER = "stabilityai/stable-diffusion-x4-upscaler"
X4_UNET = UpscalerUNetConfig(
    block_out_channels=(256, 512, 512, 1024),
    down_block_types=("DownBlock2D", *3 * ("CrossAttnDownBlock2D",)),
    up_block_types=(*3 * ("CrossAttnUpBlock2D",), "UpBlock2D"),
    cross_attention_dim=1024,
    only_cross_attention=(True, True, True, False),
)
X4_TEXT = CLIPTextConfig(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16
)

PUBLISHED = {
    "DeepFloyd/IF-I-M-v1.0": _stage_1(192, 384, 576, 768, parameters=371_605_830),
    "DeepFloyd/IF-I-L-v1.0": _stage_1(320, 640, 960, 1280, parameters=935_365_830),
    "DeepFloyd/IF-I-XL-v1.0": _stage_1(704, 1408, 2112, 2816, parameters=4_304_695_110),
    "DeepFloyd/IF-II-M-v1.0": _stage_2(
        128, 256, 512, 768, 768, layers=(2, 2, 3, 4, 2), parameters=461_064_198
    ),
    "DeepFloyd/IF-II-L-v1.0": _stage_2(
        160, 320, 640, 960, 1280, layers=(2, 2, 3, 5, 5), parameters=1_243_277_190
    ),
    # Stage III; published in float32 only.
    X4_UPSCALER: Layout(
        (
            Network("unet", UNET_BASE, X4_UNET, parameters=473_398_020),
            Network("vae", UNET_BASE, AutoencoderConfig((128, 256, 512)), parameters=55_325_927),
            Network("text_encoder", TRANSFORMER_BASE, X4_TEXT, parameters=340_387_840),
        ),
        required=LAYOUTS["stage_3"].required,
        optional=LAYOUTS["stage_3"].optional,
    ),
}
RELEASES = {
    name: Release(name, f"DeepFloyd/IF-I-{size}-v1.0", f"DeepFloyd/IF-II-{second}-v1.0", X4_UPSCALER)
    for name, size, second in (("IF-M", "M", "M"), ("IF-L", "L", "L"), ("IF-XL", "XL", "L"))
}
# The published code of the method runs in half precision, and the fp16 files are half of the bytes.
DEFAULT_VARIANT, FULL = "fp16", "fp32"


def release_of(source: Any) -> Release | None:
    """The release that a word names, or None. A folder of that name, seen from here, goes before it."""
    if not isinstance(source, str) or source not in RELEASES or Path(source).is_dir():
        return None
    return RELEASES[source]


def part_source(source: Source | None, part: str) -> Source | None:
    """The source of one part: a release's name stands for that release's part, NONE for no such part."""
    if source == NONE and not Path(NONE).is_dir():
        return None
    release = release_of(source)
    return source if release is None else release.part(part)


def stages_of(count: int) -> list[str]:
    """The names in STAGES of what works for a request's first `count` stages."""
    names = ["text", "stage I", "stage II"][: 1 + count]
    return [*names, "text III", "stage III"] if count > 2 else names


def has_variant(source: Any, part: str) -> bool:
    """Whether a source may have files of a variant, as far as is known without asking."""
    if part in WITHOUT_VARIANT:
        return False
    known = PUBLISHED.get(source) if isinstance(source, str) else None
    return known is None or all(network.half_bytes is not None for network in known.networks)


def explain(error: SourceError, source: Source) -> SourceError:
    """The error about a source that is nothing, with the names that would be something."""
    close = difflib.get_close_matches(str(source).upper(), RELEASES, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return SourceError(f"{error}. Releases known by name: {', '.join(RELEASES)}{hint}")


def layout_of(part: str, source: Source | None) -> Layout:
    """What a part's source is expected to hold; with sizes where the source is a published repository."""
    known = PUBLISHED.get(source) if isinstance(source, str) else None
    return LAYOUTS[part] if known is None else known
