"""A plan of a cascade: what its networks weigh on disk and in memory, stage by stage, and whether that fits."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..errors import SourceError, whole_number
from ..files.hub import Source
from ..files.shards import Shards
from .loading import T5_ALIASES
from .machine import SHARE, memory_of
from .releases import GLIDE, NETWORKS, PUBLISHED, STAGES, Network, network_files

# Tight: only when other programs give memory back. Streamed: T5 runs from its files.
FITS, TIGHT, STREAMED, TOO_LARGE, UNKNOWN = "fits", "tight", "streamed", "too large", "unknown"
OVERHEAD = {"cpu": 350 << 20, "cuda": 600 << 20, "mps": 350 << 20}  # of a process before its first weight
STREAMING = 550 << 20  # of T5-XXL run from its files, measured
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
    """Networks in memory together, and the bytes of process, weights and a step's tensors (None = unknown yet)."""

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
    sources: Mapping[str, Source | None], variants: Mapping[str, str | None], *, dtype: torch.dtype,
    device: torch.device, name: str = "cascade", views: int = 2, batch_size: int = 1, size: int = 64,
) -> Plan:  # fmt: skip
    """Plan a cascade's work from its files' headers, else published figures, asking no hub; size: stage I's in px."""
    rows = whole_number("views", views, 1) * whole_number("batch_size", batch_size, 1)
    area = whole_number("size", size, 1) ** 2
    pixels = {"unet_1": rows * area, "unet_2": 16 * rows * area, "autoencoder_3": 16 * area}
    networks = {
        network: _planned(network, source, variants.get(network.part), dtype, pixels.get(network.name, 0))
        for network in NETWORKS
        if (source := sources.get(network.part)) is not None
    }
    total, free = memory_of(device) or (None, None)
    stages = []
    for stage in STAGES:
        members = [found for network, found in networks.items() if stage in network.stages]
        known, verdict = all(n.memory is not None for n in members), UNKNOWN
        weights = sum(n.memory or 0 for n in members)
        needed = OVERHEAD[device.type] + weights + max((n.step for n in members), default=0)
        if known and total is not None and free is not None:
            verdict = TOO_LARGE if needed > total else TIGHT if needed > free else FITS
            if stage == "text" and sum(n.disk or 0 for n in members) > SHARE * free:
                needed, verdict = OVERHEAD[device.type] + STREAMING, STREAMED
        if (names := [n.name for n in members]) not in ([], ["noise_clip"]):
            stages.append(PlannedStage(stage, names, needed if known else None, verdict))
    about = name, str(device), str(dtype).removeprefix("torch."), rows, total, free
    return Plan(*about, list(networks.values()), stages)


def _planned(
    network: Network, source: Source, variant: str | None, dtype: torch.dtype, pixels: int
) -> PlannedNetwork:
    """One network; pixels: of all pictures that it works on at once."""
    variant, t5 = variant if network.base else None, network.name == "text_encoder"
    try:
        paths = network_files(network, source, variant, fetch=False)
    except SourceError:
        paths = []
    files = [path for path in paths if path.suffix in (".safetensors", ".pt")]
    known = PUBLISHED.get(str(source) if network.base else GLIDE, {}).get(network.subfolder)
    if {path.suffix for path in files} == {".safetensors"}:  # each by itself: the CLIP's towers share names
        tensors = [item for path in files for item in Shards([path], aliases=T5_ALIASES).items()]
        parameters, stored = sum(t.numel() for _, t in tensors), sum(t.nbytes for _, t in tensors)
        first = max((t.shape[0] for n, t in tensors if t.ndim and n.endswith("conv_in.weight")), default=0)
    elif known is not None:
        parameters, first = known
        stored = 4 * parameters if variant is None else 2 * (parameters + T5_SINGLE * t5)
    else:
        return PlannedNetwork(network.name, str(source), variant, bool(paths))
    single = not network.base or (network.name == "autoencoder_3" and dtype == torch.float16)
    width = torch.float32.itemsize if single else dtype.itemsize
    memory = stored if t5 and variant is not None else width * parameters
    step = PER_VALUE.get(network.name, 0) * pixels * first * width
    disk = sum(path.stat().st_size for path in files) or stored
    return PlannedNetwork(network.name, str(source), variant, bool(paths), parameters, disk, memory, step)


def describe(plan: Plan) -> list[str]:
    """A plan as lines of text."""
    form = "{:<14} {:<47} {:>13} {:>9} {:>9}  {}"
    title = form.format("network", "source", "parameters", "on disk", "in memory", "here")
    lines = [f"{plan.name}, {plan.dtype} on {plan.device}", "", title]
    for n in plan.networks:
        source = n.source if n.variant is None else f"{n.source} ({n.variant})"
        count, here = "?" if n.parameters is None else f"{n.parameters:,}", "yes" if n.here else "no"
        lines.append(form.format(n.name, source, count, human_bytes(n.disk), human_bytes(n.memory), here))
    lines += ["", f"{'in memory together':<60} {'needed':>9}  on this machine"]
    for stage in plan.stages:
        members = f"{stage.name}: {', '.join(stage.networks)}"
        lines.append(f"{members:<60} {human_bytes(stage.needed):>9}  {stage.verdict}")
    if plan.total is not None:
        total, free = human_bytes(plan.total), human_bytes(plan.free)
        lines += ["", f"this machine has {total}, of which {free} are free"]
    lines.append(f"needed: the process, the weights, and at most what a step of {plan.pictures} views takes")
    return lines


def human_bytes(count: int | None) -> str:
    """Bytes for people, "?" for None; GB and MB are 10^9 and 10^6."""
    return "?" if count is None else f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
