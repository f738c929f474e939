"""One stage I step at IF-I-M's real size (371,605,830 parameters), ours beside diffusers: difference, time, memory.

    pip install -c constraints.txt ".[bench]"
    python -m benchmarks.real_size --threads 2

A folder in the published layout is written once with random float32 weights (1.5 GB, deleted afterwards, or kept with
--folder). Each library then loads it in a process of its own and takes one step of stage I at t=957: the UNet on null
and prompt, guidance 10, the DDPM step. Load is from the interpreter's start to the network in memory, step is the
second of two, by the clock and in processor time (which other work on the machine does not lengthen), peak is the
process's largest resident memory; the file's mapped pages count in it for both.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

KINDS = ("ours", "diffusers")
PARAMETERS, GUIDANCE, LIMIT = 371_605_830, 10.0, 1e-4  # IF-I-M's


def write_folder(folder: Path) -> None:
    """unet/ and scheduler/ of the published layout at IF-I-M's size; torch's own initial values, norms not at rest."""
    import torch
    from safetensors.torch import save_file

    from mtl_anagram.models.unet import UNet, UNetConfig

    torch.manual_seed(0)
    config = UNetConfig(
        block_out_channels=(192, 384, 576, 768),
        layers_per_block=(3, 3, 3, 3),
        cross_attention_dim=768,
        encoder_hid_dim=4096,
        down_block_types=("ResnetDownsampleBlock2D", *3 * ("SimpleCrossAttnDownBlock2D",)),
        up_block_types=(*3 * ("SimpleCrossAttnUpBlock2D",), "ResnetUpsampleBlock2D"),
        in_channels=3,
    )
    unet = UNet(config).requires_grad_(False)
    assert sum(p.numel() for p in unet.parameters()) == PARAMETERS
    for name, parameter in unet.named_parameters():
        if "norm" in name:
            parameter.add_(0.2 * torch.randn_like(parameter))
    (folder / "unet").mkdir(parents=True)
    save_file(unet.state_dict(), folder / "unet" / "diffusion_pytorch_model.safetensors")
    (folder / "unet" / "config.json").write_text(json.dumps(unet.config.to_dict()))
    (folder / "scheduler").mkdir()
    scheduler = {
        "_class_name": "DDPMScheduler",
        "beta_schedule": "squaredcos_cap_v2",
        "clip_sample": True,
        "dynamic_thresholding_ratio": 0.95,
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "sample_max_value": 1.5,
        "thresholding": True,
        "variance_type": "learned_range",
    }
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))


def inputs():
    """x_t (1, 3, 64, 64), text states (2, 77, 4096) of null and prompt, and the step's noise like x_t."""
    import torch

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 3, 64, 64, generator=generator)
    text = 0.1 * torch.randn(2, 77, 4096, generator=generator)
    return x, text, torch.randn(x.shape, generator=torch.Generator().manual_seed(2))


def child(kind: str, folder: Path, threads: int, out: Path) -> None:
    """Load, step twice; print the figures as JSON and save prediction and x_{t-1}."""
    import torch

    torch.set_num_threads(threads)
    if kind == "ours":
        from mtl_anagram.files.hub import read_json
        from mtl_anagram.models import load_unet
        from mtl_anagram.sampling import Schedule, ddpm_step

        unet = load_unet(folder)
        schedule = Schedule.from_config(read_json(folder / "scheduler" / "scheduler_config.json"), 30)
        t = schedule.timesteps[0]
    else:
        from diffusers import DDPMScheduler, UNet2DConditionModel

        unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32).eval()
        scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
        scheduler.set_timesteps(30)
        t = int(scheduler.timesteps[0])
    loaded = time.time()
    x, text, z = inputs()
    seconds, busy = [], []
    for _ in range(2):
        begin, begin_busy = time.perf_counter(), time.process_time()
        with torch.no_grad():
            rows = torch.cat([x, x])
            prediction = unet(rows, t, text) if kind == "ours" else unet(rows, t, text).sample
            null, prompt = prediction.chunk(2)
            noise = null[:, :3] + GUIDANCE * (prompt[:, :3] - null[:, :3])
            if kind == "ours":
                after = ddpm_step(noise, prompt[:, 3:], x, t, schedule, z)
            else:
                generator = torch.Generator().manual_seed(2)
                output = torch.cat([noise, prompt[:, 3:]], dim=1)
                after = scheduler.step(output, t, x, generator=generator).prev_sample
        seconds.append(time.perf_counter() - begin)
        busy.append(time.process_time() - begin_busy)
    torch.save({"prediction": prediction, "x": after}, out)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"loaded_at": loaded, "step": seconds[-1], "busy": busy[-1], "peak": peak}))


def measure(folder: Path, threads: int) -> dict[str, dict]:
    """Both libraries' figures (load, step and busy in s, peak in MiB) and outputs, each from a fresh process."""
    import torch

    found: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as place:
        for kind in KINDS:
            out, begin = Path(place) / f"{kind}.pt", time.time()
            command = [sys.executable, "-m", "benchmarks.real_size", "--child", kind, "--folder", str(folder)]
            command += ["--threads", str(threads), "--out", str(out)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[kind] = json.loads(done.stdout.splitlines()[-1])
            found[kind]["load"] = found[kind].pop("loaded_at") - begin
            found[kind]["outputs"] = torch.load(out, weights_only=True)
    return found


def differences(found: dict[str, dict]) -> dict[str, float]:
    """Largest difference over the reference's largest magnitude, of the prediction and of x_{t-1}."""
    ours, reference = (found[kind]["outputs"] for kind in KINDS)
    return {
        name: ((ours[name] - reference[name]).abs().max() / reference[name].abs().max()).item()
        for name in ours
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the weights are, or are written and kept")
    parser.add_argument("--child", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.folder, args.threads, args.out)
        return
    import torch

    with tempfile.TemporaryDirectory() as place:
        folder = args.folder or Path(place) / "model"
        if not (folder / "unet").is_dir():
            write_folder(folder)
        found = measure(folder, args.threads)
    ours, reference = (found[kind] for kind in KINDS)
    print(f"torch {torch.__version__}, {args.threads} threads, {PARAMETERS:,} parameters, float32")
    for what, unit in (("load", "s"), ("step", "s"), ("busy", "s"), ("peak", "MiB")):
        ratio = reference[what] / ours[what]
        label = "step, processor time" if what == "busy" else what
        figures = ", ".join(f"{kind} {found[kind][what]:.2f} {unit}" for kind in KINDS)
        print(f"{label}: {figures}, ratio {ratio:.2f}")
    for name, value in differences(found).items():
        print(f"largest difference of {name}, relative: {value:.2g} (limit {LIMIT:g})")
    if max(differences(found).values()) > LIMIT:
        raise SystemExit("the two differ")


if __name__ == "__main__":
    main()
