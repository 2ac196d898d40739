"""One run of a cell of the evidence: trained, then measured."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final, Self, TypeAlias

import rich.console
import torch
from torch import nn

from meristem.bench.evidence import EvidenceConfig, ReadingConfig
from meristem.bench.reading import reading_figures
from meristem.checkpoint.store import open_checkpoint
from meristem.config import fingerprint, identity_of_choices
from meristem.data.prepare import prepare
from meristem.data.stream import held_out_documents
from meristem.data.tokenizer import Tokenizer
from meristem.device.describe import hardware
from meristem.device.resolve import Device, resolve
from meristem.errors import TrainingError
from meristem.evaluate import remember
from meristem.evaluate.likelihood import likelihood
from meristem.events import silent
from meristem.growth.garden import Garden
from meristem.growth.stage import Stage
from meristem.memory.state import size_bytes
from meristem.models.load import load
from meristem.models.online import frozen
from meristem.recipes.grow import grow
from meristem.recipes.pretrain import Result, pretrain
from meristem.runs.config import Config
from meristem.sinks.console import Console
from meristem.sinks.records import history
from meristem.train.loss import cross_entropy

VERSION: Final = 1
"""Of how a trial is trained and measured; another number means that all have to be run again.

What is compared is known by the settings that are not their defaults, so that a key which is new does not make hours of
results strangers. Where a default changes, or what a setting does, this is raised.
"""

FAR: Final = 4
"""Attention spans beyond which what is recalled counts as remembered, not seen."""


@dataclass(frozen=True)
class Measures:
    """What is measured of a trained model beside its likelihood, as ``EvidenceConfig`` and its tables say."""

    span: int
    n_texts: int
    n_documents: int
    reading: ReadingConfig | None

    @classmethod
    def of(cls, config: EvidenceConfig, table: str) -> Self:
        """Those of a table."""
        return cls(config.span, config.n_texts, config.n_documents, config.tables[table].reading)


@dataclass(frozen=True)
class Trial:
    """One variant from one start. measures: None where only its likelihood counts, as when a learning rate is tried.

    place: the directory below ``run.dir`` that it is in.
    """

    variant: str
    config: Config
    measures: Measures | None
    place: str

    @cached_property
    def fingerprint(self) -> str:
        """Of all that decides its outcome."""
        reading = self.measures and self.measures.reading
        asked = self.measures and asdict(self.measures) | {"reading": reading and reading.model_dump(mode="json")}
        return fingerprint({"run": self._identity, "asked": asked})

    @cached_property
    def _identity(self) -> str:
        return fingerprint([VERSION, identity_of_choices(self.config), identity_of_choices(self.config.eval)])

    @property
    def name(self) -> str:
        """As ``titans-0 on notebook at 0.003``."""
        config = self.config
        return f"{self.variant}-{config.run.seed} on {Path(config.data.source).name} at {config.optim.lr:g}"

    @property
    def directory(self) -> Path:
        """Where it is trained: another one for other settings, whatever is measured of it."""
        return self.config.run.dir / self.place / f"{self.variant}-{self.config.run.seed}-{self._identity[:12]}"


@dataclass(frozen=True)
class Outcome:
    """What came of a trial: figures, or why training ended before there were any.

    curve: tokens read, or operations where these are the budget, and bits per byte of held-out text there.
    chip: what it ran on.
    """

    name: str
    fingerprint: str
    figures: Mapping[str, float]
    curve: tuple[tuple[float, float], ...]
    chip: str
    failure: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values, as JSON gives them back."""
        return asdict(self) | {"curve": [list(point) for point in self.curve]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """What ``to_json`` gave."""
        return cls(**dict(values) | {"curve": tuple((tokens, bits) for tokens, bits in values["curve"])})


Runner: TypeAlias = Callable[[Sequence[Trial]], Iterator[Outcome]]
"""What gives the outcomes of trials as they end."""


@contextmanager
def running(jobs: int) -> Iterator[Runner]:
    """What runs trials one after the other in this process, or so many at once, in processes that last as the block.

    It raises KeyboardInterrupt once a trial was interrupted; that has left a checkpoint and goes on from there next
    time.
    """
    if jobs == 1:
        yield partial(map, run_trial)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as processes:

        def run(planned: Sequence[Trial]) -> Iterator[Outcome]:
            for done in as_completed([processes.submit(run_trial, trial) for trial in planned]):
                yield done.result()

        try:
            yield run
        except BaseException:
            processes.shutdown(wait=False, cancel_futures=True)
            raise


def run_trial(trial: Trial) -> Outcome:
    """Train where the run stands, and measure it. What a person would see goes into ``<directory>.log``.

    A run that could not be trained is an outcome as well. Raises KeyboardInterrupt where it was interrupted.
    """
    trial.directory.parent.mkdir(parents=True, exist_ok=True)
    found, is_cpu = hardware(), trial.config.device.device == "cpu"
    chip = found["cpu"] if is_cpu or not found["gpus"] else found["gpus"][0]["name"]
    recipe = grow if trial.config.grow.enabled else pretrain
    with Path(f"{trial.directory}.log").open("a", encoding="utf-8") as log:
        view = Console(screen=rich.console.Console(file=log, highlight=False))
        began = time.perf_counter()
        try:
            result = recipe(trial.config, run_dir=trial.directory, view=view)
        except TrainingError as cause:
            return Outcome(trial.name, trial.fingerprint, {}, (), chip, str(cause))
        wall_s = time.perf_counter() - began
    if result.status == "interrupted" or result.bits_per_byte is None:
        raise KeyboardInterrupt
    figures = {
        "bits_per_byte": result.bits_per_byte,
        "tokens": float(result.tokens),
        "seconds": result.seconds_used,
        "tokens_per_s": result.tokens / max(result.seconds_used, 1e-9),
    }
    if trial.config.train.flops is not None:
        figures |= {"flops": result.flops, "nats": result.nats or 0.0, "wall_s": wall_s} | end_of(result)
    if trial.measures is not None:
        figures |= measure(trial.config, trial.measures, result.checkpoint)
    held_out = (r for r in history(trial.directory) if r["split"] == "val" and r["task"] is None)
    curve = tuple((r["metrics"].get("flops", r["tokens"]), r["metrics"]["bits_per_byte"]) for r in held_out)
    return Outcome(trial.name, trial.fingerprint, figures, curve, chip)


def end_of(result: Result) -> dict[str, float]:
    """How large the model of a run is at its end; where it grew, how many seeds it put in and kept, and the operations
    that were no training."""
    model, _ = load(result.checkpoint)
    found = {"n_parameters": float(sum(each.numel() for each in model.parameters()))}
    saved = open_checkpoint(result.checkpoint)
    if saved.has("garden"):
        garden = Garden.from_json(saved.value("garden"))
        found |= {
            "n_seeds": float(len(garden.lives)),
            "n_kept": float(sum(life.stage is Stage.FOSSILIZED for life in garden.lives)),
            "probe_flops": result.flops - garden.flops,
        }
    return found


def measure(config: Config, measures: Measures, checkpoint: Path) -> dict[str, float]:
    """What the memory of a checkpoint brings while it reads, what it recalls, and what learning brings.

    ``documents/MODE``: bits per byte of held-out documents, the memory carried through each, written or frozen.
    """
    model, tokenizer = load(checkpoint)
    device = resolve(config.device, silent)
    model = model.to(device.device)
    corpus, cut = prepare(config.data, config.tokenizer), config.eval
    found = {}
    for mode, reader in {"memory": model, "frozen": frozen(model)}.items():
        read = held_out_documents(
            corpus, "val", window=config.data.seq_len, batch=cut.batch_size, max_windows=cut.n_windows_end
        )
        measured = likelihood(reader, read, device=device, loss=cross_entropy)
        found[f"documents/{mode}"] = measured.bits_per_byte
    found["state_bytes"] = float(session_bytes(model, device, config.data.seq_len))
    if "notebook" in config.data.source.split("+"):
        found |= recall_figures(model, tokenizer, config, measures, device)
    if measures.reading is not None:
        read_at = reading_figures(model, tokenizer, measures.reading, config.data, device)
        found |= {f"reading/{key}": value for key, value in read_at.items()}
    return found


def recall_figures(
    model: nn.Module, tokenizer: Tokenizer, config: Config, measures: Measures, device: Device
) -> dict[str, float]:
    """Facts recalled, with the memory written and frozen, as ``evaluate.remember`` measures them.

    ``remember/MODE/SPANS``: share for which the value is the likeliest of eight; ``.../greedy`` that it is predicted.
    ``mentions/MODE/BYTES``: share of values that are predicted where they come back, from half of that distance up to
    it, with their number under ``.../n``; ``mentions/MODE/far`` of all beyond ``FAR`` attention spans.
    """
    data, found = config.data, dict[str, float]()
    texts = remember.tell_facts(tokenizer, measures.span, measures.n_texts, data.validation)
    chosen = remember.held_out_documents(data.notebook, data.validation, measures.n_documents)
    n_bytes = sum(len(one.text) for one in chosen)
    far_bytes = FAR * measures.span * n_bytes / sum(len(tokenizer.encode_bytes(one.text)) for one in chosen)
    how: dict[str, Any] = {"piece": max(data.seq_len, remember.PIECE), "device": device}
    for mode, reader in {"memory": model, "frozen": frozen(model)}.items():
        asked = remember.remember(reader, texts, is_reset=False, batch=config.eval.batch_size, **how)
        for spans, one in zip(remember.SPANS, asked, strict=True):
            found[f"remember/{mode}/{spans}"] = one.n_chosen / one.n
            found[f"remember/{mode}/{spans}/greedy"] = one.n_greedy / one.n
        by_bytes = remember.mentions(reader, chosen, tokenizer, **how)
        for distance, (n, n_right) in by_bytes.items():
            found |= {f"mentions/{mode}/{distance}": n_right / n, f"mentions/{mode}/{distance}/n": float(n)}
        far = [counts for distance, counts in by_bytes.items() if distance / 2 >= far_bytes]
        if far:
            found[f"mentions/{mode}/far"] = sum(right for _, right in far) / sum(n for n, _ in far)
    return found


@torch.no_grad()
def session_bytes(model: nn.Module, device: Device, n_time: int) -> int:
    """What one reader carries after a sequence: all that must be kept of its session."""
    (tokens_bt,) = device.move(torch.zeros(1, n_time, dtype=torch.long))
    _, state = model(tokens_bt, None)
    return size_bytes(state)
