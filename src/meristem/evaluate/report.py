"""``report.md``: what a run came to, for someone who was not there."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from meristem.evaluate.baselines import HELD_OUT_BYTES, PRIMING_BYTES, Baseline


@dataclass(frozen=True)
class Sample:
    """A text that the model wrote on from a prompt."""

    prompt: str
    text: str


@dataclass(frozen=True)
class Report:
    """What the report says.

    summary: one paragraph. facts, memory, settings: rows of name and value.
    model_bits_per_byte: on the held-out text; None when the run ended before it was measured.
    has_picture: ``loss.png`` stands beside the report.
    readings: of a text that was held out, how it was read and its bits per byte; ``reading.png`` draws them.
    go_on: command and what it does.
    """

    title: str
    summary: str
    model_bits_per_byte: float | None
    baselines: Sequence[Baseline]
    facts: Sequence[tuple[str, str]]
    memory: Sequence[tuple[str, str]]
    readings: Sequence[tuple[str, str]]
    samples: Sequence[Sample]
    settings: Sequence[tuple[str, str]]
    go_on: Sequence[tuple[str, str]]
    has_picture: bool

    def to_markdown(self) -> str:
        sections = [f"# {self.title}", self.summary]
        if self.has_picture:
            sections.append("![Loss in bits per byte over the tokens read](loss.png)")
        sections += ["## Held-out text", _table(("", "bits per byte"), self._scale()), _SCALE_NOTE]
        sections += ["## The run", _table(("", ""), self.facts)]
        if self.memory:
            sections += ["## The memory", _table(("", ""), self.memory)]
        if self.readings:
            sections += ["## A text that it never saw", _table(("read", "bits per byte"), self.readings)]
        if self.readings and self.has_picture:
            sections.append("![Bits per byte over the tokens read, for each way to read](reading.png)")
        if self.samples:
            sections += ["## What it writes", *(_quoted(sample) for sample in self.samples)]
        sections += ["## How to go on", "\n".join(f"- `{command}` {purpose}" for command, purpose in self.go_on)]
        sections += ["## Settings", "All of them stand in `config.yaml`. The main ones:"]
        sections += [_table(("", ""), self.settings)]
        return "\n\n".join(sections) + "\n"

    def _scale(self) -> list[tuple[str, str]]:
        """The model among the compressors, best first."""
        rows = [(baseline.bits_per_byte, baseline.name) for baseline in self.baselines]
        if self.model_bits_per_byte is not None:
            rows.append((self.model_bits_per_byte, "**this model**"))
        return [(name, f"{bits_per_byte:.3f}") for bits_per_byte, name in sorted(rows)]


_SCALE_NOTE = (
    f"Bits needed per byte of text that was not trained on; less is better, and plain bytes need 8. Compressors read "
    f"at most the first {HELD_OUT_BYTES >> 20} MiB of it; where xz is given the training text, at most its last "
    f"{PRIMING_BYTES >> 20} MiB. The size of the model is not counted."
)


def _table(head: tuple[str, str], rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join([f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _quoted(sample: Sample) -> str:
    """The prompt and its continuation as a code block, fenced by more backticks than the text holds in a row."""
    text = sample.prompt + sample.text
    fence = "```"
    while fence in text:
        fence += "`"
    return f"After {sample.prompt!r}:\n\n{fence}text\n{text}\n{fence}"
