"""One release's models: where they come from, where they live, loaded when first needed."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .checks import choice, flag, whole_number
from .checksums import combined_checksum, optional_file, sha256_of, weight_paths
from .devices import resolve_device, resolve_dtype
from .errors import AnagramError, InputError, SourceError
from .models import load_noise_clip, load_t5, load_tokenizer, load_unet
from .models.configs import UNetConfig
from .models.loading import check_unet_files
from .models.noise_clip import NoiseCLIP
from .models.sources import Source, open_source, read_config, require
from .models.t5 import T5Encoder
from .models.tokenizers import T5Tokenizer
from .models.unet import UNet
from .models.upscaler import Upscaler, load_upscaler
from .parts import find_parts
from .prompt_cache import PromptCache
from .releases import PLACES, STAGES, UPSCALER_PARTS, WITHOUT_VARIANT, stages_of
from .sampling import Recipe, Schedule
from .text import MODES, streams, text_files

if TYPE_CHECKING:
    from .planning import Plan

KEEP = ("auto", "all", "one")
MAX_TOKENS = 77


def embedded_folder() -> Path:
    """The folder of the weights that come with the library."""
    here = Path(__file__).resolve().parent
    for folder in (here / "weights", here.parent / "weights"):  # installed; a checkout
        if (folder / "cascade.json").is_file():
            return folder
    raise SourceError(
        f"the embedded cascade is not beside {here}: reinstall the package, or name another model"
    )


class Cascade:
    """The models of one cascade. Nothing is read before it is needed; `release()` gives the memory back.

    keep: "all" networks stay in memory; "one": a network's loading releases those that never work beside it
    (releases.STAGES), so that the largest stage decides what memory is needed; "auto": all, if this machine
    has the memory for that when the first is loaded, else one. What is sampled does not depend on it. A network
    that the machine cannot hold is a CapacityError before its files are downloaded, unless ignore_memory.

    text_encoder: "whole" loads T5, "streamed" runs it from its files with half a gigabyte of memory, "auto" takes
    the second where the first does not fit what is free. prompt_cache: a folder (or a PromptCache) where
    prompts' states are kept, so that the text encoder is loaded for new prompts only; None = no cache.

    Attributes: device, dtype (of the networks), recipe (what the cascade's makers recommend), concepts (names
    that its makers say it has learnt to draw, for a small cascade, else none), clip_concepts (those that its
    noise-aware CLIP tells apart; the same unless given), name, sources and variants (by part), and has_stage_2,
    has_stage_3 and has_noise_clip, which say what the cascade holds."""

    def __init__(
        self,
        stage_1: Source,
        *,
        stage_2: Source | None = None,
        stage_3: Source | None = None,
        noise_clip: Source | None = None,
        name: str | None = None,
        recipe: Recipe | None = None,
        concepts: Sequence[str] = (),
        clip_concepts: Sequence[str] = (),
        variant: str | Mapping[str, str | None] | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        keep: str = "auto",
        ignore_memory: bool = False,
        text_encoder: str = "auto",
        prompt_cache: PromptCache | str | Path | None = None,
    ) -> None:
        self.keep = choice("keep", keep, KEEP)
        self.ignore_memory = flag("ignore_memory", ignore_memory)
        self.text_mode = choice("text_encoder", text_encoder, MODES)
        if prompt_cache is not None and not isinstance(prompt_cache, PromptCache):
            prompt_cache = PromptCache(prompt_cache)
        self.prompt_cache = prompt_cache
        self.device = resolve_device(device)
        # Half precision is what the released weights were published for; CPUs are faster in float32.
        default = torch.float16 if self.device.type == "cuda" else torch.float32
        self.dtype = resolve_dtype(dtype) or default
        self.name = str(stage_1) if name is None else name
        self.recipe = Recipe.released() if recipe is None else recipe
        self.concepts = tuple(concepts)
        self.clip_concepts = tuple(clip_concepts) or self.concepts
        self.sources = {
            "stage_1": stage_1,
            "stage_2": stage_2,
            "stage_3": stage_3,
            "noise_clip": noise_clip,
        }
        if not isinstance(variant, Mapping):
            variant = dict.fromkeys((part for part in self.sources if part not in WITHOUT_VARIANT), variant)
        self.variants = {part: variant.get(part) for part in self.sources}
        self._keeps_all: bool | None = None if keep == "auto" else keep == "all"
        self._models: dict[str, Any] = {}

    @classmethod
    def from_pretrained(
        cls,
        source: Source | None = None,
        *,
        stage_2: Source | None = None,
        stage_3: Source | None = None,
        noise_clip: Source | None = None,
        variant: str | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        keep: str = "auto",
        ignore_memory: bool = False,
        text_encoder: str = "auto",
        prompt_cache: PromptCache | str | Path | None = None,
    ) -> Cascade:
        """A cascade from a release's name, a folder or a hub id; None = the embedded one.

        The names are those of `mtl_anagram.releases.RELEASES`: "IF-M", "IF-L", "IF-XL". A folder of that name goes
        before it. A name in the place of stage_2, stage_3 or noise_clip means that release's part, "none"
        leaves a part out. variant: "fp16", or "fp32" = the files without a variant; None = fp16 for what a
        release's name stands for, else fp32.

        A folder holds either `stage_1/` (and `stage_2/`, `stage_3/`, `noise_clip/`, `cascade.json`), as the
        embedded cascade's does, or one release of stage I (`unet/`, `text_encoder/`, `tokenizer/`), as a hub id
        does; `stage_2`, `stage_3` (the x4 upscaler) and `noise_clip` then name the other parts' folders or ids.
        device None = the best there is; dtype None = float16 on CUDA, else float32. The other arguments: as the
        class says. Lazy: only small JSON files are read here.
        """
        found = find_parts(
            embedded_folder() if source is None else source,
            variant,
            stage_2=stage_2,
            stage_3=stage_3,
            noise_clip=noise_clip,
        )
        return cls(
            **found.sources,  # type: ignore[arg-type]
            name=found.name,
            recipe=found.recipe,
            concepts=found.concepts,
            clip_concepts=found.clip_concepts,
            variant=found.variants,
            device=device,
            dtype=dtype,
            keep=keep,
            ignore_memory=ignore_memory,
            text_encoder=text_encoder,
            prompt_cache=prompt_cache,
        )

    @property
    def variant(self) -> str | None:
        """Of stage I's weight files."""
        return self.variants["stage_1"]

    @property
    def has_stage_2(self) -> bool:
        return self.sources["stage_2"] is not None

    @property
    def has_stage_3(self) -> bool:
        return self.sources["stage_3"] is not None

    @property
    def has_noise_clip(self) -> bool:
        return self.sources["noise_clip"] is not None

    @property
    def tokenizer(self) -> T5Tokenizer:
        return self._once("tokenizer", lambda: load_tokenizer(self._source("stage_1")))

    @property
    def text_encoder(self) -> T5Encoder:
        return self._once("text_encoder", self._text_encoder)

    @property
    def unet_1(self) -> UNet:
        return self._once("unet_1", lambda: self._unet("stage_1"))

    @property
    def unet_2(self) -> UNet:
        return self._once("unet_2", lambda: self._unet("stage_2"))

    @property
    def upscaler(self) -> Upscaler:
        """Stage III, whose parts are in turn loaded when first needed."""
        return self._once(
            "upscaler",
            lambda: load_upscaler(
                self._source("stage_3"),
                variant=self.variants["stage_3"],
                dtype=self.dtype,
                device=self.device,
                before=lambda part: self._make_room(next(n for n, p in UPSCALER_PARTS.items() if part in p)),
            ),
        )

    @property
    def noise_clip(self) -> NoiseCLIP:
        # Small beside the UNets, and its cosines decide weights: float32, as in the released code.
        return self._once(
            "noise_clip",
            lambda: load_noise_clip(self._source("noise_clip"), dtype=torch.float32, device=self.device),
        )

    def schedule(self, stage: int, num_inference_steps: int) -> Schedule:
        """Stage 1's or 2's noise schedule, from its scheduler_config.json where the release has one."""
        part = f"stage_{stage}"
        path = optional_file(self._source(part), "scheduler", "scheduler_config.json")
        if path is None:
            return (
                Schedule.stage_1(num_inference_steps) if stage == 1 else Schedule.stage_2(num_inference_steps)
            )
        return read_config(path, lambda config: Schedule.from_config(config, num_inference_steps))

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Prompts -> (text (V, 77, D), null (1, 77, D)) on the cascade's device, in its dtype."""
        texts = [*prompts, ""]
        if self.prompt_cache is None:
            states = self._states(texts)
        else:
            states = self.prompt_cache.states(texts, self._text_identity(), self._states).to(self.device)
        return states[:-1], states[-1:]

    @property
    def keeps_all(self) -> bool:
        """Whether all networks stay in memory; decided for keep="auto" when it is first asked for."""
        if self._keeps_all is None:
            from .planning import keeps_all

            try:
                self._keeps_all = keeps_all(self)
            except AnagramError:  # files that do not load: their loading says it better
                return False
        return self._keeps_all

    def plan(
        self, *, views: int = 2, batch_size: int = 1, size: int | None = None, look_up: bool = True
    ) -> Plan:
        """What the cascade needs and what the machine has: planning.Plan. Loads nothing.

        For batch_size pictures of that many views, stage I at size px (None = what it was trained at).
        Published repositories need no hub; of others config.json is fetched if look_up.
        """
        from .planning import make_plan

        whole_number("views", views, 1)
        whole_number("batch_size", batch_size, 1)
        return make_plan(self, views=views, batch_size=batch_size, size=size, look_up=look_up)

    def check_memory(
        self, *, views: int = 2, batch_size: int = 1, sizes: Sequence[int] | None = None, guided: bool = True
    ) -> None:
        """CapacityError where this machine cannot hold a stage with its activations, unless ignore_memory.

        sizes: the side in px of each stage that will run, None = all stages at the sides they were trained at.
        Of repositories that are no release's, config.json is fetched.
        """
        from .planning import is_small, make_plan

        if self.ignore_memory or is_small(self):
            return
        stages = stages_of(3 if sizes is None else len(sizes))
        if self.prompt_cache is not None:
            stages.remove("text")  # the prompts' states may all be there; else T5's loading checks by itself
        plan = make_plan(
            self,
            views=views,
            batch_size=batch_size,
            size=None if sizes is None else sizes[0],
            guided=guided,
            stages=stages,
            look_up=True,
        )
        plan.check()
        if self._keeps_all is None:
            self._keeps_all = plan.keep == "all"

    def layout(self, stage: int) -> UNet:
        """Stage 1's or 2's UNet without weights, on the meta device: from config.json alone."""
        loaded = self._models.get(f"unet_{stage}")
        return loaded or self._once(f"layout_{stage}", lambda: self._layout(f"stage_{stage}"))

    def prepare(self, stages: int) -> None:
        """Load the UNets of the first stages where all can stay; else check the files of all but the values."""
        for stage in range(1, stages + 1):
            if self.keeps_all:
                getattr(self, f"unet_{stage}")
            else:
                part = f"stage_{stage}"
                check_unet_files(self._source(part), variant=self.variants[part])

    def release(self, *names: str) -> None:
        """Forget models ("text_encoder", "unet_1", ...; none named = all) and give their memory back."""
        for name in names or tuple(self._models):
            if name in UPSCALER_PARTS and "upscaler" in self._models:
                self._models["upscaler"].release(*UPSCALER_PARTS[name])
            self._models.pop(name, None)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def checksums(self) -> dict[str, str]:
        """sha256 of every file that a picture depends on, by part and name (read once, then remembered)."""
        return self._once(
            "checksums",
            lambda: {
                name: self._checksum(path)
                for name, path in sorted(weight_paths(self.sources, self.variants).items())
            },
        )

    def upscaler_checksums(self) -> dict[str, str]:
        """The same for stage III, by itself: pictures that end before it do not depend on it."""
        return self._once(
            "upscaler_checksums",
            lambda: {
                f"stage_3/{name}": self._checksum(p) for name, p in sorted(self.upscaler.files().items())
            },
        )

    def _source(self, part: str) -> Source:
        source = self.sources[part]
        if source is None:
            raise InputError(f"the cascade {self.name} has no {part}: name its folder or hub id with {part}=")
        return source

    @property
    def text_dtype(self) -> torch.dtype | None:
        """What T5's weights are read as, None = as they are stored."""
        # T5's feed-forward overflows in float16; the published fp16 variant keeps that part in float32,
        # other files are read as bfloat16 instead.
        if self.variant is not None:
            return None
        return torch.bfloat16 if self.dtype == torch.float16 else self.dtype

    def _text_encoder(self) -> T5Encoder:
        options: dict[str, Any] = {"variant": self.variant, "dtype": self.text_dtype, "device": self.device}
        if self._streams_text():
            options["streamed"] = True
        return load_t5(self._source("stage_1"), **options)

    @property
    def streams_text(self) -> bool | None:
        """Whether the text encoder runs from its files; None = not decided before its files are looked at."""
        return self._models.get("streams_text") if self.text_mode == "auto" else self.text_mode == "streamed"

    def _streams_text(self) -> bool:
        return self._once(
            "streams_text",
            lambda: streams(
                self.text_mode,
                self._source("stage_1"),
                variant=self.variant,
                dtype=self.text_dtype,
                device=self.device,
            ),
        )

    def _states(self, texts: list[str]) -> Tensor:
        """Texts -> (V, 77, D) on the cascade's device, in its dtype, by T5."""
        ids, mask = self.tokenizer(texts, max_length=MAX_TOKENS)
        return self.text_encoder(ids.to(self.device), mask.to(self.device)).to(self.dtype)

    def _text_identity(self) -> dict[str, str]:
        """What states depend on besides their text: files, lengths, and how they are computed and kept."""
        files = text_files(self._source("stage_1"), self.variant)
        checksums = {name: self._checksum(path) for name, path in files.items()}
        computed = f"{self.text_dtype}, {'streamed' if self._streams_text() else 'whole'}"
        if self.text_dtype is not None:
            computed = str(self.text_dtype)  # the same numbers either way
        return {
            "weights": combined_checksum(checksums),
            "computed": computed,
            "stored": str(self.dtype),
            "tokens": str(MAX_TOKENS),
        }

    def _checksum(self, path: Path) -> str:
        return sha256_of(path) if self.prompt_cache is None else self.prompt_cache.checksum(path, sha256_of)

    def _unet(self, part: str) -> UNet:
        return load_unet(
            self._source(part), variant=self.variants[part], dtype=self.dtype, device=self.device
        )

    def _layout(self, part: str) -> UNet:
        files = open_source(self._source(part), "unet", "config.json")
        config = read_config(require(files, "config.json"), UNetConfig.from_dict)
        with torch.device("meta"):
            return UNet(config)

    def _once(self, name: str, load: Any) -> Any:
        if name not in self._models:
            if name in PLACES or name == "noise_clip":
                self._make_room(name)
            # Weights loaded inside inference_mode could not take part in the anti-segregation's gradient.
            with torch.inference_mode(False), torch.no_grad():
                self._models[name] = load()
        return self._models[name]

    def _make_room(self, name: str) -> None:
        """Before a network is loaded: the machine must be able to hold it; what never works beside it goes."""
        self._source(PLACES.get(name, (name,))[0])  # a part that the cascade has not is an error by itself
        if not self.ignore_memory:
            from .planning import check_network

            check_network(self, name)
        if not self.keeps_all:
            company = {member for stage in STAGES.values() if name in stage for member in stage}
            others = [
                other for other in (*PLACES, "noise_clip") if other not in company and self._holds(other)
            ]
            if others:
                self.release(*others)

    def _holds(self, name: str) -> bool:
        """Whether a network is in memory."""
        upscaler = self._models.get("upscaler")
        if name in UPSCALER_PARTS:
            return upscaler is not None and any(map(upscaler.holds, UPSCALER_PARTS[name]))
        return name in self._models
