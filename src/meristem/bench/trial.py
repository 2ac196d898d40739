"""One run of an ablation: trained, then measured."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import rich.console
import torch
from torch import nn

from meristem.data.prepare import prepare
from meristem.device.resolve import Device, resolve
from meristem.errors import TrainingError
from meristem.evaluate.adaptation import N_WINDOWS, Adaptation, Documents, adaptation, documents
from meristem.evaluate.recall import HELD_OUT, recall, suite
from meristem.events import silent
from meristem.memory.state import size_bytes
from meristem.models.load import load
from meristem.models.online import frozen
from meristem.recipes.pretrain import pretrain
from meristem.runs.config import Config
from meristem.sinks.console import Console
from meristem.sinks.records import history
from meristem.train.loss import cross_entropy


@dataclass(frozen=True)
class Trial:
    """One variant from one start. ``fingerprint``: of all that decides its outcome."""

    variant: str
    random_seed: int
    config: Config
    n_parameters: int
    n_recall: int
    n_documents: int
    fingerprint: str

    @property
    def name(self) -> str:
        """As ``titans-0``."""
        return f"{self.variant}-{self.random_seed}"

    @property
    def directory(self) -> Path:
        """Where it runs: another one for other settings."""
        return self.config.run.dir / "ablation" / f"{self.name}-{self.fingerprint[:8]}"


@dataclass(frozen=True)
class Figures:
    """What was measured of a trained model.

    recall, chance: means over the tasks that fit, of right answers and of a guess. on, off: adaptation with the memory
    written and with a frozen one, as ``evaluate.adaptation`` names the figures.
    curve: tokens read, and bits per byte of held-out text there.
    """

    bits_per_byte: float
    recall: float
    chance: float
    on: Mapping[str, float]
    off: Mapping[str, float]
    tokens_per_s: float
    state_bytes: int
    curve: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Outcome:
    """What came of a trial: figures, or why training ended before there were any."""

    name: str
    variant: str
    random_seed: int
    fingerprint: str
    n_parameters: int
    hidden: int
    figures: Figures | None
    failure: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values, as JSON gives them back."""
        plain = asdict(self)
        if self.figures is not None:
            plain["figures"]["curve"] = [list(point) for point in self.figures.curve]
        return plain

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """What ``to_json`` gave."""
        figures = values["figures"]
        if figures is not None:
            figures = Figures(**figures | {"curve": tuple((tokens, bits) for tokens, bits in figures["curve"])})
        return cls(**dict(values) | {"figures": figures})


def run_trial(trial: Trial) -> Outcome:
    """Train where the run stands, and measure it. What a person would see goes into ``<directory>.log``.

    A run that could not be trained is an outcome as well. Raises KeyboardInterrupt where it was interrupted.
    """
    trial.directory.parent.mkdir(parents=True, exist_ok=True)
    with trial.directory.with_suffix(".log").open("a", encoding="utf-8") as log:
        view = Console(screen=rich.console.Console(file=log, highlight=False))
        try:
            result = pretrain(trial.config, run_dir=trial.directory, view=view)
        except TrainingError as cause:
            return _outcome(trial, None, str(cause))
    if result.status == "interrupted" or result.bits_per_byte is None:
        raise KeyboardInterrupt
    tokens_per_s = result.tokens / max(result.seconds_used, 1e-9)
    figures = measure(trial, result.checkpoint, bits_per_byte=result.bits_per_byte, tokens_per_s=tokens_per_s)
    return _outcome(trial, figures)


def _outcome(trial: Trial, figures: Figures | None, failure: str | None = None) -> Outcome:
    return Outcome(
        name=trial.name,
        variant=trial.variant,
        random_seed=trial.random_seed,
        fingerprint=trial.fingerprint,
        n_parameters=trial.n_parameters,
        hidden=trial.config.model.mlp_dim,
        figures=figures,
        failure=failure,
    )


def measure(trial: Trial, checkpoint: Path, *, bits_per_byte: float, tokens_per_s: float) -> Figures:
    """Recall, adaptation and the size of a session, of a checkpoint of this trial."""
    config = trial.config
    model, tokenizer = load(checkpoint)
    device = resolve(config.device, silent)
    model = model.to(device.device)
    corpus = prepare(config.data, config.tokenizer)
    accuracy, chance = _recall(model, trial, tokenizer.vocab_size, device)
    chosen = documents(corpus, "val", length=N_WINDOWS * config.data.seq_len, most=trial.n_documents)
    on, off = (_adaptation(reader, trial, chosen, device) for reader in (model, frozen(model)))
    records = [r for r in history(trial.directory) if r["split"] == "val" and r["task"] is None]
    return Figures(
        bits_per_byte=bits_per_byte,
        recall=accuracy,
        chance=chance,
        on=on.figures(),
        off=off.figures(),
        tokens_per_s=tokens_per_s,
        state_bytes=session_bytes(model, chosen, device, config.data.seq_len),
        curve=tuple((r["tokens"], r["metrics"]["bits_per_byte"]) for r in records),
    )


def _recall(model: nn.Module, trial: Trial, vocabulary: int, device: Device) -> tuple[float, float]:
    """Means over all tasks that fit: the share of right answers, and that of a guess."""
    tasks = suite(vocabulary, trial.config.data.seq_len)
    batch = trial.config.eval.batch_size
    found = [
        recall(model, task.questions(trial.n_recall, HELD_OUT), batch=batch, device=device, loss=cross_entropy)
        for task in tasks
    ]
    return sum(f.accuracy for f in found) / len(tasks), sum(task.chance for task in tasks) / len(tasks)


def _adaptation(reader: nn.Module, trial: Trial, chosen: Documents, device: Device) -> Adaptation:
    config = trial.config
    how = {"piece": config.data.seq_len, "batch": config.eval.batch_size}
    return adaptation(reader, chosen, device=device, loss=cross_entropy, **how)


@torch.no_grad()
def session_bytes(model: nn.Module, chosen: Documents, device: Device, piece: int) -> int:
    """What one reader carries after a document: all that must be kept of its session."""
    state = None
    for part_bt in chosen.tokens_bt[:1].split(piece, dim=1):
        (tokens_bt,) = device.move(part_bt)
        _, state = model(tokens_bt, state)
    return size_bytes(state or {})
