"""Time and memory of decoding one 1024 px picture at the released decoder's size, with random weights.

    python -m benchmarks.upscaler_decoder [--latents 256] [--whole] [--dtype float32] [--device cpu]

--whole: without bands, as a plain implementation works; --compare: both ways, and how far the pictures differ.
"""

import argparse

import torch

from benchmarks.common import head, peak, say, timed
from mtl_anagram.models.upscaler import AutoencoderConfig, LatentDecoder

CONFIG = AutoencoderConfig(
    (128, 256, 512), down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3
)


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
    head("", "seconds", "peak beyond the start, MiB", "of the GPU", "largest difference")
    for whole in [False, True] if arguments.compare else [arguments.whole]:
        pictures.append(decoder(latents[:, :, :8, :8]))  # warm
        seconds = timed(
            lambda whole=whole: pictures.append(decoder(latents, band=None) if whole else decoder(latents)),
            arguments.device,
        )
        picture, first = pictures[-1], pictures[1]
        title = f"{picture.shape[-1]} px, {'whole' if whole else 'in bands'}, {arguments.dtype}"
        on_gpu = torch.cuda.max_memory_allocated() / 2**20 if picture.is_cuda else ""
        gap = ((picture - first).abs().max() / first.abs().max()).item() if picture is not first else ""
        say(title, seconds, peak() - before, on_gpu, gap)


if __name__ == "__main__":
    main()
