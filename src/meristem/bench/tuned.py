"""What is compared is tried at several learning rates, then runs with its best from every seed; what is known stays."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Generic, Protocol, TypeVar

import orjson

from meristem.bench.trial import Measures, Outcome, Runner, Trial
from meristem.bench.tuning import TunedConfig
from meristem.device.describe import code_version, hardware
from meristem.errors import BadRecords
from meristem.runs.config import Config
from meristem.train.config import TrainConfig

BITS: Final = "bits_per_byte"

Known = Mapping[str, Outcome]
"""Outcomes by their fingerprints."""


class Candidate(Protocol):
    """What is tuned and run from every seed."""

    @property
    def variant(self) -> str: ...

    @property
    def config(self) -> Config: ...


Cell = TypeVar("Cell", bound=Candidate)


@dataclass(frozen=True)
class Result(Generic[Cell]):
    """What is known of a cell: the learning rate once it is chosen, and outcomes by seed."""

    cell: Cell
    rate: float | None
    by_seed: Mapping[int, Outcome]

    @property
    def is_measured(self) -> bool:
        """Whether a seed has figures."""
        return any(outcome.figures for outcome in self.by_seed.values())

    def values(self, key: str) -> dict[int, float]:
        """A figure by seed."""
        return {seed: one.figures[key] for seed, one in self.by_seed.items() if key in one.figures}


def rate_trials(config: TunedConfig, cell: Candidate) -> dict[float, Trial]:
    """By learning rate, a run from the first seed for a share of the budget; none where there is no choice."""
    if len(config.rates) == 1:
        return {}
    train = cell.config.train
    part = {"tokens": train.tokens, "steps": train.steps, "flops": train.flops, "max_time": train.max_time}
    short = {key: value * config.rate_share for key, value in part.items() if value is not None}
    counts = {key: max(1, round(short[key])) for key in ("tokens", "steps") if key in short}
    shorter = TrainConfig(**train.model_dump() | short | counts)
    return {rate: _trial(config, cell, config.seeds[0], rate, None, shorter) for rate in config.rates}


def best_rate(config: TunedConfig, cell: Candidate, known: Known) -> float | None:
    """The learning rate whose try ended lowest, the first where all failed; None while a try is missing."""
    tried = {rate: known.get(trial.fingerprint) for rate, trial in rate_trials(config, cell).items()}
    if not tried:
        return config.rates[0]
    if None in tried.values():
        return None
    found = {rate: outcome.figures[BITS] for rate, outcome in tried.items() if outcome and outcome.figures}
    return min(found, key=found.__getitem__, default=config.rates[0])


def seed_trials(
    config: TunedConfig, cell: Candidate, rate: float, measures: Measures | None = None
) -> dict[int, Trial]:
    """The runs that count, by seed. measures: what is measured of each beside its likelihood."""
    return {seed: _trial(config, cell, seed, rate, measures) for seed in config.seeds}


def result_of(config: TunedConfig, cell: Cell, known: Known, measures: Measures | None = None) -> Result[Cell]:
    """What is known of a cell."""
    rate = best_rate(config, cell, known)
    trials = {} if rate is None else seed_trials(config, cell, rate, measures)
    done = {seed: known.get(trial.fingerprint) for seed, trial in trials.items()}
    return Result(cell, rate, {seed: outcome for seed, outcome in done.items() if outcome is not None})


def trials_of(config: TunedConfig, cell: Candidate, known: Known, measures: Measures | None = None) -> list[Trial]:
    """The runs of a cell that can be named by now: those that count once a rate is chosen."""
    rate = best_rate(config, cell, known)
    tries = list(rate_trials(config, cell).values())
    return tries if rate is None else [*tries, *seed_trials(config, cell, rate, measures).values()]


def run_missing(
    trials: Callable[[Known], Iterable[Trial]],
    known: dict[str, Outcome],
    *,
    run: Runner,
    say: Callable[[str], object],
    keep: Callable[[], object],
) -> None:
    """Run what is missing until nothing is, and put it into ``known``. trials: all that can be named by now.

    keep: called after every run, so that one which is interrupted has lost nothing that had ended. Learning rates are
    tried before the runs that use the best of them, and two runs never train in one directory at once.
    """
    while left := _missing(trials(known), known):
        say(f"{len(known)} runs are known, {len(left)} can go now")
        for outcome in run(left):
            known[outcome.fingerprint] = outcome
            say(_line(outcome))
            keep()


def read_known(path: Path, schema: str) -> dict[str, Outcome]:
    """What an earlier call has measured. Raises BadRecords for a file of something else."""
    if not path.exists():
        return {}
    try:
        report = orjson.loads(path.read_bytes())
        if report["schema"] != schema:
            raise ValueError(f"its schema is {report['schema']}")
        return {values["fingerprint"]: Outcome.from_json(values) for values in report["outcomes"]}
    except (ValueError, KeyError, TypeError) as cause:
        raise BadRecords(
            f"{path} holds no evidence ({cause}), and would be overwritten. Move it away, or choose another --out.",
            path=str(path),
        ) from cause


def report_of(schema: str, config: TunedConfig, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What the JSON of any study holds, from which ``read_known`` takes its outcomes."""
    return {
        "schema": schema,
        "hardware": hardware(),
        "code": code_version(),
        "settings": config.model_dump(mode="json"),
        "outcomes": [outcome.to_json() for outcome in outcomes],
    }


def tuning_words(config: TunedConfig) -> str:
    """How learning rates were chosen."""
    rates = ", ".join(f"{rate:g}" for rate in config.rates)
    if len(config.rates) == 1:
        return f"all with the learning rate {rates}."
    return (
        f"each tried the learning rates {rates} for {config.rate_share:.0%} of its budget from seed {config.seeds[0]}, "
        "and used the best; where that is the smallest or largest of them, another might be better."
    )


def rate_words(config: TunedConfig, rate: float | None) -> str:
    """A learning rate, and whether it is the smallest or the largest that was tried."""
    if rate is None:
        return ""
    is_edge = len(config.rates) > 1 and rate in (min(config.rates), max(config.rates))
    which = "smallest" if rate == min(config.rates) else "largest"
    return f"{rate:g}" + (f" ({which})" if is_edge else "")


def origin(config: TunedConfig, outcomes: Sequence[Outcome], command: str) -> str:
    """Where, when and by which command a page was written, in one sentence."""
    code = code_version()
    hours = sum(outcome.figures.get("seconds", 0.0) for outcome in outcomes) / 3600
    return (
        f"Written by `{command}` on {datetime.now(UTC):%Y-%m-%d}, version {code['version']}, commit "
        f"`{str(code['commit'])[:12]}`; one thread for each run, of "
        f"{' and '.join(sorted({outcome.chip for outcome in outcomes}))}; seeds {', '.join(map(str, config.seeds))}; "
        f"{hours:.2f} hours of training."
    )


def _missing(trials: Iterable[Trial], known: Known) -> list[Trial]:
    """What can run at once: of several that train in one directory the first. The others then find it trained."""
    by_directory: dict[Path, Trial] = {}
    for trial in trials:
        if trial.fingerprint not in known:
            by_directory.setdefault(trial.directory, trial)
    return sorted(by_directory.values(), key=lambda trial: trial.config.run.seed)


def _trial(
    config: TunedConfig,
    cell: Candidate,
    seed: int,
    rate: float,
    measures: Measures | None,
    train: TrainConfig | None = None,
) -> Trial:
    own = cell.config
    sections = {
        "run": own.run.model_copy(update={"seed": seed}),
        "optim": own.optim.model_copy(update={"lr": rate}),
        "train": train or own.train,
    }
    return Trial(cell.variant, own.model_copy(update=sections), measures, config.place)


def _line(outcome: Outcome) -> str:
    if outcome.failure is not None:
        return f"{outcome.name}: {outcome.failure}"
    figures = outcome.figures
    return f"{outcome.name}: {figures[BITS]:.4f} bits per byte, {figures['tokens_per_s']:,.0f} tokens/s"
