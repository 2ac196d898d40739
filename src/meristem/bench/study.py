"""The evidence from its file to its page: what is missing runs, what is known stays, and all of it is written down."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import orjson

from meristem.bench import tuned
from meristem.bench.evidence import Cell, EvidenceConfig, cells, groups, read_evidence
from meristem.bench.picture import plot_table
from meristem.bench.trained import training_speeds
from meristem.bench.trial import Measures, Trial, running
from meristem.bench.tuned import Known, Result, origin, read_known, report_of, run_missing, trials_of
from meristem.bench.verdict import page, sentences
from meristem.checkpoint.atomic import write_atomic
from meristem.data.prepare import prepare
from meristem.device.resolve import resolve
from meristem.errors import MissingExtra
from meristem.events import silent

SCHEMA: Final = "meristem.evidence/1"

Speeds = dict[str, float]
"""Tokens/s in training, by ``table/variant``."""


def study(
    config: Path, out: Path, *, only: Sequence[str], jobs: int, command: str, say: Callable[[str], object]
) -> dict[str, Any]:
    """Run what is missing of the tables that ``config`` describes, and write all to ``out``; gives the JSON beside it.

    only: the tables to run; none names all. Page and JSON are written after every run. At the end the variants of these
    tables train by turns for a few steps, which gives the tokens/s of the page: what ran beside a run, or an older
    version of the code, is in none of them.
    """
    tree = read_evidence(config)
    chosen = set(groups(tree, only))
    known, speeds = read_known(out.with_suffix(".json"), SCHEMA), _read_speeds(out.with_suffix(".json"))
    planned = [cell for group in groups(tree) for cell in cells(tree, group)]
    asked = [cell for cell in planned if cell.group in chosen]

    def keep() -> dict[str, Any]:
        return write(out, tree, planned, known, speeds, command)

    with running(jobs) as run:
        run_missing(
            lambda known: (trial for cell in asked for trial in _trials(tree, cell, known)),
            known,
            run=run,
            say=say,
            keep=keep,
        )
    n_stale = len(known) - len(keep()["outcomes"])
    say(f"{len(known)} runs are known, none is missing; {n_stale} of other settings are left out")
    speeds |= measure_speeds(asked)
    for table, results in _by_table(tree, planned, known).items():
        measured = [result for result in results if result.is_measured]
        try:
            if measured:
                plot_table(picture(out, table), tree.tables[table], measured)
        except MissingExtra as error:
            say(str(error))
        for line in sentences(tree, table, results):
            say(line)
    return keep()


def measure_speeds(asked: Sequence[Cell]) -> Speeds:
    """How fast each variant trains in each of its tables, on the text that the table names first."""
    first = {f"{cell.group.table}/{cell.variant}": cell.config for cell in reversed(asked)}
    config = asked[0].config
    vocabulary = prepare(config.data, config.tokenizer).tokenizer.vocab_size
    return training_speeds(first, vocabulary, resolve(config.device, silent))


def _read_speeds(path: Path) -> Speeds:
    return dict(orjson.loads(path.read_bytes()).get("tokens_per_s", {})) if path.exists() else {}


def picture(out: Path, table: str) -> Path:
    """Where the picture of a table stands."""
    return out.with_name(f"{out.stem}-{table}.png")


def seed_trials(config: EvidenceConfig, cell: Cell, rate: float) -> dict[int, Trial]:
    """The runs that count, by seed."""
    return tuned.seed_trials(config, cell, rate, Measures.of(config, cell.group.table))


def result_of(config: EvidenceConfig, cell: Cell, known: Known) -> Result[Cell]:
    """What is known of a cell."""
    return tuned.result_of(config, cell, known, Measures.of(config, cell.group.table))


def _trials(config: EvidenceConfig, cell: Cell, known: Known) -> list[Trial]:
    return trials_of(config, cell, known, Measures.of(config, cell.group.table))


def _by_table(config: EvidenceConfig, planned: Sequence[Cell], known: Known) -> dict[str, list[Result[Cell]]]:
    return {
        table: [result_of(config, cell, known) for cell in planned if cell.group.table == table]
        for table in config.tables
    }


def write(
    out: Path, config: EvidenceConfig, planned: Sequence[Cell], known: Known, speeds: Speeds, command: str
) -> dict[str, Any]:
    """The page and the JSON beside it, whose content is given back; what other settings gave is left out."""
    used = {trial.fingerprint for cell in planned for trial in _trials(config, cell, known)}
    outcomes = [outcome for key, outcome in known.items() if key in used]
    by_table, title = _by_table(config, planned, known), origin(config, outcomes, command)
    drawn = {table: picture(out, table) for table, own in by_table.items() if any(one.is_measured for one in own)}
    pictures = {table: path.name for table, path in drawn.items() if path.exists()}
    said = {table: list(sentences(config, table, own)) for table, own in by_table.items()}
    report = report_of(SCHEMA, config, outcomes) | {"sentences": said, "tokens_per_s": speeds}
    write_atomic(out.with_suffix(".json"), orjson.dumps(report, option=orjson.OPT_INDENT_2) + b"\n")
    write_atomic(out, page(config, by_table, title=title, pictures=pictures, speeds=speeds).encode())
    return report
