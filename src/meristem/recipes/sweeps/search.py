"""What the next point of a search is, and whether a run is worse than earlier ones: Optuna, asked as a function.

A study is built from the rows for every question and thrown away after it, so that nothing but the rows is to be kept.
Its answer follows from them, the number of the point and the random seed.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from meristem.extras import imported, require
from meristem.recipes.sweeps.config import Choice, PruneConfig, RangeConfig, SearchConfig, SweepConfig
from meristem.recipes.sweeps.points import Row


def require_optuna(config: SweepConfig) -> None:
    """MissingExtra where a sweep compares its runs and Optuna is not installed; nothing is imported."""
    if config.compares:
        require("optuna", f"the sweep '{config.name}', which compares its runs,")


def drawn(
    search: SearchConfig,
    number: int,
    rows: Sequence[Row],
    pending: Sequence[Mapping[str, Any]],
    *,
    lower_is_better: bool,
) -> dict[str, Any]:
    """The settings of point ``number``.

    rows: the points that are known. pending: the settings of those before it of which nothing is known; it keeps away
    from them. A point that failed counts as one that was worse than all others.
    """
    optuna = _optuna()
    state, trials = optuna.trial.TrialState, []
    distributions = {key: _distribution(optuna, among) for key, among in search.keys.items()}
    for row in rows:
        is_done = row.status == "finished" and row.value is not None
        trials.append(
            optuna.trial.create_trial(
                state=state.COMPLETE if is_done else state.PRUNED,
                value=row.value if is_done else None,
                params=_params(search, row.settings),
                distributions=distributions,
                intermediate_values={} if row.status == "failed" else dict(row.reports),
            )
        )
    for settings in pending:
        params = _params(search, settings)
        trials.append(optuna.trial.create_trial(state=state.RUNNING, params=params, distributions=distributions))
    # A sampler of its own for each point: where it stands in its draws depends on no other point.
    seed = random.Random(f"{search.random_seed} {number}").getrandbits(32)
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=0, constant_liar=True)
    study = optuna.create_study(sampler=sampler, direction="minimize" if lower_is_better else "maximize")
    study.add_trials(trials)
    params = study.ask(distributions).params
    return {key: _value(among, params[key]) for key, among in search.keys.items()}


def pruned_at(
    prune: PruneConfig, reports: Sequence[tuple[int, float]], rows: Sequence[Row], *, lower_is_better: bool
) -> int | None:
    """The first of these evaluations at which the run is to be ended; None where none is.

    reports: step and value of each. rows: the points that it is compared with; only those that finished count.
    """
    if prune.percentile is None or not reports:
        return None
    optuna = _optuna()
    pruner = optuna.pruners.PercentilePruner(
        prune.percentile, n_startup_trials=prune.after_points, n_warmup_steps=prune.after_step
    )
    study = optuna.create_study(pruner=pruner, direction="minimize" if lower_is_better else "maximize")
    for row in rows:
        if row.status == "finished" and row.value is not None:
            study.add_trial(optuna.trial.create_trial(value=row.value, intermediate_values=dict(row.reports)))
    trial = study.ask()
    for step, value in reports:
        trial.report(value, step)
        if trial.should_prune():
            return step
    return None


def _optuna() -> Any:
    optuna = imported("optuna", "a sweep that compares its runs")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _distribution(optuna: Any, among: Choice) -> Any:
    """A choice is drawn by its place, since Optuna knows only some types of values."""
    if not isinstance(among, RangeConfig):
        return optuna.distributions.CategoricalDistribution(tuple(range(len(among))))
    kind = optuna.distributions.IntDistribution if among.is_whole else optuna.distributions.FloatDistribution
    return kind(among.low, among.high, log=among.log)


def _params(search: SearchConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: settings[key] if isinstance(among, RangeConfig) else list(among).index(settings[key])
        for key, among in search.keys.items()
    }


def _value(among: Choice, param: Any) -> Any:
    return among.within(param) if isinstance(among, RangeConfig) else among[param]
