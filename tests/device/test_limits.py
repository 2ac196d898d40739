"""The limits of a process are the smallest of the machine's and those of its control groups, of either version."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from meristem.device.limits import available_bytes, n_cpus, total_bytes

MIB = 1 << 20
UNLIMITED = 9223372036854771712


def machine(root, membership, files):
    """A tree of files as a machine shows its groups: what ``/proc/self/cgroup`` says, and files of groups by path."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(membership)
    for path, content in files.items():
        place = root / "sys/fs/cgroup" / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(f"{content}\n")
    return root


@pytest.fixture(autouse=True)
def room(monkeypatch):
    """A machine of 1 GiB, half of it free, with 16 processors."""
    found = type("Found", (), {"total": 1024 * MIB, "available": 512 * MIB})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: found)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))


CASES = {
    "none": ("", {}, (1024, 512, 16)),
    "unlimited v2": (
        "0::/a",
        {"a/memory.max": "max", "a/memory.current": MIB, "a/cpu.max": "max 100000"},
        (1024, 512, 16),
    ),
    "v2": (
        "0::/a",
        {
            "a/memory.max": 300 * MIB,
            "a/memory.current": 100 * MIB,
            "a/memory.stat": f"anon 7\ninactive_file {30 * MIB}",
            "a/cpu.max": "350000 100000",
        },
        (300, 230, 3),
    ),
    "v2, the limit further up": (
        "0::/a/b/c",
        {
            "a/memory.max": 200 * MIB,
            "a/memory.current": 150 * MIB,
            "a/b/memory.max": "max",
            "a/b/c/memory.max": 400 * MIB,
            "a/b/c/memory.current": MIB,
            "a/cpu.max": "200000 100000",
            "a/b/c/cpu.max": "900000 100000",
        },
        (200, 50, 2),
    ),
    "v2, one free and one large": (
        "0::/a/b",
        {
            "a/memory.max": 400 * MIB,
            "a/memory.current": 380 * MIB,
            "a/b/memory.max": 300 * MIB,
            "a/b/memory.current": MIB,
        },
        (300, 20, 16),
    ),
    "v2 in a container, whose group is the root": (
        "0::/",
        {"memory.max": 128 * MIB, "memory.current": 28 * MIB, "cpu.max": "50000 100000"},
        (128, 100, 1),
    ),
    "v2, seen from outside": ("0::/../../b", {"memory.max": 128 * MIB, "memory.current": 0}, (128, 128, 16)),
    "v2, overfull": ("0::/a", {"a/memory.max": 10 * MIB, "a/memory.current": 11 * MIB}, (10, 0, 16)),
    "v2, more than the machine": ("0::/a", {"a/memory.max": 2048 * MIB, "a/memory.current": 0}, (1024, 512, 16)),
    "v1": (
        "9:memory:/a/b\n3:cpu,cpuacct:/c\n1:name=systemd:/",
        {
            "memory/a/b/memory.limit_in_bytes": UNLIMITED,
            "memory/a/memory.limit_in_bytes": 256 * MIB,
            "memory/a/memory.usage_in_bytes": 128 * MIB,
            "memory/a/memory.stat": f"inactive_file 1\ntotal_inactive_file {8 * MIB}",
            "cpu,cpuacct/c/cpu.cfs_quota_us": 400000,
            "cpu,cpuacct/c/cpu.cfs_period_us": 100000,
        },
        (256, 136, 4),
    ),
    "v1 without a quota": (
        "1:cpu:/c",
        {"cpu/c/cpu.cfs_quota_us": -1, "cpu/c/cpu.cfs_period_us": 100000},
        (1024, 512, 16),
    ),
    "v1 in a container that sees only its own part": (
        "4:memory:/docker/0123\n2:cpu,cpuacct:/docker/0123",
        {
            "memory/memory.limit_in_bytes": 64 * MIB,
            "memory/memory.usage_in_bytes": 4 * MIB,
            "cpu/cpu.cfs_quota_us": 200000,
            "cpu/cpu.cfs_period_us": 100000,
        },
        (64, 60, 2),
    ),
    "both": (
        "4:memory:/a\n0::/b",
        {
            "memory/a/memory.limit_in_bytes": 99 * MIB,
            "memory/a/memory.usage_in_bytes": 0,
            "unified/b/memory.max": 77 * MIB,
        },
        (77, 77, 16),
    ),
    "nonsense": ("what\n0::\n:::\n0::/a", {"a/memory.max": "?", "a/cpu.max": "1", "memory.max": ""}, (1024, 512, 16)),
}


@pytest.mark.parametrize("membership, files, expected", CASES.values(), ids=CASES)
def test_the_smallest_limit_holds(tmp_path, membership, files, expected):
    """Total, available and processors, of groups however nested."""
    root = machine(tmp_path, membership, files)
    total, available, processors = expected
    assert (total_bytes(root), available_bytes(root), n_cpus(root)) == (total * MIB, available * MIB, processors)


PROBE = """
import os, sys
from pathlib import Path
(Path(sys.argv[1]) / "cgroup.procs").write_text(str(os.getpid()))
import psutil
from meristem.device.limits import available_bytes, total_bytes
held = bytearray(os.urandom(1 << 20) * 40)
print(total_bytes(), available_bytes())
"""


def own_group():
    """The directory of the group that counts the memory of this process, of either version."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        if names == "memory" or not names:
            place = Path("/sys/fs/cgroup", names, path.lstrip("/"))
            if any((place / name).exists() for name in ("memory.max", "memory.limit_in_bytes")):
                return place
    return None


def test_a_process_in_a_real_group():
    """Where this machine lets us make a group, a process in it sees its limit, and less what it holds."""
    above = own_group()
    group = above and above / f"meristem-{os.getpid()}"
    try:
        group.mkdir()
        limit = next(group / name for name in ("memory.max", "memory.limit_in_bytes") if (group / name).exists())
        limit.write_text(str(512 * MIB))
    except (AttributeError, OSError, StopIteration) as refusal:
        if group and group.exists():
            group.rmdir()
        pytest.skip(f"no control group can be made here: {refusal}")
    try:
        probe = [sys.executable, "-c", PROBE, str(group)]
        done = subprocess.run(probe, capture_output=True, text=True, check=True)
    finally:
        group.rmdir()
    total, available = map(int, done.stdout.split())
    assert total == 512 * MIB
    assert available <= (512 - 40) * MIB
