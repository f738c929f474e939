"""A plan of a cascade: what its networks weigh on disk and in memory, stage by stage, and whether that fits."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import SourceError, whole_number
from ..files.hub import Files, Folder, Repository, Source, open_source
from ..files.shards import Shards
from . import glide
from .loading import T5_ALIASES, weight_files
from .machine import memory_of
from .releases import NETWORKS, PUBLISHED, STAGES, Network

FITS, TIGHT, STREAMED, TOO_LARGE, UNKNOWN = "fits", "tight", "streamed", "too large", "unknown"
OVERHEAD = {"cpu": 350 << 20, "cuda": 600 << 20, "mps": 350 << 20}  # of a process before its first weight
FIRST_LAYERS = ("conv_in.weight", "encoder.conv_in.weight")
T5_SINGLE = 24 * 4096 * 10240  # parameters of T5-XXL that its fp16 files have in float32
# Bytes of a step's tensors alive at once, per pixel, value of the first width and byte of the dtype, as counted
# on the meta device; in stage I with the anti-segregation's gradient, in stage III the decoder's, which are the most.
PER_VALUE = {"unet_1": 182, "unet_2": 32, "autoencoder_3": 75}


@dataclass(frozen=True)
class PlannedNetwork:
    """One network: bytes of its files, of its weights as they run, of a step's tensors; None = unknown yet."""

    name: str
    source: str
    variant: str | None
    here: bool
    parameters: int | None = None
    disk: int | None = None
    memory: int | None = None
    step: int = 0


@dataclass(frozen=True)
class PlannedStage:
    """Networks in memory together; needed = bytes of the process, the weights and a step's tensors.

    verdict: tight = only when other programs give memory back; streamed = T5 runs from its files, in half a gigabyte.
    """

    name: str
    networks: list[str]
    needed: int | None
    verdict: str


@dataclass(frozen=True)
class Plan:
    """What a cascade needs for so many pictures times views at once, and the device's memory (None = not told)."""

    name: str
    device: str
    dtype: str
    pictures: int
    total: int | None
    free: int | None
    networks: list[PlannedNetwork]
    stages: list[PlannedStage]


def plan(
    sources: Mapping[str, Source | None],
    variants: Mapping[str, str | None],
    *,
    dtype: torch.dtype,
    device: torch.device,
    name: str = "cascade",
    views: int = 2,
    batch_size: int = 1,
    size: int = 64,
) -> Plan:
    """Plan a cascade's work, sources and variants by part, without loading it or asking a hub; size = stage I's in px.

    Parameters and bytes are those in the files' headers where they are here, else the published networks'.
    """
    rows = whole_number("views", views, 1) * whole_number("batch_size", batch_size, 1)
    pixels = whole_number("size", size, 1) ** 2
    worked_on = {"unet_1": rows * pixels, "unet_2": 16 * rows * pixels, "autoencoder_3": 16 * pixels}
    networks = []
    for network in (network for network in NETWORKS if sources.get(network.part) is not None):
        source, variant = str(sources[network.part]), variants.get(network.part) if network.base else None
        networks.append((network, _planned(network, source, variant, dtype, worked_on.get(network.name, 0))))
    total, free = memory_of(device) or (None, None)
    stages = []
    for stage in STAGES:
        members = [found for network, found in networks if stage in network.stages]
        names, weights = [n.name for n in members], [n.memory for n in members if n.memory is not None]
        needed, verdict = None, UNKNOWN
        if members and len(weights) == len(members):
            needed = OVERHEAD.get(device.type, 0) + sum(weights) + max(n.step for n in members)
            if total is not None and free is not None:
                verdict = TOO_LARGE if needed > total else TIGHT if needed > free else FITS
                verdict = STREAMED if stage == "text" and sum(weights) > 0.8 * free else verdict
        if names not in ([], ["noise_clip"]):
            stages.append(PlannedStage(stage, names, needed, verdict))
    kind = str(dtype).removeprefix("torch.")
    return Plan(name, str(device), kind, rows, total, free, [n for _, n in networks], stages)


def _planned(
    network: Network, source: str, variant: str | None, dtype: torch.dtype, pixels: int
) -> PlannedNetwork:
    """One network; pixels: of all pictures that it works on at once."""
    paths, t5 = _paths_here(network, source, variant), network.name == "text_encoder"
    known = PUBLISHED.get(source if network.base else glide.GLIDE, {}).get(network.subfolder)
    if paths and paths[0].suffix == ".safetensors":
        groups = [paths] if network.base else [[path] for path in paths]  # the CLIP's towers share names
        tensors = [item for group in groups for item in Shards(group, aliases=T5_ALIASES).items()]
        parameters, stored = sum(t.numel() for _, t in tensors), sum(t.nbytes for _, t in tensors)
        first = max((t.shape[0] for n, t in tensors if n in FIRST_LAYERS), default=0)
    elif known is not None:
        parameters, first = known
        stored = 4 * parameters if variant is None else 2 * (parameters + T5_SINGLE * t5)
    else:
        return PlannedNetwork(network.name, source, variant, here=False)
    single = not network.base or (network.name == "autoencoder_3" and dtype == torch.float16)
    width = torch.float32.itemsize if single else dtype.itemsize
    memory = stored if t5 and variant is not None else width * parameters
    step = PER_VALUE.get(network.name, 0) * pixels * first * width
    disk = sum(path.stat().st_size for path in paths) or stored
    return PlannedNetwork(network.name, source, variant, bool(paths), parameters, disk, memory, step)


def _paths_here(network: Network, source: str, variant: str | None) -> list[Path]:
    """The weight files of a network that is here with all of them, else []; asks no network."""
    files: Files = Folder(glide.cache_folder())
    if not glide.is_glide(source):
        files = open_source(source, network.subfolder, "config.json")
    if isinstance(files, Repository):
        files.get = files.cached  # type: ignore[method-assign]
    if not network.base:
        towers = [path for names in glide.CLIP_FILES[:2] if (path := glide.first_of(files, names))]
        return towers if len(towers) == 2 else []
    try:
        return weight_files(files, network.base, variant)
    except SourceError:
        return []


def describe(plan: Plan) -> list[str]:
    """A plan as lines of text."""
    form = "{:<14} {:<47} {:>13} {:>9} {:>9}  {}"
    lines = [f"{plan.name}, {plan.dtype} on {plan.device}", ""]
    lines.append(form.format("network", "source", "parameters", "on disk", "in memory", "here"))
    for n in plan.networks:
        source = n.source if n.variant is None else f"{n.source} ({n.variant})"
        count = "?" if n.parameters is None else f"{n.parameters:,}"
        here = "yes" if n.here else "no"
        lines.append(form.format(n.name, source, count, human_bytes(n.disk), human_bytes(n.memory), here))
    lines += ["", f"{'in memory together':<45} {'needed':>9}  on this machine"]
    for stage in plan.stages:
        together = f"{stage.name}: {', '.join(stage.networks)}"
        lines.append(f"{together:<45} {human_bytes(stage.needed):>9}  {stage.verdict}")
    if plan.total is not None:
        total, free = human_bytes(plan.total), human_bytes(plan.free)
        lines += ["", f"this machine has {total}, of which {free} are free"]
    lines.append(f"needed: the process, the weights, and at most what a step of {plan.pictures} views takes")
    return lines


def human_bytes(count: int | None) -> str:
    """Bytes for people, "?" for None; GB and MB are 10^9 and 10^6."""
    if count is None:
        return "?"
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
