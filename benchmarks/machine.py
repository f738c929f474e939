"""What this machine can do at best: matrix products and copies, one thread and all (python -m benchmarks.machine)."""

import argparse
import os
import platform

from benchmarks.common import copy_rate, head, matrix_rate, say


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal")
    args = parser.parse_args()
    import torch

    small = {"seconds": 0.05} if args.tiny else {}
    side = 256 if args.tiny else 2048 if args.device == "cpu" else 8192
    print(f"{processor()}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}, "
          f"torch {torch.__version__}", end="")  # fmt: skip
    print(f", {torch.cuda.get_device_name()}" if args.device.startswith("cuda") else "")
    head("", "float32 GFLOP/s", "bfloat16", "float16", "copy, GB/s")
    for threads in dict.fromkeys((1, torch.get_num_threads())) if args.device == "cpu" else (0,):
        if threads:
            torch.set_num_threads(threads)
        rates = [
            matrix_rate(args.device, dtype, side, **small) for dtype in ("float32", "bfloat16", "float16")
        ]
        title = f"{threads} thread{'s' * (threads > 1)}" if threads else args.device
        say(title, *rates, copy_rate(args.device, 8 if args.tiny else 256, **small))


def processor() -> str:
    """The processor's own name, where the system tells it."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
