"""Which runs a sweep has, each tried as settings before the first one starts."""

import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from meristem.errors import ConfigError, ConflictingKeys, MeristemError
from meristem.recipes.sweeps.config import Choice, RangeConfig, SearchConfig, SweepConfig
from meristem.runs.config import Config, load_config


@dataclass(frozen=True)
class Point:
    """One run of a sweep. settings: the keys in which it differs. words: all of its settings, as they are typed."""

    number: int
    settings: Mapping[str, Any]
    words: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of its directory."""
        return f"{self.number:03d}"


@dataclass(frozen=True)
class Row:
    """What a point came to.

    value: of the metric at its last evaluation, of a pruned one at that which ended it; None where it has none.
    reports: step and value of each evaluation before its end. why: what ended it early.
    """

    point: int
    settings: Mapping[str, Any]
    status: Literal["finished", "pruned", "failed"]
    exit: int
    value: float | None
    step: int | None
    reports: tuple[tuple[int, float], ...] = ()
    why: str = ""


def n_points(config: SweepConfig) -> int:
    """How many runs a sweep has in all."""
    return config.search.n if config.search is not None else sum(1 for _ in _settings_of(config))


def points_of(config: SweepConfig) -> list[Point]:
    """The points that are known before the first run, in their order: all, of a search those drawn at random.

    Each is tried as settings, and of a search both ends of each range and every choice; ConfigError names the first
    that is none.
    """
    points = []
    for number, settings in enumerate(_settings_of(config), 1):
        point = point_of(config, number, settings)
        try:
            tree(config, point)
        except MeristemError as cause:
            raise ConfigError(f"point {number} of the sweep ({_shown(settings)}): {cause}", point=number) from cause
        points.append(point)
    if config.search is not None:
        _try_ends(config, config.search, points[0])
    return points


def point_of(config: SweepConfig, number: int, settings: Mapping[str, Any]) -> Point:
    """The point with these settings."""
    words = tuple(f"{key}={_word(value)}" for key, value in {**config.settings, **settings}.items())
    return Point(number, settings, words)


def tree(config: SweepConfig, point: Point) -> Config:
    """The settings of a run; ConfigError where they are none, or none that runs can be compared by."""
    found = load_config(config.base, point.words).tree
    is_compared = config.prune is not None and config.prune.percentile is not None
    if is_compared and (found.train.steps is None or found.eval.every is None):
        raise ConflictingKeys(
            f"prune.percentile compares runs at the same step, but train.steps is {found.train.steps} and eval.every "
            f"is {found.eval.every}. Set both under settings.",
            path="prune.percentile",
        )
    return found


def _try_ends(config: SweepConfig, search: SearchConfig, first: Point) -> None:
    for key, among in search.keys.items():
        for value in (among.low, among.high) if isinstance(among, RangeConfig) else among:
            try:
                tree(config, point_of(config, 0, {**first.settings, key: value}))
            except MeristemError as cause:
                raise ConfigError(f"search.keys of the sweep ({key}={_word(value)}): {cause}", key=key) from cause


def _settings_of(config: SweepConfig) -> Iterator[dict[str, Any]]:
    if config.grid is not None:
        for values in itertools.product(*config.grid.values()):
            yield dict(zip(config.grid, values, strict=True))
    elif config.list is not None:
        yield from (dict(each) for each in config.list)
    elif (drawn := config.search or config.random) is not None:
        draw = random.Random(drawn.random_seed)
        for _ in range(min(drawn.n_random, drawn.n) if isinstance(drawn, SearchConfig) else drawn.n):
            yield {key: _drawn(draw, among) for key, among in drawn.keys.items()}


def _drawn(draw: random.Random, among: Choice) -> Any:
    if not isinstance(among, RangeConfig):
        return draw.choice(among)
    low, high = among.low, among.high
    return among.within(math.exp(draw.uniform(math.log(low), math.log(high))) if among.log else draw.uniform(low, high))


def _shown(settings: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={_word(value)}" for key, value in settings.items())


def _word(value: Any) -> str:
    """A value as it is typed behind its key."""
    return value if isinstance(value, str) else json.dumps(value)
