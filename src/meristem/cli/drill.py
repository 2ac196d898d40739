"""`meristem doctor --drill`: break something on purpose, and see what becomes of a run."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from meristem.cli.answer import json_line

if TYPE_CHECKING:
    from meristem.drills.drill import Outcome

ALL = "all"


def drill(names: list[str], as_json: bool) -> bool:
    """Run the named drills one after the other, or all; says whether every outcome was as expected.

    Raises WrongValue, before anything is broken, for a name that no drill has.
    """
    from meristem.drills.catalogue import drills, run_drill

    chosen = list(dict.fromkeys(drills.names() if ALL in names else names))
    found = []
    for one in [drills.get(name) for name in chosen]:
        place = Path(tempfile.mkdtemp(prefix=f"meristem-{one.name}-"))
        outcome = run_drill(one, place)
        found.append(outcome)
        if outcome.is_as_expected:
            shutil.rmtree(place)
        if not as_json:
            typer.echo("\n".join([*_words(outcome, place), ""]))
    is_ok = all(outcome.is_as_expected for outcome in found)
    if as_json:
        json_line({"status": "ok" if is_ok else "fail", "drills": [outcome.to_json() for outcome in found]})
    return is_ok


def _words(outcome: "Outcome", place: Path) -> Iterator[str]:
    yield typer.style(outcome.name, bold=True)
    yield f"  fault     {outcome.fault}"
    yield f"  expected  {outcome.expected}"
    for sentence, was_so in outcome.seen.checks.items():
        yield f"  {'saw' if was_so else 'NOT SO':8}  {sentence}"
    for name, value in outcome.seen.told.items():
        yield f"  told      {name} {value}"
    if outcome.error:
        yield f"  error     {outcome.error}"
    if outcome.is_as_expected:
        yield typer.style(f"  outcome   as expected, after {outcome.seconds:.1f} s", fg="green")
    else:
        yield typer.style(f"  outcome   NOT as expected; what is left of it stands in {place}", fg="red")
