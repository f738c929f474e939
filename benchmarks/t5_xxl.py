"""T5-XXL's encoder at its true size, streamed: peak memory and time, beside what this machine could do at best.

    python -m benchmarks.t5_xxl --folder FOLDER            # 11.5 GB of disk, given back in the end
    python -m benchmarks.t5_xxl --layers 2 --check         # two layers, against transformers

Writes a random checkpoint as the fp16 variant is published (two shards, wo in float32), tensor by tensor, then
encodes in a process of its own for each dtype: two prompts and the null prompt, 77 tokens each. The files are
out of the system's cache before the first call, in it for the second if they fit. The two bounds are measured here
too: reading the same bytes once, and the same number of multiplications as one product after another of the
model's largest matrix.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
ROWS, TOKENS = 3, 77
STEM = "model.fp16-0000{}-of-00002.safetensors"
INDEX = "model.safetensors.index.fp16.json"


def write_checkpoint(folder: Path, layers: int) -> int:
    """A random encoder in the published layout of the fp16 variant; returns its number of parameters."""
    import torch

    from mtl_anagram.media import write_atomically
    from mtl_anagram.models import T5Config, T5Encoder
    from mtl_anagram.models.shards import buffer_of

    config = T5Config(**{**SIZES, "num_layers": layers})
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in T5Encoder(config).state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(shapes)
    weight_map, generator = {}, torch.Generator().manual_seed(0)
    for number, members in enumerate((names[: len(names) * 5 // 6], names[len(names) * 5 // 6 :]), 1):
        header, at = {}, 0
        for name in members:
            dtype, size = (torch.float32, 4) if name.endswith("wo.weight") else (torch.float16, 2)
            stop = at + torch.Size(shapes[name]).numel() * size
            kind = "F32" if dtype == torch.float32 else "F16"
            header[name] = {"dtype": kind, "shape": list(shapes[name]), "data_offsets": [at, stop]}
            weight_map[name], at = STEM.format(number), stop
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / STEM.format(number), "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in members:
                value = torch.randn(shapes[name], generator=generator).mul_(_spread(name, config))
                value += 1.0 if "layer_norm" in name else 0.0
                file.write(buffer_of(value if header[name]["dtype"] == "F32" else value.half()))
                del value
            file.flush()
            os.fsync(file.fileno())
    write_atomically(folder / "config.json", json.dumps(config.to_dict()).encode())
    write_atomically(folder / INDEX, json.dumps({"metadata": {}, "weight_map": weight_map}).encode())
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def _spread(name: str, config) -> float:
    """The standard deviation that T5 is initialised with, so that states stay of ordinary size."""
    if "layer_norm" in name:
        return 0.1
    if name.endswith(".q.weight"):
        return (config.d_model * config.d_kv) ** -0.5
    if name.endswith(".wo.weight"):
        return config.d_ff**-0.5
    return 1.0 if name == "shared.weight" else config.d_model**-0.5


def forget(folder: Path) -> None:
    """Take the files out of the system's cache, so that the next reading is from the disk."""
    for path in folder.glob("*.safetensors"):
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def read_seconds(folder: Path) -> float:
    """Reading all bytes of the weights once into a buffer that is reused, by this process alone."""
    buffer = memoryview(bytearray(1 << 26))
    start = time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def arithmetic_seconds(dtype: str, parameters: int) -> float:
    """As many multiplications as the encoder's matrices need, at the rate of one large product."""
    import torch

    kind = getattr(torch, dtype)
    x = torch.randn(ROWS * TOKENS, SIZES["d_model"]).to(kind)
    weight = torch.randn(SIZES["d_ff"], SIZES["d_model"]).to(kind)
    torch.nn.functional.linear(x, weight)
    start = time.perf_counter()
    for _ in range(5):
        torch.nn.functional.linear(x, weight)
    return (time.perf_counter() - start) / 5 * parameters / weight.numel()


def child(folder: Path, dtype: str) -> None:
    """What one process measures of itself, printed as JSON."""
    import torch

    def memory(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

    torch.zeros(1)
    before = memory("VmRSS")
    from mtl_anagram.models import load_t5

    start = time.perf_counter()
    encoder = load_t5(folder, subfolder=None, variant="fp16", dtype=dtype, streamed=True)
    seconds = {"load": time.perf_counter() - start}
    ids = torch.randint(2, SIZES["vocab_size"], (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))
    mask = torch.zeros_like(ids)
    for row, length in enumerate((12, 9, 1)):
        mask[row, :length] = 1
    for name in ("cold", "warm"):
        start = time.perf_counter()
        states = encoder(ids * mask, mask)
        seconds[name] = time.perf_counter() - start
    torch.save(states, folder / f"states.{dtype}.pt")
    made = {"peak": memory("VmHWM") - before, "torch": before, "norm": states.float().norm().item()}
    print(json.dumps({**seconds, **made, "threads": torch.get_num_threads()}))


def check(folder: Path, layers: int) -> float:
    """Largest relative difference of the streamed float32 states from transformers' on the same files."""
    import torch
    from transformers import T5Config, T5EncoderModel

    from mtl_anagram.models import load_t5
    from mtl_anagram.models.loading import read_safetensors

    reference = T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **{**SIZES, "num_layers": layers}))
    state = {}
    for path in folder.glob("*.safetensors"):
        state |= {name: value.float() for name, value in read_safetensors(path).items()}
    reference.load_state_dict({**state, "encoder.embed_tokens.weight": state["shared.weight"]}, strict=True)
    ids = torch.randint(2, SIZES["vocab_size"], (ROWS, TOKENS))
    mask = (torch.arange(TOKENS) < torch.tensor([[12], [77], [1]])).long()
    with torch.no_grad():
        expected = reference.eval()(input_ids=ids, attention_mask=mask).last_hidden_state
    streamed = load_t5(folder, subfolder=None, variant="fp16", streamed=True)
    return ((streamed(ids, mask) - expected).abs().max() / expected.abs().max()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--check", action="store_true", help="compare with transformers: few --layers only")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint there, use it if there")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        return child(given.folder, given.child)
    folder = Path(tempfile.mkdtemp(prefix="t5_xxl.")) if given.folder is None else given.folder
    existed = given.folder is not None and folder.exists()
    try:
        if not (given.keep and (folder / INDEX).is_file()):
            start = time.perf_counter()
            count = write_checkpoint(folder, given.layers)
            print(f"{count:,} parameters written in {time.perf_counter() - start:.0f} s", flush=True)
        measure(folder, given)
        if given.check:
            print(f"largest relative difference from transformers: {check(folder, given.layers):.2g}")
    finally:
        if not given.keep:
            shutil.rmtree(folder) if not existed else [path.unlink() for path in _ours(folder)]


def _ours(folder: Path) -> list[Path]:
    names = [*(STEM.format(n) for n in (1, 2)), INDEX, "config.json"]
    return [folder / n for n in names if (folder / n).is_file()] + sorted(folder.glob("states.*.pt"))


def measure(folder: Path, given: argparse.Namespace) -> None:
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    per_layer = SIZES["d_model"] * (4 * SIZES["num_heads"] * SIZES["d_kv"] + 3 * SIZES["d_ff"])
    print(f"{size / 1e9:.3f} GB, {ROWS} prompts of {TOKENS} tokens, {given.layers} layers")
    for _ in range(given.rounds):
        forget(folder)
        cold, warm = read_seconds(folder), read_seconds(folder)
        print(f"reading once: {cold:.1f} s ({size / cold / 1e9:.2f} GB/s), again {warm:.1f} s", flush=True)
        for dtype in given.dtypes:
            forget(folder)
            command = [sys.executable, "-m", "benchmarks.t5_xxl", "--folder", str(folder), "--child", dtype]
            found = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout)
            work = arithmetic_seconds(dtype, per_layer * given.layers)
            print(
                f"{dtype}: {found['peak'] / 2**30:.2f} GiB beyond torch's {found['torch'] / 2**30:.2f}; "
                f"load {found['load']:.2f} s, call {found['cold']:.1f} s cold, {found['warm']:.1f} s after it; "
                f"arithmetic alone {work:.1f} s: cold / larger bound {found['cold'] / max(cold, work):.2f}, "
                f"after it {found['warm'] / max(warm, work):.2f} ({found['threads']} threads)",
                flush=True,
            )
    if len(given.dtypes) > 1:
        import torch

        first, *others = (torch.load(folder / f"states.{dtype}.pt").float() for dtype in given.dtypes)
        for dtype, states in zip(given.dtypes[1:], others, strict=True):
            difference = ((states - first).norm() / first.norm()).item()
            print(f"{dtype} states differ from {given.dtypes[0]}'s by {difference:.4f} of their norm")


if __name__ == "__main__":
    main()
