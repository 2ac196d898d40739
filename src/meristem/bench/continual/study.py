"""From the file of settings to the page: what is missing is run, what is known stays, and all of it is written down."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson

from meristem.bench.continual.host import Make, Size, Texts, maker, sizes
from meristem.bench.continual.page import Arm, draw, page
from meristem.bench.continual.settings import ContinualConfig, HostConfig, read_continual
from meristem.bench.continual.trial import Trained, Trial, run, trained_host
from meristem.bench.trial import Outcome
from meristem.bench.tuned import Known, origin, read_known, report_of
from meristem.checkpoint.atomic import write_atomic
from meristem.config import fingerprint
from meristem.errors import MissingExtra

SCHEMA: Final = "meristem.continual/1"


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
        n_tokens = max(1, round(self.tree.second_tokens * self.tree.rate_share))
        tried = {rate: self.trial(arm, self.tree.seeds[0], rate, n_tokens=n_tokens) for rate in self.tree.rates}
        return tried if len(tried) > 1 else {}

    def best_rate(self, arm: str, known: Known) -> float | None:
        """The rate whose try ended lowest on the second text, the first where all failed; None while one is missing."""
        tried = {rate: known.get(one.fingerprint) for rate, one in self.tries(arm).items()}
        if None in tried.values():
            return None
        found = {rate: one.figures["on/second"] for rate, one in tried.items() if one and one.figures}
        return min(found, key=found.__getitem__, default=self.tree.rates[0])

    def trial(self, arm: str, random_seed: int, rate: float, *, n_tokens: int | None = None) -> Trial:
        """A run of an arm. n_tokens: of the second text, None for all."""
        size, n_tokens = self.sizes[arm][0], n_tokens or self.tree.second_tokens
        aside = {"hosts", "seeds", "rates", "rate_share", "second_tokens"}
        decides = self.tree.model_dump(mode="json", exclude=aside) | {
            "host": self.host.model_dump(mode="json", exclude={"arms", "same_size_as"}),
            "arm": self.host.arms[arm].model_dump(mode="json"),
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


def continual(config: Path, out: Path, *, command: str, say: Callable[[str], object]) -> dict[str, Any]:
    """Run what is missing of what ``config`` lists, and write page, picture and JSON; gives what is in the JSON.

    Page and JSON are written after every arm, so that one which is interrupted has lost nothing that had ended. A host
    is trained where an arm of it is missing. One that needs a package which is not there is left out, and said.
    """
    tree, known = read_continual(config), read_known(out.with_suffix(".json"), SCHEMA)
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
    try:
        draw(picture_of(out), tree, {bench.name: bench.found(known) for bench in benches})
    except MissingExtra as error:
        say(str(error))
    return _write(out, tree, benches, known, left_out=left_out, command=command)


def picture_of(out: Path) -> Path:
    """Where the picture of a page stands."""
    return out.with_suffix(".png")


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
    """The page and the JSON, whose content is given; outcomes of other settings are left out.

    Those of a host that is left out stay in the JSON: nothing says that they are of other settings.
    """
    found = {bench.name: bench.found(known) for bench in benches}
    used = {one.fingerprint for bench in benches for arm in bench.host.arms for one in bench.tries(arm).values()}
    used |= {outcome.fingerprint for arms in found.values() for arm in arms for outcome in arm.by_seed.values()}
    absent = tuple(f"{name}, " for name in tree.hosts if name not in found)
    outcomes = [one for one in known.values() if one.fingerprint in used or one.name.startswith(absent)]
    report = report_of(SCHEMA, tree, outcomes)
    write_atomic(out.with_suffix(".json"), orjson.dumps(report, option=orjson.OPT_INDENT_2) + b"\n")
    title, picture = origin(tree, outcomes, command), picture_of(out)
    text = page(tree, found, title=title, left_out=left_out, picture=picture.name if picture.exists() else None)
    write_atomic(out, text.encode())
    return report


def _line(outcome: Outcome) -> str:
    if outcome.failure is not None:
        return f"{outcome.name}: {outcome.failure}"
    figures = outcome.figures
    return (
        f"{outcome.name}: first {figures['before/first']:.4f} -> {figures['on/first']:.4f}, second "
        f"{figures['before/second']:.4f} -> {figures['on/second']:.4f} bits per byte, {figures['seconds']:.0f} s"
    )
