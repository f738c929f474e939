"""One release's models: where they come from, where they live, loaded when first needed."""

from __future__ import annotations

import gc
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .devices import resolve_device, resolve_dtype
from .errors import ConfigError, InputError, SourceError
from .models import load_noise_clip, load_t5, load_tokenizer, load_unet
from .models.loading import MERGES, weight_files
from .models.noise_clip import NoiseCLIP
from .models.sources import Folder, Source, open_source, read_config, read_json
from .models.t5 import T5Encoder
from .models.tokenizers import T5Tokenizer
from .models.unet import UNet
from .models.upscaler import Upscaler, load_upscaler
from .sampling import Recipe, Schedule

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

    Attributes: device, dtype (of the networks), recipe (what the cascade's makers recommend), name, and
    has_stage_2, has_stage_3 and has_noise_clip, which say what the cascade holds.
    """

    def __init__(
        self,
        stage_1: Source,
        *,
        stage_2: Source | None = None,
        stage_3: Source | None = None,
        noise_clip: Source | None = None,
        name: str | None = None,
        recipe: Recipe | None = None,
        variant: str | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> None:
        self.device = resolve_device(device)
        # Half precision is what the released weights were published for; CPUs are faster in float32.
        default = torch.float16 if self.device.type == "cuda" else torch.float32
        self.dtype = resolve_dtype(dtype) or default
        self.name = str(stage_1) if name is None else name
        self.recipe = Recipe.released() if recipe is None else recipe
        self.variant = variant
        self._sources = {
            "stage_1": stage_1,
            "stage_2": stage_2,
            "stage_3": stage_3,
            "noise_clip": noise_clip,
        }
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
    ) -> Cascade:
        """A cascade from a folder or a hub id; None = the embedded one.

        A folder holds either `stage_1/` (and `stage_2/`, `stage_3/`, `noise_clip/`, `cascade.json`), as the
        embedded cascade's does, or one release of stage I (`unet/`, `text_encoder/`, `tokenizer/`), as a hub id
        does; `stage_2`, `stage_3` (the x4 upscaler) and `noise_clip` then name the other parts' folders or ids.
        device None = the best there is; dtype None = float16 on CUDA, else float32. Lazy: only small JSON files
        are read here.
        """
        places = {"variant": variant, "device": device, "dtype": dtype}
        parts = {"stage_2": stage_2, "stage_3": stage_3, "noise_clip": noise_clip}
        if source is None:
            source = embedded_folder()
        files = open_source(source, None, "cascade.json")
        if not isinstance(files, Folder):
            return cls(source, **parts, **places)  # type: ignore[arg-type]
        folder = files.path
        about = read_json(folder / "cascade.json") if (folder / "cascade.json").is_file() else {}
        if not (folder / "stage_1").is_dir():
            if not (folder / "unet").is_dir():
                raise SourceError(
                    f"{folder} is no cascade: it has neither stage_1/ nor unet/ ({files.listing()}); give the "
                    "folder of a release"
                )
            return cls(folder, **parts, **places)  # type: ignore[arg-type]
        name = about.get("name", folder.name)
        if not isinstance(name, str):
            raise ConfigError(f"{folder / 'cascade.json'}: name={name!r} must be a string; change it back")
        recipe = None
        if about.get("recipe") is not None:
            recipe = read_config(folder / "cascade.json", lambda content: Recipe.from_dict(content["recipe"]))
        inner = {part: folder / part if (folder / part).is_dir() else None for part in parts}
        return cls(
            folder / "stage_1",
            name=name,
            recipe=recipe,
            **{part: inner[part] if given is None else given for part, given in parts.items()},  # type: ignore[arg-type]
            **places,  # type: ignore[arg-type]
        )

    @property
    def has_stage_2(self) -> bool:
        return self._sources["stage_2"] is not None

    @property
    def has_stage_3(self) -> bool:
        return self._sources["stage_3"] is not None

    @property
    def has_noise_clip(self) -> bool:
        return self._sources["noise_clip"] is not None

    @property
    def tokenizer(self) -> T5Tokenizer:
        return self._once("tokenizer", lambda: load_tokenizer(self._source("stage_1")))

    @property
    def text_encoder(self) -> T5Encoder:
        # T5's feed-forward overflows in float16; the published fp16 variant keeps that part in float32,
        # other files are read as bfloat16 instead.
        keep = self.variant is not None
        dtype = torch.bfloat16 if self.dtype == torch.float16 else self.dtype
        return self._once(
            "text_encoder",
            lambda: load_t5(
                self._source("stage_1"),
                variant=self.variant,
                dtype=None if keep else dtype,
                device=self.device,
            ),
        )

    @property
    def unet_1(self) -> UNet:
        return self._once("unet_1", lambda: self._unet("stage_1"))

    @property
    def unet_2(self) -> UNet:
        return self._once("unet_2", lambda: self._unet("stage_2"))

    @property
    def upscaler(self) -> Upscaler:
        """Stage III, whose parts are in turn loaded when first needed. It has no files of a variant."""
        return self._once(
            "upscaler",
            lambda: load_upscaler(self._source("stage_3"), dtype=self.dtype, device=self.device),
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
        path = self._optional(part, "scheduler", "scheduler_config.json")
        if path is None:
            return (
                Schedule.stage_1(num_inference_steps) if stage == 1 else Schedule.stage_2(num_inference_steps)
            )
        return read_config(path, lambda config: Schedule.from_config(config, num_inference_steps))

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Prompts -> (text (V, 77, D), null (1, 77, D)) on the cascade's device, in its dtype."""
        ids, mask = self.tokenizer([*prompts, ""], max_length=MAX_TOKENS)
        states = self.text_encoder(ids.to(self.device), mask.to(self.device)).to(self.dtype)
        return states[:-1], states[-1:]

    def release(self, *names: str) -> None:
        """Forget models ("text_encoder", "unet_1", ...; none named = all) and give their memory back."""
        for name in names or tuple(self._models):
            self._models.pop(name, None)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def checksums(self) -> dict[str, str]:
        """sha256 of every file that a picture depends on, by part and name (read once, then remembered)."""
        return self._once("checksums", self._checksums)

    def upscaler_checksums(self) -> dict[str, str]:
        """The same for stage III, by itself: pictures that end before it do not depend on it."""
        return self._once(
            "upscaler_checksums",
            lambda: {f"stage_3/{name}": _sha256(p) for name, p in sorted(self.upscaler.files().items())},
        )

    def _source(self, part: str) -> Source:
        source = self._sources[part]
        if source is None:
            raise InputError(f"the cascade {self.name} has no {part}: name its folder or hub id with {part}=")
        return source

    def _optional(self, part: str, subfolder: str, name: str) -> Path | None:
        """A file that a release may lack, with its folder or without, or None."""
        files = open_source(self._source(part), None, name)
        if isinstance(files, Folder) and not (files.path / subfolder).is_dir():
            return files.get(name)
        return open_source(self._source(part), subfolder, name).get(name)

    def _unet(self, part: str) -> UNet:
        return load_unet(self._source(part), variant=self.variant, dtype=self.dtype, device=self.device)

    def _once(self, name: str, load: Any) -> Any:
        if name not in self._models:
            # Weights loaded inside inference_mode could not take part in the anti-segregation's gradient.
            with torch.inference_mode(False), torch.no_grad():
                self._models[name] = load()
        return self._models[name]

    def _checksums(self) -> dict[str, str]:
        found: dict[str, Path] = {}
        for part in ("stage_1", "stage_2"):
            if self._sources[part] is None:
                continue
            models = [("unet", "diffusion_pytorch_model")]
            models += [("text_encoder", "model")] if part == "stage_1" else []
            for subfolder, base in models:
                files = open_source(self._source(part), subfolder, "config.json")
                paths = [files.get("config.json"), *weight_files(files, base, self.variant)]
                found |= {f"{part}/{subfolder}/{p.name}": p for p in paths if p is not None}
            optional = [("scheduler", "scheduler_config.json")]
            optional += [("tokenizer", "spiece.model")] if part == "stage_1" else []
            for subfolder, name in optional:
                path = self._optional(part, subfolder, name)
                if path is not None:
                    found[f"{part}/{subfolder}/{name}"] = path
        if self.has_noise_clip:
            files = open_source(self._source("noise_clip"), None, "clip_image_enc.safetensors")
            groups = [
                [f"{tower}.safetensors", f"{tower}.pt"] for tower in ("clip_image_enc", "clip_text_enc")
            ]
            for names in [*groups, list(MERGES)]:
                path = next((p for p in map(files.get, names) if p is not None), None)
                if path is not None:
                    found[f"noise_clip/{path.name}"] = path
        return {name: _sha256(path) for name, path in sorted(found.items())}


def combined_checksum(checksums: dict[str, str]) -> str:
    """One sha256 for a set of files: of their names and checksums."""
    return hashlib.sha256(json.dumps(checksums, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    blob = path.resolve()
    if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return blob.name  # the hub's cache names large files by their sha256: no need to read 10 GB again
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error}); allow it, or download it again") from error
    return digest.hexdigest()
