"""Stage III from a folder or the hub: its parts, each loaded when first needed, strictly."""

from collections.abc import Callable
from functools import cached_property, partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from ...errors import ConfigError, whole_number
from ...files.hub import Source, read_json
from ..configs import AutoencoderConfig, CLIPTextConfig, UpscalerUNetConfig
from ..loading import (
    TEXT_BASE,
    UNET_BASE,
    assemble,
    check_fit,
    config_of,
    resolve_device,
    resolve_dtype,
    shards_of,
)
from ..releases import optional_file
from .autoencoder import LatentDecoder, LatentEncoder
from .text import CLIPTextTower, UpscalerTokenizer
from .unet import UpscalerUNet

MAX_NOISE_LEVEL = 350  # of the released pipeline, where model_index.json does not say
POSITION_IDS = "text_model.embeddings.position_ids"  # in old files; not needed
# The autoencoder's attention as files of 2022 name it -> as it is named since.
OLD_NAMES = {
    f"{half}.mid_block.attentions.0.{old}.{kind}": f"{half}.mid_block.attentions.0.{new}.{kind}"
    for half in ("decoder", "encoder")
    for old, new in {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}.items()
    for kind in ("weight", "bias")
}
C = TypeVar("C")
P = TypeVar("P", bound=nn.Module)


class Upscaler:
    """The Stable Diffusion x4 upscaler's parts. Nothing is read before it is needed; a part may be replaced.

    source: a folder in the published layout or a hub id. variant: of the weight files. dtype: of the networks, None =
    the files'; for float16 the autoencoder is in float32 where its config says force_upcast.
    """

    def __init__(
        self,
        source: Source,
        *, variant: str | None = None, dtype: torch.dtype | str | None = None, device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self.source, self.variant = source, variant
        self.dtype, self.device = resolve_dtype(dtype), resolve_device(device)

    @cached_property
    def unet(self) -> UpscalerUNet:
        return self._load(UpscalerUNet, "unet", self.unet_config)

    @cached_property
    def decoder(self) -> LatentDecoder:
        return self._load(LatentDecoder, "vae", self.autoencoder_config)

    @cached_property
    def encoder(self) -> LatentEncoder:
        return self._load(LatentEncoder, "vae", self.autoencoder_config)

    @cached_property
    def text_encoder(self) -> CLIPTextTower:
        return self._load(CLIPTextTower, "text_encoder", self.text_config)

    @cached_property
    def tokenizer(self) -> UpscalerTokenizer:
        return UpscalerTokenizer(self.source)

    @cached_property
    def unet_config(self) -> UpscalerUNetConfig:
        return config_of(self.source, "unet", UpscalerUNetConfig)

    @cached_property
    def autoencoder_config(self) -> AutoencoderConfig:
        return config_of(self.source, "vae", AutoencoderConfig)

    @cached_property
    def text_config(self) -> CLIPTextConfig:
        return config_of(self.source, "text_encoder", CLIPTextConfig)

    @property
    def max_noise_level(self) -> int:
        """The highest noise level of the low-resolution picture, from model_index.json where there is one."""
        path = optional_file(self.source, "", "model_index.json")
        level = MAX_NOISE_LEVEL if path is None else read_json(path).get("max_noise_level", MAX_NOISE_LEVEL)
        return whole_number(f"{path}: max_noise_level", level, 0, 999, error=ConfigError)

    @torch.no_grad()
    def encode(self, prompts: str | list[str]) -> tuple[Tensor, Tensor]:
        """Prompts -> (text (V, 77, D), null (1, 77, D)), the states of the prompts and of the empty one."""
        tower, texts = self.text_encoder, [prompts] if isinstance(prompts, str) else prompts
        ids = self.tokenizer([*texts, ""], max_length=tower.config.max_position_embeddings)
        states = tower(ids.to(self.device))
        return states[:-1], states[-1:]

    def check_weights(self, *, encoder: bool = False) -> None:
        """WeightsError or SourceError for files that would not load, from their headers; reads no weights."""
        if (words := self.tokenizer.vocab_size) > (size := self.text_config.vocab_size):
            said = f"{self.source}: the tokenizer has {words} tokens, the text encoder {size}"
            raise ConfigError(f"{said}; take both from the same release")
        self._load(UpscalerUNet, "unet", self.unet_config, check=True)
        self._load(CLIPTextTower, "text_encoder", self.text_config, check=True)
        for half in (LatentDecoder, LatentEncoder)[: 1 + encoder]:
            self._load(half, "vae", self.autoencoder_config, check=True)

    def _load(self, kind: Callable[[C], P], subfolder: str, config: C, *, check: bool = False) -> P:
        """A network from its files; check = on the meta device, when the files' headers fit it.

        The names of the text tower's tensors may lack the hub's prefix `text_model.` (transformers 5 writes none), the
        autoencoder's may be of 2022, and its other half is known and skipped by name; all else is strict.
        """
        build, dtype, upcast = partial(kind, config), self.dtype, False
        aliases, ignored, base = OLD_NAMES, {POSITION_IDS}, UNET_BASE
        if isinstance(config, CLIPTextConfig):
            names, base = {*_names(build), POSITION_IDS}, TEXT_BASE
            aliases = {name.removeprefix("text_model."): name for name in names}
        elif isinstance(config, AutoencoderConfig):
            ignored = _names(partial(LatentEncoder if build.func is LatentDecoder else LatentDecoder, config))
            upcast = config.force_upcast
            dtype = torch.float32 if upcast and dtype == torch.float16 else dtype
        shards = shards_of(self.source, subfolder, base, self.variant, aliases=aliases, ignored=ignored)
        if check:
            return check_fit(build, shards)
        network = assemble(build, shards, dtype=dtype, device=self.device, one_dtype=True)
        return network.float() if upcast and next(network.parameters()).dtype == torch.float16 else network


def _names(build: Callable[[], nn.Module]) -> set[str]:
    with torch.device("meta"):
        return set(build().state_dict())


load_upscaler = Upscaler
