"""Drivers of the native core in C++, compiled with AddressSanitizer and UBSan."""

import subprocess
from pathlib import Path

from meristem.native import build

CHECKED = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
LEFT_OUT = ("-O3", "-shared", "-fPIC")


def said_by(driver: str, variant: str, folder: Path, *words: str) -> str:
    """What a driver of this folder prints, compiled for a variant; it has to end without a finding."""
    flags = [flag for flag in build.FLAGS if flag not in LEFT_OUT]
    compiler = [*build.compiler(), *flags, *CHECKED, *build.VARIANTS[build.machine()][variant]]
    program = folder / "driver"
    made = [*compiler, "-I", str(build.source_folder()), str(Path(__file__).parent / driver), "-o", str(program)]
    done = subprocess.run(made, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    ran = subprocess.run([program, *words], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return ran.stdout
