"""Swapped axes are noticed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TESTED = {
    "train/loss": ("tests/train/test_loss.py", 1),
    "nn/mlp": ("tests/nn/test_mlp.py", 2),
    "nn/recurrent": ("tests/nn/test_recurrent.py", 1),
    "nn/conv": ("tests/nn/test_conv.py", 11),
    "nn/attention": ("tests/nn/test_attention.py", 17),
    "nn/memory_cache": ("tests/nn/test_memory_cache.py", 13),
}
"""Modules, the tests that have to fail where a function of theirs swaps two axes, and the fewest functions that can."""


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("module", TESTED)
def test_tr_8_swapped_axes_are_noticed(tmp_path, module):
    """TR-8: whichever annotated function does it, in a copy of the package; the tests of its own module say so."""
    tests, n_least = TESTED[module]
    program = Path(__file__).with_name("mutants.py")
    done = subprocess.run(
        [sys.executable, program, tmp_path, module, tests], check=True, stdout=subprocess.PIPE, text=True
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) >= n_least
    assert [each["at"] for each in found if not each["is_killed"]] == []
