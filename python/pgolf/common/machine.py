"""What this machine has: its processor, and the cores and memory that this process may use.

Linux tells more than other systems do; what only it tells is left out elsewhere.
"""

from __future__ import annotations

import math
import os
import platform
from pathlib import Path


def processor() -> str:
    """The processor's name, as it gives it."""
    lines = (line.partition(":") for line in kernel_file("/proc/cpuinfo").splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == "model name"), platform.machine())


def usable_cores() -> int:
    """The cores that this process may use: what the scheduler allows and a container's quota (cgroup v2) leaves."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:  # macOS and Windows; os.process_cpu_count came with Python 3.13
        cores = getattr(os, "process_cpu_count", os.cpu_count)() or 1
    quota, _, period = kernel_file("/sys/fs/cgroup/cpu.max").partition(" ")
    return min(cores, math.ceil(int(quota) / int(period))) if quota.isdigit() else cores


def usable_memory() -> tuple[int, int] | None:
    """Bytes of memory that are free and that there are; no more than a container (cgroup v2) may have.

    None where the system does not tell.
    """
    fields = dict(line.split(":") for line in kernel_file("/proc/meminfo").splitlines())
    if not fields.keys() >= {"MemAvailable", "MemTotal"}:
        return None
    free, total = (1024 * int(fields[name].split()[0]) for name in ("MemAvailable", "MemTotal"))
    limit = kernel_file("/sys/fs/cgroup/memory.max").strip()
    return (min(free, int(limit)), min(total, int(limit))) if limit.isdigit() else (free, total)


def shows_nvidia_gpu() -> bool:
    """Whether an NVIDIA GPU's device file is there: on Linux with a driver; in a container, with access to the GPU."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def kernel_file(path: str) -> str:
    """The text of a file of the kernel's; empty where it has none such."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
