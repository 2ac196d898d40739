"""Loads the native core for this processor, or says why it is not there.

``python -m meristem.native.library`` does so and prints which: ``scripts/bootstrap.sh`` compiles it like this.
"""

import ctypes
import os
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import torch

from meristem.errors import WrongValue
from meristem.native.build import PACKAGED, VARIANTS, BuildFailed, cached, machine

ABI: Final = 11
"""Version of the C interface that this package calls; ``core.cpp`` has the same."""

SETTING: Final = "MERISTEM_NATIVE"
"""Variable of the environment: ``off`` does without the core, the name of a variant takes that one."""

NEEDS: Final = {
    "x86-64-v3": ("avx2", "fma3", "bmi", "bmi2", "f16c", "lzcnt"),
    "x86-64-v4": ("avx512_f", "avx512_bw", "avx512_cd", "avx512_dq", "avx512_vl"),
    "aarch64": (),
}
"""What a processor must have for a variant, in torch's names; a level has what those below it have."""


@dataclass(frozen=True)
class Core:
    """The native core as this process has it.

    library: None where it is not there. said: which variant of which file, or why there is none; one line.
    """

    library: ctypes.CDLL | None
    variant: str | None
    said: str


def library() -> ctypes.CDLL | None:
    """The library that this processor can run, compiled on first use where a wheel brought none; None without one.

    Chosen once for the process; ``core().said`` has the reason.
    """
    return core().library


@cache
def core() -> Core:
    """The library, which variant it is, and a line about it; without a library, the reason."""
    asked = os.environ.get(SETTING, "")
    try:
        variant = _variant(asked)
        path = _path(variant)
        return Core(_opened(path), variant, f"{variant}, {path}")
    except BuildFailed as cause:
        return Core(None, None, str(cause))


def supported() -> list[str]:
    """The variants that this processor can run, the best first."""
    can, levels = torch.cpu.get_capabilities(), list(VARIANTS.get(machine(), {}))
    return [
        name for at, name in enumerate(levels) if all(can.get(unit) for level in levels[at:] for unit in NEEDS[level])
    ]


def _variant(asked: str) -> str:
    if asked == "off":
        raise BuildFailed(f"{SETTING} is off")
    here = supported()
    if asked and asked not in here:
        raise WrongValue(
            f"{SETTING} is '{asked}'; expected off, or what this processor can run: {', '.join(here) or 'nothing'}. "
            f"Unset it for the best of them.",
            value=asked,
        )
    if not here:
        lowest = list(VARIANTS.get(machine(), {}))[-1:]
        why = f"it lacks {', '.join(_missing(lowest[0]))}" if lowest else f"there is no variant for {machine()}"
        raise BuildFailed(f"this processor cannot run it: {why}")
    return asked or here[0]


def _missing(variant: str) -> list[str]:
    can = torch.cpu.get_capabilities()
    return [unit for unit in NEEDS[variant] if not can.get(unit)]


def _path(variant: str) -> Path:
    packaged = PACKAGED / f"{variant}.so"
    return packaged if packaged.is_file() else cached(variant)


def _opened(path: Path) -> ctypes.CDLL:
    """The library of a file. Raises BuildFailed where it cannot be loaded or has another version of the interface."""
    try:
        found = ctypes.CDLL(str(path))
        version = found.meristem_abi()
    except (OSError, AttributeError) as cause:
        raise BuildFailed(f"{path} cannot be loaded: {cause}") from cause
    if version != ABI:
        raise BuildFailed(f"{path} has version {version} of the interface, and this package calls version {ABI}")
    return found


if __name__ == "__main__":
    sys.stderr.write(f"native core: {core().said}\n")
