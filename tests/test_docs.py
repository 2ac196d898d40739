"""The documents say what is true: the README runs, the reference is current, links lead somewhere."""

import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from meristem.memory.forms import forms
from meristem.memory.named import rules

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")

# What a reader types for minutes runs for seconds here: the same commands, a smaller job. ./check only collects.
SMALL = {
    "MERISTEM__TRAIN__MAX_TIME": "2s",
    "MERISTEM__DATA__SOURCE": "stdlib-docs",
    "MERISTEM__MODEL__DIM": "32",
    "MERISTEM__MEMORY__HEAD_DIM": "16",
    "MERISTEM__MODEL__N_LAYERS": "1",
    "MERISTEM__EVAL__N_WINDOWS_END": "4",
    "PYTEST_ADDOPTS": "--collect-only -q -n 0 tests/test_plugins.py",
    "OMP_NUM_THREADS": "1",
    # Should the set-up want to install after all, it must not touch the environment that this test borrows.
    "PIP_DRY_RUN": "1",
}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_block_of_the_readme_runs(tmp_path: Path) -> None:
    """In order, in a copy of the tracked files, with the environment that this test itself runs in."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / name)
    borrow_environment(tmp_path)
    environment = os.environ | SMALL | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment["MERISTEM_CACHE"] = str(tmp_path / "cache")
    blocks = BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert {language for language, _ in blocks} == {"sh", "python"}
    for language, text in blocks:
        command = ["sh", "-eu", "-c", text] if language == "sh" else [sys.executable, "-c", text]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def borrow_environment(root: Path) -> None:
    """Make ``root/.venv`` out of links, with the stamp that keeps the set-up from installing into what it links to."""
    (root / ".venv").mkdir()
    for entry in Path(sys.prefix).iterdir():
        if entry.name != "stamp":
            (root / ".venv" / entry.name).symlink_to(entry)
    script = (root / "scripts" / "bootstrap.sh").read_text(encoding="utf-8")
    stamp = re.search(r"^stamp\(\) \{\n.*?^\}$", script, re.DOTALL | re.MULTILINE)
    assert stamp is not None
    subprocess.run(["sh", "-eu", "-c", f"{stamp.group()}\nstamp >.venv/stamp"], cwd=root, check=True)


def script(name: str) -> ModuleType:
    """A program of scripts/, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_rules_is_current() -> None:
    """Names, equations, papers, parts and forms are those of the catalogue; figures are those that were measured."""
    page = script("rules")
    written = page.PAGE.read_text(encoding="utf-8")
    found = json.loads(page.FIGURES.read_text(encoding="utf-8"))
    assert written == page.page(found), "docs/rules.md is stale: run .venv/bin/python scripts/rules.py"
    for name in rules.names():
        assert f"\n## {name}\n\n{page.said(rules.get(name))}\n" in written


def test_both_rules_of_atlas_stand_on_the_page_with_their_equations() -> None:
    """S3b-S18."""
    written = script("rules").PAGE.read_text(encoding="utf-8")
    assert "`S <- momentum S + grad sum of the last losses; M <- retain M - write NS(S)`" in written
    assert "`S <- momentum S + write u k^T; M <- retain M + S`" in written


def test_a_rule_that_is_not_on_the_page_makes_it_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    """S3b-S18: the check above can fail: on another catalogue, and on other forms."""
    page = script("rules")
    found = json.loads(page.FIGURES.read_text(encoding="utf-8"))
    written = page.page(found)
    monkeypatch.setitem(rules._entries, "unheard_of", rules.get("delta"))
    assert page.page(found) != written
    monkeypatch.undo()
    monkeypatch.delitem(forms._entries, "exact_chunk")
    assert page.page(found) != written


def test_the_configuration_reference_is_current() -> None:
    reference = script("reference")
    written = reference.PAGE.read_text(encoding="utf-8")
    assert written == reference.page(), "docs/configuration.md is stale: run .venv/bin/python scripts/reference.py"


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name
)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


def test_k8_the_table_of_stages_is_that_of_the_code() -> None:
    stages = script("stages")
    written = stages.PAGE.read_text(encoding="utf-8")
    assert written == stages.page(written), "docs/growth.md is stale: run .venv/bin/python scripts/stages.py"


def test_the_table_of_faults_is_current() -> None:
    faults = script("faults")
    written = faults.PAGE.read_text(encoding="utf-8")
    assert written == faults.page(), "docs/faults.md is stale: run .venv/bin/python scripts/faults.py"


def conversations(page: str) -> list[tuple[list[str], list[str], list[str]]]:
    """The conversations that a page shows: the words of the command, what is typed behind ``> ``, and what is shown."""
    found = []
    for language, text in BLOCK.findall(page):
        if language == "console":
            command, *lines = text.splitlines()
            assert command.startswith("$ meristem chat")
            typed = [line.removeprefix("> ") for line in lines if line.startswith("> ")]
            printed = [line for line in lines if line and not line.startswith("> ")]
            found.append((command.split()[2:], typed, printed))
    return found


NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")


def test_the_first_hour_is_what_the_model_in_the_box_says(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every reply on the page, word for word; of what commands print, numbers to one in twenty, and no times."""
    from meristem.cli import run

    monkeypatch.chdir(ROOT)
    shown = conversations((ROOT / "docs" / "first-hour.md").read_text(encoding="utf-8"))
    assert len(shown) >= 3
    for command, typed, printed in shown:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in typed)))
        assert run(command) == 0
        found, expected = capsys.readouterr().out, "\n".join(printed)
        found, expected = (re.sub(r"in [\d.]+ s", "", text) for text in (found, expected))
        assert NUMBER.sub("#", found).split() == NUMBER.sub("#", expected).split()
        numbers = [[float(number.replace(",", "")) for number in NUMBER.findall(text)] for text in (found, expected)]
        assert numbers[0] == pytest.approx(numbers[1], rel=0.05)
