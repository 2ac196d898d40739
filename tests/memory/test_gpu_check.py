"""The check for a machine with a GPU takes the same way on a CPU, by Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.extras, pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]


def test_each_part_runs_whatever_became_of_the_others() -> None:
    """Those whose packages refuse the interpreter, or are not there, say so; the page of results stays as it is."""
    page = (ROOT / "docs" / "gpu.md").read_bytes()
    variables = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = ["sh", "scripts/gpu-check.sh", "--interpreter"]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert "- correctness: the largest error is" in said and "correctness: not all of it" not in said
    assert "- fla: not all of it, RuntimeError: fla's kernels refuse Triton's interpreter" in said
    assert "| titans, reads highest, 20 x 16 |" in said and "| gated_delta, reads highest, 20 x 16 |" in said
    assert "- training, " in said and "tokens/s" in said
    assert "- decoding, titans-mag-micro, 2 at once: " in said and "predictions differ by 0e+00" in said
    assert (ROOT / "docs" / "gpu.md").read_bytes() == page


def test_without_a_gpu_nothing_is_written() -> None:
    variables = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    done = subprocess.run(["sh", "scripts/gpu-check.sh"], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 3
    assert "torch sees no NVIDIA GPU; nothing was run" in done.stderr
