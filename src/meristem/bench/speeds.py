"""The page of all speeds: every figure beside what was asked, and beside every miss the limit and the reason."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from meristem.bench.estimate import table
from meristem.bench.parts import Parts, amount, figures, machine
from meristem.config import ConfigSection, Loaded, load

PARTS: Final = Parts(
    "meristem.speeds/1",
    {
        "memory": "Memory forms and layers",
        "rules": "Every rule in every form",
        "model": "The default preset against a transformer",
        "training": "Training of the default preset by the native core",
        "compositions": "Memory as context, gate and layer",
        "hope": "HOPE",
        "levels": "Levels",
        "decode": "Decoding",
        "data": "Reading the text",
        "snapshot": "Snapshots and the guard",
        "seeds": "Growth",
        "prepare": "Preparing a text",
        "trackers": "Trackers",
        "finetune": "Fine-tuning",
        "start": "Starting the program",
    },
)
UNEXPLAINED: Final = "**no reason is written down**"


class LimitsConfig(ConfigSection):
    """Why figures fall short. limits: a sentence by the name of the figure, in which * stands for anything."""

    limits: dict[str, str] = {}


def read_limits(path: Path) -> dict[str, str]:
    """The sentences that a YAML file holds. ConfigError where it does not."""
    loaded: Loaded[LimitsConfig] = load(LimitsConfig, file=path)
    return loaded.tree.limits


def page(report: Mapping[str, Any], limits: Mapping[str, str]) -> str:
    """The page for people. limits: as in ``LimitsConfig``; the first that fits a missed figure stands beside it."""
    missed = [row for found in report["parts"] for row in found["rows"] if row["is_met"] is False]
    lines = [
        "# What was measured",
        "",
        f"Measured on {machine(report)}. Every figure is a median, and its candidates took their turns in one run; the "
        "table at the end says when each part was measured, at what load, and by which command. What is asked and "
        "missed has its reason under [What falls short](#what-falls-short). [rules.md](rules.md) has every rule in "
        "every form, [serve-bench.md](serve-bench.md) a server under load.",
    ]
    for found in report["parts"]:
        lines += ["", f"## {PARTS.names[found['part']]}", "", *figures(found["rows"])]
    lines += ["", "## What falls short", ""]
    short = [
        (row["name"], amount(row), f"{row['sense']} {row['target']:g}", _limit(row["name"], limits)) for row in missed
    ]
    lines += table(("what", "measured", "asked", "why"), short) if short else ["Nothing."]
    lines += ["", "## How", "", *PARTS.how(report)]
    lines += ["", "A load average of 1 is one other program that computes all the time."]
    return "\n".join([*lines, ""])


def _limit(name: str, limits: Mapping[str, str]) -> str:
    return next((sentence for pattern, sentence in limits.items() if fnmatchcase(name, pattern)), UNEXPLAINED)
