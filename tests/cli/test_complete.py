"""What a shell offers while a command line is typed, by the machinery that a shell starts."""

import os
import subprocess
import sys

import pytest

from meristem.cli import run


@pytest.fixture
def offered(monkeypatch, capsys):
    """What bash is given for the last of some words."""

    def complete(*words: str) -> list[str]:
        monkeypatch.setenv("_MERISTEM_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", " ".join(("meristem", *words)))
        monkeypatch.setenv("COMP_CWORD", str(len(words)))
        assert run([]) == 0
        return capsys.readouterr().out.split()

    return complete


def test_verbs_and_options_are_offered(offered):
    """Those that begin as typed."""
    assert offered("tr") == ["train"]
    assert offered("config", "ex") == ["explain"]
    assert "--resume" in offered("train", "lmm", "--re")


def test_presets_and_files_are_offered(offered, tmp_path, monkeypatch):
    """Also in their sizes, and whatever is YAML."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "titans-mine.yaml").write_text("")
    assert offered("train", "titans-ma")[:3] == ["titans-mac", "titans-mag", "titans-mal"]
    assert offered("train", "titans-mi") == ["titans-mine.yaml"]
    assert "hope-340m" in offered("config", "show", "hope-")
    assert offered("plan", "./ti") == ["./titans-mine.yaml"]


def test_keys_are_offered(offered):
    """Up to the value; `explain` takes sections too."""
    assert offered("train", "titans-mag", "train.st") == ["train.steps="]
    assert "optim.lr=" in offered("train", "titans-mag", "run.seed=1", "optim.l")
    assert "data.seq_len=" in offered("data", "prepare", "data.s")
    assert {"train", "train.steps"} <= set(offered("config", "explain", "train"))


def test_runs_are_offered(offered, tmp_path, monkeypatch):
    """Here and below ``runs`` to begin with, then where the path leads."""
    monkeypatch.chdir(tmp_path)
    for name in ("runs/ada", "runs/bob", "eve", "deep/down/zoe"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "run.json").write_text("{}")
    (tmp_path / "runs" / "rest").mkdir()
    for verb in (("sample",), ("chat",), ("eval",), ("checkpoint", "show"), ("runs", "show")):
        assert offered(*verb, "") == ["eve", "runs/ada", "runs/bob"]
        assert offered(*verb, "runs/a") == ["runs/ada"]
    assert offered("sample", "deep/down/") == ["deep/down/zoe"]
    assert offered("sample", "./e") == ["./eve"]


@pytest.mark.parametrize("words", ["train titans", "train lmm optim.", "sample runs/", "config explain o"])
def test_answer_comes_without_torch(words):
    """A shell asks at every key."""
    probe = """
import sys
from meristem.cli import run
code = run([])
heavy = sorted({"torch", "numpy", "tokenizers", "safetensors"} & set(sys.modules))
assert (code, heavy) == (0, []), (code, heavy)
"""
    variables = {
        "_MERISTEM_COMPLETE": "complete_bash",
        "COMP_WORDS": f"meristem {words}",
        "COMP_CWORD": str(len(words.split())),
    }
    subprocess.run(
        [sys.executable, "-c", probe], check=True, capture_output=True, timeout=60, env=os.environ | variables
    )


def test_script_for_the_shell_is_shown(capsys, monkeypatch):
    """As --show-completion and the shell itself ask for it."""
    monkeypatch.setenv("_MERISTEM_COMPLETE", "source_zsh")
    assert run([]) == 0
    assert "_MERISTEM_COMPLETE=complete_zsh" in capsys.readouterr().out
    monkeypatch.delenv("_MERISTEM_COMPLETE")
    assert run(["--help"]) == 0
    told = capsys.readouterr().out
    assert "--install-completion" in told and "--show-completion" in told
