"""A run tells what it ran on, and nothing secret."""

import json
import os
import shutil
import subprocess

import pytest
import torch

from meristem.device.describe import code_version, describe


def test_planted_secret_does_not_appear(monkeypatch):
    """A5.2: Only listed variables are told, and of those none whose name or URL may hold a secret."""
    planted = {
        "HF_TOKEN": "hf_planted",
        "MERISTEM_HUB_TOKEN": "planted2",
        "OMP_API_KEY": "planted3",
        "AWS_SECRET_ACCESS_KEY": "planted4",
        "MERISTEM__DATA__MIRROR": "https://ada:planted5@example.org/x",
        "HOME_OF_PLANTED": "planted6",
    }
    # Whoever runs the tests has variables of this kind as well, such as the extras that .ci/run asks for.
    for name in os.environ:
        if name.startswith(("MERISTEM_", "OMP_", "PYTORCH_")):
            monkeypatch.delenv(name)
    for name, value in (planted | {"OMP_NUM_THREADS": "7", "MERISTEM__TRAIN__STEPS": "3"}).items():
        monkeypatch.setenv(name, value)
    described = describe()
    assert "planted" not in json.dumps(described)
    assert described["env"]["variables"] == {
        "MERISTEM__DATA__MIRROR": "https://example.org/x",
        "MERISTEM__TRAIN__STEPS": "3",
        "OMP_NUM_THREADS": "7",
    }


def test_description_is_plain_and_names_torch():
    """All of it is JSON, with the versions that results depend on and the size of the machine."""
    described = json.loads(json.dumps(describe()))
    assert described["env"]["torch"]["version"] == torch.__version__
    assert described["env"]["packages"]["numpy"]
    assert described["hardware"]["cpu_count"] >= 1
    assert described["hardware"]["ram_bytes"] > 1 << 28


@pytest.fixture
def checkout(tmp_path):
    """A git repository with a package in it."""
    package = tmp_path / "src" / "meristem"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-q", "-m", "x")
    return package


def git(directory, *arguments):
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    done = subprocess.run(["git", "-C", str(directory), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_clean_checkout_is_its_commit(checkout):
    """A5.3: Without changes the commit says it all."""
    version = code_version(checkout)
    assert version["commit"] == git(checkout, "rev-parse", "HEAD")
    assert version["dirty_sha256"] is None


def test_every_change_has_its_hash(checkout):
    """A5.3: A changed line, a staged one and a new file each give another hash; undoing the change undoes the hash."""
    hashes = [code_version(checkout)["dirty_sha256"]]
    (checkout / "__init__.py").write_text("a = 1\n")
    hashes.append(code_version(checkout)["dirty_sha256"])
    (checkout / "__init__.py").write_text("a = 2\n")
    git(checkout, "add", ".")
    hashes.append(code_version(checkout)["dirty_sha256"])
    (checkout / "new.py").write_text("")
    hashes.append(code_version(checkout)["dirty_sha256"])
    assert len(set(hashes)) == 4
    (checkout / "new.py").unlink()
    assert code_version(checkout)["dirty_sha256"] == hashes[2]


def test_package_outside_git_is_its_version(tmp_path, checkout):
    """A5.3: Neither a plain directory nor one that some other repository ignores belongs to a commit."""
    site = checkout.parents[1] / ".venv" / "meristem"
    site.mkdir(parents=True)
    (site / "__init__.py").write_text("")
    for package in (tmp_path.parent, site):
        version = code_version(package)
        assert (version["commit"], version["dirty_sha256"]) == (None, None)
        assert version["version"]
