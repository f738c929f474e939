"""Stage III from a folder or the hub: its parts, each loaded when first needed, strictly."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ...checks import whole_number
from ...devices import resolve_device, resolve_dtype
from ...errors import ConfigError
from ..loading import assemble, check_fit, weight_files
from ..shards import Entry, Shards
from ..sources import Folder, Source, open_source, read_config, read_json, require
from .autoencoder import LatentDecoder, LatentEncoder
from .configs import AutoencoderConfig, CLIPTextConfig, UpscalerUNetConfig
from .text import CLIPTextTower
from .tokenizer import UpscalerTokenizer, tokenizer_files
from .unet import UpscalerUNet

NETWORKS = ("unet", "decoder", "encoder", "text_encoder")
MAX_NOISE_LEVEL = 350  # of the released pipeline, where model_index.json does not say
# The attention's tensors as files of 2022 name them, and as they are named since.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
P = TypeVar("P", bound=nn.Module)


class Upscaler:
    """The Stable Diffusion x4 upscaler's parts. Nothing is read before it is needed.

    source: a folder in the published layout (unet/, vae/, text_encoder/, tokenizer/, scheduler/ and
    low_res_scheduler/) or a hub id. dtype: of the networks, None = the files'; the autoencoder stays in
    float32 where dtype is float16 and its config says force_upcast. variant: of the weight files. before(name):
    called when a network of NETWORKS is about to be loaded.
    """

    def __init__(
        self,
        source: Source,
        *,
        variant: str | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        before: Callable[[str], None] | None = None,
    ) -> None:
        self.source, self.variant, self._before = source, variant, before
        self.dtype, self.device = resolve_dtype(dtype), resolve_device(device)
        self._parts: dict[str, Any] = {}

    @property
    def unet(self) -> UpscalerUNet:
        return self._once("unet", lambda: load_upscaler_unet(self.source, **self._places))

    @property
    def decoder(self) -> LatentDecoder:
        return self._once("decoder", lambda: load_upscaler_decoder(self.source, **self._places))

    @property
    def encoder(self) -> LatentEncoder:
        return self._once("encoder", lambda: load_upscaler_encoder(self.source, **self._places))

    @property
    def text_encoder(self) -> CLIPTextTower:
        return self._once("text_encoder", lambda: load_upscaler_text(self.source, **self._places))

    @property
    def tokenizer(self) -> UpscalerTokenizer:
        return self._once("tokenizer", lambda: UpscalerTokenizer.from_source(self.source))

    @property
    def unet_config(self) -> UpscalerUNetConfig:
        """The UNet's sizes, without its weights."""
        return self._config("unet", UpscalerUNetConfig.from_dict)

    @property
    def autoencoder_config(self) -> AutoencoderConfig:
        return self._config("vae", AutoencoderConfig.from_dict)

    @property
    def text_config(self) -> CLIPTextConfig:
        return self._config("text_encoder", CLIPTextConfig.from_dict)

    @property
    def max_noise_level(self) -> int:
        """The highest noise level of the low-resolution picture, from model_index.json where there is one."""
        path = open_source(self.source, None, "model_index.json").get("model_index.json")
        if path is None:
            return MAX_NOISE_LEVEL
        level = read_json(path).get("max_noise_level", MAX_NOISE_LEVEL)
        return whole_number(f"{path}: max_noise_level", level, 0, 999, error=ConfigError)

    def scheduler_config(self, name: str) -> tuple[Path, dict[str, Any]] | None:
        """The scheduler_config.json in the folder `name`, "scheduler" or "low_res_scheduler"; None without."""
        path = self._optional(name, "scheduler_config.json")
        return None if path is None else (path, read_json(path))

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Prompts -> (text (V, 77, D), null (1, 77, D)), the states of the prompts and of the empty one."""
        tower = self.text_encoder
        ids = self.tokenizer([*prompts, ""], max_length=tower.config.max_position_embeddings)
        states = tower(ids.to(self.device))
        return states[:-1], states[-1:]

    def files(self) -> dict[str, Path]:
        """Every file that a picture depends on, by its name within the release."""
        found: dict[str, Path] = {}
        bases = {
            "unet": "diffusion_pytorch_model",
            "vae": "diffusion_pytorch_model",
            "text_encoder": "model",
        }
        for folder, base in bases.items():
            files = open_source(self.source, folder, "config.json")
            paths = [require(files, "config.json"), *weight_files(files, base, self.variant)]
            found |= {f"{folder}/{path.name}": path for path in paths}
        found |= {f"tokenizer/{name}": path for name, path in tokenizer_files(self.source).items()}
        for folder in ("scheduler", "low_res_scheduler"):
            path = self._optional(folder, "scheduler_config.json")
            if path is not None:
                found[f"{folder}/{path.name}"] = path
        return found

    def check_weights(self, *, encoder: bool = False) -> None:
        """WeightsError or SourceError for files that would not load, from their headers; reads no weights."""
        _unet_plan(self.source, "unet", self.variant).check()
        _text_plan(self.source, "text_encoder", self.variant).check()
        _half_plan(LatentDecoder, LatentEncoder, self.source, "vae", self.variant)[0].check()
        if encoder:
            _half_plan(LatentEncoder, LatentDecoder, self.source, "vae", self.variant)[0].check()

    def holds(self, name: str) -> bool:
        """Whether a part is in memory."""
        return name in self._parts

    def release(self, *names: str) -> None:
        """Forget parts ("unet", "decoder", ...; none named = all) and give their memory back."""
        for name in names or tuple(self._parts):
            self._parts.pop(name, None)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def _places(self) -> dict[str, Any]:
        return {"variant": self.variant, "dtype": self.dtype, "device": self.device}

    def _config(self, folder: str, parse: Callable[[dict[str, Any]], Any]) -> Any:
        files = open_source(self.source, folder, "config.json")
        return self._once(f"{folder} config", lambda: read_config(require(files, "config.json"), parse))

    def _optional(self, folder: str, name: str) -> Path | None:
        files = open_source(self.source, None, name)
        if isinstance(files, Folder):
            path = files.path / folder / name
            return path if path.is_file() else None
        return open_source(self.source, folder, name).get(name)

    def _once(self, name: str, load: Callable[[], Any]) -> Any:
        if name not in self._parts:
            if name in NETWORKS and self._before is not None:
                self._before(name)
            self._parts[name] = load()
        return self._parts[name]


def load_upscaler(
    source: Source,
    *,
    variant: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    before: Callable[[str], None] | None = None,
) -> Upscaler:
    """Stage III, lazily: see `Upscaler`."""
    return Upscaler(source, variant=variant, dtype=dtype, device=device, before=before)


def load_upscaler_unet(
    source: Source,
    *,
    subfolder: str | None = "unet",
    variant: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
) -> UpscalerUNet:
    """The latent UNet, in eval mode, its parameters without gradients; arguments as `load_unet`'s."""
    device, dtype = resolve_device(device), resolve_dtype(dtype)
    return _unet_plan(source, subfolder, variant).load(dtype, device)


def load_upscaler_decoder(
    source: Source,
    *,
    subfolder: str | None = "vae",
    variant: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
) -> LatentDecoder:
    """The autoencoder's decoder; arguments as `load_unet`'s.

    The file's encoder is known and skipped, by name; everything else is strict. Its attention may have the
    names of 2022 (query, key, value, proj_attn) or today's. dtype float16 means float32 where the config says
    force_upcast: this decoder's values leave half precision's range.
    """
    return _load_half(LatentDecoder, LatentEncoder, source, subfolder, variant, dtype, device)


def load_upscaler_encoder(
    source: Source,
    *,
    subfolder: str | None = "vae",
    variant: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
) -> LatentEncoder:
    """The autoencoder's encoder, as `load_upscaler_decoder` loads the decoder."""
    return _load_half(LatentEncoder, LatentDecoder, source, subfolder, variant, dtype, device)


def load_upscaler_text(
    source: Source,
    *,
    subfolder: str | None = "text_encoder",
    variant: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
) -> CLIPTextTower:
    """The text tower; arguments as `load_unet`'s.

    Names may have the hub's prefix `text_model.` or, as transformers 5 writes them, none. A table of position
    numbers, which old files hold, is not needed.
    """
    device, dtype = resolve_device(device), resolve_dtype(dtype)
    return _text_plan(source, subfolder, variant).load(dtype, device)


@dataclass(frozen=True)
class _Plan(Generic[P]):
    """How one part is made of its files: what `assemble` needs but dtype and device."""

    build: Callable[[], P]
    paths: list[Path]
    aliases: Mapping[str, str]
    ignored: Collection[str]

    def load(self, dtype: torch.dtype | None, device: torch.device) -> P:
        return assemble(
            self.build,
            self.paths,
            dtype=dtype,
            device=device,
            aliases=self.aliases,
            one_dtype=True,
            ignored=self.ignored,
        )

    def check(self) -> None:
        """WeightsError or SourceError where `load` would fail, from the files' headers alone."""
        shards = Shards(self.paths, aliases=self.aliases)
        state: dict[str, Entry] = {n: entry for n, entry in shards.items() if n not in self.ignored}
        with torch.device("meta"):
            module = self.build()
        check_fit(module, state, shards.origin)


def _unet_plan(source: Source, subfolder: str | None, variant: str | None) -> _Plan[UpscalerUNet]:
    files = open_source(source, subfolder, "config.json")
    config = read_config(require(files, "config.json"), UpscalerUNetConfig.from_dict)
    paths = weight_files(files, "diffusion_pytorch_model", variant)
    return _Plan(lambda: UpscalerUNet(config), paths, {}, ())


def _text_plan(source: Source, subfolder: str | None, variant: str | None) -> _Plan[CLIPTextTower]:
    files = open_source(source, subfolder, "config.json")
    config = read_config(require(files, "config.json"), CLIPTextConfig.from_dict)
    names = _names(lambda: CLIPTextTower(config))
    position_ids = "text_model.embeddings.position_ids"
    aliases = {name.removeprefix("text_model."): name for name in [*names, position_ids]}
    paths = weight_files(files, "model", variant)
    return _Plan(lambda: CLIPTextTower(config), paths, aliases, {position_ids})


def _half_plan(
    kind: Callable[[AutoencoderConfig], P],
    other: Callable[[AutoencoderConfig], nn.Module],
    source: Source,
    subfolder: str | None,
    variant: str | None,
) -> tuple[_Plan[P], AutoencoderConfig]:
    """For one half of the autoencoder; the other half's tensors are known and ignored."""
    files = open_source(source, subfolder, "config.json")
    config = read_config(require(files, "config.json"), AutoencoderConfig.from_dict)
    skipped = _names(lambda: other(config))
    names = [*_names(lambda: kind(config)), *skipped]
    paths = weight_files(files, "diffusion_pytorch_model", variant)
    return _Plan(lambda: kind(config), paths, old_attention_names(names), set(skipped)), config


def _load_half(
    kind: Callable[[AutoencoderConfig], P],
    other: Callable[[AutoencoderConfig], nn.Module],
    source: Source,
    subfolder: str | None,
    variant: str | None,
    dtype: torch.dtype | str | None,
    device: torch.device | str,
) -> P:
    device, dtype = resolve_device(device), resolve_dtype(dtype)
    plan, config = _half_plan(kind, other, source, subfolder, variant)
    upcast = config.force_upcast and dtype == torch.float16
    module = plan.load(torch.float32 if upcast else dtype, device)
    half = next(module.parameters()).dtype == torch.float16
    return module.float() if config.force_upcast and half else module


def old_attention_names(names: Iterable[str]) -> dict[str, str]:
    """The names of 2022 for these tensors of an autoencoder -> today's."""
    old = {}
    for name in names:
        owner, _, rest = name.partition(".mid_block.attentions.0.")
        for before, after in OLD_NAMES.items():
            if rest.startswith(f"{after}."):
                old[f"{owner}.mid_block.attentions.0.{before}{rest.removeprefix(after)}"] = name
    return old


def _names(build: Callable[[], nn.Module]) -> list[str]:
    with torch.device("meta"):
        return list(build().state_dict())
