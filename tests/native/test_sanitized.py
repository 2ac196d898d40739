"""The native core under AddressSanitizer and UBSan: any sizes, buffers exactly as large as they must be."""

import subprocess
from pathlib import Path

import pytest

from meristem.native import build
from meristem.native.library import supported

CHECKED = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
LEFT_OUT = ("-O3", "-shared", "-fPIC")
DRIVEN = {
    ("form", "300"): "600 windows\n",
    ("layers", "200"): "600 calls\n",
    ("decode", "100"): "9000 steps of 100 models, 2000 draws\n",
}
"""Windows of each precision through the form; calls of what stands around it, for each kind of number; random models
that read 90 tokens each, and draws. Forward and backward where there is a backward pass, on one to four threads."""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not build.has_compiler(), reason="no C++ compiler is here")
@pytest.mark.parametrize("variant", supported())
def test_nothing_leaves_its_buffers_or_the_language(variant: str, tmp_path: Path) -> None:
    """One program, compiled for a variant, does all that Python asks of the core, and ends without a finding."""
    flags = [flag for flag in build.FLAGS if flag not in LEFT_OUT]
    compiler = [*build.compiler(), *flags, *CHECKED, *build.VARIANTS[build.machine()][variant]]
    program = tmp_path / "driver"
    sources = ["-I", str(build.source_folder()), str(Path(__file__).parent / "driver.cpp")]
    done = subprocess.run([*compiler, *sources, "-o", str(program)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    for (driver, n), said in DRIVEN.items():
        ran = subprocess.run([program, driver, "7", n], capture_output=True, text=True, timeout=300)
        assert ran.returncode == 0, ran.stderr[-4000:]
        assert ran.stdout == said
