"""Which networks a cascade has, where their files lie, and what a release's name or a folder stands for."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import SourceError, read_fields
from ..files.hub import Folder, Repository, Source, open_source, read_config, require
from .glide import GLIDE, PARAMETERS, clip_files, open_noise_clip
from .loading import TEXT_BASE, UNET_BASE, weight_files

PARTS = ("stage_1", "stage_2", "stage_3", "noise_clip")
UP_TO_STAGE_2 = ("stage_1", "stage_2", "noise_clip")  # the parts that pictures up to there depend on
FULL_ONLY = ("stage_3",)  # published in one precision: no variant
NONE = "none"  # in the place of a source: leave this part out
# The published code of the method runs in half precision, and the fp16 files are half of the bytes.
DEFAULT_VARIANT, FULL = "fp16", "fp32"


class Network(NamedTuple):
    """One network: its weight files, named by base, and config.json in part/subfolder; the noise-aware CLIP has others.

    stages: when it works; all of a stage are in memory together.
    """

    name: str
    part: str
    subfolder: str
    base: str
    stages: tuple[str, ...]


STAGES = ("text", "stage I", "stage II", "text III", "stage III")
NETWORKS = (
    Network("text_encoder", "stage_1", "text_encoder", TEXT_BASE, ("text",)),
    Network("unet_1", "stage_1", "unet", UNET_BASE, ("stage I",)),
    Network("unet_2", "stage_2", "unet", UNET_BASE, ("stage II",)),
    Network("text_encoder_3", "stage_3", "text_encoder", TEXT_BASE, ("text III", "stage III")),
    Network("unet_3", "stage_3", "unet", UNET_BASE, ("stage III",)),
    Network("autoencoder_3", "stage_3", "vae", UNET_BASE, ("stage III",)),
    Network("noise_clip", "noise_clip", "", "", STAGES[1:]),
)
SCHEDULER = "scheduler/scheduler_config.json"
# What else a part's repository or folder holds that is read: True = it must be there, or, for all of these are a
# tokenizer's, in their place the one file that newer libraries save.
TOKENIZER_JSON = "tokenizer/tokenizer.json"
SMALL_FILES: dict[str, dict[str, bool]] = {
    "stage_1": {"tokenizer/spiece.model": True, SCHEDULER: False},
    "stage_2": {SCHEDULER: False},
    "stage_3": {
        **dict.fromkeys(("tokenizer/merges.txt", "tokenizer/vocab.json"), True),
        **dict.fromkeys(("tokenizer/special_tokens_map.json", SCHEDULER), False),
        **dict.fromkeys(("low_res_scheduler/scheduler_config.json", "model_index.json"), False),
    },
    "noise_clip": {},
}
X4 = "stabilityai/stable-diffusion-x4-upscaler"
RELEASES: dict[str, dict[str, str]] = {
    name: {"stage_1": f"DeepFloyd/IF-I-{one}-v1.0", "stage_2": f"DeepFloyd/IF-II-{two}-v1.0", "stage_3": X4,
           "noise_clip": GLIDE}
    for name, one, two in (("IF-M", "M", "M"), ("IF-L", "L", "L"), ("IF-XL", "XL", "L"))
}  # fmt: skip
# Parameters and first width of the published networks, so that a plan needs no hub; docs/releases.md has the sources.
T5_XXL = {"text_encoder": (4_762_310_656, 0)}
PUBLISHED: dict[str, dict[str, tuple[int, int]]] = {
    "DeepFloyd/IF-I-M-v1.0": {**T5_XXL, "unet": (371_605_830, 192)},
    "DeepFloyd/IF-I-L-v1.0": {**T5_XXL, "unet": (935_365_830, 320)},
    "DeepFloyd/IF-I-XL-v1.0": {**T5_XXL, "unet": (4_304_695_110, 704)},
    "DeepFloyd/IF-II-M-v1.0": {"unet": (461_064_198, 128)},
    "DeepFloyd/IF-II-L-v1.0": {"unet": (1_243_277_190, 160)},
    X4: {"unet": (473_398_020, 256), "vae": (55_325_927, 128), "text_encoder": (340_387_840, 0)},
    GLIDE: {"": (sum(PARAMETERS.values()), 0)},
}


@dataclass(frozen=True)
class Parts:
    """Where a cascade's parts are, and what its makers say of it in cascade.json.

    sources, variants: by part, None = no such part, or files without a variant. recipe: a Recipe's fields.
    concepts, clip_concepts, styles: what the UNets and the noise-aware CLIP have learnt, () = not said.
    """

    sources: dict[str, Source | None]
    variants: dict[str, str | None]
    name: str | None = None
    recipe: dict[str, Any] | None = None
    concepts: tuple[str, ...] = ()
    clip_concepts: tuple[str, ...] = ()
    styles: tuple[str, ...] = ()


def find_parts(
    source: Source, variant: str | None = None, *, stage_2: Source | None = None, stage_3: Source | None = None,
    noise_clip: Source | None = None,
) -> Parts:  # fmt: skip
    """Resolve a cascade's source (a release's name, a folder or a hub id) and the parts named beside it.

    A part that is None is the source's own; "none" leaves it out; a release's name means that release's part. variant:
    of all parts' files; None = what the folder's cascade.json says, fp16 for what comes by a release's name, else
    the files without a variant; "fp32" = those for all.
    """
    own, about = _own_parts(source)
    stored = about.pop("variants", {})
    named = {"stage_2": stage_2, "stage_3": stage_3, "noise_clip": noise_clip}
    given = own | {part: value for part, value in named.items() if value is not None}
    sources: dict[str, Source | None] = {}
    variants: dict[str, str | None] = {}
    for part in PARTS:
        value = given.get(part)
        left_out = value == NONE and not Path(NONE).is_dir()
        released = _is_release(value)
        sources[part] = None if left_out else RELEASES[str(value)][part] if released else value
        default = DEFAULT_VARIANT if released else stored.get(part) if value == own.get(part) else None
        chosen = default if variant is None else variant
        variants[part] = None if chosen == FULL or part in FULL_ONLY else chosen
    if stage_3 is None and sources["stage_2"] is None:
        sources["stage_3"] = None  # it enlarges stage II's pictures
    return Parts(sources, variants, **about)


def _is_release(source: Source | None) -> bool:
    """Whether a source is a release's name; a folder of that name, seen from here, goes before it."""
    return isinstance(source, str) and source in RELEASES and not Path(source).is_dir()


def _own_parts(source: Source) -> tuple[dict[str, Source], dict[str, Any]]:
    """A source's own parts, and what the cascade.json of a whole cascade's folder says."""
    if _is_release(source):
        return dict.fromkeys(PARTS, source), {"name": source}
    try:
        files = open_source(source, None, "cascade.json")
    except SourceError as error:
        close = difflib.get_close_matches(str(source).upper(), RELEASES, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise SourceError(f"{error}. Releases known by name: {', '.join(RELEASES)}{hint}") from None
    if isinstance(files, Repository):
        return {"stage_1": source}, {}
    found: dict[str, Source] = {part: files.path / part for part in PARTS if (files.path / part).is_dir()}
    if "stage_1" in found:
        path = files.path / "cascade.json"
        return found, {"name": files.path.name} | (read_config(path, _about) if path.is_file() else {})
    if (files.path / "unet").is_dir():
        return {"stage_1": files.path}, {}
    said = f"it has neither stage_1/ nor unet/ ({files.listing()})"
    raise SourceError(f"{files} is no cascade: {said}; give a release's folder")


def _about(content: dict[str, Any]) -> dict[str, Any]:
    """A cascade.json's content: the last fields of Parts, and "variants", by part that of its files."""
    names = tuple[str, ...]
    kinds = {"name": str, "recipe": dict | None, "concepts": names, "clip_concepts": names, "styles": names}
    about = read_fields(content, owner="a cascade", read={**kinds, "variants": dict}, unused=None)
    variants = {f"variants.{part}": value for part, value in about.get("variants", {}).items()}
    read_fields(variants, owner="a cascade", read=dict.fromkeys(variants, str | None))
    return about


def network_files(network: Network, source: Source, variant: str | None, *, fetch: bool = True) -> list[Path]:
    """A network's config and weight files, fetched if they are not here; SourceError where one is missing."""
    if not network.base:
        return clip_files(open_noise_clip(source, fetch=fetch))
    files = open_source(source, network.subfolder, "config.json", fetch=fetch)
    return [require(files, "config.json"), *weight_files(files, network.base, variant)]


def part_files(source: Source, part: str, variant: str | None) -> dict[str, Path]:
    """One part's files that pictures depend on, by name, fetched if they are not here; SourceError for one missing."""
    # model_index.json, which lies in no folder, holds a limit: it changes no picture.
    found = {name: optional_file(source, *name.split("/")) for name in SMALL_FILES[part] if "/" in name}
    for network in (network for network in NETWORKS if network.part == part):
        paths = network_files(network, source, variant)
        found |= {f"{network.subfolder}/{path.name}".lstrip("/"): path for path in paths}
    if absent := [name for name, needed in SMALL_FILES[part].items() if needed and found[name] is None]:
        found[TOKENIZER_JSON] = optional_file(source, *TOKENIZER_JSON.split("/"))
    if absent and found[TOKENIZER_JSON] is None:
        raise SourceError(f"{source} has no {absent[0]}: give a whole release, or unset HF_HUB_OFFLINE once")
    return {name: path for name, path in found.items() if path is not None}


def weight_paths(
    sources: Mapping[str, Source | None], variants: Mapping[str, str | None], parts: Iterable[str]
) -> dict[str, Path]:
    """`part_files` of several parts, by part and name."""
    given = {part: source for part in parts if (source := sources.get(part)) is not None}
    found = {part: part_files(source, part, variants.get(part)) for part, source in given.items()}
    return {f"{part}/{name}": path for part, files in found.items() for name, path in files.items()}


def optional_file(source: Source, subfolder: str, name: str) -> Path | None:
    """A file that a release may lack, with its folder or without, or None; offline, None too if it is not here."""
    from huggingface_hub import constants

    files = open_source(source, None, name, fetch=not constants.HF_HUB_OFFLINE)
    if not isinstance(files, Folder) or (files.path / subfolder).is_dir():
        files = open_source(source, subfolder, name, fetch=not constants.HF_HUB_OFFLINE)
    return files.get(name)
