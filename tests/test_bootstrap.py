"""Setting up the environment: what is found, what is skipped, and what is said instead of done."""

import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path
from shutil import copy, which

import pytest

ROOT = Path(__file__).parents[1]
TORCH = version("torch").partition("+")[0]


class Clone:
    """A folder with our bootstrap script, and a PATH that holds a few tools and the stubs that a test puts there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "pip.log"
        (folder / "scripts").mkdir(parents=True)
        copy(ROOT / "scripts" / "bootstrap.sh", folder / "scripts")
        (folder / "pyproject.toml").touch()
        (folder / "constraints.txt").write_text(f"torch=={TORCH}\n")
        for tool in ("cat", "head", "rm", "sh", "tr", "wc"):
            (folder / "bin").mkdir(exist_ok=True)
            (folder / "bin" / tool).symlink_to(str(which(tool)))

    def stub(self, path: str, script: str) -> None:
        """An executable; after ``script`` it goes on as this interpreter."""
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(f'#!/bin/sh\n{script}\nexec {sys.executable} "$@"\n')
        target.chmod(0o755)

    def start(self, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "MERISTEM_TORCH")}
        environment |= {"PATH": str(self.folder / "bin"), **variables}
        command = ["sh", "-c", "set -eu; . scripts/bootstrap.sh; echo ready"]
        return subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False, timeout=60
        )


LOGGED_PIP = 'if [ "$1 $2" = "-m pip" ]; then echo "$@" >>pip.log; exit 0; fi'


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path / "clone")


def test_no_python_is_said(clone: Clone) -> None:
    done = clone.start()
    assert done.returncode == 3
    assert "No Python 3.11 or newer was found. Install one (sudo apt install python3 python3-venv)" in done.stderr


def test_old_python_is_passed_over(clone: Clone) -> None:
    clone.stub("bin/python3", "exit 1")
    clone.stub("bin/python3.12", LOGGED_PIP.replace("-m pip", "-m venv"))
    assert "Making .venv with Python" in clone.start().stderr
    assert "-m venv --clear .venv" in clone.log.read_text()


def test_python_without_pip_gets_its_apt_line(clone: Clone) -> None:
    clone.stub("bin/python3", 'case "$2" in *ensurepip*) exit 1;; esac')
    done = clone.start()
    assert done.returncode == 3
    assert f"    sudo apt install python{sys.version_info[0]}.{sys.version_info[1]}-venv\n" in done.stderr


def test_second_start_asks_pip_nothing(clone: Clone) -> None:
    """The requirements are installed once, and again when what they are made from changes."""
    clone.stub(".venv/bin/python", LOGGED_PIP)
    assert clone.start().stdout == "ready\n"
    assert "-c constraints.txt -e .[plot,serve,test,lint]" in clone.log.read_text()
    clone.log.unlink()
    assert clone.start().stdout == "ready\n"
    assert not clone.log.exists()
    (clone.folder / "pyproject.toml").write_text("# changed")
    assert clone.start().stdout == "ready\n"
    assert clone.log.exists()


def test_interrupted_installation_is_done_again(clone: Clone) -> None:
    """No stamp is left behind by a pip that failed."""
    clone.stub(".venv/bin/python", 'case "$*" in "-m pip install"*"-e ."*) exit 1;; "-m pip install"*) exit 0;; esac')
    done = clone.start()
    assert done.returncode == 3
    assert "pip could not install the requirements" in done.stderr
    assert not (clone.folder / ".venv" / "stamp").exists()


def wheel(folder: Path, name: str, requires: str = "") -> None:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-9.9.9-py3-none-any.whl", "w") as archive:
        info = f"{name}-9.9.9.dist-info"
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9.9\n{requires}")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")


OFFLINE = {"PIP_NO_INDEX": "1", "PIP_EXTRA_INDEX_URL": "", "PIP_CONFIG_FILE": os.devnull}


def test_cuda_build_is_announced_not_begun(clone: Clone) -> None:
    """Without an NVIDIA GPU, a torch that brings CUDA packages along is named, and nothing is installed."""
    clone.stub(".venv/bin/python", 'case "$*" in *dry-run*) ;; "-m pip install"*) echo "$@" >>pip.log; exit 0;; esac')
    (clone.folder / "constraints.txt").write_text("torch==9.9.9\n")
    wheel(clone.folder / "wheels", "torch", "Requires-Dist: nvidia\nRequires-Dist: nvidia-parts\n")
    wheel(clone.folder / "wheels", "nvidia")
    wheel(clone.folder / "wheels", "nvidia_parts")
    links = {"PIP_FIND_LINKS": str(clone.folder / "wheels")}
    done = clone.start(**OFFLINE, **links)
    assert done.returncode == 3, done.stderr
    assert "no NVIDIA GPU, but pip offers only the CUDA build of torch" in done.stderr
    assert "(2 packages beside it, such as nvidia). Nothing was installed." in done.stderr
    assert "torch" not in clone.log.read_text()
    assert clone.start(**OFFLINE, **links, MERISTEM_TORCH="any").stdout == "ready\n"
    assert "-c constraints.txt torch" in clone.log.read_text()


def test_cpu_build_is_installed(clone: Clone) -> None:
    clone.stub(".venv/bin/python", 'case "$*" in *dry-run*) ;; "-m pip install"*) echo "$@" >>pip.log; exit 0;; esac')
    (clone.folder / "constraints.txt").write_text("torch==9.9.9\n")
    wheel(clone.folder / "wheels", "torch")
    assert clone.start(**OFFLINE, PIP_FIND_LINKS=str(clone.folder / "wheels")).stdout == "ready\n"
    assert "-c constraints.txt torch" in clone.log.read_text()


def test_torch_that_cannot_be_found_is_said(clone: Clone) -> None:
    clone.stub(".venv/bin/python", "")
    (clone.folder / "constraints.txt").write_text("torch==9.9.9\n")
    (clone.folder / "wheels").mkdir()
    done = clone.start(**OFFLINE, PIP_FIND_LINKS=str(clone.folder / "wheels"))
    assert done.returncode == 3
    assert "pip cannot find torch" in done.stderr


@pytest.mark.parametrize("script", ["demo", "check", ".ci/run", "scripts/lock.sh"])
def test_scripts_are_executable(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)


def test_constraints_are_exact_and_local_to_nobody() -> None:
    """Versions only: no hashes, no index lines, no build labels, no addresses."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()[1:]
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==\d+(\.\d+)*((a|b|rc)\d+)?(\.post\d+)?", line)] == []
    assert f"torch=={TORCH}" in lines
