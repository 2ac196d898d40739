"""An ablation from its file to its page: what is missing runs, what is known stays, and all of it is written down."""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import orjson

from meristem.bench.ablation import AblationConfig, finished, read_ablation, run_trials, trials
from meristem.bench.picture import plot_ablation
from meristem.bench.trial import Outcome, Trial
from meristem.bench.verdict import figures_by_variant, page, sentences, table
from meristem.checkpoint.atomic import write_atomic
from meristem.device.describe import describe
from meristem.errors import BadRecords, MissingExtra

SCHEMA: Final = "meristem.ablation/1"


def study(config: Path, out: Path, *, jobs: int, say: Callable[[str], object]) -> dict[str, Any]:
    """Run what is missing of the ablation that ``config`` describes, and write it to ``out``; gives the JSON beside it.

    Page and JSON are written after every run, so that one which is interrupted has lost nothing that had ended.
    """
    part = read_ablation(config)
    planned = trials(part)
    beside = out.with_suffix(".json")
    before = _known(beside)
    done = finished(planned, before)
    for trial in planned[: len(part.variants)]:
        say(f"{trial.variant:<20} {trial.n_parameters:>12,} parameters, model.mlp_dim={trial.config.model.mlp_dim}")
    stale = len(before) - len(done)
    left = [trial for trial in planned if trial.name not in done]
    say(f"{len(done)} of {len(planned)} runs are known, {len(left)} to go" + _of_stale(stale, beside))
    for outcome in run_trials(left, jobs=jobs):
        done[outcome.name] = outcome
        say(_line(outcome, len(done), len(planned)))
        write(out, part, planned, done)
    report = write(out, part, planned, done)
    for line in (*table(part, _ordered(planned, done)), "", *sentences(part, _ordered(planned, done))):
        say(line)
    try:
        plot_ablation(out.with_suffix(".png"), figures_by_variant(part, _ordered(planned, done)))
    except MissingExtra as error:
        say(str(error))
        return report
    return write(out, part, planned, done)


def write(out: Path, config: AblationConfig, planned: Sequence[Trial], done: Mapping[str, Outcome]) -> dict[str, Any]:
    """The page and the JSON beside it, whose content is given back."""
    outcomes, found = _ordered(planned, done), describe()
    data = planned[0].config.data
    tokens = planned[0].config.train.tokens
    length = f"{tokens:,} tokens" if tokens else f"{planned[0].config.train.steps:,} steps"
    title = [
        f"Written by `meristem bench ablation` on {datetime.now(UTC):%Y-%m-%d}: the text `{data.source}`, {length} in "
        f"sequences of {data.seq_len}, random seeds {', '.join(map(str, config.seeds))}, one thread of "
        f"{found['hardware']['cpu']} for each run."
    ]
    picture = out.with_suffix(".png")
    text = page(
        config, outcomes, title=title, picture=picture.name if picture.exists() else None, n_planned=len(planned)
    )
    report = {
        "schema": SCHEMA,
        "hardware": found["hardware"],
        "code": found["code"],
        "settings": config.model_dump(mode="json"),
        "outcomes": [outcome.to_json() for outcome in outcomes],
        "sentences": list(sentences(config, outcomes)),
    }
    write_atomic(out.with_suffix(".json"), orjson.dumps(report, option=orjson.OPT_INDENT_2) + b"\n")
    write_atomic(out, text.encode())
    return report


def _known(path: Path) -> list[Outcome]:
    """What an earlier call has measured."""
    if not path.exists():
        return []
    try:
        report = orjson.loads(path.read_bytes())
        if report["schema"] != SCHEMA:
            raise ValueError(f"its schema is {report['schema']}")
        return [Outcome.from_json(values) for values in report["outcomes"]]
    except (ValueError, KeyError, TypeError) as cause:
        raise BadRecords(
            f"{path} holds no results of an ablation ({cause}), and would be overwritten. Move it away, or choose "
            f"another --out.",
            path=str(path),
        ) from cause


def _ordered(planned: Sequence[Trial], done: Mapping[str, Outcome]) -> list[Outcome]:
    return [done[trial.name] for trial in planned if trial.name in done]


def _of_stale(n_stale: int, path: Path) -> str:
    return f"; {n_stale} in {path} are of other settings and are left out" if n_stale else ""


def _line(outcome: Outcome, n_done: int, n_planned: int) -> str:
    said = f"{outcome.failure}"
    if outcome.figures is not None:
        said = f"{outcome.figures.bits_per_byte:.4f} bits per byte, {outcome.figures.tokens_per_s:,.0f} tokens/s"
    return f"{outcome.name:<24} {said} ({n_done} of {n_planned})"
