"""The life of every seed of a run, read from its directory: as rows, and as a picture (growth.md 18)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from meristem.checkpoint import store
from meristem.errors import RunError
from meristem.evaluate.picture import empty_figure, write_figure
from meristem.events import Emit, silent
from meristem.growth.garden import Garden
from meristem.growth.gates import GateResult
from meristem.growth.report import FILE, GrowthReport, read
from meristem.growth.stage import Life, Stage
from meristem.sinks.records import history

COLOURS: Final[Mapping[Stage, str]] = {
    Stage.GERMINATED: "#c7c7c7",
    Stage.TRAINING: "#aec7e8",
    Stage.BLENDING: "#ffbb78",
    Stage.SHADOWING: "#f7e08a",
    Stage.PROBATIONARY: "#98df8a",
    Stage.FOSSILIZED: "#2ca02c",
    Stage.CULLED: "#d62728",
    Stage.EMBARGOED: "#ff9896",
    Stage.RESETTING: "#e7cccc",
}
"""Of the stages in a picture."""


@dataclass(frozen=True)
class LifeReport:
    """One seed. results: what the gates said of it. blend: (step, weight) at each boundary. report: how it ended."""

    life: Life
    figures: Mapping[str, Any]
    results: tuple[GateResult, ...]
    blend: tuple[tuple[int, float], ...]
    report: GrowthReport | None

    @property
    def outcome(self) -> str:
        """What the run came to beside what it would have come to by its line before the graft, or where it stands."""
        return self.report.outcome if self.report else f"is {self.life.stage.name}"

    @property
    def verdict(self) -> str:
        """What was decided, and the figure or gate that it hung on; or where it stands."""
        decided = [each for each in self.life.history if each.after in (Stage.FOSSILIZED, Stage.CULLED)]
        if not decided:
            return f"is {self.life.stage.name}"
        if decided[-1].after is Stage.CULLED:
            return f"taken out: {decided[-1].reason}"
        gained = self.figures.get("gained")
        return f"kept, worth {gained['mean']:.3f} nats" if gained else "kept"

    def spans(self, last: int) -> list[tuple[Stage, int, int]]:
        """Stages with the step at which each began and ended; the present one lasts to ``last``."""
        begun = [(each.after, each.step) for each in self.life.history]
        ends = [*(step for _, step in begun[1:]), last]
        return [(stage, step, end) for (stage, step), end in zip(begun, ends, strict=True)]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "seed": self.life.seed,
            "slot": self.life.slot,
            "blueprint": self.life.origin.blueprint,
            "settings": dict(self.life.origin.settings),
            "way": self.life.way,
            "stage": self.life.stage.name,
            "stages": [
                {"stage": each.after.name, "step": each.step, "reason": each.reason} for each in self.life.history
            ],
            "gates": [each.to_json() | {"code": each.code} for each in self.results],
            "blend": [list(point) for point in self.blend],
            "figures": dict(self.figures),
            "verdict": self.verdict,
            "outcome": self.outcome,
        }


def lives_of(run_dir: Path, emit: Emit = silent) -> list[LifeReport]:
    """Every seed of a run, in the order of their birth, as its newest whole checkpoint knows them.

    Raises RunError for a run that does not grow, or that has saved nothing yet.
    """
    checkpoint = store.newest(run_dir / "checkpoints", emit)
    if checkpoint is None or not checkpoint.has("garden"):
        raise RunError(
            f"{run_dir} holds no checkpoint of a run that grows. Train one with `meristem grow`, or give its place.",
            path=str(run_dir),
        )
    garden = Garden.from_json(checkpoint.value("garden"))
    reports = {(each.seed, each.ended): each for each in read(run_dir / FILE, emit)}
    told = [each for each in history(run_dir, "events", emit) if each["name"] == "blend.reported"]
    found = []
    for life in garden.lives:
        end = next((each.step for each in life.history if each.after in (Stage.FOSSILIZED, Stage.CULLED)), None)
        until = checkpoint.step if end is None else end
        points = [(each["step"], each["payload"]["weight"]) for each in told if each["payload"]["slot"] == life.slot]
        found.append(
            LifeReport(
                life=life,
                figures=garden.figures.get(life.seed, {}),
                results=tuple(each for each in garden.results if each.seed == life.seed),
                blend=tuple(point for point in points if life.born < point[0] <= until),
                report=None if end is None else reports.get((life.seed, end)),
            )
        )
    return found


def table(lives: Sequence[LifeReport]) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
    """Titles and a row for each seed: what came of it, and the figures that decided."""
    titles = (
        "seed",
        "blueprint",
        "way",
        "verdict",
        "stages",
        "blend",
        "on trial",
        "gained",
        "rent",
        "FLOPs",
        "outcome",
    )
    return titles, [_row(each) for each in lives]


def _row(each: LifeReport) -> tuple[object, ...]:
    figures, life = each.figures, each.life
    stages = ", ".join(f"{step.after.name.lower()} {step.step}" for step in life.history)
    weights = [weight for _, weight in each.blend]
    blend = f"{weights[0]:.2g} to {weights[-1]:.2g}" if weights else None
    return (
        life.seed,
        life.origin.blueprint,
        life.way,
        each.verdict,
        stages,
        blend,
        interval(figures.get("tried")),
        interval(figures.get("gained")),
        figures.get("rent"),
        figures.get("flops_spent"),
        each.outcome,
    )


def interval(found: Mapping[str, Any] | None) -> str | None:
    """A mean with its 90 % interval, in nats per token."""
    if not found or found.get("lower") is None:
        return None
    return f"{found['mean']:.4f} ({found['lower']:.4f} to {found['upper']:.4f})"


def gate_lines(lives: Sequence[LifeReport]) -> list[tuple[object, ...]]:
    """A row for each check of each gate: seed, gate, step, check, value, what was asked, and what came of it."""
    return [
        (each.life.seed, result.gate, result.step, check.name, check.value, check.threshold, check.status)
        for each in lives
        for result in each.results
        for check in result.checks
    ]


def draw_lives(path: Path, run_dir: Path, lives: Sequence[LifeReport], emit: Emit = silent) -> None:
    """Write the losses of a run over its steps as a PNG, and below them a bar for each seed, coloured by stage."""
    records = history(run_dir, emit=emit)
    curves = {
        split: [
            (record["step"], record["metrics"]["bits_per_byte"])
            for record in records
            if record["split"] == split
            and record["task"] is None
            and record["metrics"].get("bits_per_byte") is not None
        ]
        for split in ("train", "val")
    }
    last = max((step for points in curves.values() for step, _ in points), default=1)
    figure = empty_figure(path, 10, 5 + 0.4 * len(lives))
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 0.6 + 0.4 * len(lives)])
    if curves["train"]:
        above.plot(*zip(*curves["train"], strict=True), linewidth=0.8, alpha=0.6, label="training batches")
    if curves["val"]:
        above.plot(*zip(*curves["val"], strict=True), marker="o", markersize=3, label="held-out text")
    above.set_ylabel("bits per byte")
    seen: set[Stage] = set()
    for place, each in enumerate(lives):
        above.axvline(each.life.born, color="#7f7f7f", linewidth=0.7, linestyle=":")
        for stage, start, end in each.spans(last):
            if stage in COLOURS:
                label = None if stage in seen else stage.name.lower()
                seen.add(stage)
                below.barh(place, max(end - start, 1), left=start, height=0.7, color=COLOURS[stage], label=label)
        if each.blend:
            steps, weights = zip(*each.blend, strict=True)
            below.plot(steps, [place + 0.3 - 0.6 * weight for weight in weights], color="black", linewidth=0.8)
        side, words = (
            ("right" if each.life.born > last / 2 else "left"),
            f"{each.life.origin.blueprint}: {each.verdict}",
        )
        below.text(each.life.born, place - 0.36, words, fontsize=7, va="bottom", ha=side)
    below.set_yticks(range(len(lives)), [each.life.seed for each in lives])
    below.set_ylim(max(len(lives), 1) - 0.4, -0.7)
    below.set_xlabel("steps; the black line is the blend weight, from 0 at the bottom of a bar to 1 at its top")
    if seen:
        drawn = below.get_legend_handles_labels()
        figure.legend(*drawn, fontsize="x-small", ncols=len(seen), loc="outside lower left")
    if above.lines:
        above.legend(fontsize="small")
    write_figure(path, figure)
