"""The chunk form under AddressSanitizer and UBSan: any sizes, buffers exactly as large as they must be."""

import subprocess
from pathlib import Path

import pytest

from meristem.native import build
from meristem.native.library import supported

HERE = Path(__file__).parent
CHECKED = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
LEFT_OUT = ("-O3", "-shared", "-fPIC")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not build.has_compiler(), reason="no C++ compiler is here")
@pytest.mark.parametrize("variant", supported())
def test_no_window_leaves_its_buffers_or_the_language(variant: str, tmp_path: Path) -> None:
    """Three hundred windows of each precision, forward and backward, on one to four threads."""
    flags = [flag for flag in build.FLAGS if flag not in LEFT_OUT]
    words = [*build.compiler(), *flags, *CHECKED, *build.VARIANTS[build.machine()][variant]]
    program = tmp_path / "driver"
    made = [*words, "-I", str(build.source_folder()), str(HERE / "form_driver.cpp"), "-o", str(program)]
    done = subprocess.run(made, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    ran = subprocess.run([program, "7", "300"], capture_output=True, text=True, timeout=300)
    assert (ran.returncode, ran.stdout) == (0, "600 windows\n"), ran.stderr[-4000:]
