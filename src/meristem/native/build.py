"""Compiles the native core, and keeps what was compiled.

A checkout compiles one variant into the cache, when it is first needed; ``setup.py`` compiles all variants of a
platform into a wheel. It loads this file by its path, before the package is installed: nothing but the standard library
is imported here.
"""

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

VARIANTS: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "x86_64": {"x86-64-v4": ("-march=x86-64-v4",), "x86-64-v3": ("-march=x86-64-v3",)},
    "aarch64": {"aarch64": ("-march=armv8-a",)},
}
"""By machine: levels of its processors, the best first, and the flags that compile for them."""

# Errno and traps of mathematical functions are read by nobody, and keep loops from being vectorised. NaN stays NaN.
FLAGS: Final = (
    *("-std=c++20", "-O3", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
)
# Where a wheel is installed there may be an older C++ library than where it was built.
PORTABLE: Final = ("-static-libstdc++", "-static-libgcc") if sys.platform == "linux" else ()

COMPILERS: Final = ("c++", "g++", "clang++")

CORE: Final = "core.cpp"
EDGE: Final = "edge.cpp"
"""What is compiled by itself: the core that Python calls, and the one of ``meristem export edge``."""

# The edge's library stands alone, with the C++ library in it and no more of that than it needs.
SMALL: Final = (
    (
        "-fno-rtti",
        "-DMERISTEM_SMALL",
        *PORTABLE,
        "-Wl,--exclude-libs,ALL",
        "-Wl,--gc-sections",
        "-Wl,-z,noseparate-code",
        "-s",
    )
    if sys.platform == "linux"
    else ()
)
# No sum is contracted and no small number flushed: the bits are those of any build with these, whatever its vectors.
SAME_BITS: Final = ("-ffp-contract=off", "-DMERISTEM_PORTABLE_BITS", "-fno-fast-math")
WASM_SIMD: Final = ("-msimd128",)
WASM: Final = (
    *("--target=wasm32-wasi", "-std=c++20", "-O3", "-mexec-model=reactor", "-fvisibility=hidden"),
    *("-fno-exceptions", "-fno-rtti", "-fno-math-errno", "-fno-trapping-math", *SAME_BITS),
    "-Wl,-s,--gc-sections",
)
WASM_COMPILER: Final = "clang++"
WASM_NEEDS: Final = (
    "clang for WebAssembly: apt-get install clang lld wasi-libc libc++-dev-wasm32 libclang-rt-14-dev-wasm32"
)
TIMEOUT_S: Final = 600
PACKAGED: Final = Path(__file__).parent / "variants"
"""Where a wheel has libraries that are compiled already."""


class BuildFailed(Exception):
    """The core was not compiled; the message is the reason, as a clause."""


def machine() -> str:
    """The processor's kind, as ``VARIANTS`` names it."""
    found = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(found, found)


def source_folder() -> Path:
    """The folder ``native`` of the checkout, or its copy in an installed package. Raises BuildFailed without either."""
    for folder in (Path(__file__).parent / "source", Path(__file__).parents[3] / "native"):
        if (folder / "core.cpp").is_file():
            return folder
    raise BuildFailed("its sources are not there")


def compiler() -> list[str]:
    """The words that start the C++ compiler: $CXX, or the first of ``COMPILERS`` on the path. Raises BuildFailed."""
    words = shlex.split(os.environ.get("CXX", ""))
    for candidate in [words] if words else [[name] for name in COMPILERS]:
        if found := shutil.which(candidate[0]):
            return [found, *candidate[1:]]
    raise BuildFailed(f"no C++ compiler was found (looked for {words[0] if words else ', '.join(COMPILERS)})")


def has_compiler() -> bool:
    """Whether a C++ compiler is there, and variants for this machine."""
    try:
        return bool(compiler()) and machine() in VARIANTS
    except BuildFailed:
        return False


def compile_variant(flags: tuple[str, ...], sources: Path, target: Path, main: str = CORE) -> None:
    """Compile ``main`` of the folder ``sources`` into the library ``target``, which is whole or not there.

    Processes that do this at once do not disturb each other: each compiles into a file of its own, and the last to
    finish puts an equal library in the place of the first. Raises BuildFailed, with what the compiler said.
    """
    compile_into(target, [*compiler(), *FLAGS, *flags, str(sources / main)])


def compile_into(target: Path, words: list[str]) -> None:
    """Run a compiler with ``-o`` and a file in a folder beside ``target``, whose place it takes. Raises BuildFailed."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        own = Path(tempfile.mkdtemp(dir=target.parent, prefix=target.stem, suffix=".part"))
    except OSError as cause:
        raise BuildFailed(f"{target.parent} cannot be written: {cause.strerror}") from cause
    try:
        done = subprocess.run(
            [*words, "-o", str(own / target.name)],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=TIMEOUT_S,
        )
        if done.returncode:
            said = (done.stderr or done.stdout).strip()[-500:] or f"exit code {done.returncode}"
            raise BuildFailed(f"{words[0]} failed: {said}")
        os.replace(own / target.name, target)  # with the rights that the linker gave it: a program runs
    except (OSError, subprocess.TimeoutExpired) as cause:
        raise BuildFailed(f"it could not be compiled: {cause}") from cause
    finally:
        shutil.rmtree(own, ignore_errors=True)


def cached(variant: str, main: str = CORE) -> Path:
    """The library of a variant of this machine in the cache, compiled first where it is not there. Raises BuildFailed.

    The cache is ``$MERISTEM_CACHE/native`` or ``~/.cache/meristem/native``. A library stands in a folder named by what
    it was made of: the sources, the flags and the compiler.
    """
    flags, sources = (*VARIANTS[machine()][variant], *(SMALL if main == EDGE else ())), source_folder()
    target = _place(f"{Path(main).stem}-{variant}.so", (*FLAGS, *flags), sources, compiler())
    if not target.is_file():
        compile_variant(flags, sources, target, main)
    return target


def cached_wasm(vectors: tuple[str, ...] = WASM_SIMD) -> Path:
    """The edge's core for WebAssembly, from the wheel, or from the cache, compiled first. Raises BuildFailed.

    vectors: flags; none for a build without vectors, which gives the same bits and is slower.
    """
    packaged = PACKAGED / "edge.wasm"
    if vectors and packaged.is_file():
        return packaged
    found, sources = shutil.which(WASM_COMPILER), source_folder()
    if found is None:
        raise BuildFailed(f"no {WASM_NEEDS}")
    words = [found, *WASM, *vectors, *_exports(sources)]
    target = _place("edge.wasm", tuple(words[1:]), sources, [found])
    if not target.is_file():
        try:
            compile_into(target, [*words, str(sources / EDGE)])
        except BuildFailed as cause:
            raise BuildFailed(f"{cause}; it needs {WASM_NEEDS}") from cause
    return target


def _exports(sources: Path) -> list[str]:
    """For the linker: the functions of the header that WebAssembly has, those without files."""
    header = (sources / "meristem.h").read_text(encoding="utf-8")
    names = set(re.findall(r"^MERISTEM_API .*?(meristem_[a-z_]+)\(", header, re.MULTILINE))
    names -= {"meristem_open", "meristem_load", "meristem_save"}
    return [f"-Wl,--export={name}" for name in (*sorted(names), "malloc", "free")]


def _place(name: str, flags: tuple[str, ...], sources: Path, words: list[str]) -> Path:
    """Where the cache keeps what is made of these sources by this compiler."""
    digest = hashlib.sha256(repr((name, flags, words)).encode())
    status = os.stat(os.path.realpath(words[0]))
    digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
    for source in sources_in(sources):
        digest.update(f"{source.name}\0".encode() + source.read_bytes())
    root = os.path.expanduser(os.environ.get("MERISTEM_CACHE") or "~/.cache/meristem")
    if root.startswith("~"):
        raise BuildFailed("no home directory is known for the cache; set MERISTEM_CACHE")
    return Path(root, "native", digest.hexdigest()[:16], name)


def sources_in(folder: Path) -> list[Path]:
    """What is compiled, and what it includes."""
    return sorted([*folder.glob("*.[ch]pp"), *folder.glob("*.h")])


def fill(folder: Path) -> list[str]:
    """Put sources and every variant of this machine into a package that is being built; gives the variants.

    Without a compiler there are the sources alone, and the reason is printed.
    """
    sources, made = source_folder(), []
    (folder / "source").mkdir(parents=True, exist_ok=True)
    for source in sources_in(sources):
        shutil.copy2(source, folder / "source")
    if (sources / "edge").is_dir():
        shutil.copytree(sources / "edge", folder / "source" / "edge", dirs_exist_ok=True)
    try:
        for variant, flags in VARIANTS.get(machine(), {}).items():
            compile_variant((*flags, *PORTABLE), sources, folder / PACKAGED.name / f"{variant}.so")
            compile_variant((*flags, *SMALL), sources, folder / PACKAGED.name / f"edge-{variant}.so", EDGE)
            made.append(variant)
    except BuildFailed as cause:
        sys.stderr.write(f"the wheel goes without the native core: {cause}\n")
    try:
        shutil.copy2(cached_wasm(), folder / PACKAGED.name / "edge.wasm")
    except BuildFailed as cause:
        sys.stderr.write(f"the wheel goes without the page of the edge: {cause}\n")
    return made
