"""Memory of freed tensors stays with the process."""

import subprocess
import sys

import pytest
import torch

from meristem.device.allocator import keep_freed_memory, peak_process_bytes

HANDED_BACK = """
import ctypes, sys, torch
from meristem.device.allocator import keep_freed_memory

class Held(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Held

def held():
    info = libc.mallinfo2()
    return info.arena + info.hblkhd

if sys.argv[1] == "keep":
    assert keep_freed_memory()
many = [torch.ones(2**20) for _ in range(25)]
before = held()
del many
print(before - held())
"""


def handed_back(how: str) -> int:
    """Bytes that the C library gives back to the system when 25 tensors of 4 MiB go.

    Page faults would tell the same of a step of training, but a sandboxed kernel counts none.
    """
    done = subprocess.run([sys.executable, "-c", HANDED_BACK, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not keep_freed_memory(), reason="the C library of this machine has no such setting")
def test_what_tensors_held_waits_for_the_next_ones() -> None:
    assert handed_back("keep") == 0
    assert handed_back("default") > 50 * 2**20


def test_the_peak_is_of_the_program_not_of_the_one_that_started_it():
    """Linux lets the peak of ``getrusage`` begin with the memory of the process that forked."""
    held = torch.ones(2**27)  # 512 MiB
    words = "from meristem.device.allocator import peak_process_bytes; print(peak_process_bytes())"
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True)
    assert 2**25 < int(done.stdout) < held.nbytes < peak_process_bytes()
