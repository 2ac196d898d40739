"""Writes docker/requirements.txt and docker/requirements-cuda.txt: what the images install, with versions and hashes.

Run it, with the Python of the image, on a machine like the one that builds it: a hash is of one file, for one platform.
Versions are those of constraints.txt; the CUDA build of torch brings libraries of its own.
"""

import json
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCKS = {"CPU": "requirements.txt", "CUDA": "requirements-cuda.txt"}
"""By the build of torch."""


def lock(build: str) -> None:
    """Write the lock of one build of torch."""
    options = "--dry-run --ignore-installed --quiet --no-input --report - -c constraints.txt".split()
    # Builds for the CPU have a version such as 2.13.0+cpu, which three equal signs leave out.
    torch = [] if build == "CPU" else [f"torch==={_torch()}"]
    command = [sys.executable, "-m", "pip", "install", *options, ".[serve]", *torch]
    report = json.loads(subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout)
    lines = []
    for item in report["install"]:
        name, version = item["metadata"]["name"], item["metadata"]["version"]
        if name != "meristem":
            lines.append(f"{name}=={version} --hash=sha256:{item['download_info']['archive_info']['hashes']['sha256']}")
    python = f"Python {platform.python_version()}, {platform.system()}, {platform.machine()}"
    head = f"# Written by scripts/lock_image.py: {python}, {build} build of torch.\n"
    (ROOT / "docker" / LOCKS[build]).write_text(head + "".join(f"{line}\n" for line in sorted(lines, key=str.lower)))


def _torch() -> str:
    """The version of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith("torch=="))


if __name__ == "__main__":
    for each in LOCKS:
        lock(each)
