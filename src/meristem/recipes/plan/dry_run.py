"""``meristem plan``: is a configuration consistent, how large is it, what does a step cost, and will it fit?

Parts in order, each building on those before. The first that fails gives the plan its exit code and, unless a step
merely does not fit, ends it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch

from meristem.data.given import given
from meristem.data.tokenizer import most_entries
from meristem.device.limits import available_bytes, total_bytes
from meristem.device.resolve import NAMES, Device, resolve
from meristem.errors import MeristemError, OutOfDeviceBytes, exit_code
from meristem.events import silent
from meristem.models.build import build as build_model
from meristem.models.packed import refusal_as_built
from meristem.recipes.plan import rehearse, table
from meristem.recipes.plan.fit import extrapolate
from meristem.recipes.plan.ledger import failing_line
from meristem.recipes.plan.measure import MOST_OPERATIONS, Measured, combine, measure, short
from meristem.recipes.plan.memory import memory_of
from meristem.recipes.plan.report import (
    PartName,
    PartOutcome,
    PlanReport,
    SessionFigures,
    SnapshotFigures,
    Training,
    WhatIf,
    needed_bytes,
    size,
)
from meristem.recipes.plan.text import look
from meristem.runs.backend import choose_backend
from meristem.runs.config import Config
from meristem.train.rollback import n_snapshots

PER_FORWARD: Final = 4
"""A step takes at most so many operations for each one of a forward pass without gradients."""


@dataclass
class Draft:
    """What the parts have found so far; ``sections`` are those of the report."""

    config: Config
    n_steps: int
    device: Device = field(init=False)
    vocabulary: int = field(init=False)
    pace: dict[int, int] = field(init=False)
    step: Measured = field(init=False)
    sections: dict[str, Any] = field(default_factory=dict)


def plan(config: Config, *, steps: int = 2, until: PartName = "warnings") -> PlanReport:
    """All that can be known of a run before it begins, on fake tensors, in seconds.

    steps: optimizer steps to rehearse; the second is the first to hold the optimizer's state, so its peak is the run's.
    until: the last part to go through. A run that is about to start needs no more than ``steps``.
    """
    began = time.perf_counter()
    draft = Draft(config, steps)
    outcomes: list[PartOutcome] = []
    is_over = False
    for name, work in PARTS.items():
        if is_over:
            outcomes.append(PartOutcome(name=name, outcome="not reached"))
            continue
        try:
            outcomes.append(work(draft))
        except (MeristemError, RuntimeError) as cause:
            outcomes.append(_failed(name, cause))
            # A step that does not fit was rehearsed all the same, and its figures say what to change.
            is_over = not isinstance(cause, OutOfDeviceBytes)
        is_over = is_over or name == until
    seconds = round(time.perf_counter() - began, 3)
    return PlanReport(model=config.model.name, parts=tuple(outcomes), seconds=seconds, **draft.sections)


def check_config(draft: Draft) -> PartOutcome:
    """Part 1. The rules between keys held when the tree was made; here the device and its dtypes are tried."""
    draft.device = resolve(draft.config.device, silent)
    chosen = f"{draft.device.device}, computing in {NAMES[draft.device.dtype]}"
    return PartOutcome(name="config", outcome="ok", message=chosen)


def check_data(draft: Draft) -> PartOutcome:
    """Part 2. What is known of the text without reading it; the vocabulary, or what the tokenizer may at most learn."""
    figures = look(draft.config)
    tokenizer = draft.config.tokenizer
    found = given(tokenizer, download=draft.config.data.download)
    most = found.vocab_size if found is not None else most_entries(tokenizer)
    draft.vocabulary = most if figures is None else figures.vocabulary
    draft.sections |= {"vocabulary": draft.vocabulary, "data": figures}
    if figures is None:
        return PartOutcome(name="data", outcome="not prepared", message=f"counted with a vocabulary of {most}")
    return PartOutcome(name="data", outcome="ok", message=f"{figures.n_tokens:,} tokens prepared")


def build(draft: Draft) -> PartOutcome:
    """Part 3. The model on fake tensors: what it holds, and how its memory will run."""
    model = rehearse.build(draft.config, draft.vocabulary, draft.device)
    draft.sections["memory"] = memory_of(model, draft.config.memory, draft.config.data.seq_len)
    parameters = list(model.parameters())
    draft.sections["n_parameters"] = sum(p.numel() for p in parameters)
    draft.sections["n_trainable"] = sum(p.numel() for p in parameters if p.requires_grad)
    chosen = choose_backend(model, draft.config, draft.device.device, None)
    by = {"native": "; memories by the native core: ", "reference": "; memories by tensor code: "}
    said = by[chosen.name] + chosen.why if chosen.name in by else ""
    return PartOutcome(name="build", outcome="ok", message=f"{draft.sections['n_parameters']:,} parameters{said}")


def rehearse_steps(draft: Draft) -> PartOutcome:
    """Part 4. Optimizer steps by the real loop, then a session's prompt and one token; the peak against the machine."""
    draft.pace = _pace(draft)
    draft.step = _measure(draft, draft.device)
    draft.sections["training"] = _training(draft)
    draft.sections["session"] = _session(draft)
    draft.sections["snapshots"] = _snapshots(draft)
    needed, there = needed_bytes(draft.step.peak_bytes), machine_bytes(draft.device.device)
    draft.sections["machine_bytes"] = there
    if needed > there:
        raise OutOfDeviceBytes(
            f"a step needs {size(needed)} at its peak; {draft.device.device} has {size(there)}. "
            f"Lower data.batch_size and raise train.grad_accum_steps, lower data.seq_len, or choose a smaller model.",
            found=there,
            expected=needed,
        )
    return PartOutcome(name="steps", outcome="ok", message=f"peak {size(draft.step.peak_bytes)} of {size(there)}")


def list_modules(draft: Draft) -> PartOutcome:
    """Part 5. One row per module."""
    rows = tuple(table.rows(draft.step, draft.config.train.grad_accum_steps))
    draft.sections["modules"] = rows
    return PartOutcome(name="modules", outcome="ok", message=f"{len(rows)} modules")


def price_changes(draft: Draft) -> PartOutcome:
    """Part 6. The totals stand already; here is the same step with one thing changed."""
    if not draft.step.is_certain:
        return PartOutcome(name="totals", outcome="ok", message="no change priced: the step itself is uncertain")
    data, device = draft.config.data, draft.device
    dtype = torch.bfloat16 if device.dtype == torch.float32 else torch.float32
    steps = {
        "data.batch_size x2": _measure(draft, device, batch=2 * data.batch_size),
        f"device.dtype={NAMES[dtype]}": _measure(draft, replace(device, dtype=dtype)),
    }
    bound = getattr(draft.step.longest.model, "window", None)
    if bound is None or 2 * data.seq_len <= bound:
        longer = 2 * data.seq_len
        is_fitted, samples = draft.step.is_fitted, draft.step.samples
        steps["data.seq_len x2"] = combine(samples, longer) if is_fitted else _measure(draft, device, window=longer)
    draft.sections["what_if"] = tuple(
        WhatIf(change=change, peak_bytes=step.peak_bytes, flops_per_step=_work(draft, step))
        for change, step in steps.items()
    )
    return PartOutcome(name="totals", outcome="ok", message=f"{len(steps)} changes priced")


def collect_warnings(draft: Draft) -> PartOutcome:
    """Part 8. What runs, and is probably not meant."""
    sample = draft.step.longest
    found = [f"{name} is never called" for name in table.never_called(sample)]
    found += [f"{name} gets no gradient" for name in sample.without_gradient]
    found += [f"{name} has no FLOP formula; it ran {n} times" for name, n in sample.ledger.unknown.items()]
    found += [f"{line} reads a value back from the device" for line in sample.ledger.readings]
    if not draft.step.is_certain:
        lengths = " and ".join(map(str, draft.step.samples))
        found.append(
            f"peak and work are extrapolated from sequences of {lengths} tokens, where they were not yet on one line"
        )
    if draft.config.device.compile:
        found.append("device.compile is on: the peak is that of the uncompiled model, an upper estimate")
    draft.sections["warnings"] = tuple(found)
    return PartOutcome(name="warnings", outcome="ok", message=f"{len(found)} warnings")


PARTS: Final[dict[PartName, Callable[[Draft], PartOutcome]]] = {
    "config": check_config,
    "data": check_data,
    "build": build,
    "steps": rehearse_steps,
    "modules": list_modules,
    "totals": price_changes,
    "warnings": collect_warnings,
}


def machine_bytes(device: torch.device) -> int:
    """What the device has in all; of the machine's RAM, as much as this process may use."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return total_bytes()


def _failed(name: PartName, cause: Exception) -> PartOutcome:
    """Our own errors bring words and exit code; an error of torch gets the line of the model that caused it."""
    if isinstance(cause, MeristemError):
        message = str(cause)
    else:
        message = f"{failing_line(cause)}: {cause}"
    kind = type(cause).__name__
    return PartOutcome(name=name, outcome="failed", exit_code=exit_code(cause), error=kind, message=message)


def _measure(draft: Draft, device: Device, *, batch: int | None = None, window: int | None = None) -> Measured:
    """One step of the run, as it is or with another device, batch or sequence length."""
    config, vocabulary = draft.config, draft.vocabulary
    window = window or config.data.seq_len
    batch = batch or config.data.batch_size

    def rehearsal(length: int) -> rehearse.Rehearsal:
        return rehearse.train(config, vocabulary, device, batch=batch, window=length, n_steps=draft.n_steps)

    def n_operations(length: int) -> int:
        return _forward(draft, length) * PER_FORWARD * draft.n_steps * min(config.train.grad_accum_steps, 2)

    return measure(rehearsal, window, n_operations)


def _forward(draft: Draft, length: int) -> int:
    """About how many operations a forward pass over ``length`` tokens takes."""
    return extrapolate({n: {0: n_operations} for n, n_operations in draft.pace.items()}, length)[0]


def _pace(draft: Draft) -> dict[int, int]:
    """Operations of a forward pass over two short sequences: they tell a loop over time from work done at once."""
    lengths = short(draft.config.data.seq_len)
    readings = {n: rehearse.read(draft.config, draft.vocabulary, draft.device, n_prompt=n) for n in lengths}
    return {n: reading.ledger.n_operations["prefill"] for n, reading in readings.items()}


def _work(draft: Draft, step: Measured) -> int:
    return draft.config.train.grad_accum_steps * sum(step.flops.values())


def _training(draft: Draft) -> Training:
    step, data, accumulate = draft.step, draft.config.data, draft.config.train.grad_accum_steps
    n_looked_up = 0 if draft.config.model.tied else table.looked_up(step.longest.model)
    return Training(
        batch=data.batch_size,
        window=data.seq_len,
        accumulate=accumulate,
        flops_forward=accumulate * table.work(step, "", ("forward", "loss")),
        flops_backward=accumulate * table.work(step, "", ("backward",)),
        flops_6nd=6 * (draft.sections["n_parameters"] - n_looked_up) * data.batch_size * data.seq_len * accumulate,
        peak_bytes=step.peak_bytes,
        peak_stage=step.stage,
        peak_module=step.module,
        by_category=dict(step.by_category),
        largest=step.largest,
        fitted_from=tuple(step.samples) if step.is_fitted else (),
    )


def _snapshots(draft: Draft) -> SnapshotFigures:
    """What rollback will need; refused here where the configured number does not fit."""
    held = draft.step.by_category
    each_bytes = held.get("parameters", 0) + held.get("optimizer", 0)
    count = n_snapshots(draft.config.rollback, each_bytes, available_bytes())
    return SnapshotFigures(count=count, each_bytes=each_bytes)


def _session(draft: Draft) -> SessionFigures:
    """A prompt of one token less than a sequence: where the length is bounded, the token after it still finds room."""
    n_prompt = max(1, draft.config.data.seq_len - 1)
    takes_line = draft.step.is_certain or _forward(draft, n_prompt) > MOST_OPERATIONS
    lengths = tuple(draft.step.samples) if draft.step.is_fitted and takes_line else (n_prompt,)
    readings = {n: rehearse.read(draft.config, draft.vocabulary, draft.device, n_prompt=n) for n in lengths}
    figures = extrapolate({n: reading.figures() for n, reading in readings.items()}, n_prompt)
    with torch.device("meta"):
        reason = refusal_as_built(build_model(draft.config.model, draft.config.memory, draft.vocabulary, 0))
    return SessionFigures(n_prompt=n_prompt, decoded_by=f"torch: {reason}" if reason else "native core", **figures)
