"""What the C library does with the memory of tensors that are gone."""

import ctypes
import platform
import resource
from pathlib import Path
from typing import Final

import torch

M_TRIM_THRESHOLD: Final = -1
M_MMAP_THRESHOLD: Final = -3

STATUS: Final = Path("/proc/self/status")

LARGEST_BYTES: Final = 32 * 2**20
"""Blocks above this go back to the system all the same: glibc takes no higher limit."""


def keep_freed_memory() -> bool:
    """Have the process keep the memory of freed tensors for the next ones; says whether the C library took the setting.

    By default glibc hands large blocks back at once, and every step of training pays the page faults again: a fifth of
    its time on the machine of dev/LOG.md. The process stays as large as it was at its peak.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(M_MMAP_THRESHOLD, LARGEST_BYTES)) and bool(libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def peak_bytes(device: torch.device) -> int:
    """The most bytes held so far: by tensors on a CUDA device, by the whole process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return peak_process_bytes()


def peak_process_bytes() -> int:
    """The most memory that this process held so far.

    On Linux the peak of ``getrusage`` begins with that of the program that started this one: what is read here is that
    of the address space, which is new with the program.
    """
    if STATUS.is_file():
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
