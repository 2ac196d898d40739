"""The steps of the Dockerfile, one by one, as far as a machine without containers allows."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parents[1]
NOBODY = 65534
LOCKS = {
    build: ROOT / "docker" / name for build, name in (("cpu", "requirements.txt"), ("cuda", "requirements-cuda.txt"))
}
LARGEST_BYTES = 1_200_000_000 - 130_000_000
"""Of what is installed; python:3.11-slim beneath has the rest of an image of 1.2 GB."""
SMALL = "data.source=stdlib-docs data.seq_len=64 model.dim=32 model.n_layers=1 memory.head_dim=16".split()


def instructions() -> list[tuple[str, str]]:
    """Kind and text of each, its lines joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in lines if line.strip()]


def locked(lock: Path) -> dict[str, str]:
    found = (line.split()[0].split("==") for line in lock.read_text().splitlines() if not line.startswith("#"))
    return {name.lower().replace("_", "-"): version.partition("+")[0] for name, version in found}


@pytest.mark.parametrize("build", LOCKS)
def test_the_lock_is_that_of_the_tests(build):
    """CX-9.5: Each package in the version that everything else is tested with, and with a hash."""
    lines = [line for line in LOCKS[build].read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"\S+==\S+ --hash=sha256:[0-9a-f]{64}", line) for line in lines)
    tested = (line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    versions = {name.lower().replace("_", "-"): version for name, version in tested}
    wanted = [*project()["dependencies"], *project()["optional-dependencies"]["serve"]]
    names, found = {re.split(r"[^\w.-]", each)[0].lower().replace("_", "-") for each in wanted}, locked(LOCKS[build])
    assert names <= found.keys(), "run scripts/lock_image.py"
    differing = {name for name, version in found.items() if versions.get(name, version) != version}
    assert differing == set()


def test_the_builds_differ_in_what_cuda_brings():
    """The image for NVIDIA GPUs has torch's own build for them, and its libraries, beside what the other has."""
    cpu, cuda = (locked(lock) for lock in LOCKS.values())
    brought = cuda.keys() - cpu.keys()
    assert cpu.items() <= cuda.items() and brought
    assert all(name.startswith(("nvidia-", "cuda-")) or name == "triton" for name in brought)
    assert "torch==2.13.0+cpu " in LOCKS["cpu"].read_text() and "+cpu" not in LOCKS["cuda"].read_text()


def test_what_is_copied_is_sent():
    """The files that a step copies are those that .dockerignore lets through."""
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [text.split()[:-1] for kind, text in instructions() if kind == "COPY" and "--from" not in text]
    assert {path for paths in copied for path in paths} == sent
    assert all((ROOT / path).exists() for path in sent)


@pytest.mark.extras
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_cx_11_1_cx_11_2_the_steps_of_the_image_give_what_works(tmp_path):
    """Installed with hashes into a clean environment, used by one without rights that can write to its data alone:
    version, doctor, 20 steps, a text (CX-11.1), and a server that is healthy by the check of the image (CX-11.2,
    CX-11.3). The index of torch is this machine's."""
    build(tmp_path / "opt", tmp_path / "src")
    size_bytes = sum(path.lstat().st_size for path in (tmp_path / "opt").rglob("*"))
    assert size_bytes < LARGEST_BYTES
    for above in (tmp_path, *tmp_path.parents):  # pytest keeps its directories to their owner
        if above.stat().st_uid == os.getuid() and above != Path("/"):
            above.chmod(above.stat().st_mode | 0o055)
    run_healthy(tmp_path / "opt", tmp_path / "data")


def build(place: Path, source: Path) -> None:
    """What the first stage does, with ``place`` for /opt/meristem and ``source`` for /src, which is gone afterwards."""
    source.mkdir()
    steps, given = instructions(), dict(os.environ)
    last = max(number for number, (kind, _) in enumerate(steps) if kind == "FROM")
    for kind, text in steps[:last]:
        if kind == "COPY":
            *paths, target = text.split()
            for path in paths:
                to = source / (target if path == target else Path(target) / Path(path).name)
                to.parent.mkdir(parents=True, exist_ok=True)
                copy = shutil.copytree if (ROOT / path).is_dir() else shutil.copy
                copy(ROOT / path, to)
        elif kind == "ARG" and "=" in text:
            name, _, value = text.partition("=")
            given[name] = value
        elif kind == "RUN":
            command = text.replace("/opt/meristem", str(place))
            command = re.sub(r"^python ", f"{shlex.quote(sys.executable)} ", command)
            subprocess.run(["/bin/sh", "-ec", command], cwd=source, env=given, check=True)
    shutil.rmtree(source)


def works_alone(call: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """What a user does first with the program that ``call`` runs: ask for its version, examine, train, sample."""
    run = "run"  # from where it works: a folder above may be closed to this user, which os.access minds
    assert call("--version").stdout.split()[-1] == project()["version"]
    examined = call("doctor", "--json")
    assert examined.returncode == 0, examined.stdout
    trained = call("train", "default", *SMALL, "train.steps=20", "--run-dir", run)
    assert trained.returncode == 0, trained.stderr
    sampled = call("sample", run, "--prompt", "The", "--max-tokens", "8", "--json")
    assert sampled.returncode == 0 and json.loads(sampled.stdout)


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def run_healthy(place: Path, data: Path) -> None:
    """What the second stage says of the container, until it is healthy."""
    data.mkdir()
    settings = dict(instructions())
    assert settings["WORKDIR"] == settings["VOLUME"]
    program, command = json.loads(settings["ENTRYPOINT"]), json.loads(settings["CMD"])
    environment = {"PATH": f"{place}/bin:/usr/bin:/bin", "HOME": str(data), "PYTHONDONTWRITEBYTECODE": "1"}
    environment["XDG_DATA_HOME"] = str(data)
    uid, bare = os.getuid(), []
    if uid == 0:
        os.chown(data, NOBODY, NOBODY)
        uid = NOBODY
        # The interpreter may be one of root alone, so that this user may read what it is not allowed to, and no more.
        only = "-all,+dac_read_search"
        bare = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--no-new-privs"]
        bare += [f"--inh-caps={only}", "--ambient-caps=+dac_read_search", f"--bounding-set={only}"]

    def call(*words):
        return subprocess.run([*bare, *words], env=environment, cwd=data, capture_output=True, text=True, check=False)

    works_alone(lambda *words: call(*program, *words))
    refused = call(*program, *command)
    assert refused.returncode == 2 and "there is no key" in refused.stderr
    assert call(*program, "keys", "add", "ada").returncode == 0
    serve = [*bare, *program, *command, "--port", "0", "--json"]
    with subprocess.Popen(serve, env=environment, cwd=data, stdout=subprocess.PIPE) as server:
        try:
            port = json.loads(server.stdout.readline())["url"].rpartition(":")[2]
            assert psutil.Process(server.pid).uids().effective == uid
            words = json.loads(settings["HEALTHCHECK"].partition(" CMD ")[2])
            check = [*words[:-1], words[-1].replace(":8000/", f":{port}/")]
            until = time.monotonic() + 600
            while call(*check).returncode:
                assert server.poll() is None and time.monotonic() < until
                time.sleep(1)
        finally:
            server.terminate()
    written = {path.name for path in data.rglob("*") if path.is_file()}
    assert written >= {"keys.sqlite", "sessions.sqlite"}
