"""Measures every rule of the catalogue and writes docs/rules.md, docs/rules.png and, between the two, docs/rules.json.

    .venv/bin/python scripts/rules.py

What docs/rules.json holds already is not measured again, unless a rule has other forms now: remove the file to start
afresh. The tests fail when the page does not say what the catalogue says; figures may be older than the code.
"""

import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from meristem.bench import rules as bench
from meristem.bench.learn import N_HELD_OUT, learn
from meristem.bench.picture import plot_speeds
from meristem.device.config import DeviceConfig
from meristem.device.describe import describe
from meristem.device.resolve import resolve
from meristem.errors import NonFinite
from meristem.evaluate.recall import Associative
from meristem.events import silent
from meristem.memory import named
from meristem.memory.bias import biases
from meristem.memory.features import features
from meristem.memory.forms import accepting, forms
from meristem.memory.named import rules
from meristem.memory.region import FADE
from meristem.memory.retention import retentions
from meristem.memory.rule import LONGEST
from meristem.memory.update import updates
from meristem.models.build import build
from meristem.models.config import ModelConfig

DOCS = Path(__file__).parents[1] / "docs"
PAGE, FIGURES, PICTURE = DOCS / "rules.md", DOCS / "rules.json", DOCS / "rules.png"

FIRST = ("hebbian", "delta", "titans", "moneta", "yaad", "memora", "lattice", "trellis", "omega")
WIDTH, N_TIME, REPEATS = 128, 512, 5

TASK = Associative(vocabulary=64, window=24, n_pairs=8)
MODEL = ModelConfig(dim=32, n_layers=1, mixer="memory")
TRAINING: dict[str, Any] = {"steps": 200, "batch": 16, "rate": 0.01, "random_seed": 0}

ARXIV = re.compile(r"\b(?:([A-Z]\w+) )?(\d{4}\.\d{5})\b")

REASONS = {
    "associative": "it holds a matrix per token, and moving these takes longer than multiplying them",
    "atlas": "five Newton-Schulz steps for every token are most of the work, as in the scan, and a chunk holds all",
    "frozen_chunk": "its short chunks go one after the other, with many small operations in each",
    "lattice": "every token reads slots of unit length, so that there is a set of slots for each",
    "refined": "it goes over a chunk again in every sweep, and each token has weights of its own there",
    "tnt": "every token writes two memories and reads both, and the global chunks go one after the other",
}
"""Why a form may train less than ten times faster than the scan."""


def ordered() -> list[str]:
    """The nine rules of the papers' comparison, then the others."""
    return [*FIRST, *(name for name in rules.names() if name not in FIRST)]


def page(found: dict[str, Any]) -> str:
    """The whole document from what was measured, and from what the catalogue says now."""
    lines = [*head(found), *overview(found), *short(found)]
    for name in ordered():
        lines += section(name, found["rules"].get(name, {}))
    return "\n".join([*lines, ""])


def head(found: dict[str, Any]) -> Iterator[str]:
    yield "# Memory rules"
    yield ""
    yield (
        f"Written by `scripts/rules.py` from the catalogue and from one run that ended on {found['date']}: "
        f"{found['cpu']}, torch {found['torch']} on {found['threads']} of its threads, {found['limit_gflops']:,.0f} "
        f"GFLOP/s in one large float32 matrix product; when it began, the load of the machine was {found['load']:.1f}. "
        "Any of these rules is trained by `meristem train lmm-NAME`."
    )
    yield ""
    yield (
        f"**Speed** is that of one memory layer, projections included: width {WIDTH}, one row of {N_TIME} tokens, "
        "float32, the preset's heads and chunks; training is forward and backward. `scan` is measured over "
        f"{bench.SCANNED} tokens and scaled, which flatters it; *over scan* compares whole sequences of "
        f"{bench.COMPARED:,} tokens. **State** is what a session keeps for such a layer. **Recall** is the share of "
        f"right answers after {TRAINING['steps']} steps on `{TASK.name}` (batch {TRAINING['batch']}, AdamW at "
        f"{TRAINING['rate']}, random seed {TRAINING['random_seed']}): {TASK.n_pairs} pairs among {TASK.vocabulary} ids "
        f"in sequences of {TASK.window} tokens, one layer of width {MODEL.dim}, {N_HELD_OUT} sequences held out. Who "
        f"knows the values of a sequence but not whose they are is right in {1 / TASK.n_pairs:.1%} (1 / pairs). Rates, "
        "widths and steps that suit one rule do not suit all: this is one point of a curve, and no ranking. What a "
        "trained model recalls, `meristem eval --suite recall` says; `meristem bench memory` measures the speeds again."
    )
    yield ""
    yield (
        "**Bounded** says how long a memory can become, for any unit keys, values up to `|v|` and gates that the gate "
        f"layer can give: `e` is the fade of a write of rate 1, 2^{math.log2(FADE):.0f}, m the greatest momentum of "
        f"the head, and LONGEST {LONGEST:,.0f}. `meristem.memory.region` proves it, and says what holds in forms that "
        "are not exact."
    )
    yield ""
    yield "![Training tokens a second of every rule in every form](rules.png)"


def overview(found: dict[str, Any]) -> Iterator[str]:
    yield ""
    yield "| rule | paper | state | fastest form | training tokens/s | recall |"
    yield "|---|---|---|---|---|---|"
    for name in ordered():
        measured = found["rules"].get(name, {})
        speeds = [speed for speed in measured.get("speeds", []) if speed["form"] in accepting(named(name))]
        best = max(speeds, key=lambda speed: speed["training_tokens_per_s"], default=None)
        state = speed = form = "not measured"
        if best is not None:
            state, form = f"{best['state_bytes'] / 2**10:,.1f} KiB", f"`{best['form']}`"
            speed = f"{best['training_tokens_per_s']:,.0f}"
        yield f"| [`{name}`](#{name}) | {papers(name)} | {state} | {form} | {speed} | {recalled(measured)} |"


def short(found: dict[str, Any]) -> Iterator[str]:
    """The pairs that train less than ten times faster than their scan."""
    yield ""
    yield f"## Less than {bench.ASKED:.0f} times faster than the scan"
    yield ""
    yield f"Training over {bench.COMPARED:,} tokens; *work* is the matrix products of the form over those of the scan."
    yield ""
    yield "| rule | form | over scan | work | why |"
    yield "|---|---|---|---|---|"
    for name in ordered():
        for pair in found["rules"].get(name, {}).get("over_scan", []):
            if pair["form"] in accepting(named(name)) and not pair["is_met"]:
                ratio = "not run" if pair["ratio"] is None else f"{pair['ratio']:.1f}"
                work = "" if pair["ratio"] is None else f"{pair['work']:.1f}"
                yield f"| `{name}` | `{pair['form']}` | {ratio} | {work} | {REASONS.get(pair['form'], '')} |"


def section(name: str, measured: dict[str, Any]) -> Iterator[str]:
    rule = named(name)
    yield ""
    yield f"## {name}"
    yield ""
    yield said(rules.get(name))
    yield ""
    yield said(rules.get(name), paragraph=1)
    yield ""
    yield f"Paper: {papers(name)}."
    yield ""
    yield "| part | choice | what it is |"
    yield "|---|---|---|"
    yield f"| structure | `{rule.structure.kind}` | {said(type(rule.structure))} |"
    for place, registry in (("bias", biases), ("retention", retentions), ("update", updates), ("features", features)):
        choice = getattr(rule, place).name
        yield f"| {place} | `{choice}` | {said(registry.get(choice))} |"
    order = f"{rule.reads} a token is written; surprise at the {'old' if rule.probe == 'cold' else 'retained'} memory"
    yield f"| order | | read {order}{f'; over {rule.span} pairs' if rule.span > 1 else ''} |"
    yield ""
    yield "| form | exact | training tokens/s | reading tokens/s | state | peak | share of limit | over scan |"
    yield "|---|---|---|---|---|---|---|---|"
    speeds = {speed["form"]: speed for speed in measured.get("speeds", [])}
    ratios = {pair["form"]: pair["ratio"] for pair in measured.get("over_scan", [])}
    for form in accepting(rule):
        exact = "yes" if forms.get(form).is_exact else "no"
        yield f"| `{form}` | {exact} | {cells(speeds.get(form), ratios.get(form))} |"
    yield ""
    yield f"Recall: {recalled(measured)}."


def cells(speed: dict[str, Any] | None, ratio: float | None) -> str:
    if speed is None:
        return " | ".join(["not measured", *[""] * 5])
    return " | ".join(
        (
            f"{speed['training_tokens_per_s']:,.0f}",
            f"{speed['forward_tokens_per_s']:,.0f}",
            f"{speed['state_bytes'] / 2**10:,.1f} KiB",
            f"{speed['peak_bytes'] / 2**20:,.1f} MiB",
            f"{speed['limit_share']:.1%}",
            "" if ratio is None else f"{ratio:.1f} x",
        )
    )


def recalled(measured: dict[str, Any]) -> str:
    recall = measured.get("recall")
    if recall is None:
        return "not measured"
    return f"{recall['accuracy']:.1%}" if recall["accuracy"] is not None else "diverged"


def said(thing: Any, paragraph: int = 0) -> str:
    """A paragraph of the docstring as Markdown on one line, fit for a cell of a table."""
    text = " ".join((thing.__doc__ or "").strip().split("\n\n")[paragraph].split())
    return text.replace("``", "`").replace("|", "\\|")


def papers(name: str) -> str:
    """Links to what the rule's docstring names, by number, or by a name that another rule gives the number of."""
    known = {paper: number for other in rules.names() for paper, number in ARXIV.findall(said(rules.get(other)))}
    text = said(rules.get(name))
    numbers = {number: paper for paper, number in ARXIV.findall(text)}
    numbers |= {number: paper for paper, number in known.items() if paper and f"({paper}," in text}
    links = [f"[{paper or 'arXiv'} {number}](https://arxiv.org/abs/{number})" for number, paper in numbers.items()]
    return ", ".join(links) or "none named"


def measure_speeds(name: str, limit: float) -> list[dict[str, Any]]:
    return [dict(row.figures) for row in bench.in_all_forms(name, WIDTH, N_TIME, limit, REPEATS) if row.measured]


def measure_over_scan(name: str, limit: float) -> list[dict[str, Any]]:
    rows = bench.over_scan(name, WIDTH, REPEATS)
    return [{**row.figures, "ratio": row.measured, "is_met": row.is_met} for row in rows]


def measure_recall(name: str, limit: float) -> dict[str, Any]:
    model = build(MODEL, bench.part_of(name), TASK.vocabulary, 0)
    device = resolve(DeviceConfig(dtype="fp32", threads=1), silent)
    try:
        found = learn(model, TASK, device=device, **TRAINING)
    except NonFinite:
        return {"accuracy": None, "nats": None}
    return {"accuracy": found.accuracy, "nats": found.nats}


MEASURED = {"speeds": measure_speeds, "over_scan": measure_over_scan, "recall": measure_recall}


def is_there(name: str, kind: str, before: dict[str, Any]) -> bool:
    """Whether figures of that kind are known, for the very forms that take the rule now where they are of forms."""
    if kind == "recall" or kind not in before:
        return kind in before
    too_short = {form for form, longest in bench.LONGEST.items() if longest < N_TIME}
    left_out = {"scan"} if kind == "over_scan" else too_short
    return {measured["form"] for measured in before[kind]} == set(accepting(named(name))) - left_out


def begun() -> dict[str, Any]:
    """What was measured before; else where this run measures, and the limit there."""
    if FIGURES.exists():
        return dict(json.loads(FIGURES.read_text(encoding="utf-8")))
    resolve(DeviceConfig(), silent)
    return {
        "cpu": describe()["hardware"]["cpu"],
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "limit_gflops": bench.matrix_limit(REPEATS) / 1e9,
        "rules": {},
    }


def keep(found: dict[str, Any], name: str, kind: str) -> None:
    """Measure, and write down at once: a run that is broken off goes on from here."""
    began = time.perf_counter()
    resolve(DeviceConfig(threads=found["threads"]), silent)
    measured = MEASURED[kind](name, found["limit_gflops"] * 1e9)
    found["rules"].setdefault(name, {})[kind] = measured
    found["date"] = f"{datetime.now(UTC):%Y-%m-%d}"
    FIGURES.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(found), encoding="utf-8")
    sys.stdout.write(f"{name}: {kind}, {time.perf_counter() - began:.0f} s\n")
    sys.stdout.flush()


def main() -> None:
    # Before torch's profiler first measures a peak: it would write a line whenever it starts and stops.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    found = begun()
    for kind in MEASURED:
        for name in ordered():
            if not is_there(name, kind, found["rules"].get(name, {})):
                keep(found, name, kind)
    plot_speeds(PICTURE, [speed for name in ordered() for speed in found["rules"][name]["speeds"]])
    PAGE.write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
