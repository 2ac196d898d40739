"""What was found, in words: a table for each host, sentences on what is better, and a picture of both texts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from meristem.bench.continual.host import Size
from meristem.bench.continual.settings import ContinualConfig, HostConfig
from meristem.bench.estimate import estimate, paired, said, table
from meristem.bench.evidence import TOLERANCE
from meristem.bench.trial import Outcome
from meristem.bench.tuned import rate_words, tuning_words
from meristem.evaluate.picture import empty_figure, write_figure

UNIT: Final = "bits per byte"


@dataclass(frozen=True)
class Arm:
    """What is known of an arm: its size, its learning rate once that is chosen, and outcomes by random seed."""

    name: str
    size: Size
    rate: float | None
    by_seed: Mapping[int, Outcome]

    def values(self, key: str) -> dict[int, float]:
        """A figure by random seed."""
        return {seed: one.figures[key] for seed, one in self.by_seed.items() if key in one.figures}

    @property
    def is_measured(self) -> bool:
        """Whether a random seed has figures."""
        return bool(self.values("on/second"))

    @property
    def is_beside(self) -> bool:
        """Whether its host is frozen."""
        return self.size.n_parameters > 0


def page(
    tree: ContinualConfig,
    found: Mapping[str, Sequence[Arm]],
    *,
    title: str,
    left_out: Sequence[str],
    picture: str | None,
) -> str:
    """The whole document. title: where, when and by which command. left_out: why a host or the picture is missing."""
    lines = [
        *("# A second text after a first", "", title, ""),
        f"A model is trained on `{tree.first}` ({tree.first_tokens:,} tokens) and then learns `{tree.second}` "
        f"({tree.second_tokens:,} tokens). Is the first forgotten, and how well is the second learned: with all "
        "weights, with low-rank adapters, or with parts that are grown beside a frozen host?",
        "",
        f"**Fair.** All arms of a host begin with the same weights and read the same batches of the second text; with "
        f"replay, fewer of it, for the batches of both together are as many. Arms with a frozen host add as many "
        f"parameters within {TOLERANCE:.0%}. They were tuned alike, on the second text: {tuning_words(tree)} Host and "
        "arms are trained in one plain loop of torch with AdamW.",
        "",
        f"**Figures** are {UNIT} of held-out text ({tree.n_windows} sequences), less is better: means over "
        f"{len(tree.seeds)} random seeds, each with a host of its own, ± half of a 95 % interval (Student's t). "
        "Differences are paired by seed; where their interval holds 0, that is called no effect. *Off* is with the "
        "seeds switched off: whoever reads has to know then which text it is.",
        *([""] if left_out else []),
        *(f"- {line}" for line in left_out),
    ]
    if picture and any(arm.is_measured for arms in found.values() for arm in arms):
        lines += ["", f"![How both texts changed while the second was learned]({picture})"]
    for name, arms in found.items():
        host = tree.hosts[name]
        lines += ["", f"## {name}", "", _described(host), ""]
        measured = [arm for arm in arms if arm.is_measured]
        if not measured:
            lines.append("Not measured yet.")
            continue
        lines += [*_table(tree, host, measured), "", *(f"- {sentence}" for sentence in sentences(host, arms))]
    return "\n".join([*lines, ""])


def sentences(host: HostConfig, arms: Sequence[Arm]) -> Iterator[str]:
    """Whether the first text is the same bits with the seeds off, and each arm against the one of equal size."""
    same = [value for arm in arms for value in arm.values("is_same").values()]
    if same:
        n_same = sum(value == 1 for value in same)
        yield (
            f"With the seeds off every logit on the held-out first text is the same bits as before in {n_same} of "
            f"{len(same)} runs" + ("." if n_same == len(same) else ": **that is a fault**.")
        )
    other = next(arm for arm in arms if arm.name == host.same_size_as)
    for arm in arms:
        second = paired(arm.values("on/second"), other.values("on/second"))
        first = paired(arm.values("on/first"), other.values("on/first"))
        if arm is not other and second and first:
            on = ", its seeds on" if arm.is_beside else ""
            yield (
                f"`{arm.name}` against `{other.name}`: second text {said(second, UNIT)}; first text{on}: "
                f"{said(first, UNIT)}."
            )
        for seed, outcome in arm.by_seed.items():
            if outcome.failure is not None:
                yield f"`{arm.name}` from seed {seed} ended before it had learned: {outcome.failure}"


def draw(path: Path, tree: ContinualConfig, found: Mapping[str, Sequence[Arm]]) -> None:
    """Write as a PNG, a panel for each host, how both texts changed against the host before: the first from left to
    right, the second from below; a point for each seed, a cross for the mean with its intervals, an arm a colour."""
    panels = {name: [arm for arm in arms if arm.is_measured] for name, arms in found.items()}
    panels = {name: arms for name, arms in panels.items() if arms}
    if not panels:
        return
    names = dict.fromkeys(arm.name for arms in panels.values() for arm in arms)
    colours = {name: f"C{number}" for number, name in enumerate(names)}
    figure = empty_figure(path, 6.2 * len(panels), 4.8)
    for axes, (name, arms) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for arm in arms:
            first, second = (_changes(arm, text) for text in ("first", "second"))
            at, height = estimate(first), estimate(second)
            drawn = {"color": colours[arm.name], "capsize": 3, "fmt": "x", "label": arm.name}
            axes.errorbar(at.mean, height.mean, xerr=at.half or 0, yerr=height.half or 0, **drawn)
            axes.plot(first, second, ".", color=colours[arm.name], markersize=4)
        axes.axvline(0, color="grey", linewidth=0.8, linestyle="--", label="seeds off")
        axes.plot(0, 0, "o", color="grey", label="the host before")
        texts = [f"{UNIT} of {text}, after less before" for text in tree.texts]
        axes.set(xlabel=texts[0], ylabel=texts[1], title=name)
        axes.legend(fontsize="x-small")
    write_figure(path, figure)


def _changes(arm: Arm, text: str) -> list[float]:
    """By how much a text costs more after the second was learned, seed by seed."""
    before = arm.values(f"before/{text}")
    return [bits - before[seed] for seed, bits in arm.values(f"on/{text}").items()]


def _described(host: HostConfig) -> str:
    if host.transformers is not None:
        sizes = ", ".join(f"{key} {value}" for key, value in host.transformers.items())
        return f"A causal language model of Hugging Face ({sizes}), grown by `grow.attach`."
    return f"The preset `{host.preset}` with {', '.join(f'`{one}`' for one in host.settings) or 'no changes'}."


def _table(tree: ContinualConfig, host: HostConfig, arms: Sequence[Arm]) -> list[str]:
    """Both texts before and after, and what was added."""
    titles = ["arm", "new parameters", "FLOPs per token", "learning rate", "second text", "gained", "first text"]
    titles += ["forgotten", "first text, off"]
    before = [estimate([*arms[0].values(f"before/{text}").values()]).text() for text in ("second", "first")]
    rows = [["the host before", "", "", f"{host.rate:g}", before[0], "", before[1], "", ""]]
    for arm in arms:
        first, second = arm.values("on/first"), arm.values("on/second")
        off = [*arm.values("off/first").values()]
        is_same = all(value == 1 for value in arm.values("is_same").values())
        row = [
            f"`{arm.name}`",
            f"{arm.size.n_parameters:,} {f'({arm.size.chosen})' if arm.size.chosen else ''}".strip(),
            f"{arm.size.flops_per_token:,.0f}",
            rate_words(tree, arm.rate),
            estimate([*second.values()]).text(),
            f"**{estimate([-bits for bits in _changes(arm, 'second')]).text(sign='+')}**",
            estimate([*first.values()]).text(),
            f"**{estimate(_changes(arm, 'first')).text(sign='+')}**",
            f"{estimate(off).text()}, {'the same bits' if is_same else 'OTHER BITS'}" if off else "",
        ]
        rows.append(row)
    return table(titles, rows)
