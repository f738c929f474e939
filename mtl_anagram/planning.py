"""A plan of a cascade: what its networks weigh on disk and in memory, stage by stage, and whether that fits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .errors import AnagramError, CapacityError
from .memory import (
    Machine,
    machine_of,
    parameters_of,
    text_activations,
    unet_activations,
    upscaler_activations,
)
from .models import glide
from .models.configs import UNetConfig
from .models.loading import index_names, weight_files
from .models.shards import Shards
from .models.sources import Folder, Repository, Source, open_source, read_config, read_json, require
from .models.t5 import T5Encoder
from .models.t5_config import T5Config
from .models.t5_streamed import streamed_bytes
from .models.unet import UNet
from .models.upscaler import (
    AutoencoderConfig,
    CLIPTextConfig,
    CLIPTextTower,
    LatentDecoder,
    LatentEncoder,
    UpscalerUNet,
    UpscalerUNetConfig,
)
from .releases import PLACES, STAGES, Network, NetworkConfig, layout_of
from .text import is_too_large

if TYPE_CHECKING:
    from .cascade import Cascade

# Beyond the tensors that a plan counts, the C library keeps some freed memory: so much of what is free may be
# planned with before keep="auto" releases one stage when the next is loaded.
KEEP_SHARE = 0.75
# Bytes that a process takes before the first weight: the interpreter with torch, or a CUDA context.
OVERHEAD = {"cpu": 350 << 20, "cuda": 600 << 20, "mps": 350 << 20}
# How a network's config.json is read.
CONFIGS: dict[str, Any] = {
    "text_encoder": T5Config,
    "unet_1": UNetConfig,
    "unet_2": UNetConfig,
    "text_encoder_3": CLIPTextConfig,
    "unet_3": UpscalerUNetConfig,
    "autoencoder_3": AutoencoderConfig,
}
FITS, TIGHT, TOO_LARGE, UNKNOWN = "fits", "tight", "too large", "unknown"


@dataclass(frozen=True)
class PlannedFile:
    """A file by its path in the source; bytes None = not known before it is downloaded."""

    path: str
    bytes: int | None
    present: bool


@dataclass(frozen=True)
class PlannedNetwork:
    """One network. disk: bytes of its weight files; memory: of its weights in the dtype they run in.

    streamed: it runs from its files, and memory is what of it is there at a time.
    """

    name: str
    source: str
    variant: str | None
    parameters: int | None
    disk: int | None
    memory: int | None
    files: list[PlannedFile]
    config: NetworkConfig | None
    streamed: bool = False


@dataclass(frozen=True)
class PlannedStage:
    """Networks that are in memory at the same time; needed = overhead + weights + activations, in bytes."""

    name: str
    networks: list[str]
    weights: int | None
    activations: int | None
    needed: int | None
    verdict: str


@dataclass(frozen=True)
class Plan:
    """What a cascade needs for `batch_size` pictures of `views` views each, and what the machine has.

    together: bytes needed where all networks stay in memory, None = not known. keep: "all" or "one", what the
    cascade does. A verdict is "fits", "tight" (only when other programs give memory back), "too large", or
    "unknown" (the hub has not been asked).
    """

    name: str
    device: str
    dtype: str
    batch_size: int
    views: int
    machine: Machine | None
    networks: list[PlannedNetwork]
    stages: list[PlannedStage]
    together: int | None
    keep: str

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values; a network's config is that of its config.json."""
        content = asdict(self)
        for network, planned in zip(content["networks"], self.networks, strict=True):
            network["config"] = None if planned.config is None else planned.config.to_dict()
        return content

    def check(self) -> None:
        """CapacityError for the first stage that this machine cannot hold."""
        if self.machine is None:
            return
        total = human_bytes(self.machine.total)
        for stage in self.stages:
            if stage.verdict == TOO_LARGE:
                needed, weights = human_bytes(stage.needed), human_bytes(stage.weights)
                raise CapacityError(
                    f"{self.name}: {stage.name} needs about {needed} on {self.device} ({weights} of weights in "
                    f"{self.dtype}, {human_bytes(stage.activations)} of activations for {self.batch_size} pictures of "
                    f"{self.views} views), and there are {total}: take a smaller release, a dtype of half the size "
                    "(float16 on a GPU, bfloat16 on a CPU), a smaller batch or another device; ignore_memory=True "
                    "(--ignore-memory) goes on all the same"
                )
        if self.keep == "all" and (self.together or 0) > self.machine.total:
            raise CapacityError(
                f"{self.name}: all networks together need about {human_bytes(self.together)} on {self.device}, and "
                f'there are {total}: keep="one" (--keep one) has one stage in memory at a time'
            )


def make_plan(
    cascade: Cascade,
    *,
    views: int = 2,
    batch_size: int = 1,
    size: int | None = None,
    guided: bool = True,
    stages: Sequence[str] | None = None,
    look_up: bool = False,
) -> Plan:
    """Plan a cascade's work without loading it; nothing is downloaded, unless look_up, and then config.json.

    Parameters and bytes are the files' own where they are on this machine (read from their headers), else those
    written down for the published repositories. The activations' peak is that of one step of the network on
    the meta device, where every tensor is counted and none is filled. size: stage I's side in px, None = what
    it was trained at. guided: with the anti-segregation's gradient. stages: names of STAGES, None = all that
    the cascade has.
    """
    wanted = {member for stage in (STAGES if stages is None else stages) for member in STAGES[stage]}
    planned = [plan_network(cascade, name, look_up and name in wanted) for name in _names(cascade)]
    networks = [network for network in planned if network is not None]
    by_name = {network.name: network for network in networks}
    machine = machine_of(cascade.device)
    overhead = OVERHEAD.get(cascade.device.type, 0)
    made: list[PlannedStage] = []
    for stage, members in STAGES.items():
        main = by_name.get(members[0])
        if main is None or (stages is not None and stage not in stages):
            continue
        present = [by_name[name] for name in members if name in by_name]
        weights = _total([network.memory for network in present])
        activations = None
        if isinstance(main.config, T5Config):
            activations = text_activations(T5Encoder, main.config, rows=views + 1)
        elif isinstance(main.config, CLIPTextConfig):
            activations = text_activations(CLIPTextTower, main.config, rows=views + 1)
        elif isinstance(main.config, UpscalerUNetConfig):
            vae = by_name["autoencoder_3"].config
            if isinstance(vae, AutoencoderConfig):
                first = by_name["unet_1"].config
                known = first.sample_size if isinstance(first, UNetConfig) else None
                activations = upscaler_activations(
                    main.config, vae, size=4 * (size or known or 64), dtype=cascade.dtype
                )
        elif isinstance(main.config, UNetConfig):
            side = _side(by_name, main.config, size)
            guide = guided and views > 1 and stage == "stage I"
            activations = unet_activations(
                main.config, rows=batch_size * views, size=side, guided=guide, dtype=cascade.dtype
            )
        needed = _total([weights, activations, overhead])
        names = [network.name for network in present]
        made.append(PlannedStage(stage, names, weights, activations, needed, _verdict(needed, machine)))
    together = _total(
        [overhead, *(n.memory for n in networks), max((s.activations or 0 for s in made), default=0)]
    )
    fits = together is not None and machine is not None and together <= KEEP_SHARE * machine.free
    keep = cascade.keep if cascade.keep != "auto" else ("all" if fits else "one")
    dtype = str(cascade.dtype).removeprefix("torch.")
    return Plan(
        cascade.name, str(cascade.device), dtype, batch_size, views, machine, networks, made, together, keep
    )


def plan_network(cascade: Cascade, name: str, look_up: bool = False) -> PlannedNetwork | None:
    """One network of a cascade ("text_encoder", "unet_1", ...), or None where the cascade has it not."""
    part, subfolder = PLACES.get(name, ("noise_clip", ""))
    source, variant = cascade.sources[part], cascade.variants[part]
    if source is None:
        return None
    if name == "noise_clip":
        return _plan_clip(source)
    network = next(n for n in layout_of(part, source).networks if n.subfolder == subfolder)
    files = open_source(source, subfolder, "config.json")
    parameters: int | None
    disk: int | None
    tensors: int | None
    if isinstance(files, Folder):
        config = read_config(require(files, "config.json"), CONFIGS[name].from_dict)
        paths = weight_files(files, network.base, variant)
        parameters, disk, tensors = _measured(paths)
        listed = [files.path / "config.json", *paths]
        planned = [PlannedFile(f"{subfolder}/{p.name}", p.stat().st_size, True) for p in listed]
    else:
        config = _hub_config(files, network, name, look_up)
        as_stated = config == network.config  # else the repository's own config.json, which goes first
        parameters = network.parameters if as_stated else _count(config)
        disk = tensors = network.tensor_bytes(variant) if as_stated else None
        names = _hub_names(files, network, variant)
        single = tensors if len(names) == 1 else None
        planned = [_cached(files, f"{subfolder}/config.json", None)]
        planned += [_cached(files, path, single) for path in names]
    memory = _in_memory(cascade, name, variant, parameters, tensors)
    streamed = isinstance(config, T5Config) and _streams(cascade, memory)
    if isinstance(config, T5Config) and streamed:
        memory = streamed_bytes(config) if memory is None else min(memory, streamed_bytes(config))
    return PlannedNetwork(name, str(source), variant, parameters, disk, memory, planned, config, streamed)


def check_network(cascade: Cascade, name: str) -> None:
    """CapacityError where this machine cannot hold a network's weights; what is not known passes."""
    try:
        network, machine = plan_network(cascade, name), machine_of(cascade.device)
    except AnagramError:  # files that do not load: their loading says it better
        return
    if network is None or network.memory is None or machine is None:
        return
    needed = OVERHEAD.get(cascade.device.type, 0) + network.memory
    if needed > machine.total:
        weights = PlannedStage(name, [name], network.memory, 0, needed, TOO_LARGE)
        dtype = str(cascade.dtype).removeprefix("torch.")
        device = str(cascade.device)
        Plan(cascade.name, device, dtype, 1, 1, machine, [network], [weights], needed, cascade.keep).check()


def is_small(cascade: Cascade) -> bool:
    """Whether twenty times a cascade's weights are free, so that no plan has to be made."""
    machine = machine_of(cascade.device)
    planned = [plan_network(cascade, name) for name in _names(cascade)]
    weights = _total([network.memory for network in planned if network is not None])
    overhead = OVERHEAD.get(cascade.device.type, 0)
    return machine is not None and weights is not None and overhead + 20 * weights < machine.free


def keeps_all(cascade: Cascade) -> bool:
    """Whether all networks of a cascade can stay in memory: what keep="auto" comes to on this machine, now."""
    return is_small(cascade) or make_plan(cascade).keep == "all"


def _names(cascade: Cascade) -> list[str]:
    return [
        name for name in (*PLACES, "noise_clip") if cascade.sources[PLACES.get(name, (name,))[0]] is not None
    ]


def _in_memory(
    cascade: Cascade, name: str, variant: str | None, parameters: int | None, tensors: int | None
) -> int | None:
    """Bytes of a network's weights once loaded."""
    if name == "text_encoder" and variant is not None:
        return tensors  # its files mix dtypes on purpose, and are taken as they are
    dtype = cascade.dtype
    if dtype == torch.float16 and name in ("text_encoder", "autoencoder_3"):  # what float16 would overflow in
        dtype = torch.bfloat16 if name == "text_encoder" else torch.float32
    return None if parameters is None else parameters * dtype.itemsize


def _streams(cascade: Cascade, whole: int | None) -> bool:
    """Whether the text encoder, of so many bytes, runs from its files: as was decided, else as it would be now."""
    decided = cascade.streams_text
    if decided is not None:
        return decided
    machine = machine_of(cascade.device)
    return whole is not None and machine is not None and is_too_large(whole, machine.free)


def _measured(paths: Sequence[Path]) -> tuple[int, int, int]:
    """Parameters, bytes of the files, and bytes of the tensors, from the files' headers."""
    entries = dict(Shards(paths))
    if "shared.weight" in entries:
        entries.pop("encoder.embed_tokens.weight", None)  # the same numbers once more
    parameters = sum(math.prod(entry.shape) for entry in entries.values())
    tensors = sum(entry.nbytes for entry in entries.values())
    return parameters, sum(path.stat().st_size for path in paths), tensors


def _hub_config(files: Repository, network: Network, name: str, look_up: bool) -> NetworkConfig | None:
    """The repository's own config.json where it is cached, or may be fetched; else what is known of it."""
    path = files.cached("config.json")
    if path is None and look_up and network.config is None:
        path = require(files, "config.json")
    if path is None:
        return network.config
    return read_config(path, CONFIGS[name].from_dict)


def _hub_names(files: Repository, network: Network, variant: str | None) -> list[str]:
    """The weight files of a repository: as stated for the published ones, else by an index if one is cached."""
    if network.parameters is None:
        for name in index_names(network.base, variant):
            index = files.cached(name)
            weight_map = None if index is None else read_json(index).get("weight_map")
            if isinstance(weight_map, dict):
                return [f"{network.subfolder}/{file}" for file in (name, *sorted(set(weight_map.values())))]
    return network.names(variant)


def _count(config: NetworkConfig | None) -> int | None:
    if config is None:
        return None
    build: dict[type, Any] = {
        T5Config: T5Encoder,
        UNetConfig: UNet,
        CLIPTextConfig: CLIPTextTower,
        UpscalerUNetConfig: UpscalerUNet,
        AutoencoderConfig: lambda c: nn.ModuleList([LatentDecoder(c), LatentEncoder(c)]),
    }
    return parameters_of(lambda: build[type(config)](config))


def _cached(files: Repository, path: str, size: int | None) -> PlannedFile:
    found = files.cached(path.rpartition("/")[2])
    return PlannedFile(path, size if found is None else found.stat().st_size, found is not None)


def _plan_clip(source: Source) -> PlannedNetwork:
    """GLIDE's own from what is known of it; another's from its files. It runs in float32."""
    total = sum(glide.PARAMETERS.values())
    towers = [f"{tower}.safetensors" for tower in glide.TOWERS]
    if glide.is_glide(source):
        folder = glide.cache_folder()
        lacking = glide.missing(folder)
        sizes = [4 * glide.PARAMETERS[tower] for tower in glide.TOWERS]
        planned = [
            PlannedFile(name, size, name not in lacking)
            for name, size in zip([*towers, glide.MERGES[0]], [*sizes, None], strict=True)
        ]
        return PlannedNetwork("noise_clip", str(source), None, total, 4 * total, 4 * total, planned, None)
    files = open_source(source, None, towers[0])
    if not isinstance(files, Folder):
        unknown = [PlannedFile(name, None, files.cached(name) is not None) for name in towers]
        return PlannedNetwork("noise_clip", str(source), None, None, None, None, unknown, None)
    paths = [files.get(name) or files.get(name.replace(".safetensors", ".pt")) for name in towers]
    found = [path for path in paths if path is not None]
    planned = [PlannedFile(p.name, p.stat().st_size, True) for p in found]
    planned += [
        PlannedFile(name, None, False) for name, path in zip(towers, paths, strict=True) if path is None
    ]
    parameters = disk = None
    if len(found) == len(towers) and all(path.suffix == ".safetensors" for path in found):
        measured = [_measured([path]) for path in found]  # each a model: the towers share names
        parameters, disk = sum(m[0] for m in measured), sum(m[1] for m in measured)
    memory = None if parameters is None else 4 * parameters
    return PlannedNetwork("noise_clip", str(source), None, parameters, disk, memory, planned, None)


def _side(networks: dict[str, PlannedNetwork], config: UNetConfig, size: int | None) -> int:
    """The side in px that a stage works at: stage I's size, four times that in stage II."""
    if config.class_embed_type is None:
        return size or config.sample_size or 64
    if size is not None:
        return 4 * size
    first = networks["unet_1"].config
    side = first.sample_size if isinstance(first, UNetConfig) else None
    return 4 * side if side is not None else config.sample_size or 256


def _verdict(needed: int | None, machine: Machine | None) -> str:
    if needed is None or machine is None:
        return UNKNOWN
    if needed > machine.total:
        return TOO_LARGE
    return FITS if needed <= machine.free else TIGHT


def _total(values: Sequence[int | None]) -> int | None:
    return None if any(value is None for value in values) else sum(value or 0 for value in values)


def human_bytes(count: int | None) -> str:
    """Bytes for people, "?" for None; GB and MB are 10^9 and 10^6."""
    if count is None:
        return "?"
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
