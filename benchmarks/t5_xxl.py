"""T5-XXL's encoder at its true size, streamed: peak memory and time, beside what this machine could do at best.

    python -m benchmarks.t5_xxl --folder FOLDER            # 11.5 GB of disk, given back in the end
    python -m benchmarks.t5_xxl --layers 2 --check         # two layers, against transformers

Writes a random checkpoint as the fp16 variant is published (two shards, wo in float32), tensor by tensor, then
encodes in a process of its own for each dtype: two prompts and the null prompt, 77 tokens each. The files are
out of the system's cache before the first call, in it for the second if they fit. The two bounds are measured here
too: reading the same bytes once, and the same number of multiplications as one product after another of the
model's largest matrix. Beside the time on the clock stands the processor time, which other work on the machine
disturbs less.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
ROWS, TOKENS = 3, 77
STEM = "model.fp16-0000{}-of-00002.safetensors"
INDEX = "model.safetensors.index.fp16.json"


def write_checkpoint(folder: Path, layers: int) -> int:
    """A random encoder in the published layout of the fp16 variant; returns its number of parameters."""
    import torch

    from mtl_anagram.files.atomic import write_atomically
    from mtl_anagram.files.shards import bytes_of
    from mtl_anagram.models import T5Config, T5Encoder

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
                file.write(bytes_of(value if header[name]["dtype"] == "F32" else value.half()))
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


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds that `work` takes on the clock, and of processor time in all threads."""
    clock, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - processor


def read_all(folder: Path) -> None:
    """All bytes of the weights once, into a buffer that is reused."""
    buffer = memoryview(bytearray(1 << 26))
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def arithmetic_seconds(dtype: str, parameters: int) -> tuple[float, float]:
    """As many multiplications as the encoder's matrices need, at the rate of one large product."""
    import torch

    kind = getattr(torch, dtype)
    x = torch.randn(ROWS * TOKENS, SIZES["d_model"]).to(kind)
    weight = torch.randn(SIZES["d_ff"], SIZES["d_model"]).to(kind)
    torch.nn.functional.linear(x, weight)
    clock, processor = timed(lambda: [torch.nn.functional.linear(x, weight) for _ in range(10)])
    share = parameters / weight.numel() / 10
    return clock * share, processor * share


def child(folder: Path, dtype: str) -> None:
    """What one process measures of itself, printed as JSON."""
    import torch

    def memory(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

    torch.zeros(1)
    before = memory("VmRSS")
    from mtl_anagram.models import load_t5

    made = []
    options = {"subfolder": None, "variant": "fp16", "dtype": dtype, "streamed": True}
    seconds = {"load": timed(lambda: made.append(load_t5(folder, **options)))}
    ids = torch.randint(2, SIZES["vocab_size"], (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))
    mask = torch.zeros_like(ids)
    for row, length in enumerate((12, 9, 1)):
        mask[row, :length] = 1
    for name in ("cold", "warm"):
        seconds[name] = timed(lambda: made.append(made[0](ids * mask, mask)))
    torch.save(made[-1], folder / f"states.{dtype}.pt")
    sizes = {"peak": memory("VmHWM") - before, "torch": before}
    print(json.dumps({**seconds, **sizes, "threads": torch.get_num_threads()}))


def check(folder: Path, layers: int) -> float:
    """Largest relative difference of the streamed float32 states from transformers' on the same files."""
    import torch
    from transformers import T5Config, T5EncoderModel

    from mtl_anagram.files.shards import read_safetensors
    from mtl_anagram.models import load_t5

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
        cold, warm = timed(lambda: read_all(folder)), timed(lambda: read_all(folder))
        rate = f"{size / cold[0] / 1e9:.2f} GB/s"
        print(f"reading once: {_seconds(cold)}, {rate}; again {_seconds(warm)}", flush=True)
        for dtype in given.dtypes:
            forget(folder)
            command = [sys.executable, "-m", "benchmarks.t5_xxl", "--folder", str(folder), "--child", dtype]
            found = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout)
            work = arithmetic_seconds(dtype, per_layer * given.layers)
            print(
                f"{dtype}: {found['peak'] / 1e9:.2f} GB beyond the {found['torch'] / 1e9:.2f} of python with torch, "
                f"{found['threads']} threads; load {found['load'][0]:.2f} s; arithmetic alone {_seconds(work)}"
            )
            for name, read in (("cold", cold), ("warm", warm)):
                call, larger = found[name], max(read[0], work[0])
                print(
                    f"  {name} call {_seconds(call)}: {call[0] / larger:.2f} of the larger bound by the clock; "
                    f"{call[1] / (work[1] + read[1]):.2f} of reading and arithmetic in processor time",
                    flush=True,
                )
    if len(given.dtypes) > 1:
        import torch

        first, *others = (torch.load(folder / f"states.{dtype}.pt").float() for dtype in given.dtypes)
        for dtype, states in zip(given.dtypes[1:], others, strict=True):
            difference = ((states - first).norm() / first.norm()).item()
            print(f"{dtype} states differ from {given.dtypes[0]}'s by {difference:.4f} of their norm")


def _seconds(pair: Sequence[float]) -> str:
    return f"{pair[0]:.1f} s (processor {pair[1]:.1f} s)"


if __name__ == "__main__":
    main()
