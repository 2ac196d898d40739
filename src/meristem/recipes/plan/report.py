"""What a plan says, as a frozen value, and the same as tables for people."""

from typing import Final, Literal, NamedTuple

from pydantic import computed_field

from meristem import errors
from meristem.config import ConfigSection
from meristem.errors import MeristemError

GIB: Final = 2**30
# What the tracker cannot see: fragmentation and scratch space inside kernels, and the interpreter with torch in it.
SHARE_UNSEEN: Final = 0.05
PROCESS_BYTES: Final = GIB // 2


PartName = Literal["config", "data", "build", "steps", "modules", "totals", "warnings"]


class PartOutcome(ConfigSection):
    """How one part of the plan ended."""

    name: PartName
    outcome: Literal["ok", "failed", "not prepared", "not reached"]
    exit_code: int = 0
    message: str = ""
    error: str = ""


class DataFigures(ConfigSection):
    """The prepared text, in units of training."""

    vocabulary: int
    n_tokens: int
    n_windows: int
    n_batches: int
    unused_tokens: int
    epochs: float | None
    max_token_id: int


class ModuleRow(ConfigSection):
    """One module: what it reads and gives (axis letters with sizes), what it holds, and its work per step."""

    name: str
    kind: str
    reads: tuple[str, ...]
    gives: tuple[str, ...]
    dtype: str
    n_parameters: int
    n_trainable: int
    flops_forward: int
    flops_backward: int


class Held(ConfigSection):
    """Tensors alive at the peak that one operation of one module made; ``shape`` is that of the largest."""

    category: str
    module: str
    operation: str
    shape: tuple[int, ...]
    dtype: str
    n_tensors: int
    size_bytes: int


class Training(ConfigSection):
    """One optimizer step: its size, its work, and the bytes at its highest moment."""

    batch: int
    window: int
    accumulate: int
    flops_forward: int
    flops_backward: int
    flops_6nd: int
    peak_bytes: int
    peak_stage: str
    peak_module: str
    by_category: dict[str, int]
    largest: tuple[Held, ...]
    fitted_from: tuple[int, ...]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.window * self.accumulate

    @computed_field  # type: ignore[prop-decorator]
    @property
    def flops_per_step(self) -> int:
        return self.flops_forward + self.flops_backward

    @computed_field  # type: ignore[prop-decorator]
    @property
    def flops_per_token(self) -> float:
        return self.flops_per_step / self.tokens_per_step


class SessionFigures(ConfigSection):
    """One reader: the prompt read in one call, then one token.

    decoded_by: what reads token by token on a CPU, and if it is not the native core, why.
    """

    n_prompt: int
    state_bytes: int
    state_bytes_after_one_more: int
    flops_prefill: int
    flops_per_token: int
    decoded_by: str


class WhatIf(ConfigSection):
    """The same step with one thing changed."""

    change: str
    peak_bytes: int
    flops_per_step: int


class FormRow(ConfigSection):
    """One form of running a rule; without refusals it takes the rule."""

    name: str
    is_exact: bool
    refusals: tuple[str, ...]


class Fit(ConfigSection):
    """Two parts of a rule, such as a structure and a bias; without reasons they go together."""

    places: tuple[str, str]
    parts: tuple[str, str]
    reasons: tuple[str, ...]


class FormRun(ConfigSection):
    """The form that runs one memory of the model, and whether its reads are those of ``scan``."""

    path: str
    form: str
    is_exact: bool


class MemoryFigures(ConfigSection):
    """The rule of a model's first memory; ``runs`` is the form of a training window, also where ``form`` is auto.

    memories: of every memory of the model, which may have a rule of its own.
    """

    rule: str
    structure: str
    bias: str
    retention: str
    update: str
    form: str
    runs: str
    chunk: int
    memories: tuple[FormRun, ...]
    forms: tuple[FormRow, ...]
    fits: tuple[Fit, ...]


class SnapshotFigures(ConfigSection):
    """The states that a run keeps in memory for rollback: how many, and the bytes of each."""

    count: int
    each_bytes: int


class PlanReport(ConfigSection):
    """What a configuration costs and whether it can work. Sections that were not reached are None or empty."""

    model: str
    parts: tuple[PartOutcome, ...]
    vocabulary: int | None = None
    data: DataFigures | None = None
    n_parameters: int | None = None
    n_trainable: int | None = None
    memory: MemoryFigures | None = None
    modules: tuple[ModuleRow, ...] = ()
    training: Training | None = None
    snapshots: SnapshotFigures | None = None
    session: SessionFigures | None = None
    what_if: tuple[WhatIf, ...] = ()
    machine_bytes: int | None = None
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0

    @computed_field  # type: ignore[prop-decorator]
    @property
    def exit_code(self) -> int:
        """That of the first part that failed, else 0."""
        return next((part.exit_code for part in self.parts if part.outcome == "failed"), 0)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def needed_bytes(self) -> int | None:
        """The predicted peak with room for what the plan cannot see."""
        return None if self.training is None else needed_bytes(self.training.peak_bytes)

    def fits(self, gib: float) -> bool:
        """Whether the training step finds room in so many GiB."""
        return self.needed_bytes is not None and self.needed_bytes <= gib * GIB

    def refuse(self) -> None:
        """Raise the error of the first part that failed; nothing when all went well."""
        for part in self.parts:
            if part.outcome == "failed":
                kind = getattr(errors, part.error, MeristemError)
                raise kind(part.message, part=part.name)

    def to_json(self) -> str:
        """The whole report as JSON."""
        return self.model_dump_json(indent=2)

    def to_markdown(self) -> str:
        """The report as tables of a text document."""
        return "\n\n".join(_markdown(section) for section in sections(self)) + "\n"


class Section(NamedTuple):
    """A titled table: the terminal and the document are both made from these."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def brief(report: PlanReport) -> list[str]:
    """Three lines for the start of a run: the model, the step, the text."""
    lines = []
    if report.n_parameters is not None:
        state = f", {size(report.session.state_bytes)} of state per session" if report.session else ""
        counts = f"{report.n_parameters:,} parameters, vocabulary {report.vocabulary:,}"
        lines.append(f"model {report.model}: {counts}{state}")
    if (step := report.training) is not None:
        room = f" of {size(report.machine_bytes)}" if report.machine_bytes else ""
        lines.append(
            f"step: {step.tokens_per_step:,} tokens, {amount(step.flops_per_step)}FLOP "
            f"({amount(step.flops_per_token)}FLOP per token), peak {size(step.peak_bytes)}{room}"
        )
    if report.data is not None:
        lines.append(f"text: {report.data.n_tokens:,} tokens, {report.data.n_batches:,} batches per epoch")
    elif report.parts[1].outcome == "not prepared":
        lines.append("text: not prepared yet")
    return lines


def needed_bytes(peak_bytes: int) -> int:
    """The room a step takes when what the plan cannot see is added."""
    return int(peak_bytes * (1 + SHARE_UNSEEN)) + PROCESS_BYTES


def sections(report: PlanReport) -> list[Section]:
    """The report in reading order."""
    parts = Section("Plan", ("part", "outcome", "message"), tuple((p.name, p.outcome, p.message) for p in report.parts))
    made = [parts, _totals(report)]
    if report.memory is not None:
        made += [_memory(report.memory), *fitting(report.memory.fits)]
    if report.modules:
        made.append(_modules(report.modules))
    if report.training is not None:
        made.append(_peak(report.training))
        made.append(_largest(report.training))
    if report.what_if:
        rows = tuple((row.change, size(row.peak_bytes), f"{amount(row.flops_per_step)}FLOP") for row in report.what_if)
        made.append(Section("What if", ("change", "peak", "per step"), rows))
    if report.warnings:
        made.append(Section("Warnings", ("warning",), tuple((warning,) for warning in report.warnings)))
    return [section for section in made if section.rows]


def _totals(report: PlanReport) -> Section:
    rows: list[tuple[str, str]] = []
    if report.n_parameters is not None:
        rows.append(("parameters", f"{report.n_parameters:,}, of which {report.n_trainable:,} are trained"))
    if (data := report.data) is not None:
        rows.append(("text", f"{data.n_tokens:,} tokens, {data.n_windows:,} sequences, {data.unused_tokens:,} unused"))
        epochs = "" if data.epochs is None else f"; the run sees {data.epochs:.2f} epochs"
        rows.append(("epoch", f"{data.n_batches:,} batches{epochs}"))
    if (step := report.training) is not None:
        rows.append(("step", f"{step.accumulate} x {step.batch} x {step.window} = {step.tokens_per_step:,} tokens"))
        ratio = f"{step.flops_per_step / step.flops_6nd:.2f} x 6ND"
        rows.append(("work per step", f"{amount(step.flops_per_step)}FLOP, {ratio}"))
        forward, backward = (amount(n / step.tokens_per_step) for n in (step.flops_forward, step.flops_backward))
        rows.append(("work per token", f"{forward}FLOP forward, {backward}FLOP backward"))
        where = f"in {step.peak_module}, " if step.peak_module else ""
        rows.append(("peak of a step", f"{size(step.peak_bytes)} ({where}{step.peak_stage})"))
        rows.append(("room", _verdict(report)))
        if (kept := report.snapshots) is not None:
            rows.append(("snapshots", f"{kept.count} x {size(kept.each_bytes)} of RAM" if kept.count else "none"))
        if step.fitted_from:
            rows.append(("method", f"fitted from sequences of {', '.join(map(str, step.fitted_from))} tokens"))
    if (session := report.session) is not None:
        grows = session.state_bytes_after_one_more > session.state_bytes
        rows.append(("state per session", size(session.state_bytes) + (", growing with the text" if grows else "")))
        prompt = f"{session.n_prompt} tokens in one call: {amount(session.flops_prefill)}FLOP"
        rows.append(("work per read token", f"{amount(session.flops_per_token)}FLOP; {prompt}"))
        rows.append(("token by token on a CPU", session.decoded_by))
    return Section("Totals", ("figure", "value"), tuple(rows))


def _memory(memory: MemoryFigures) -> Section:
    """The rule, the form that runs, and whether each form takes the rule."""
    rows = [(name, getattr(memory, name)) for name in ("rule", "structure", "bias", "retention", "update")]
    chosen = ", which auto chose" if memory.form == "auto" else ""
    runs = {(each.form, each.is_exact): "" for each in memory.memories}
    if len(runs) > 1:
        runs = {run: f": {', '.join(m.path for m in memory.memories if m.form == run[0])}" for run in runs}
    for (form_name, is_exact), where in runs.items():
        exact = "exact" if is_exact else "not exact"
        rows.append(("runs by", f"{form_name} ({exact}){chosen}; chunks of {memory.chunk}{where}"))
    for form in memory.forms:
        takes = "takes it" + ("" if form.is_exact else ", not exact")
        rows.append((f"form {form.name}", "; ".join(form.refusals) or takes))
    return Section("Memory", ("part", "choice"), tuple(rows))


def fitting(fits: tuple[Fit, ...]) -> list[Section]:
    """Which structure goes with which bias, retention and update; where one does not, the number of the reason."""
    reasons = list(dict.fromkeys(reason for fit in fits for reason in fit.reasons))
    tables: dict[str, dict[str, dict[str, str]]] = {}
    for fit in fits:
        if fit.places[0] == "structure":
            cell = " ".join(str(1 + reasons.index(reason)) for reason in fit.reasons) or "yes"
            tables.setdefault(fit.places[1], {}).setdefault(fit.parts[0], {})[fit.parts[1]] = cell
    made = [
        Section(f"Which {place} a structure takes", ("structure", *next(iter(rows.values()))), _cells(rows))
        for place, rows in tables.items()
    ]
    numbered = tuple((str(1 + index), reason) for index, reason in enumerate(reasons))
    return [*made, Section("Why parts do not go together", ("number", "reason"), numbered)]


def _cells(rows: dict[str, dict[str, str]]) -> tuple[tuple[str, ...], ...]:
    return tuple((name, *cells.values()) for name, cells in rows.items())


def _verdict(report: PlanReport) -> str:
    needed, machine = report.needed_bytes, report.machine_bytes
    if needed is None or machine is None:
        return "unknown"
    word = "fits" if needed <= machine else "does not fit"
    unseen = f"{SHARE_UNSEEN:.0%} and {size(PROCESS_BYTES)} for what is not seen here"
    return f"{word}: {size(needed)} with {unseen}; the machine has {size(machine)}"


def _modules(modules: tuple[ModuleRow, ...]) -> Section:
    """One row for modules that differ in a number of their name only, as those of equal blocks."""
    alike: dict[tuple[str, ...], int] = {}
    for row in modules:
        cells = (
            ".".join("*" if word.isdigit() else word for word in row.name.split(".")) or "(all)",
            row.kind,
            ", ".join(row.reads),
            ", ".join(row.gives),
            f"{row.n_parameters:,}",
            amount(row.flops_forward),
            amount(row.flops_backward),
        )
        alike[cells] = alike.get(cells, 0) + 1
    columns = ("modules", "name", "class", "reads", "gives", "parameters", "forward", "backward")
    return Section("Modules, with FLOPs of one step each", columns, tuple((str(n), *row) for row, n in alike.items()))


def _peak(step: Training) -> Section:
    ordered = sorted(step.by_category.items(), key=lambda item: -item[1])
    rows = tuple((name, size(n), f"{n / step.peak_bytes:.1%}") for name, n in ordered)
    return Section("Bytes at the peak", ("category", "size", "share"), rows)


def _largest(step: Training) -> Section:
    rows = tuple(
        (
            size(held.size_bytes),
            str(held.n_tensors),
            held.category,
            held.operation,
            held.module or "(outside)",
            " x ".join(map(str, held.shape)),
            held.dtype,
        )
        for held in step.largest
    )
    return Section("Largest at the peak", ("size", "tensors", "category", "made by", "module", "shape", "dtype"), rows)


def _markdown(section: Section) -> str:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (section.columns, *section.rows)]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    lines.insert(1, "|" + "---|" * len(section.columns))
    return f"## {section.title}\n\n" + "\n".join(lines)


def size(n_bytes: float) -> str:
    """Bytes for people, in powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:,.1f} TiB"


def amount(n: float) -> str:
    """A count for people, with the prefix of its unit: 1.5 G."""
    for prefix in ("", "k", "M", "G", "T"):
        if n < 1000:
            return f"{n:.0f} " if not prefix else f"{n:.2f} {prefix}"
        n /= 1000
    return f"{n:,.2f} P"
