"""Every rule in every form that takes it, as a layer: how fast it reads and trains, what it holds, what it leaves.

One row a pair, all forms of a rule interleaved. ``scan`` is slow, so the table runs it over a short sequence: its
seconds and matrix products are scaled to the given length, its peak is extrapolated from two short ones. Where other
forms are compared with it, it runs the whole sequence.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from meristem.bench.measure import Row, Timed, timed
from meristem.bench.peer_titans import peak_bytes
from meristem.config.layers import preset_names
from meristem.memory import named
from meristem.memory.forms import accepting, forms
from meristem.memory.named import rules
from meristem.memory.state import size_bytes
from meristem.nn.config import MemoryConfig
from meristem.nn.memory import MemoryLayer
from meristem.recipes.plan.flops import flops_of
from meristem.runs.config import load_config

SCANNED: Final = 64
"""Tokens that ``scan`` is measured over."""

LONGEST: Final = {"associative": 512}
"""Lengths beyond which a form is not run: this one holds a matrix per token."""

COMPARED: Final = 1024
"""The length at which a form is compared with ``scan``, and the number of times it has to train faster."""
ASKED: Final = 10.0

MOST_S: Final = 2.0
"""Seconds for the turns of one rule at one length: slow rules take fewer turns."""

LIMIT_SIZE: Final = 2048
"""Rows and columns of the matrices whose product is taken for the limit of the machine."""


@dataclass(frozen=True)
class Speed:
    """What was measured of one rule in one form. limit_share: of the machine's matrix products, while training."""

    rule: str
    form: str
    is_exact: bool
    width: int
    head_width: int
    chunk: int
    n_time: int
    forward_tokens_per_s: float
    training_tokens_per_s: float
    training_flops: int
    limit_share: float
    state_bytes: int
    peak_bytes: int
    repeats: int

    def row(self) -> Row:
        """The pair as a line: tokens a second of training, and the rest beside it."""
        note = (
            f"forward {self.forward_tokens_per_s:,.0f} tokens/s, state {self.state_bytes / 2**10:,.1f} KiB, peak "
            f"{self.peak_bytes / 2**20:,.1f} MiB, {self.limit_share:.1%} of the limit"
        )
        if self.form == "scan":
            note += f"; from {SCANNED} tokens"
        name = f"{self.rule}, {self.form}: width {self.width}, T = {self.n_time}"
        return Row(name, self.training_tokens_per_s, "tokens/s", note=note, figures=asdict(self))


def speeds(
    n_repeats: int, widths: Sequence[int] = (128,), windows: Sequence[int] = (512,), only: Sequence[str] = ()
) -> Iterator[Row]:
    """Tokens a second, bytes and the share of the machine's limit, for all pairs; then each over its scan.

    only: the rules to measure, in the place of the whole catalogue.
    """
    limit = matrix_limit(n_repeats)
    yield Row(f"the limit: float32 product of matrices of {LIMIT_SIZE}", limit / 1e9, "GFLOP/s")
    for width in widths:
        for name in only or rules.names():
            for n_time in windows:
                yield from in_all_forms(name, width, n_time, limit, n_repeats)
            yield from over_scan(name, width, n_repeats)


def matrix_limit(n_repeats: int) -> float:
    """Operations a second of one large float32 matrix product: more than any rule can attain."""
    left, right = torch.rand(2, LIMIT_SIZE, LIMIT_SIZE)
    once = timed(lambda: torch.mm(left, right))
    once()
    return 2 * LIMIT_SIZE**3 / min(once() for _ in range(max(3, n_repeats)))


def part_of(name: str) -> MemoryConfig:
    """The settings of the rule's preset, or the defaults where it has none, as a plugin's."""
    preset = f"lmm-{name}"
    return load_config(preset, environment={}).tree.memory if preset in preset_names() else MemoryConfig(rule=name)


def in_all_forms(name: str, width: int, n_time: int, limit: float, n_repeats: int) -> Iterator[Row]:
    """One row for every form that takes the rule. limit: operations a second, as ``matrix_limit`` gives them."""
    fitting = [form for form in accepting(named(name)) if n_time <= LONGEST.get(form, n_time)]
    for form in accepting(named(name)):
        if form not in fitting:
            yield _skipped(name, form, f"{name}, {form}: width {width}, T = {n_time}", "tokens/s")
    candidates = {form: _Window(name, form, width, SCANNED if form == "scan" else n_time) for form in fitting}
    training = {form: timed(window.train) for form, window in candidates.items()}
    reading = {f"read by {form}": timed(window.read) for form, window in candidates.items()}
    seconds, n_turns = _in_turns(training | reading, n_repeats)
    for form, window in candidates.items():
        part, scale = window.config, n_time / window.n_time
        flops = round(scale * flops_in(window.train))
        trained_s = scale * seconds[form]
        yield Speed(
            rule=name,
            form=form,
            is_exact=forms.get(form).is_exact,
            width=width,
            head_width=part.head_dim,
            chunk=part.chunk,
            n_time=n_time,
            forward_tokens_per_s=window.n_time / seconds[f"read by {form}"],
            training_tokens_per_s=n_time / trained_s,
            training_flops=flops,
            limit_share=flops / trained_s / limit,
            state_bytes=size_bytes(window.read()),
            peak_bytes=_peak(window, n_time),
            repeats=n_turns,
        ).row()


def over_scan(name: str, width: int, n_repeats: int) -> Iterator[Row]:
    """How many times faster than by its scan the rule trains, by every other form that takes it."""
    others = [form for form in accepting(named(name)) if form != "scan"]
    fitting = [form for form in others if LONGEST.get(form, COMPARED) >= COMPARED]
    for form in others:
        if form not in fitting:
            yield _skipped(name, form, f"{name}, {form} over scan: width {width}, T = {COMPARED}", "x")
    if not fitting:
        return
    steps = {form: _Window(name, form, width, COMPARED) for form in (*fitting, "scan")}
    seconds, n_turns = _in_turns({form: timed(window.train) for form, window in steps.items()}, n_repeats)
    scanned_flops = COMPARED / SCANNED * flops_in(_Window(name, "scan", width, SCANNED).train)
    for form in fitting:
        ratio, work = seconds["scan"] / seconds[form], flops_in(steps[form].train) / scanned_flops
        taken = f"{seconds[form] * 1e3:,.0f} ms against {seconds['scan'] * 1e3:,.0f} ms"
        note = f"{taken}; {work:.1f} times its matrix products"
        figures = {"rule": name, "form": form, "width": width, "n_time": COMPARED, "work": work, "repeats": n_turns}
        label = f"{name}, {form} over scan: width {width}, T = {COMPARED}"
        yield Row(label, ratio, "x", ASKED, note=note, figures=figures)


def _skipped(rule: str, form: str, name: str, unit: str) -> Row:
    note = f"skipped: beyond {LONGEST[form]} tokens; the form holds a matrix per token"
    return Row(name, None, unit, note=note, figures={"rule": rule, "form": form})


class _Window:
    """A memory layer with text to read; the text needs a gradient too, as inside a model."""

    def __init__(self, rule: str, form: str, width: int, n_time: int) -> None:
        torch.manual_seed(0)
        self.config = part_of(rule).model_copy(update={"form": form})
        self.layer = MemoryLayer(width, self.config)
        self.n_time = n_time
        self.hidden_btd = torch.randn(1, n_time, width, requires_grad=True)

    def train(self) -> None:
        self.layer.zero_grad()
        mixed_btd, _ = self.layer(self.hidden_btd)
        mixed_btd.sum().backward()

    @torch.no_grad()
    def read(self) -> Any:
        """The state that reading leaves."""
        return self.layer(self.hidden_btd)[1]

    def shorter(self) -> "_Window":
        """The same layer over half of the text."""
        return _Window(self.config.rule, self.config.form, self.hidden_btd.shape[-1], self.n_time // 2)


def _peak(window: _Window, n_time: int) -> int:
    """Peak bytes of a training step over ``n_time`` tokens, by the line through a shorter length and half of it."""
    there = peak_bytes(window.train)
    if window.n_time == n_time:
        return there
    half = window.shorter()
    half.train()
    per_token = (there - peak_bytes(half.train)) / (window.n_time - half.n_time)
    return round(there + per_token * (n_time - window.n_time))


def _in_turns(candidates: Mapping[str, Timed], n_repeats: int) -> tuple[dict[str, float], int]:
    """Median seconds of every candidate, and of how many turns: as many as given, or as there is time for.

    The first turn warms up and measures how long one takes; where there is time for no other, it is the one that
    counts.
    """

    def turn() -> dict[str, float]:
        return {name: once() for name, once in candidates.items()}

    first = turn()
    n_turns = min(n_repeats, int(MOST_S / sum(first.values())))
    turns = [turn() for _ in range(n_turns)] or [first]
    return {name: statistics.median(turn[name] for turn in turns) for name in candidates}, len(turns)


class _Counter(TorchDispatchMode):
    """Adds up the operations of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.n_flops = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = operation(*args, **(kwargs or {}))
        self.n_flops += flops_of(operation, args, kwargs or {}, out) or 0
        return out


def flops_in(step: Callable[[], object]) -> int:
    """Operations of the matrix products of one call, from their shapes; elementwise work counts nothing."""
    with _Counter() as counter:
        step()
    return counter.n_flops
