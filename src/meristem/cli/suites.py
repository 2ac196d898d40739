"""The suites of `meristem eval`: likelihood of held-out text, recall, what is gained by reading, what is remembered."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from meristem.cli.answer import progress_bytes, tell
from meristem.errors import CapabilityError

if TYPE_CHECKING:
    from torch import nn

    from meristem.data.corpus import Corpus
    from meristem.data.tokenizer import Tokenizer
    from meristem.device.resolve import Device
    from meristem.runs.config import Config

VERSION: Final = "1"
"""Of the metrics: another number means that older figures do not compare."""

N_WINDOWS: Final = 128
"""Of each task of recall, unless given."""

SMALLER_IS_BETTER: Final = ("nats", "perplexity", "bits_per_byte")
"""How the names of metrics end of which less is better; of a gain, as of an accuracy, more is."""

Learn = Literal["none", "memory", "levels", "weights"]


@dataclass(frozen=True)
class Loaded:
    """What is measured, and on what, and where it is drawn.

    is_its_own: on the text that it was trained beside, or on another.
    """

    model: "nn.Module"
    tokenizer: "Tokenizer"
    config: "Config"
    device: "Device"
    is_its_own: bool
    picture: Path | None

    def corpus(self) -> "Corpus":
        """The text; its own has been prepared already, another is cut by the checkpoint's tokenizer."""
        from meristem.data.prepare import prepare

        data, tokenizer = self.config.data, self.tokenizer
        with progress_bytes("preparing") as progress:
            corpus = prepare(data, self.config.tokenizer if self.is_its_own else tokenizer, tell, progress)
            if corpus.tokenizer.fingerprint != tokenizer.fingerprint:
                corpus = prepare(data, tokenizer, tell, progress)
        return corpus

    def reading(self, learn: Learn, batch: int) -> dict[str, Any]:
        """How it is read: who reads, how many texts at once, on which device, and what counts."""
        from meristem.models.online import online_reader
        from meristem.train.loss import cross_entropy

        learning = self.config.learn
        reader = online_reader(self.model, learn, cross_entropy, learning)
        # Levels learn from one text, in a copy of their own, and so do most weights.
        is_alone = learn == "levels" or (learn == "weights" and learning.which in ("mlp", "all"))
        return {
            "reader": reader,
            "batch": 1 if is_alone else batch,
            "device": self.device,
            "loss": cross_entropy,
        }


def _likelihood(loaded: Loaded, learn: Learn | None, max_windows: int | None) -> list[dict[str, Any]]:
    """Every sequence from a fresh memory, and whole documents through which it is carried."""
    from meristem.data.stream import held_out, held_out_documents
    from meristem.evaluate.likelihood import likelihood

    how = loaded.reading(learn or "memory", loaded.config.eval.batch_size)
    corpus, reader, tasks = loaded.corpus(), how.pop("reader"), []
    cut = {"window": loaded.config.data.seq_len, "batch": how.pop("batch"), "max_windows": max_windows}
    for name, batches in (("likelihood", held_out), ("likelihood/documents", held_out_documents)):
        measured = likelihood(reader, batches(corpus, "val", **cut), **how)
        figures = {metric: getattr(measured, metric) for metric in ("nats", "perplexity", "bits_per_byte")}
        tasks.append(_task(name, corpus.fingerprint, measured.n_tokens, figures))
    return tasks


def _recall(loaded: Loaded, learn: Learn | None, n_windows: int | None) -> list[dict[str, Any]]:
    """Every task of recall that fits, its ids drawn from the vocabulary of the checkpoint."""
    from meristem.evaluate.recall import HELD_OUT, recall, suite

    how = loaded.reading(learn or "memory", loaded.config.eval.batch_size)
    reader, tasks = how.pop("reader"), []
    for task in suite(loaded.tokenizer.vocab_size, loaded.config.data.seq_len):
        questions = task.questions(n_windows or N_WINDOWS, HELD_OUT)
        measured = recall(reader, questions, **how)
        figures = {"accuracy": measured.accuracy, "nats": measured.nats}
        tasks.append(_task(task.name, questions.fingerprint, measured.n, figures))
    return tasks


def _adaptation(loaded: Loaded, learn: Learn | None, n_documents: int | None) -> list[dict[str, Any]]:
    """A task for every way to read, and for every point of the longest document; all read the same."""
    from meristem.evaluate.adaptation import N_DOCUMENTS, adaptation, documents, longest, reading
    from meristem.evaluate.adaptation import N_WINDOWS as WINDOWS
    from meristem.evaluate.picture import Point, draw_reading

    config = loaded.config
    length = WINDOWS * config.data.seq_len
    both: tuple[Learn, ...] = ("none", "memory")
    ways = both if learn is None else (*both, learn) if learn == "weights" else (learn,)
    readings = {way: loaded.reading(way, config.eval.batch_size) for way in ways}
    corpus = loaded.corpus()
    chosen, whole = documents(corpus, "val", length=length, most=n_documents or N_DOCUMENTS), longest(corpus, "val")
    tasks, points = [], []
    curves: dict[str, list[Point]] = {}
    for way, how in readings.items():
        reader, batch = how.pop("reader"), how.pop("batch")
        measured = adaptation(reader, chosen, piece=config.data.seq_len, batch=batch, **how)
        tasks.append(_task(f"adaptation/{way}", chosen.fingerprint, measured.whole.n_tokens, measured.figures()))
        read = reading(reader, whole, piece=config.data.seq_len, **how)
        for n, found in read:
            figures = {"bits_per_byte": found.bits_per_byte}
            points.append(_task(f"reading/{way}/{n}", whole.fingerprint, found.n_tokens, figures))
        curves[way] = [(n, found.bits_per_byte) for n, found in read]
    if loaded.picture is not None:
        draw_reading(loaded.picture, curves)
    return tasks + points


def _remember(loaded: Loaded, learn: Learn | None, n_texts: int | None) -> list[dict[str, Any]]:
    """A task for every way to remember and every distance; all read the same."""
    from meristem.evaluate import remember as suite
    from meristem.evaluate.picture import Share, draw_remembered

    data, model = loaded.config.data, loaded.config.model
    span = (model.sliding_window if "sliding_window" in model.reads else None) or data.seq_len
    how_many = span, n_texts or suite.N_TEXTS, data.validation
    texts = {"remember": suite.tell_facts(loaded.tokenizer, *how_many)}
    in_known_words = {"remember-known": suite.tell_facts(loaded.tokenizer, *how_many, is_new=False)}
    chosen = suite.held_out_documents(data.notebook, data.validation, n_texts or suite.N_DOCUMENTS)
    tasks: list[dict[str, Any]] = []
    told: dict[str, list[Share]] = {}
    returned: dict[str, list[Share]] = {}
    for name, mode in suite.MODES.items():
        if learn not in (None, mode.learn):
            continue
        try:
            how = loaded.reading(mode.learn, loaded.config.eval.batch_size) | {"piece": max(data.seq_len, suite.PIECE)}
        except CapabilityError:
            # A model without weights that learn while it reads has one way less, unless that is the one given.
            if learn is not None:
                raise
            continue
        reader, batch = how.pop("reader"), how.pop("batch")
        how.pop("loss")
        # Weights that learn read many times as long, and are shown in new words alone.
        for task, facts in (texts if name == "weights" else texts | in_known_words).items():
            found = suite.remember(reader, facts, is_reset=mode.is_reset, batch=batch, **how)
            label = name if task in texts else f"{name}, known words"
            for times, measured in zip(suite.SPANS, found, strict=True):
                figures = measured.figures()
                told.setdefault(label, []).append((span * times, *_interval(figures, "choice")))
                tasks.append(_task(f"{task}/{name}/{times}", facts.fingerprint, measured.n, figures))
        if mode.is_reset:
            continue
        fingerprint = suite.fingerprint(chosen)
        for distance, (n, n_right) in suite.mentions(reader, chosen, loaded.tokenizer, **how).items():
            figures = suite.share("greedy", n_right, n)
            returned.setdefault(name, []).append((distance, *_interval(figures, "greedy")))
            tasks.append(_task(f"mentions/{name}/{distance}", fingerprint, n, figures))
    if loaded.picture is not None:
        draw_remembered(loaded.picture, told, returned, chance=1 / suite.N_FACTS)
    return tasks


def _interval(figures: Mapping[str, float], name: str) -> tuple[float, float, float]:
    return figures[name], figures[f"{name}_low"], figures[f"{name}_high"]


def _task(name: str, dataset_fingerprint: str, n: int, figures: dict[str, float]) -> dict[str, Any]:
    """What one task came to; ``n`` tokens were predicted."""
    metrics = {
        metric: {"value": value, "version": VERSION, "direction": _direction(metric)}
        for metric, value in figures.items()
    }
    return {"name": name, "dataset_fingerprint": dataset_fingerprint, "n": n, "metrics": metrics}


def _direction(metric: str) -> str:
    is_cost = metric.endswith(SMALLER_IS_BETTER) and not metric.startswith("gain")
    return "min" if is_cost else "max"


SUITES: Final[Mapping[str, Callable[[Loaded, Learn | None, int | None], list[dict[str, Any]]]]] = {
    "likelihood": _likelihood,
    "recall": _recall,
    "adaptation": _adaptation,
    "remember": _remember,
}
"""By name; each gives its tasks, from what is measured, what learns, and how much of it."""
