"""The documents say what is true: the README runs, the reference is current, links lead somewhere."""

import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from meristem.memory.forms import forms
from meristem.memory.named import rules

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(#[^)\s]*)?\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)

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
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", ["README.md", "docs/start.md"])
def test_every_block_of_the_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CX-12.1: in order, in a copy of the tracked files, with the environment that this test itself runs in."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / name)
    borrow_environment(tmp_path)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for name, value in (SMALL | {"PATH": path, "MERISTEM_CACHE": str(tmp_path / "cache")}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    run_already = set() if page == "README.md" else set((ROOT / "README.md").read_text(encoding="utf-8").splitlines())
    for language, text in BLOCK.findall((ROOT / page).read_text(encoding="utf-8")):
        if language == "python":
            exec(compile(text, page, "exec"), {})
        elif language == "sh":
            for line in text.replace("\\\n", " ").splitlines():
                if line not in run_already:
                    run_line(line, monkeypatch)
        else:  # a conversation, which a test of its own runs
            assert language == "console"


def run_line(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of a shell; what it calls of ours runs in this process, which has imported everything once."""
    from meristem.cli import run

    command, _, otherwise = line.partition(" || ")
    before, bar, ours = command.rpartition(" | ")
    if not ours.startswith("meristem "):
        before, bar, ours = command, "|", ""
    typed = ""
    if bar:
        done = subprocess.run(
            ["sh", "-eu", "-c", before], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        typed = done.stdout
    if ours:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        assert run(shlex.split(ours, comments=True)[1:]) == (1 if otherwise == "true" else 0), line


@pytest.mark.extras
@pytest.mark.timeout(900)
def test_the_tour_ends_with_the_same_text_from_both(tmp_path: Path) -> None:
    """From records of a user to a folder of transformers, each block in a process of its own."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment |= {"MERISTEM_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    printed = []
    for language, text in BLOCK.findall((ROOT / "docs" / "tour.md").read_text(encoding="utf-8")):
        command = ["sh", "-eu", "-c", text] if language == "sh" else [sys.executable, "-c", text]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)
        assert done.returncode == 0, f"{text}\n{done.stderr.decode()[-2000:]}"
        printed.append(done.stdout.decode())
    assert list((tmp_path / "runs" / "notes" / "tensorboard").iterdir())
    assert printed[-2].strip() and printed[-2].strip() == printed[-1].strip()


@pytest.mark.parametrize("name", ["growth.md", "python.md", "sessions.md"])
def test_every_python_session_of_a_page_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CX-12.1: A session begins with its imports; any other block shows a few lines of one."""
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    blocks = [text for language, text in BLOCK.findall(page) if language == "python"]
    sessions = [text for text in blocks if text.startswith(("import ", "from "))]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rules, "_entries", dict(rules._entries))  # a page may register a rule
    for text in sessions:
        exec(compile(text, name, "exec"), {})
    assert sessions


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
    """CX-12.1."""
    reference = script("reference")
    written = reference.PAGE.read_text(encoding="utf-8")
    assert written == reference.page(), "docs/configuration.md is stale: run .venv/bin/python scripts/reference.py"


PAGES = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").glob("*.md")), *ROOT.glob("examples/**/*.md")]


def wrong_links(page: Path, text: str) -> list[str]:
    """The links of ``text``, which stands in ``page``, to no file of ours, no heading of it, or nothing at all."""
    found = []
    for target, anchor in LINK.findall(text):
        other = page.parent / target if target else page
        if not other.exists() or anchor == "#" or not (target or anchor):
            found.append(target + anchor)
        elif anchor and other.suffix == ".md":
            headings = HEADING.findall(text if other == page else other.read_text(encoding="utf-8"))
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            found += [] if anchor[1:] in slugs else [target + anchor]
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_cx_12_2_links_lead_somewhere(page: Path) -> None:
    """CX-12.2."""
    assert wrong_links(page, page.read_text(encoding="utf-8")) == [], page.name


def test_cx_12_2_a_link_that_leads_nowhere_is_found() -> None:
    """CX-12.2: to a file, to a heading, and one that was never filled in."""
    empty, absent, heading = [wrong_links(ROOT / "docs" / "a.md", f"[x]({to})") for to in ("#", "no.md", "data.md#no")]
    assert empty and absent and heading
    assert wrong_links(ROOT / "docs" / "a.md", "[x](data.md) [y](https://example.org/#a)") == []


def test_every_page_has_its_place_on_the_site() -> None:
    """CX-12.1: the pages of docs/ are in the contents, and their links lead to other pages of the site."""
    site = script("site")
    contents = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]["nav"]
    listed = [page for section in contents for pages in section.values() for page in pages]
    places = site.laid()
    reference = {f"api-{room}.md" for room in site.ROOMS}
    assert sorted(listed) == sorted({name for name in places.values() if name.endswith(".md")} | reference)
    for source in places:
        if source.suffix == ".md":
            site.with_links((ROOT / source).read_text(encoding="utf-8"), source, places)
    with pytest.raises(LookupError, match="docs/a.md links to ../check, which is no page of the site"):
        site.with_links("[x](../check)", Path("docs/a.md"), places)
    assert "meristem.serve.session.Session" in site.public("meristem")


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


@pytest.mark.parametrize(("page", "n"), [("README.md", 1), ("docs/first-hour.md", 3)])
def test_conversations_on_the_pages_are_what_the_model_in_the_box_says(
    page: str, n: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every reply on the page, word for word; of what commands print, numbers to one in twenty, and no times."""
    from meristem.cli import run

    monkeypatch.chdir(ROOT)
    shown = conversations((ROOT / page).read_text(encoding="utf-8"))
    assert len(shown) >= n
    for command, typed, printed in shown:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in typed)))
        assert run(command) == 0
        found, expected = capsys.readouterr().out, "\n".join(printed)
        found, expected = (re.sub(r"in [\d.]+ s", "", text) for text in (found, expected))
        assert NUMBER.sub("#", found).split() == NUMBER.sub("#", expected).split()
        numbers = [[float(number.replace(",", "")) for number in NUMBER.findall(text)] for text in (found, expected)]
        assert numbers[0] == pytest.approx(numbers[1], rel=0.05)
