"""What the benchmarks share: fresh processes, Markdown rows, the machine's rates, networks of a release's size."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
Figures = dict[str, Any]


def fresh(*command: object, cwd: Path = ROOT, env: dict[str, str] | None = None) -> Figures:
    """A command's own figures: clock, user and system seconds, peak MiB, and the JSON object of its last line."""
    begin = time.perf_counter()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=cwd,
            stdout=out,
            stderr=errors,
            env={**os.environ, **(env or {})},
        )
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        figures = {"clock": time.perf_counter() - begin, "user": used.ru_utime, "system": used.ru_stime}
        figures |= {"peak": used.ru_maxrss / 1024, "begin": begin}
        for file in (out, errors):
            file.seek(0)
        if process.returncode:
            raise SystemExit(f"{command} failed:\n{errors.read().decode()[-4000:]}")
        last = (out.read().decode().splitlines() or [""])[-1]
    return figures | (json.loads(last) if last.startswith("{") else {})


def peak() -> float:
    """This process's largest resident memory, MiB. (What `wait4` says of a child is at least its parent's.)"""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024


def child(module: str, *words: object) -> Figures:
    """`fresh` of a benchmark that runs itself with --child."""
    return fresh(sys.executable, "-m", f"benchmarks.{module}", *words)


def in_turns(kinds: Sequence[str], rounds: int, run: Callable[[str], Figures]) -> dict[str, Figures]:
    """Each kind's median figures; the kinds take turns, so that what the machine does meanwhile meets all."""
    found: dict[str, list[Figures]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind in kinds:
            found[kind].append(run(kind))
    numbers = {
        kind: [n for n, v in rows[0].items() if isinstance(v, int | float)] for kind, rows in found.items()
    }
    return {
        kind: rows[-1] | {name: statistics.median(row[name] for row in rows) for name in numbers[kind]}
        for kind, rows in found.items()
    }


def say(*cells: object) -> None:
    """A row of a Markdown table."""
    print("| " + " | ".join(number(cell) for cell in cells) + " |", flush=True)


def head(*cells: str) -> None:
    print()
    say(*cells)
    print("|" + "---|" * len(cells))


def number(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def compare(found: dict[str, Figures], rows: dict[str, str]) -> None:
    """A table of two kinds, the first ours, with the second over the first."""
    ours, peer = found
    head("", ours, peer, f"{peer} / {ours}")
    for name, title in rows.items():
        a, b = found[ours][name], found[peer][name]
        say(title, a, b, b / a)


def synchronized(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()


def timed(work: Callable[[], object], device: str = "cpu", seconds: float = 0.0) -> float:
    """Seconds a call takes; the mean of as many as fill `seconds`."""
    calls = 0
    synchronized(device)
    begin = time.perf_counter()
    while calls == 0 or time.perf_counter() - begin < seconds:
        work()
        calls += 1
        if seconds and device.startswith("cuda"):
            synchronized(device)
    synchronized(device)
    return (time.perf_counter() - begin) / calls


def matrix_rate(device: str = "cpu", dtype: str = "float32", side: int = 2048, seconds: float = 1.0) -> float:
    """GFLOP/s of one large product after another."""
    import torch

    a, b = torch.randn(2, side, side, device=device).to(getattr(torch, dtype))
    out = a @ b
    return 2 * side**3 / timed(lambda: torch.mm(a, b, out=out), device, seconds) / 1e9


def copy_rate(device: str = "cpu", megabytes: int = 256, seconds: float = 1.0) -> float:
    """GB/s read and written by a copy that no cache holds."""
    import torch

    a = torch.zeros(megabytes << 18, device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / timed(lambda: b.copy_(a), device, seconds) / 1e9


ATTENTION = ("SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D")
PLAIN = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
STAGE_2 = {
    "in_channels": 6, "sample_size": 256, "class_embed_type": "timestep", "time_embedding_act_fn": "gelu",
    "resnet_skip_time_act": True, "resnet_out_scale_factor": 1.4142271248762552,
    "mid_block_scale_factor": 1.4142271248762552,
}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {  # the stage I by its widths, the stage II also by its layers
    "tiny-I": {"block_out_channels": (32, 64, 64, 64), "layers_per_block": 1},
    "tiny-II": {"block_out_channels": (32, 32, 32, 64, 64), "layers_per_block": 1, "time_embedding_dim": 64, **STAGE_2},
    "IF-I-M": {"block_out_channels": (192, 384, 576, 768), "layers_per_block": 3},
    "IF-I-L": {"block_out_channels": (320, 640, 960, 1280), "layers_per_block": 3},
    "IF-I-XL": {"block_out_channels": (704, 1408, 2112, 2816), "layers_per_block": 3},
    "IF-II-L": {
        "block_out_channels": (160, 320, 640, 960, 1280), "layers_per_block": [2, 2, 3, 5, 5],
        "time_embedding_dim": 1280, **STAGE_2,
    },
}  # fmt: skip
PARAMETERS = {
    "IF-I-M": 371_605_830,
    "IF-I-L": 935_365_830,
    "IF-I-XL": 4_304_695_110,
    "IF-II-L": 1_243_277_190,
}


def random_unet(size: str, device: str = "cpu", dtype: str = "float32") -> Any:
    """Our UNet at a release's size with torch's own initial values, made where and as what it runs."""
    import torch

    from mtl_anagram.models.unet import UNet, UNetConfig

    widths = SIZES[size]["block_out_channels"]
    plain = len(widths) - 3 if len(widths) == 5 else 1  # a stage II attends at its last two levels alone
    kinds = {
        "down_block_types": (PLAIN[0],) * plain + (ATTENTION[0],) * (len(widths) - plain),
        "up_block_types": (ATTENTION[1],) * (len(widths) - plain) + (PLAIN[1],) * plain,
    }
    wide = {
        "cross_attention_dim": widths[-1],
        "encoder_hid_dim": 64 if "tiny" in size else 4096,
        "in_channels": 3,
    }
    heads = {"attention_head_dim": 32} if "tiny" in size else {}
    config = UNetConfig.from_dict({**kinds, **wide, **heads, **SIZES[size]})
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            unet = UNet(config).requires_grad_(False)
    finally:
        torch.set_default_dtype(default)
    count = sum(p.numel() for p in unet.parameters())
    assert count == PARAMETERS.get(size, count), f"{size} has {count} parameters"
    for name, parameter in unet.named_parameters():
        if "norm" in name:  # not at rest
            parameter.add_(0.2 * torch.randn_like(parameter))
    return unet


def peer_unet(unet: Any) -> Any:
    """The same network in diffusers, on the same tensors."""
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        peer = UNet2DConditionModel.from_config(unet.config.to_dict())
    peer.load_state_dict(unet.state_dict(), strict=True, assign=True)
    return peer.eval()
