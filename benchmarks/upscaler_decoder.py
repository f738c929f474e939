"""Time and memory of decoding one 1024 px picture at the released decoder's size, with random weights.

    python -m benchmarks.upscaler_decoder [--latents 256] [--whole] [--dtype float32] [--device cpu]

--whole: without bands, as a plain implementation works. Prints one JSON line: seconds, the process's peak
memory beyond what it held before, and on CUDA the GPU's. With --compare both ways are run, and the largest
difference between the two pictures is printed.
"""

import argparse
import json
import resource
import time

import torch

from mtl_anagram.models.upscaler import AutoencoderConfig, LatentDecoder

CONFIG = AutoencoderConfig(
    (128, 256, 512), down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3
)


def peak() -> float:
    """Largest resident memory of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--latents", type=int, default=256)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    decoder = LatentDecoder(CONFIG).eval().requires_grad_(False)
    decoder.to(arguments.device, getattr(torch, arguments.dtype))
    latents = torch.randn(1, 4, arguments.latents, arguments.latents).to(arguments.device)
    before, pictures = peak(), []
    for whole in [False, True] if arguments.compare else [arguments.whole]:
        start = time.perf_counter()
        picture = decoder(latents, band=None) if whole else decoder(latents)
        if picture.is_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        pictures.append(picture)
        report = {
            "px": picture.shape[-1],
            "whole": whole,
            "threads": torch.get_num_threads(),
            "dtype": arguments.dtype,
            "device": arguments.device,
            "seconds": round(seconds, 1),
            "peak_gib_beyond_start": round(peak() - before, 2),
        }
        if picture.is_cuda:
            report["cuda_peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        if len(pictures) == 2:
            gap = (pictures[0] - pictures[1]).abs().max() / pictures[1].abs().max()
            report["largest_difference"] = gap.item()
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
