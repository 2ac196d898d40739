"""What is said about a run when it is over: samples, the report and how to go on."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import torch

from meristem.checkpoint.atomic import write_atomic
from meristem.data.corpus import Corpus
from meristem.device.random import stream
from meristem.errors import CapabilityError, MissingExtra
from meristem.evaluate.adaptation import longest, reading
from meristem.evaluate.baselines import HELD_OUT_BYTES, PRIMING_BYTES, Baseline, baselines
from meristem.evaluate.likelihood import Likelihood
from meristem.evaluate.picture import Point, draw_loss, draw_reading
from meristem.evaluate.report import Report, Sample
from meristem.events import Event
from meristem.models.generate import Sampling, generate
from meristem.models.online import Learn, online_reader
from meristem.runs.directory import Run
from meristem.runs.resume import Job
from meristem.sinks.records import history
from meristem.train.config import TrainConfig
from meristem.train.loss import cross_entropy

PROMPT_TOKENS = 64
PROMPT_CHARACTERS = 60

WAYS: Final[Mapping[Learn, str]] = {
    "none": "static",
    "memory": "with a memory that learns",
    "weights": "with weights that learn as well",
}
"""What learns while a text is read, and how that is called."""

READING_SHARE: Final = 100
LEAST_READ: Final = 1024
FIRST_READ: Final = 128
"""One token may be read for so many trained on; with fewer than so many nothing is; the first that are counted."""


def write_samples(run: Run, job: Job) -> tuple[Sample, ...]:
    """Let the model write on from beginnings of held-out text, as far as the policy of the run lets it.

    A beginning that is not allowed is left out; of a text that is not the rest is.
    """
    part, tokenizer = job.config.eval, job.corpus.tokenizer
    sampling = Sampling(temperature=part.temperature)
    samples = []
    for index, prompt in enumerate(prompts(job.corpus, part.n_samples)):
        asked = run.policy.check(prompt, "prompt", run.emit)
        if asked.blocked is not None:
            continue
        prompt = asked.text
        generator = stream(job.config.run.seed, "sample", index, device=job.device.device)
        (tokens_bt,) = job.device.move(torch.tensor([tokenizer.encode(prompt)]))
        drawn = generate(job.model, tokens_bt, max_tokens=part.sample_tokens, sampling=sampling, generator=generator)
        text = run.policy.check(tokenizer.decode(token.token_id for token in drawn), "output", run.emit).text
        run.records.sample(job.state.progress.step, prompt, text, {"temperature": part.temperature, "index": index})
        samples.append(Sample(prompt, text))
    return tuple(samples)


def prompts(corpus: Corpus, n_prompts: int) -> Iterator[str]:
    """First words of held-out documents spread over all of them; where there are too few, of places in the text."""
    tokens, edges = corpus.tokens("val"), corpus.documents("val")
    places = edges[:-1] if len(edges) > n_prompts else range(0, len(tokens), max(1, len(tokens) // max(1, n_prompts)))
    for index in range(n_prompts):
        start = int(places[index * len(places) // n_prompts])
        text = corpus.tokenizer.decode(tokens[start : start + PROMPT_TOKENS].tolist())
        yield _first_words(text) or "\n"


def _first_words(text: str) -> str:
    """The beginning of a text, cut before the last word or line that may be cut short; half characters are left out."""
    text = text.replace("\ufffd", "").lstrip()[:PROMPT_CHARACTERS]
    cut = max(text.rfind(" "), text.rfind("\n"))
    return text[:cut] if cut > 0 else text


def read_unseen(job: Job) -> dict[str, list[Point]]:
    """How well the longest held-out document is predicted while more and more learns, by how it is read.

    Bits per byte of its first 128, 256, 512, ... tokens. Nothing for a run so short that this would cost it more than
    one token in a hundred, and nothing of what the model does not have.
    """
    most = min(job.config.eval.reading_tokens, job.state.progress.tokens // READING_SHARE)
    if most < LEAST_READ:
        return {}
    document, piece, found = longest(job.corpus, "val", most), job.config.data.seq_len, {}
    for learn, name in WAYS.items():
        with suppress(CapabilityError):
            reader = online_reader(job.model, learn, cross_entropy, job.config.learn)
            read = reading(reader, document, piece=piece, device=job.device, loss=cross_entropy, first=FIRST_READ)
            found[name] = [(n_tokens, likelihood.bits_per_byte) for n_tokens, likelihood in read]
    if found[WAYS["none"]] == found[WAYS["memory"]]:
        del found[WAYS["memory"]]
    return found


def write_report(
    run: Run, job: Job, found: Likelihood, samples: tuple[Sample, ...], readings: Mapping[str, list[Point]]
) -> Path:
    """Write ``report.md`` and its pictures; without matplotlib the report goes without them, as an event."""
    records = history(run.directory)
    corpus = job.corpus
    # A token is at least one byte, so these are enough; the whole training text may be large.
    primer = corpus.tokenizer.decode_bytes(corpus.tokens("train")[-PRIMING_BYTES:].tolist())
    held_out = corpus.tokenizer.decode_bytes(corpus.tokens("val")[:HELD_OUT_BYTES].tolist())
    scale = baselines(primer, held_out)
    report = Report(
        title=f"Run {job.config.run.name}",
        summary=_summary(job, found),
        model_bits_per_byte=found.bits_per_byte,
        baselines=scale,
        facts=_facts(run, job, found),
        memory=_memory(records),
        readings=[(name, f"{points[-1][1]:.3f}") for name, points in readings.items()],
        samples=samples,
        settings=_settings(job),
        go_on=go_on(run, job.config.train),
        has_picture=_draw(run, records, scale, readings),
    )
    path = run.directory / "report.md"
    write_atomic(path, report.to_markdown().encode())
    return path


def go_on(run: Run, train: TrainConfig) -> list[tuple[str, str]]:
    """Commands that make sense now, and what they do."""
    place = run.directory
    lengths = [f"train.{name}={2 * value}" for name in ("steps", "tokens", "flops") if (value := getattr(train, name))]
    return [
        (f"meristem chat {place}", "talks with the model; its memory learns from what is said"),
        (f'meristem sample {place} --prompt "..."', "lets it write on from a text"),
        (f"meristem eval {place} --suite likelihood", "reads all of the held-out text"),
        (
            f"meristem train {place}/config.yaml {' '.join(lengths) or 'train.max_time=30m'} --run-dir {place}",
            "trains it for longer",
        ),
    ]


def _draw(
    run: Run, records: list[dict[str, Any]], scale: Sequence[Baseline], readings: Mapping[str, list[Point]]
) -> bool:
    try:
        draw_loss(
            run.directory / "loss.png",
            _curve(records, "train"),
            _curve(records, "val"),
            [(baseline.name, baseline.bits_per_byte) for baseline in scale],
        )
        if readings:
            draw_reading(run.directory / "reading.png", readings)
    except MissingExtra as error:
        run.emit(Event("degraded", {"what": "loss.png", "reason": str(error)}, "warning"))
        return False
    return True


def _curve(records: list[dict[str, Any]], split: str) -> list[Point]:
    """Bits per byte over tokens; what was not finite leaves a gap."""
    kept = (record for record in records if record["split"] == split and record["task"] is None)
    points = ((record["tokens"], record["metrics"]["bits_per_byte"]) for record in kept)
    return [(tokens, bits) for tokens, bits in points if bits is not None]


def _summary(job: Job, found: Likelihood) -> str:
    progress = job.state.progress
    n_parameters = sum(parameter.numel() for parameter in job.model.parameters())
    return (
        f"A model of {n_parameters:,} parameters read {progress.tokens:,} tokens of `{job.corpus.name}` in "
        f"{progress.seconds_used:.0f} seconds of training. It then needs **{found.bits_per_byte:.3f} bits per byte** "
        f"of text that it has not seen ({found.nats:.3f} nats per token, measured on {found.n_bytes:,} bytes)."
    )


def _facts(run: Run, job: Job, found: Likelihood) -> list[tuple[str, str]]:
    progress = job.state.progress
    n_bytes = {split: job.corpus.size_bytes(split) for split in ("train", "val")}
    return [
        ("run", str(run.manifest.content["id"])),
        ("text", f"{job.corpus.name}: {n_bytes['train']:,} bytes to train on, {n_bytes['val']:,} held out"),
        ("tokenizer", f"{job.corpus.tokenizer.kind}, {job.corpus.tokenizer.vocab_size} entries"),
        ("steps", f"{progress.step:,}, of which {progress.n_nonfinite} skipped as not finite"),
        ("times through the text", f"{job.stream.epoch(progress.cursor):.2f}"),
        *_sources(job),
        ("tokens per second", f"{progress.tokens / max(progress.seconds_used, 1e-9):,.0f}"),
        ("device", f"{job.device.device}, parameters {job.device.param_dtype}, products {job.device.dtype}"),
        ("perplexity", f"{found.perplexity:.2f} per token"),
    ]


def _sources(job: Job) -> list[tuple[str, str]]:
    """How much was read of each source of a mixture."""
    if not job.corpus.weights:
        return []
    read = job.stream.read(job.state.progress.cursor)
    n_all = max(1, sum(each.n_tokens for each in read))
    return [
        (
            f"read of `{each.name}`",
            f"{each.n_tokens:,} tokens, {each.n_tokens / n_all:.1%} of all, {each.epochs:.2f} times through",
        )
        for each in read
    ]


def _memory(records: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """The last figures of the memory that were recorded."""
    told = [record["metrics"] for record in records if "memory/norm" in record["metrics"]]
    figures = told[-1] if told else {}
    labels = {
        "memory/half_life_least": "shortest half-life of a head, tokens",
        "memory/half_life": "median half-life, tokens",
        "memory/half_life_most": "longest half-life, tokens",
        "memory/write": "mean write rate",
        "memory/momentum": "mean momentum",
        "memory/norm": "mean norm of a memory",
    }
    return [(label, f"{figures[name]:.4g}") for name, label in labels.items() if figures.get(name) is not None]


def _settings(job: Job) -> list[tuple[str, str]]:
    config = job.config
    keys = {key: getattr(config.model, key) for key in sorted(config.model.reads)}
    shown = {f"model.{key}": value for key, value in keys.items()} | {
        "memory.rule": config.memory.rule,
        "data.seq_len": config.data.seq_len,
        "data.batch_size": config.data.batch_size,
        "data.order": config.data.order,
        "optim.lr": config.optim.lr,
        "run.seed": config.run.seed,
    }
    return [(key, str(value)) for key, value in shown.items()]
