"""Whether growing pays, from its file to its page: what is missing runs, what is known stays, all is written down."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import orjson

from meristem.bench.growth import ArmCell, GrowthConfig, arm_cells, read_growth
from meristem.bench.growth_verdict import growth_page, is_worth_it, measured, verdict
from meristem.bench.picture import plot_growth
from meristem.bench.trial import Outcome, Trial, running
from meristem.bench.tuned import Known, Result, origin, read_known, report_of, result_of, run_missing, trials_of
from meristem.checkpoint.atomic import write_atomic
from meristem.errors import MissingExtra

SCHEMA: Final = "meristem.growth/1"


def growth_study(config: Path, out: Path, *, jobs: int, command: str, say: Callable[[str], object]) -> dict[str, Any]:
    """Run what is missing of the arms that ``config`` lists, and write all to ``out``; gives the JSON beside it.

    Budgets come one after the other, the smallest first; page and JSON are written after every run.
    """
    tree = read_growth(config)
    known = read_known(out.with_suffix(".json"), SCHEMA)
    planned = arm_cells(tree)

    def keep() -> dict[str, Any]:
        return write_growth(out, tree, planned, known, command)

    def draw() -> None:
        try:
            plot_growth(out.with_suffix(".png"), measured(results_of(tree, planned, known)))
        except MissingExtra as error:
            say(str(error))

    with running(jobs) as run:
        for budget in tree.budgets:
            cells = [cell for cell in planned if cell.budget == budget]
            say(f"{budget}:")
            run_missing(partial(_trials, tree, cells), known, run=run, say=say, keep=keep)
            draw()
    n_stale = len(known) - len(keep()["outcomes"])
    say(f"{len(known)} runs are known, none is missing; {n_stale} of other settings are left out")
    for line in verdict(tree, results_of(tree, planned, known)):
        say(line)
    return keep()


def _trials(config: GrowthConfig, cells: Sequence[ArmCell], known: Known) -> list[Trial]:
    return [trial for cell in cells for trial in trials_of(config, cell, known)]


def results_of(config: GrowthConfig, planned: Sequence[ArmCell], known: Known) -> dict[str, dict[str, Result[ArmCell]]]:
    """What is known of every arm, by budget."""
    return {
        budget: {cell.variant: result_of(config, cell, known) for cell in planned if cell.budget == budget}
        for budget in config.budgets
    }


def write_growth(
    out: Path, config: GrowthConfig, planned: Sequence[ArmCell], known: Mapping[str, Outcome], command: str
) -> dict[str, Any]:
    """The page and the JSON beside it, whose content is given back; what other settings gave is left out."""
    used = {trial.fingerprint for cell in planned for trial in trials_of(config, cell, known)}
    outcomes = [outcome for key, outcome in known.items() if key in used]
    results = results_of(config, planned, known)
    picture = out.with_suffix(".png")
    report = report_of(SCHEMA, config, outcomes) | {
        "sentences": verdict(config, results),
        "is_worth_it": is_worth_it(config, results),
    }
    write_atomic(out.with_suffix(".json"), orjson.dumps(report, option=orjson.OPT_INDENT_2) + b"\n")
    title, name = origin(config, outcomes, command), picture.name if picture.exists() else None
    write_atomic(out, growth_page(config, results, title=title, picture=name).encode())
    return report
