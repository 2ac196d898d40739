"""Compares measured coverage with the floor in pyproject.toml, and that floor with the one of the main branch.

    python scripts/ratchet.py coverage.json [--base origin/main]

The floor only rises: below it the gate fails, lowering it fails, and so does leaving it two points behind.
"""

import argparse
import json
import math
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
SLACK = 2
"""How many points the floor may stay behind what is measured: machines differ in which paths they take."""


def floor(project: str) -> float:
    """``fail_under`` of the text of a pyproject.toml, in percent."""
    return float(tomllib.loads(project)["tool"]["coverage"]["report"]["fail_under"])


def complaint(measured: float, project: str, base: str | None) -> str | None:
    """What is wrong with ``measured``, in percent, or with the floor; None when all is well.

    base: the pyproject.toml of the main branch; None where it has no floor, or there is no such branch.
    """
    wanted = floor(project)
    if base is not None and wanted < floor(base):
        return f"fail_under was lowered from {floor(base):g} to {wanted:g}; it only rises. Test what the change adds."
    if measured < wanted:
        return (
            f"{measured:.1f} % of the branches and lines were run, the floor is {wanted:g}. Test what the change adds."
        )
    if measured >= wanted + SLACK:
        return (
            f"{measured:.1f} % were run: raise fail_under from {wanted:g} to {math.floor(measured)} in pyproject.toml."
        )
    return None


def at(revision: str) -> str | None:
    """pyproject.toml at ``revision`` where that has a floor."""
    command = ["git", "show", f"{revision}:pyproject.toml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 and "fail_under" in done.stdout else None


def main() -> int:
    parser = argparse.ArgumentParser(description="Whether coverage is at least what it was.")
    parser.add_argument("report", type=Path, help="what coverage json wrote")
    parser.add_argument("--base", default="origin/main", help="the revision whose floor must not be undercut")
    options = parser.parse_args()
    measured = json.loads(options.report.read_text())["totals"]["percent_covered"]
    found = complaint(measured, (ROOT / "pyproject.toml").read_text(encoding="utf-8"), at(options.base))
    print(found or f"{measured:.1f} % of the branches and lines were run.", file=sys.stderr if found else sys.stdout)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
