"""Writes the table of stages in docs/growth.md from the code; the tests fail when it is stale."""

from pathlib import Path

from meristem.growth.gates import ENTRY
from meristem.growth.stage import TRANSITIONS, Stage

PAGE = Path(__file__).parents[1] / "docs" / "growth.md"
BEGIN, END = "<!-- stages -->\n", "<!-- end of stages -->\n"


def table() -> str:
    """Every stage with its number, the gate before it, and where it may go."""
    rows = [
        f"| {int(stage)} | {stage.name} | {ENTRY.get(stage, '')} | {', '.join(each.name for each in sorted(to))} |"
        for stage, to in sorted(TRANSITIONS.items())
        if stage is not Stage.UNKNOWN
    ]
    return "\n".join(["| number | stage | gate | may go to |", "|---|---|---|---|", *rows, ""])


def page(text: str) -> str:
    """The page with the table of today."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + table() + END + after


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
