"""What the processor and the memory of this machine are told and asked."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch

CGROUP = Path("/sys/fs/cgroup")  # of a container, or of a job under SLURM (version 2)


def tune() -> None:
    """Settings of this whole process that make training on a CPU faster, to be made before the first work on tensors.

    The allocator keeps what it has: glibc otherwise gives each large tensor back and asks for it again, whose pages the
    system then fills with zeros (0.8 GB a step of a 20M model, 7 % of its time). Numbers under 1e-38 count as zero: the
    processor takes some 40 times as long for them, and probabilities and Adam's moments are full of them.
    """
    torch.set_flush_denormal(True)
    if sys.platform == "linux":
        try:
            mallopt = ctypes.CDLL(None).mallopt
        except AttributeError:  # musl
            return
        m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
        mallopt(m_mmap_threshold, 1 << 30)
        mallopt(m_trim_threshold, 2**31 - 1)


def accelerator() -> Any:
    """torch's module for this machine's GPU: torch.cuda, torch.mps on an Apple, or None."""
    if torch.cuda.is_available():
        return torch.cuda
    return torch.mps if torch.backends.mps.is_available() else None


def peak_memory_mb() -> int:
    """Most memory this process held, in MB (Linux counts it in KB, macOS in bytes); on a GPU, there."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated() / 2**20)
    return round(resident() / 2**20)


def resident() -> float:
    """Most bytes of the machine's memory that this process has held so far."""
    with contextlib.suppress(OSError):  # Linux: ru_maxrss begins with what the process held that started this one
        return 1024.0 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)


def held() -> float:
    """Bytes of the machine's memory that this process holds now (where the system does not say: its peak)."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * float(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return resident()


def free_memory() -> float:
    """Bytes that a further process could take: of the GPU, else of the machine, or of the container that this runs in."""
    if torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[0])
    try:
        free = 1024.0 * int(Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0])
    except OSError:  # macOS: all that it has, most of which it gives to who asks
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with contextlib.suppress(OSError, ValueError):  # no such files, or "max"
        limit, taken = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, float(limit - taken))
    return free
