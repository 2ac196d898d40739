"""Memory of freed tensors stays with the process."""

import subprocess
import sys

import pytest

from meristem.device.allocator import keep_freed_memory

FAULTS = """
import resource, sys, torch
from meristem.device.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(3):
    many = [torch.ones(2**20) for _ in range(5)]
    del many
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    many = [torch.ones(2**20) for _ in range(5)]
    del many
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not keep_freed_memory(), reason="the C library of this machine has no such setting")
def test_steps_after_the_first_fault_no_pages() -> None:
    """Five times five tensors of 4 MiB: 25,600 pages if they are handed back, next to none if they are kept."""
    assert faults("keep") < faults("default") / 10
