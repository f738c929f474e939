"""How much memory a device has: what keep="auto", text_encoder="auto" and a plan are decided by."""

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

SHARE = 0.75  # of the free memory that weights may take: activations and the system need some too
# A container's limit and use: control groups version 2, then 1.
CONTROL_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


class Memory(NamedTuple):
    """Bytes: all that this process can have on a device, and what is free of it now."""

    total: int
    free: int


def memory_of(device: torch.device) -> Memory | None:
    """A card's memory, what Metal recommends, or the machine's; a container's limit where that is lower."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Memory(total, free)
    if device.type == "mps":
        total = torch.mps.recommended_max_memory()
        return Memory(total, max(0, total - torch.mps.driver_allocated_memory()))
    if (found := _system()) is None:
        return None
    for files in CONTROL_GROUPS:
        with suppress(OSError, ValueError):  # no such file; "max" means no limit
            limit, used = (int(Path(file).read_text()) for file in files)
            with suppress(OSError):  # files that were read count as used, but go where memory is asked for
                lines = Path(files[1]).with_name("memory.stat").read_text()
                used -= int((re.findall(r"^(?:total_)?inactive_file (\d+)$", lines, re.M) or [0])[-1])
            if limit < found.total:
                found = Memory(limit, min(found.free, max(0, limit - used)))
    return found


def _system() -> Memory | None:
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # no POSIX system
        return None
    with suppress(OSError, IndexError):  # Linux tells besides what new work can have without swapping
        available = re.findall(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        return Memory(total, 1024 * int(available[0]))
    return Memory(total, total)
