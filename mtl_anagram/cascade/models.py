"""One release's models: where they come from, each loaded when first needed."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ..errors import InputError, SourceError, choice
from ..files.checksums import checksum_of, combined_checksum
from ..files.hub import Source, read_config
from ..files.prompt_cache import PromptCache
from ..models import load_noise_clip, load_t5, load_tokenizer, load_unet, load_upscaler
from ..models.loading import check_unet_files, config_of, resolve_device, resolve_dtype
from ..models.machine import SHARE, memory_of
from ..models.noise_clip import NoiseCLIP
from ..models.releases import UP_TO_STAGE_2, Parts, optional_file, part_files, weight_paths
from ..models.t5 import T5Encoder
from ..models.tokenizers import T5Tokenizer
from ..models.unet import UNet, UNetConfig
from ..models.upscaler import Upscaler
from ..sampling import LatentSchedule, NoiseLevels, Recipe, Schedule
from ..sampling.checks import check_kinds
from ..sampling.fused import operations
from ..sampling.loop import no_gradients

N = TypeVar("N")
MAX_TOKENS = 77
LOADING = threading.RLock()
# What works at the same time. With keep="one", loading one of a row releases the networks of the others.
TOGETHER = (("text_encoder",), ("unet_1", "noise_clip"), ("unet_2", "noise_clip"), ("upscaler", "noise_clip"))
PART_OF = dict.fromkeys(("tokenizer", "text_encoder", "unet_1"), "stage_1") | {"noise_clip": "noise_clip"}
PART_OF |= {"unet_2": "stage_2", "upscaler": "stage_3"}


def embedded_folder() -> Path:
    """The folder of the weights that come with the library."""
    here = Path(__file__).resolve().parents[1]
    for folder in (here / "weights", here.parent / "weights"):  # installed; a checkout
        if (folder / "cascade.json").is_file():
            return folder
    raise SourceError(f"the embedded cascade is not beside {here}: reinstall it, or name another model")


class Models:
    """A cascade's models. Nothing is read before it is needed; each is a plain attribute, which may be replaced.

    unet_1, unet_2, tokenizer, text_encoder, noise_clip, upscaler (stage III). Other attributes: device, dtype (of the
    networks), recipe, concepts, styles (what its makers recommend and say it has learnt to draw), clip_concepts (what
    its noise-aware CLIP tells apart), name, sources and variants (by part: "stage_1", ..., "noise_clip").
    """

    def __init__(
        self, parts: Parts, recipe: Recipe, device: str | torch.device | None, dtype: str | torch.dtype | None,
        keep: str, text_encoder: str, prompt_cache: PromptCache | str | Path | None, compile: bool | str,
        fused: str | None,
    ) -> None:  # fmt: skip
        self.replaced: set[str] = set()
        self._paths: dict[str, dict[str, Path]] = {}
        self.keep = choice("keep", keep, ("auto", "all", "one"))
        self.text_mode = choice("text_encoder", text_encoder, ("auto", "whole", "streamed"))
        check_kinds(compile=(compile, bool, str))
        self.compile = compile
        if prompt_cache is not None and not isinstance(prompt_cache, PromptCache):
            prompt_cache = PromptCache(prompt_cache)
        self.prompt_cache = prompt_cache
        self.device = resolve_device(device)
        if fused is not None:
            operations(fused, self.device)  # which raises where there are none
        self.fused = fused
        # Half precision is what the released weights were published for; CPUs are faster in float32.
        default = torch.float16 if self.device.type == "cuda" else torch.float32
        self.dtype = resolve_dtype(dtype) or default
        self.sources, self.variants = parts.sources, parts.variants
        self.name = str(parts.sources["stage_1"]) if parts.name is None else parts.name
        self.recipe, self.concepts, self.styles = recipe, parts.concepts, parts.styles
        self.clip_concepts = parts.clip_concepts or parts.concepts
        self.joined: Any = None  # what joins several threads' requests, if anything does

    def __setattr__(self, name: str, value: Any) -> None:
        # A loaded network comes in another way. A caller's own goes where `release` says so, never to make room.
        if name in PART_OF:
            self.replaced.add(name)
        super().__setattr__(name, value)

    @cached_property
    def tokenizer(self) -> T5Tokenizer:
        return load_tokenizer(self.source("stage_1"))

    @cached_property
    def text_encoder(self) -> T5Encoder:
        return self._load("text_encoder", load_t5, self.text_dtype, streamed=self.streams_text)

    @cached_property
    def unet_1(self) -> UNet:
        return self._load("unet_1", self._load_unet, self.dtype)

    @cached_property
    def unet_2(self) -> UNet:
        return self._load("unet_2", self._load_unet, self.dtype)

    @cached_property
    def noise_clip(self) -> NoiseCLIP:
        # Small beside the UNets, and its cosines decide weights: float32, as in the released code.
        return self._load("noise_clip", load_noise_clip, torch.float32)

    @cached_property
    def upscaler(self) -> Upscaler:
        """Stage III, whose parts are in turn loaded when first needed."""
        variant = self.variants["stage_3"]
        return load_upscaler(self.source("stage_3"), variant=variant, dtype=self.dtype, device=self.device)

    def _load_unet(self, source: Source, **options: Any) -> UNet:
        unet = load_unet(source, **options)
        unet.side_by_side = unet.parameter_count < 50e6  # a large one's products keep all threads busy
        if self.compile:  # in place: it stays a UNet, whose calls, but not text_maps, go through the compiler
            unet.compile(fullgraph=True, backend="inductor" if self.compile is True else self.compile)
        return unet

    def _load(self, name: str, load: Callable[..., N], dtype: Any, **options: Any) -> N:
        with LOADING, no_gradients():  # weights loaded in inference mode could take no part in a gradient
            if name not in self.__dict__:  # from Python 3.12 on, cached_property lets two threads load
                self.make_room(name)
                part, options = PART_OF[name], {**options, "dtype": dtype, "device": self.device}
                options |= {"variant": self.variants[part]} if name != "noise_clip" else {}  # which has none
                self.__dict__[name] = load(self.source(part), **options)
            return cast(N, self.__dict__[name])

    @cached_property
    def keeps_all(self) -> bool:
        """Whether all networks stay in memory; "auto": where their files are here and fit what is free."""
        if self.keep != "auto":
            return self.keep == "all"
        here = all(source is None or Path(source).is_dir() for source in self.sources.values())
        return here and self._fits(weight_paths(self.sources, self.variants, self.sources), unknown=False)

    @cached_property
    def streams_text(self) -> bool:
        """Whether the text encoder runs from its files; "auto": where it does not fit what is free."""
        if self.text_mode != "auto":
            return self.text_mode == "streamed"
        return not self._fits(self._text_files(), unknown=True)

    def _fits(self, paths: Mapping[str, Path], *, unknown: bool) -> bool:
        """Whether files fit the memory that is free; `unknown` where that is not known."""
        memory, stored = memory_of(self.device), sum(path.stat().st_size for path in paths.values())
        return unknown if memory is None else stored <= SHARE * memory.free

    @property
    def text_dtype(self) -> torch.dtype | None:
        """What T5's weights are read as, None = as they are stored."""
        # T5's feed-forward overflows in float16; the published fp16 variant keeps that part in float32,
        # other files are read as bfloat16 instead.
        if self.variants["stage_1"] is not None:
            return None
        return torch.bfloat16 if self.dtype == torch.float16 else self.dtype

    def source(self, part: str) -> Source:
        """Where a part comes from; InputError where the cascade has none."""
        source = self.sources[part]
        if source is None:
            raise InputError(f"the cascade {self.name} has no {part}: name its folder or hub id with {part}=")
        return source

    def schedule(self, stage: int, num_inference_steps: int) -> Schedule:
        """Stage 1's or 2's noise schedule, from its scheduler_config.json where the release has one."""
        default = (Schedule.stage_1 if stage == 1 else Schedule.stage_2)(num_inference_steps)
        read = partial(Schedule.from_config, num_inference_steps=num_inference_steps)
        return _scheduler(self.source(f"stage_{stage}"), "scheduler", read, default)

    def latent_schedule(self, num_inference_steps: int) -> tuple[LatentSchedule, NoiseLevels]:
        """Stage III's timesteps, and the noise levels of its low-resolution picture."""
        source, default = self.upscaler.source, LatentSchedule(num_inference_steps)
        read = partial(LatentSchedule.from_config, num_inference_steps=num_inference_steps)
        levels = _scheduler(source, "low_res_scheduler", NoiseLevels.from_config, NoiseLevels())
        return _scheduler(source, "scheduler", read, default), levels

    @no_gradients()
    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Prompts -> (text (V, 77, D), null (1, 77, D)) on the cascade's device, in its dtype."""
        texts = [*([prompts] if isinstance(prompts, str) else prompts), ""]
        if self.prompt_cache is None or self.replaced & {"tokenizer", "text_encoder"}:
            states = self._states(texts)
        else:
            states = self.prompt_cache.states(texts, self._text_identity(), self._states).to(self.device)
        return states[:-1], states[-1:]

    def unet_config(self, stage: int) -> UNetConfig:
        """Stage 1's or 2's sizes, without its weights."""
        loaded = self.__dict__.get(f"unet_{stage}")
        if isinstance(loaded, UNet):
            return loaded.config
        return config_of(self.source(f"stage_{stage}"), "unet", UNetConfig)

    def attention_resolutions(self, side: int, places: Sequence[str]) -> list[int]:
        """Where stage I's attention layers of some places are, for pictures of this side in px."""
        layers = _without_weights(self.unet_config(1)).attention_layers(side)
        return sorted({size for name, size in layers.items() if name.startswith(tuple(places))})

    def release(self, *names: str) -> None:
        """Forget models ("text_encoder", "unet_1", ...; none named = all) and give their memory back."""
        for name in names or PART_OF:
            self.__dict__.pop(name, None)
            self.replaced.discard(name)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def checksums(
        self, recorded: Mapping[str, str] | None = None, parts: Sequence[str] = UP_TO_STAGE_2
    ) -> dict[str, str]:
        """What identifies every file that pictures depend on, by part and name; recorded: of the same kind as these."""
        for part in (part for part in parts if part not in self._paths):
            self._paths[part] = weight_paths(self.sources, self.variants, (part,))
        paths = {name: path for part in parts for name, path in self._paths[part].items()}
        found = {name: checksum_of(path, (recorded or {}).get(name, "")) for name, path in paths.items()}
        # What a caller has put in a network's place has no file: its class says that it is another.
        for name in self.replaced:
            if PART_OF[name] in parts:
                kind = type(getattr(self, name))
                found[f"{PART_OF[name]}/{name}"] = f"{kind.__module__}.{kind.__qualname__}"
        return found

    def check_unet(self, stage: int) -> None:
        """Load a UNet, or, where not all networks stay, find in its files' headers what would fail later."""
        if self.keeps_all:
            getattr(self, f"unet_{stage}")
        elif f"unet_{stage}" not in self.__dict__:
            check_unet_files(self.source(f"stage_{stage}"), variant=self.variants[f"stage_{stage}"])

    def make_room(self, name: str) -> None:
        """Before a network is loaded: with keep="one", those that never work beside it go."""
        company = {member for row in TOGETHER if name in row for member in row}
        others = {m for row in TOGETHER for m in row if m in self.__dict__} - company - self.replaced
        if others and not self.keeps_all:
            self.release(*others)

    def _states(self, texts: list[str]) -> Tensor:
        """Texts -> (V, 77, D) on the cascade's device, in its dtype, by T5."""
        ids, mask = self.tokenizer(texts, max_length=MAX_TOKENS)
        return self.text_encoder(ids.to(self.device), mask.to(self.device)).to(self.dtype)

    def _text_files(self) -> dict[str, Path]:
        """The files that a prompt's states depend on."""
        files = part_files(self.source("stage_1"), "stage_1", self.variants["stage_1"])
        return {n: path for n, path in files.items() if n.startswith(("text_encoder/", "tokenizer/"))}

    def _text_identity(self) -> dict[str, str]:
        """What states depend on besides their text: files, lengths, and how they are computed and kept."""
        sums = {name: checksum_of(path) for name, path in self._text_files().items()}
        computed = str(self.text_dtype)  # the same numbers, whole or streamed
        if self.text_dtype is None:
            computed += ", streamed" if self.streams_text else ", whole"
        about = {"weights": combined_checksum(sums), "computed": computed}
        return about | {"stored": str(self.dtype), "tokens": str(MAX_TOKENS)}


@cache  # making it takes 0.06 s, and every request asks
def _without_weights(config: UNetConfig) -> UNet:
    with torch.device("meta"):
        return UNet(config)


def _scheduler(source: Source, folder: str, read: Callable[[dict[str, Any]], N], default: N) -> N:
    """What a release's scheduler_config.json says, if it has one."""
    path = optional_file(source, folder, "scheduler_config.json")
    return default if path is None else read_config(path, read)
