"""The native core is compiled once, kept, loaded where the processor can run it, and where it is not, that is said."""

import ctypes
import os
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import copy2, which

import pytest
import torch

from meristem.cli import doctor
from meristem.errors import WrongValue
from meristem.native import build, library
from meristem.native.build import VARIANTS, WASM_COMPILER, BuildFailed, cached, compile_variant, has_compiler, machine
from meristem.native.library import ABI, SETTING, core, supported

ROOT = Path(__file__).parents[2]
SOURCE = 'extern "C" __attribute__((visibility("default"))) int meristem_abi() {{ return {}; }}\n'

needs_compiler = pytest.mark.skipif(
    not (has_compiler() and supported()), reason="needs a C++ compiler for this machine"
)


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A core of one function, which compiles at once, and a cache of its own."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "core.cpp").write_text(SOURCE.format(ABI))
    monkeypatch.setattr(build, "source_folder", lambda: folder)
    monkeypatch.setattr(library, "PACKAGED", tmp_path / "nothing")
    monkeypatch.setenv("MERISTEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(SETTING, raising=False)
    return folder


def loaded() -> library.Core:
    """What a process that starts now would load."""
    return core.__wrapped__()


@needs_compiler
def test_where_it_can_be_compiled_it_is_there() -> None:
    """What takes the core or tensor code, whichever is there, would be green without it."""
    if os.environ.get(SETTING) == "off":
        pytest.skip(f"{SETTING} is off")
    assert core().library is not None, core().said


@needs_compiler
def test_the_best_variant_of_the_processor_is_loaded(sources: Path) -> None:
    found = loaded()
    assert found.library is not None and found.library.meristem_abi() == ABI
    assert found.variant == supported()[0] and found.said.startswith(f"{found.variant}, ")


@needs_compiler
def test_a_variant_may_be_named(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SETTING, supported()[-1])
    assert loaded().variant == supported()[-1]
    monkeypatch.setenv(SETTING, "x86-64-v9")
    with pytest.raises(WrongValue, match="MERISTEM_NATIVE is 'x86-64-v9'; expected off, or what this processor can"):
        loaded()


def test_it_can_be_turned_off(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SETTING, "off")
    assert loaded() == library.Core(None, None, "MERISTEM_NATIVE is off")


def test_a_machine_without_a_compiler_says_so(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setattr(library, "supported", lambda: list(VARIANTS.get(machine(), {"none": ()})))
    assert loaded().said == "no C++ compiler was found (looked for /nowhere/c++)"
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "/nowhere")
    assert loaded().said == "no C++ compiler was found (looked for c++, g++, clang++)"


@needs_compiler
def test_a_compiler_that_fails_is_quoted(sources: Path) -> None:
    (sources / "core.cpp").write_text("int meristem_abi( {}")
    found = loaded()
    assert found.library is None and "failed: " in found.said and "core.cpp:1" in found.said


@needs_compiler
def test_another_version_of_the_interface_is_refused(sources: Path) -> None:
    (sources / "core.cpp").write_text(SOURCE.format(ABI + 1))
    found = loaded()
    assert found.library is None
    assert found.said.endswith(f"has version {ABI + 1} of the interface, and this package calls version {ABI}")


def test_a_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.so").write_bytes(b"no library")
    with pytest.raises(BuildFailed, match="cannot be loaded"):
        library._opened(tmp_path / "x.so")


@pytest.mark.parametrize(
    "levels, variants",
    [([], []), (["v3"], ["x86-64-v3"]), (["v4"], []), (["v3", "v4"], ["x86-64-v4", "x86-64-v3"])],
)
def test_a_processor_runs_the_levels_that_it_has(
    levels: list[str], variants: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A level needs all that those below it need."""
    has = {unit: True for level in levels for unit in library.NEEDS[f"x86-64-{level}"]}
    monkeypatch.setattr(library, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert supported() == variants


def test_a_processor_that_is_too_old_is_named(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "fma3": True, "bmi": True, "f16c": True})
    assert loaded().said == "this processor cannot run it: it lacks bmi2, lzcnt"
    monkeypatch.setattr(library, "machine", lambda: "riscv64")
    assert loaded().said == "this processor cannot run it: there is no variant for riscv64"


@needs_compiler
def test_what_is_compiled_is_kept_until_a_source_changes(sources: Path) -> None:
    first = cached(supported()[0])
    kept = first.stat().st_mtime_ns
    assert cached(supported()[0]) == first and first.stat().st_mtime_ns == kept
    (sources / "form.hpp").write_text("// changed\n")
    assert cached(supported()[0]) != first


@needs_compiler
def test_compilations_at_once_leave_one_whole_library(sources: Path, tmp_path: Path) -> None:
    target, flags = tmp_path / "out" / "x.so", VARIANTS[machine()][supported()[0]]
    with ThreadPoolExecutor(3) as pool:
        for made in [pool.submit(compile_variant, flags, sources, target) for _ in range(3)]:
            made.result()
    assert os.listdir(target.parent) == ["x.so"] and ctypes.CDLL(str(target)).meristem_abi() == ABI


@needs_compiler
def test_a_cache_that_cannot_be_written_is_said(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MERISTEM_CACHE", str(tmp_path / "file"))
    assert "cannot be written: Not a directory" in loaded().said


def test_doctor_says_which_core_or_why_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (found,) = doctor._native(tmp_path)
    assert (found.status == "ok") == (core().library is not None) and core().said in found.detail
    monkeypatch.setattr(library, "core", lambda: library.Core(None, None, "no C++ compiler was found"))
    (found,) = doctor._native(tmp_path)
    assert found.status == "warn"
    assert found.detail.startswith("not used: no C++ compiler was found; memories on the CPU run as tensor code")


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_wheel_brings_what_a_machine_without_a_compiler_loads(tmp_path: Path) -> None:
    """Built from the tracked files; every variant of the platform is inside, and the wheel is one of this platform."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        if (ROOT / name).is_file():
            (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            copy2(ROOT / name, tmp_path / "tree" / name)
    words = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, tmp_path / "tree"]
    subprocess.run([sys.executable, *map(str, words)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    inside = tmp_path / "installed" / "meristem" / "native"
    found = {path.name for path in (inside / "variants").iterdir()}
    assert found - {"edge.wasm"} == {f"{use}{name}.so" for name in VARIANTS[machine()] for use in ("", "edge-")}
    assert ("edge.wasm" in found) or which(WASM_COMPILER) is None
    assert {path.name for path in (inside / "source").iterdir()} == {
        path.name for path in build.source_folder().iterdir()
    }
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed"), "CXX": "/nowhere/c++"}
    said = subprocess.run(
        [sys.executable, "-m", "meristem.native.library"], env=environment, capture_output=True, text=True, check=True
    ).stderr
    assert said == f"native core: {supported()[0]}, {inside / 'variants' / supported()[0]}.so\n"
