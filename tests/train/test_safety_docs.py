"""The page on the safety of runs says what the code does."""

import re
from pathlib import Path

import meristem
from meristem.runs.config import Config
from meristem.train.emergency import Level
from meristem.train.guard import DETECTORS
from meristem.train.rollback import FAST, FULL

SOURCE = Path(meristem.__file__).parent
PAGE = (SOURCE.parents[1] / "docs" / "safety.md").read_text(encoding="utf-8")


def rows(title: str) -> list[list[str]]:
    """The cells of the table below a heading."""
    section = PAGE.split(f"## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]


def test_l6_detectors_of_the_page_are_those_there_are():
    assert [row[0] for row in rows("The guard")] == [detector.name for detector in DETECTORS]


def test_l6_tiers_have_the_deadlines_and_budgets_of_the_page():
    found = {row[0]: row[2:] for row in rows("Rolling back")}
    fast = ", ".join(f"{name} {1000 * seconds:g}" for name, seconds in FAST.items())
    full = ", ".join(f"{name} {seconds:g}" for name, seconds in FULL.items())
    assert found["fast"] == [f"{1000 * sum(FAST.values()):g} ms", f"{fast} ms"]
    assert found["full"] == [f"{sum(FULL.values()):g} s", f"{full} s"]


def test_l6_levels_of_the_page_are_those_there_are():
    told = [(int(row[0]), row[1].upper()) for row in rows("Emergency levels")]
    assert told == [(level.value, level.name) for level in Level if level]


def test_l6_settings_events_and_links_of_the_page_exist():
    sections = {"guard", "rollback", "profile", "aggregate", "checkpoint", "data", "distributed"}
    for name in re.findall(r"`([a-z]+\.[a-z_]+)(?:=[a-z0-9]+)?`", PAGE):
        section, key = name.split(".")
        is_setting = section in sections and key in type(getattr(Config(), section)).model_fields
        is_event = any(f'"{name}"' in path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py"))
        assert is_setting or is_event, name
    for link in re.findall(r"\]\(([^)]+)\)", PAGE):
        assert (SOURCE.parents[1] / "docs" / link).exists(), link
