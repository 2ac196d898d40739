"""The evidence from its file to its page: what is missing runs, what is known stays, and all of it is written down."""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import orjson

from meristem.bench.evidence import Cell, EvidenceConfig, cells, groups, read_evidence
from meristem.bench.picture import plot_table
from meristem.bench.trial import Measures, Outcome, Trial, run_trials
from meristem.bench.verdict import Result, page, sentences
from meristem.checkpoint.atomic import write_atomic
from meristem.device.describe import code_version, hardware
from meristem.errors import BadRecords, MissingExtra
from meristem.train.config import TrainConfig

SCHEMA: Final = "meristem.evidence/1"

Known = Mapping[str, Outcome]
"""Outcomes by their fingerprints."""


def study(
    config: Path, out: Path, *, only: Sequence[str], jobs: int, command: str, say: Callable[[str], object]
) -> dict[str, Any]:
    """Run what is missing of the tables that ``config`` describes, and write all to ``out``; gives the JSON beside it.

    only: the tables to run; none names all. Page and JSON are written after every run, so that one which is interrupted
    has lost nothing that had ended. Learning rates are tried before the runs that use the best of them, and two runs
    never train in one directory at once.
    """
    tree = read_evidence(config)
    chosen = set(groups(tree, only))
    known = _known(out.with_suffix(".json"))
    planned = [cell for group in groups(tree) for cell in cells(tree, group)]
    asked = [cell for cell in planned if cell.group in chosen]
    while left := _missing(tree, asked, known):
        say(f"{len(known)} runs are known, {len(left)} can go now")
        for outcome in run_trials(left, jobs=jobs):
            known[outcome.fingerprint] = outcome
            say(_line(outcome))
            write(out, tree, planned, known, command)
    n_stale = len(known) - len(write(out, tree, planned, known, command)["outcomes"])
    say(f"{len(known)} runs are known, none is missing; {n_stale} of other settings are left out")
    for table, results in _by_table(tree, planned, known).items():
        measured = [result for result in results if result.is_measured]
        try:
            if measured:
                plot_table(picture(out, table), tree.tables[table], measured)
        except MissingExtra as error:
            say(str(error))
        for line in sentences(tree, table, results):
            say(line)
    return write(out, tree, planned, known, command)


def picture(out: Path, table: str) -> Path:
    """Where the picture of a table stands."""
    return out.with_name(f"{out.stem}-{table}.png")


def rate_trials(config: EvidenceConfig, cell: Cell) -> dict[float, Trial]:
    """By learning rate, a run from the first seed for a share of the budget; none where there is no choice."""
    if len(config.rates) == 1:
        return {}
    train = cell.config.train
    part = {"tokens": train.tokens, "steps": train.steps, "max_time": train.max_time}
    short = {key: value * config.rate_share for key, value in part.items() if value is not None}
    shorter = TrainConfig(
        **train.model_dump() | {k: v if k == "max_time" else max(1, round(v)) for k, v in short.items()}
    )
    return {rate: _trial(cell, config.seeds[0], rate, None, shorter) for rate in config.rates}


def best_rate(config: EvidenceConfig, cell: Cell, known: Known) -> float | None:
    """The learning rate whose try ended lowest, the first where all failed; None while a try is missing."""
    tried = {rate: known.get(trial.fingerprint) for rate, trial in rate_trials(config, cell).items()}
    if not tried:
        return config.rates[0]
    if None in tried.values():
        return None
    found = {rate: outcome.figures["bits_per_byte"] for rate, outcome in tried.items() if outcome and outcome.figures}
    return min(found, key=found.__getitem__, default=config.rates[0])


def seed_trials(config: EvidenceConfig, cell: Cell, rate: float) -> dict[int, Trial]:
    """The runs that count, by seed."""
    measures = Measures.of(config, cell.group.table)
    return {seed: _trial(cell, seed, rate, measures) for seed in config.seeds}


def result_of(config: EvidenceConfig, cell: Cell, known: Known) -> Result:
    """What is known of a cell."""
    rate = best_rate(config, cell, known)
    done = {} if rate is None else {s: known.get(t.fingerprint) for s, t in seed_trials(config, cell, rate).items()}
    return Result(cell, rate, {seed: outcome for seed, outcome in done.items() if outcome is not None})


def _by_table(config: EvidenceConfig, planned: Sequence[Cell], known: Known) -> dict[str, list[Result]]:
    return {
        table: [result_of(config, cell, known) for cell in planned if cell.group.table == table]
        for table in config.tables
    }


def _trials(config: EvidenceConfig, cell: Cell, known: Known) -> list[Trial]:
    rate = best_rate(config, cell, known)
    tries = list(rate_trials(config, cell).values())
    return tries if rate is None else [*tries, *seed_trials(config, cell, rate).values()]


def _missing(config: EvidenceConfig, asked: Sequence[Cell], known: Known) -> list[Trial]:
    """What can run at once: of several that train in one directory the first. The others then find it trained."""
    trials = (trial for cell in asked for trial in _trials(config, cell, known) if trial.fingerprint not in known)
    by_directory: dict[Path, Trial] = {}
    for trial in trials:
        by_directory.setdefault(trial.directory, trial)
    return sorted(by_directory.values(), key=lambda trial: trial.config.run.seed)


def _trial(cell: Cell, seed: int, rate: float, measures: Measures | None, train: TrainConfig | None = None) -> Trial:
    config = cell.config
    sections = {
        "run": config.run.model_copy(update={"seed": seed}),
        "optim": config.optim.model_copy(update={"lr": rate}),
        "train": train or config.train,
    }
    return Trial(cell.variant, config.model_copy(update=sections), measures)


def write(out: Path, config: EvidenceConfig, planned: Sequence[Cell], known: Known, command: str) -> dict[str, Any]:
    """The page and the JSON beside it, whose content is given back; what other settings gave is left out."""
    used = {trial.fingerprint for cell in planned for trial in _trials(config, cell, known)}
    outcomes = [outcome for key, outcome in known.items() if key in used]
    by_table, code = _by_table(config, planned, known), code_version()
    hours = sum(outcome.figures.get("seconds", 0.0) for outcome in outcomes) / 3600
    seeds = ", ".join(map(str, config.seeds))
    title = (
        f"Written by `{command}` on {datetime.now(UTC):%Y-%m-%d}, version {code['version']}, commit "
        f"`{str(code['commit'])[:12]}`; one thread for each run, of "
        f"{' and '.join(sorted({outcome.chip for outcome in outcomes}))}; seeds {seeds}; {hours:.2f} hours of training."
    )
    drawn = {table: picture(out, table) for table, own in by_table.items() if any(one.is_measured for one in own)}
    pictures = {table: path.name for table, path in drawn.items() if path.exists()}
    said = {table: list(sentences(config, table, own)) for table, own in by_table.items()}
    report = {
        "schema": SCHEMA,
        "hardware": hardware(),
        "code": code,
        "settings": config.model_dump(mode="json"),
        "outcomes": [outcome.to_json() for outcome in outcomes],
        "sentences": said,
    }
    write_atomic(out.with_suffix(".json"), orjson.dumps(report, option=orjson.OPT_INDENT_2) + b"\n")
    write_atomic(out, page(config, by_table, title=title, pictures=pictures).encode())
    return report


def _known(path: Path) -> dict[str, Outcome]:
    """What an earlier call has measured."""
    if not path.exists():
        return {}
    try:
        report = orjson.loads(path.read_bytes())
        if report["schema"] != SCHEMA:
            raise ValueError(f"its schema is {report['schema']}")
        return {values["fingerprint"]: Outcome.from_json(values) for values in report["outcomes"]}
    except (ValueError, KeyError, TypeError) as cause:
        raise BadRecords(
            f"{path} holds no evidence ({cause}), and would be overwritten. Move it away, or choose another --out.",
            path=str(path),
        ) from cause


def _line(outcome: Outcome) -> str:
    if outcome.failure is not None:
        return f"{outcome.name}: {outcome.failure}"
    figures = outcome.figures
    return f"{outcome.name}: {figures['bits_per_byte']:.4f} bits per byte, {figures['tokens_per_s']:,.0f} tokens/s"
