"""The decoder under AddressSanitizer and UBSan: random models, odd sizes, buffers exactly as large as they must be."""

import subprocess
from pathlib import Path

import pytest

from meristem.native import build
from meristem.native.library import supported

HERE = Path(__file__).parent
CHECKED = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
LEFT_OUT = ("-O3", "-shared", "-fPIC")


@pytest.mark.slow
@pytest.mark.skipif(not build.has_compiler(), reason="no C++ compiler is here")
@pytest.mark.parametrize("variant", supported())
def test_no_step_leaves_its_buffers_or_the_language(variant, tmp_path):
    """A hundred models, 45 tokens each, in float32 and float64, some of whose numbers are none."""
    flags = [flag for flag in build.FLAGS if flag not in LEFT_OUT]
    words = [*build.compiler(), *flags, *CHECKED, *build.VARIANTS[build.machine()][variant]]
    program = tmp_path / "driver"
    made = [*words, "-I", str(build.source_folder()), str(HERE / "decode_driver.cpp"), "-o", str(program)]
    done = subprocess.run(made, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    ran = subprocess.run([program, "7", "100"], capture_output=True, text=True, timeout=300)
    assert (ran.returncode, ran.stdout) == (0, "4500 steps of 100 models\n"), ran.stderr[-4000:]
