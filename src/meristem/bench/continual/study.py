"""From the file of settings to the page: what is missing is run, what is known stays, and all of it is written down."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import orjson

from meristem.bench.continual.host import Make, Size, Texts, maker, sizes
from meristem.bench.continual.page import Arm, draw, page
from meristem.bench.continual.settings import ContinualConfig, HostConfig, read_continual
from meristem.bench.continual.trial import Outcome, Trained, Trial, run, trained_host
from meristem.checkpoint.atomic import write_atomic
from meristem.config import fingerprint
from meristem.device.describe import code_version, hardware
from meristem.errors import BadRecords, MissingExtra

SCHEMA: Final = "meristem.continual/1"

Known = dict[str, Outcome]
"""Outcomes by their fingerprints."""


@dataclass(frozen=True)
class Bench:
    """A host that can be made, what its arms are given, and all that is to be run of it."""

    tree: ContinualConfig
    texts: Texts
    name: str
    make: Make
    sizes: Mapping[str, tuple[int | None, Size]]

    @property
    def host(self) -> HostConfig:
        """Its settings."""
        return self.tree.hosts[self.name]

    def missing(self, known: Known, random_seed: int) -> Iterator[Trial]:
        """What can run from a host of that random seed: rates are tried before the runs that use the best."""
        for arm in self.host.arms:
            if random_seed == self.tree.seeds[0]:
                yield from (one for one in self.tries(arm).values() if one.fingerprint not in known)
            rate = self.best_rate(arm, known)
            if rate is not None and (trial := self.trial(arm, random_seed, rate)).fingerprint not in known:
                yield trial

    def tries(self, arm: str) -> dict[float, Trial]:
        """By learning rate, a run from the first seed for a share of the tokens; none where there is no choice."""
        rates, n_tokens = self._rates(arm), max(1, round(self.tree.second_tokens * self.tree.rate_share))
        tried = {rate: self.trial(arm, self.tree.seeds[0], rate, n_tokens=n_tokens) for rate in rates}
        return tried if len(rates) > 1 else {}

    def best_rate(self, arm: str, known: Known) -> float | None:
        """The rate whose try ended lowest on the second text, the first where all failed; None while one is missing."""
        tried = {rate: known.get(one.fingerprint) for rate, one in self.tries(arm).items()}
        if None in tried.values():
            return None
        found = {rate: one.figures["on/second"] for rate, one in tried.items() if one and one.figures}
        return min(found, key=found.__getitem__, default=self._rates(arm)[0])

    def trial(self, arm: str, random_seed: int, rate: float, *, n_tokens: int | None = None) -> Trial:
        """A run of an arm. n_tokens: of the second text, None for all."""
        size, n_tokens = self.sizes[arm][0], n_tokens or self.tree.second_tokens
        aside = {"hosts", "seeds", "rates", "rate_share", "second_tokens"}
        decides = self.tree.model_dump(mode="json", exclude=aside) | {
            "host": self.host.model_dump(mode="json", exclude={"arms", "same_size_as"}),
            "arm": self.host.arms[arm].model_dump(mode="json", exclude={"rates"}),
            "texts": [self.texts.first.fingerprint, self.texts.second.fingerprint],
            "run": [size, random_seed, rate, n_tokens],
        }
        return Trial(self.name, arm, size, random_seed, rate, n_tokens, fingerprint(decides))

    def found(self, known: Known) -> list[Arm]:
        """What is known of each arm."""
        arms = []
        for name, (_, size) in self.sizes.items():
            rate = self.best_rate(name, known)
            trials = {} if rate is None else {seed: self.trial(name, seed, rate) for seed in self.tree.seeds}
            by_seed = {seed: known[one.fingerprint] for seed, one in trials.items() if one.fingerprint in known}
            arms.append(Arm(name, size, rate, by_seed))
        return arms

    def _rates(self, arm: str) -> tuple[float, ...]:
        return self.host.arms[arm].rates or self.tree.rates


def continual(config: Path, out: Path, *, command: str, say: Callable[[str], object]) -> dict[str, Any]:
    """Run what is missing of what ``config`` lists, and write page, picture and JSON; gives what is in the JSON.

    Page and JSON are written after every arm, so that one which is interrupted has lost nothing that had ended. A host
    is trained where an arm of it is missing. One that needs a package which is not there is left out, and said.
    """
    tree, known = read_continual(config), _known(out.with_suffix(".json"))
    benches, left_out = _benches(tree, Texts.of(tree))
    for line in left_out:
        say(line)
    for bench in benches:
        for random_seed in tree.seeds:
            host: Trained | None = None
            while (trial := next(bench.missing(known, random_seed), None)) is not None:
                if host is None:
                    say(f"training {bench.name}, seed {random_seed}, on {tree.first}")
                    host = trained_host(tree, bench.host, bench.texts, bench.make(random_seed), random_seed)
                outcome = run(tree, trial, bench.texts, host)
                known[outcome.fingerprint] = outcome
                say(_line(outcome))
                _write(out, tree, benches, known, left_out=left_out, command=command)
    return _write(out, tree, benches, known, left_out=left_out, command=command)


def is_kept(report: Mapping[str, Any]) -> bool:
    """Whether the first text is the same bits wherever seeds were switched off."""
    return all(outcome["figures"].get("is_same", 1) == 1 for outcome in report["outcomes"])


def _benches(tree: ContinualConfig, texts: Texts) -> tuple[list[Bench], list[str]]:
    """The hosts that can be made here, and why others cannot."""
    found, left_out = [], []
    for name, host in tree.hosts.items():
        try:
            make = maker(tree, host, texts.first.tokenizer.vocab_size)
        except MissingExtra as error:
            left_out.append(f"{name} is left out: {error}")
            continue
        found.append(Bench(tree, texts, name, make, sizes(make, host, texts.config.data.seq_len)))
    return found, left_out


def _write(
    out: Path, tree: ContinualConfig, benches: Sequence[Bench], known: Known, *, left_out: Sequence[str], command: str
) -> dict[str, Any]:
    """The page, its picture and the JSON, whose content is given; outcomes of other settings are left out."""
    found = {bench.name: bench.found(known) for bench in benches}
    used = {one.fingerprint for bench in benches for arm in bench.host.arms for one in bench.tries(arm).values()}
    used |= {outcome.fingerprint for arms in found.values() for arm in arms for outcome in arm.by_seed.values()}
    code, picture = code_version(), out.with_suffix(".png")
    title = (
        f"Written by `{command}` on {datetime.now(UTC):%Y-%m-%d}, version {code['version']}, commit "
        f"`{str(code['commit'])[:12]}`, on one thread of {hardware()['cpu']}."
    )
    try:
        draw(picture, tree, found)
    except MissingExtra as error:
        left_out = [*left_out, str(error)]
    report = {
        "schema": SCHEMA,
        "hardware": hardware(),
        "code": code,
        "settings": tree.model_dump(mode="json"),
        "outcomes": [outcome.to_json() for outcome in known.values() if outcome.fingerprint in used],
    }
    write_atomic(out.with_suffix(".json"), orjson.dumps(report, option=orjson.OPT_INDENT_2) + b"\n")
    text = page(tree, found, title=title, left_out=left_out, picture=picture.name if picture.exists() else None)
    write_atomic(out, text.encode())
    return report


def _known(path: Path) -> Known:
    """What an earlier call has measured."""
    if not path.exists():
        return {}
    try:
        report = orjson.loads(path.read_bytes())
        if report["schema"] != SCHEMA:
            raise ValueError(f"its schema is {report['schema']}")
        return {values["fingerprint"]: Outcome(**values) for values in report["outcomes"]}
    except (ValueError, KeyError, TypeError) as cause:
        raise BadRecords(
            f"{path} holds no outcomes of this benchmark ({cause}), and would be overwritten. Move it away, or choose "
            f"another --out.",
            path=str(path),
        ) from cause


def _line(outcome: Outcome) -> str:
    if outcome.failure is not None:
        return f"{outcome.name}: {outcome.failure}"
    figures = outcome.figures
    return (
        f"{outcome.name}: first {figures['before/first']:.4f} -> {figures['on/first']:.4f}, second "
        f"{figures['before/second']:.4f} -> {figures['on/second']:.4f} bits per byte, {figures['seconds']:.0f} s"
    )
