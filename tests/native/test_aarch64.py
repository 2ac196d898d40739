"""The core for 64-bit ARM, compiled here by a cross compiler and run under QEMU: what it computes, not how fast."""

import shutil
import subprocess
from pathlib import Path

import pytest

from meristem.cli import run
from meristem.models.load import load
from meristem.native import build
from meristem.serve.session import Sampling, Session

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu")
PROCESSOR = build.VARIANTS["aarch64"]["aarch64"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not (shutil.which(COMPILER) and shutil.which(EMULATOR[0])),
        reason=f"needs {COMPILER} and {EMULATOR[0]}: apt-get install g++-aarch64-linux-gnu qemu-user",
    ),
]


def done(words: list[str], folder: Path) -> str:
    ran = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return ran.stdout


def test_the_core_runs(tmp_path: Path) -> None:
    """The windows, calls and models that the sanitizers see on this machine."""
    flags = [flag for flag in build.FLAGS if flag not in ("-O3", "-shared", "-fPIC")]
    sources = ["-I", str(build.source_folder()), str(Path(__file__).parent / "driver.cpp")]
    done([COMPILER, *flags, "-O1", "-static", *PROCESSOR, *sources, "-o", "driver"], tmp_path)
    assert done([*EMULATOR, "./driver", "form", "7", "100"], tmp_path) == "200 windows\n"
    assert done([*EMULATOR, "./driver", "layers", "7", "60"], tmp_path) == "180 calls\n"
    assert done([*EMULATOR, "./driver", "decode", "7", "30"], tmp_path) == "2700 steps of 30 models, 600 draws\n"


def test_the_edge_goes_on_with_a_session_and_gives_it_back(tmp_path: Path) -> None:
    """The C example writes the greedy text that the session writes here, which then goes on from what it has saved."""
    folder, shipped = tmp_path / "edge", load()
    assert run(["export", "edge", "--to", str(folder)]) == 0
    (folder / "libmeristem.so").unlink()
    sources = build.source_folder()
    build.compile_into(
        folder / "libmeristem.so", [COMPILER, *build.FLAGS, *build.SMALL, *PROCESSOR, str(sources / build.EDGE)]
    )
    assert (folder / "libmeristem.so").stat().st_size < 200_000
    compiler = COMPILER.replace("g++", "gcc")
    done([compiler, "example.c", "-o", "example", "-L.", "-lmeristem", "-Wl,-rpath,$ORIGIN"], folder)
    begun = Session(shipped.model, shipped.tokenizer, sampling=Sampling(temperature=0))
    begun.feed("Ada lives in Oslo.\nWhere does Ada live")
    begun.save(tmp_path / "begun")
    asked = [str(token_id) for token_id in shipped.tokenizer.encode("?\n")]
    text = done([*EMULATOR, "./example", "model.safetensors", "24", "../begun", "../new", *asked], folder)
    begun.feed("?\n")
    first = begun.generate(24)
    again = Session.load(tmp_path / "new", shipped.model, shipped.tokenizer)
    assert again.n_tokens == begun.n_tokens, "it saves half way"
    second = begun.generate(24)
    assert text == f"{first}{second}\n{begun.n_tokens} tokens were read; ../new has the session.\n"
    assert again.generate(24) == second
