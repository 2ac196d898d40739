"""What this process may use of the machine: its memory and processors, or less where a control group says so.

Control groups nest, and the smallest limit on the way up holds. Version 2 has one tree of them, version 1 one for each
controller; a machine may have both (Linux, Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst). Elsewhere
there are none.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

MACHINE: Final = Path("/")
"""Below it are ``proc`` and ``sys``."""

_MEMORY: Final = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""By version: the files of limit and use, and what of the use is pages that the system takes back at need."""


def total_bytes(root: Path = MACHINE) -> int:
    """The memory of the machine, or the smallest limit of the groups that this process is in."""
    return min([_of_machine("MemTotal", "total"), *(limit for limit, _ in _memory(root))])


def available_bytes(root: Path = MACHINE) -> int:
    """What can be had without swapping, of the machine and within every group that this process is in."""
    return min([_of_machine("MemAvailable", "available"), *(free for _, free in _memory(root))])


def _of_machine(line: str, field: str) -> int:
    """The memory of the machine in bytes, by psutil; where that cannot be loaded, what Linux says in this line."""
    try:
        import psutil
    except ImportError:
        for each in _lines(MACHINE / "proc/meminfo"):
            name, _, size = each.partition(":")
            if name == line:
                return int(size.split()[0]) * 1024
        raise
    return int(getattr(psutil.virtual_memory(), field))


def n_cpus(root: Path = MACHINE) -> int:
    """Processors that this process may keep busy, at least one: those it may run on, or the quota of its groups."""
    has_affinity = hasattr(os, "sched_getaffinity")
    count = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    for group in _groups("cpu", root):
        quota, period = (_words(group / "cpu.max") + ["", ""])[:2]
        if not quota:
            quota, period = (" ".join(_words(group / f"cpu.cfs_{name}_us")) for name in ("quota", "period"))
        if quota.isdecimal() and period.isdecimal() and int(period):
            count = min(count, int(quota) // int(period))
    return max(1, count)


def _memory(root: Path) -> Iterator[tuple[int, int]]:
    """The limit of every group that has one, and what is free below it, in bytes."""
    for group in _groups("memory", root):
        for limit_file, use_file, reclaimed in _MEMORY:
            limit, use = (" ".join(_words(group / name)) for name in (limit_file, use_file))
            if limit.isdecimal():
                statistics = _words(group / "memory.stat")
                cached = dict(zip(statistics[::2], statistics[1::2], strict=False)).get(reclaimed, "0")
                used = int(use) - int(cached) if use.isdecimal() else 0
                yield int(limit), max(0, int(limit) - max(0, used))


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """The directories of the groups in which ``controller`` counts this process, from its own up to the outermost.

    In a container the path may be that of the machine, of which only the container's part is to be seen.
    """
    for line in _lines(root / "proc/self/cgroup"):
        _, names, path = (*line.split(":", 2), "", "")[:3]
        if names and controller not in names.split(","):
            continue
        inner = os.path.normpath(f"/{path}").strip("/")
        for tree in [names, controller] if names else ["", "unified"]:
            top = root / "sys/fs/cgroup" / tree
            yield from (place for place in (top / inner, *(top / inner).parents) if place.is_relative_to(top))


def _words(path: Path) -> list[str]:
    """The words of a file; none where it cannot be read."""
    return " ".join(_lines(path)).split()


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return []
