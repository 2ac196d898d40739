"""What a run ran on: environment, hardware and the version of the code, as plain values for ``run.json``."""

import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from meristem.device.resolve import BF16_UNITS

_ALLOWED = re.compile(r"(MERISTEM_|OMP_|PYTORCH_).*|CUDA_VISIBLE_DEVICES")
_SECRET = re.compile(r"TOKEN|SECRET|PASS|KEY|CREDENTIAL|AUTH", re.IGNORECASE)
_USER_IN_URL = re.compile(r"//[^/@\s]*@")


def describe() -> dict[str, Any]:
    """The fields ``env``, ``hardware`` and ``code`` of ``run.json``."""
    return {"env": environment(), "hardware": hardware(), "code": code_version()}


def environment() -> dict[str, Any]:
    """Python, platform, installed packages, the build of torch, and the few variables that change results.

    Variables are taken by an allow-list, never all with a filter; even so, names and URLs that could hold a secret
    are left out.
    """
    variables = {
        name: _USER_IN_URL.sub("//", value)
        for name, value in sorted(os.environ.items())
        if _ALLOWED.fullmatch(name) and not _SECRET.search(name)
    }
    packages = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": dict(sorted(packages.items())),
        "torch": {
            "version": torch.__version__,
            "git": torch.version.git_version,
            "cuda": torch.version.cuda,
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        },
        "variables": variables,
    }


def hardware() -> dict[str, Any]:
    """The processor, its cores, the RAM, and the GPUs that torch can use."""
    capabilities = torch.cpu.get_capabilities()
    is_known = "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {})
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        gpus.append({"name": properties.name, "total_bytes": properties.total_memory, "capability": capability})
    return {
        "cpu": str(capabilities.get("cpu_name") or platform.processor()),
        "architecture": platform.machine(),
        "cpu_count": os.cpu_count(),
        "ram_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if is_known else None,
        "bf16_units": [unit for unit in BF16_UNITS if capabilities.get(unit)],
        "gpus": gpus,
    }


def code_version(package: Path = Path(__file__).parents[1]) -> dict[str, str | None]:
    """Version of the installed package, and where it is a git checkout its commit and what was changed since.

    ``dirty_sha256`` is the hash of the uncommitted changes, untracked files by name included; null when there are none.
    A package installed into an environment inside some other repository does not belong to that repository.
    """
    version = importlib.metadata.version("meristem")
    try:
        _git(package, "ls-files", "--error-unmatch", "__init__.py")
        commit = _git(package, "rev-parse", "HEAD").decode().strip()
        status = _git(package, "status", "--porcelain", "--untracked-files=all")
        changes = status + _git(package, "diff", "HEAD", "--binary", "--no-ext-diff") if status else b""
    except (OSError, subprocess.CalledProcessError):
        return {"version": version, "commit": None, "dirty_sha256": None}
    dirty = hashlib.sha256(changes).hexdigest() if changes else None
    return {"version": version, "commit": commit, "dirty_sha256": dirty}


def _git(directory: Path, *arguments: str) -> bytes:
    return subprocess.run(["git", "-C", str(directory), *arguments], capture_output=True, check=True).stdout
