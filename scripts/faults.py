"""Writes docs/faults.md from the drills; the tests fail when the page is stale."""

from pathlib import Path

from meristem.drills.catalogue import drills
from meristem.drills.drill import Drill

PAGE = Path(__file__).parents[1] / "docs" / "faults.md"

HEAD = """# Faults

Written by `scripts/faults.py` from the drills. Each fault is really caused, in a tiny run, by the tests and by

    meristem doctor --drill NAME

which says what happened and whether that was the expected; `--drill all` takes a few minutes. Exit codes are those of
the run that meets the fault; `-` stands where there is none, as for a process that is killed.

| drill | fault | what the run does | what the user sees, and does | exit code |
|---|---|---|---|---|
"""


def page() -> str:
    """The whole table."""
    return HEAD + "".join(row(drills.get(name)) for name in drills.names())


def row(drill: Drill) -> str:
    """One drill as a line of the table."""
    code = "-" if drill.exit_code is None else str(drill.exit_code)
    return f"| `{drill.name}` | {drill.fault} | {drill.does} | {drill.user} | {code} |\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
