"""Swapped axes are noticed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TESTED = {
    "train/loss": "tests/train/test_loss.py",
    "nn/mlp": "tests/nn/test_mlp.py",
    "nn/recurrent": "tests/nn/test_recurrent.py",
}
"""Modules, and the tests that have to fail where a function of theirs swaps two axes."""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_tr_8_swapped_axes_are_noticed(tmp_path):
    """TR-8: whichever annotated function does it, in a copy of the package; the tests of its own module say so."""
    program = Path(__file__).with_name("mutants.py")
    words = [sys.executable, program, tmp_path, *(word for pair in TESTED.items() for word in pair)]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {each["at"].partition(":")[0] for each in found} == set(TESTED) and len(found) >= 6
    assert [each["at"] for each in found if not each["is_killed"]] == []
