"""The main job: from a text to a model that was trained on it, evaluated, saved and described."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final, Literal, Protocol

from torch import nn

from meristem.checkpoint.store import Checkpoint
from meristem.config import fingerprint as config_fingerprint
from meristem.data.prefetch import prefetched
from meristem.data.prepare import prepare
from meristem.data.stream import Stream, held_out
from meristem.data.tokenizer import Tokenizer
from meristem.device.allocator import peak_bytes
from meristem.device.determinism import be_deterministic
from meristem.device.lost import answering
from meristem.device.resolve import NAMES, Device, resolve
from meristem.device.room import room_for
from meristem.distributed.config import require_alone
from meristem.distributed.world import joined, own_device
from meristem.errors import CorpusTooShort, OutOfDeviceBytes
from meristem.evaluate.adaptation import documents
from meristem.evaluate.learn_rate import LENGTH, find_learn_rates, n_documents
from meristem.evaluate.likelihood import Likelihood, likelihood
from meristem.evaluate.report import Sample
from meristem.events import Event
from meristem.models.load import topology_of
from meristem.models.topology import Topology
from meristem.models.validate import require_masks, require_resets
from meristem.models.weights import put_rates
from meristem.optim.schedule import rate_factor
from meristem.recipes.plan.flops import forward_flops
from meristem.recipes.plan.report import PlanReport
from meristem.runs.backend import Backend, choose_backend
from meristem.runs.config import Config
from meristem.runs.directory import Run, directory_for, opened
from meristem.runs.interrupt import interruptible
from meristem.runs.logging import Interval, Log
from meristem.runs.recovery import Recovery, recovering
from meristem.runs.report import go_on, read_unseen, write_report, write_samples
from meristem.runs.resume import (
    Contents,
    Job,
    Safety,
    after_restart,
    best_so_far,
    changed,
    checkpoint_to_resume,
    from_checkpoint,
    require_same,
    restore,
)
from meristem.runs.structure import fresh
from meristem.sinks.console import Console
from meristem.train.aggregate import keep_graphs
from meristem.train.loop import MOVING, Beside, Step, steps
from meristem.train.loss import cross_entropy
from meristem.train.profile import profiled
from meristem.train.progress import Progress
from meristem.train.state import TrainingState

PASSES: Final = 3
"""What a training step costs on a token, by a forward pass: the backward one costs twice as much."""


@dataclass(frozen=True)
class Result:
    """What a run came to. What is said of the held-out text, and the report, is None for an interrupted run."""

    status: Literal["finished", "interrupted"]
    run_dir: Path
    checkpoint: Path
    step: int
    tokens: int
    seconds_used: float
    flops: float
    nats: float | None = None
    bits_per_byte: float | None = None
    samples: tuple[Sample, ...] = ()
    report: Path | None = None

    @property
    def exit_code(self) -> int:
        """That of the process which made the run."""
        return 130 if self.status == "interrupted" else 0


def pretrain(
    config: Config,
    *,
    run_dir: Path | None = None,
    resume: str = "auto",
    view: Console | None = None,
    planned: PlanReport | None = None,
    make_job: Callable[[Run, Config, Checkpoint | None], Job] | None = None,
    time_scale: float = 1.0,
) -> Result:
    """Train a language model as ``config`` says.

    run_dir: where everything is written; by default a directory under ``run.dir`` (``directory_for``).
    resume: ``auto``, ``must``, ``never``, or a checkpoint to go on from (``checkpoint_to_resume``).
    planned: what the plan said; run.json keeps it beside what the run then took.
    make_job: in place of ``prepare_job``; a drill has one that breaks something of what that gives.
    time_scale: a factor on the deadlines of a rollback (``Recovery``).
    The first SIGINT or SIGTERM ends the run after the step in progress, with a checkpoint from which it can go on.
    """
    with begun(
        config,
        run_dir=run_dir,
        resume=resume,
        view=view,
        planned=planned,
        make_job=make_job or prepare_job,
        time_scale=time_scale,
    ) as (run, job, recovery):
        is_interrupted = train(run, job, recovery)
        return stop(run, job, recovery) if is_interrupted else finish(run, job, recovery)


@contextmanager
def begun(
    config: Config,
    *,
    run_dir: Path | None,
    resume: str,
    view: Console | None,
    planned: PlanReport | None,
    make_job: Callable[[Run, Config, Checkpoint | None], Job],
    time_scale: float,
) -> Iterator[tuple[Run, Job, Recovery]]:
    """A run in its directory, its job where it goes on, and what keeps it from being lost, while the block lasts.

    The arguments are those of ``pretrain``.
    """
    with joined(config.distributed, config.device) as world:
        place = str(run_dir or directory_for(config, resume, world.n_restarts))
        directory = Path(world.broadcast("run directory", place))
        resume = world.broadcast("resume", after_restart(resume, directory, world.n_restarts))
        with opened(config, directory, view or Console(), is_new=resume == "never", world=world) as run:
            checkpoint = checkpoint_to_resume(run, resume)
            job = make_job(run, config, checkpoint)
            safety = begin(run, job, resume, checkpoint)
            if planned and planned.training:
                predicted = {"peak_bytes": planned.needed_bytes, "flops_per_token": planned.training.flops_per_token}
                run.manifest.update(plan={"predicted": predicted, "measured": None})
            device = job.device.device
            with (
                answering(device),
                room_for("the run", device),
                job.backend.entered(),
                recovering(run, job, safety, time_scale) as recovery,
            ):
                yield run, job, recovery


def prepare_job(
    run: Run,
    config: Config,
    checkpoint: Checkpoint | None,
    change: Callable[[Config, int, Topology], Topology] = lambda config, vocabulary, topology: topology,
    *,
    tokenizer: Tokenizer | None = None,
    begins_from: Checkpoint | None = None,
) -> Job:
    """Text -> tokenizer -> corpus -> sequences -> stream; and the model with its optimizer, on the device.

    change: what is to be changed of the structure before the model is made: the settings, the size of the vocabulary,
    and the changes that it went through -> those that it has gone through then.
    tokenizer: in place of that of the settings. begins_from: whose weights a run begins with.
    """
    world = run.world
    require_alone(world.size, config.aggregate.how)
    if config.run.deterministic:
        be_deterministic()
    device = _device(run, config, checkpoint)
    run.view.start(f"preparing {config.data.source}")
    saved_cursor = checkpoint.value("cursor") if checkpoint and checkpoint.has("cursor") else {}
    wanted = saved_cursor.get("fingerprint")
    corpus = prepare(config.data, tokenizer or config.tokenizer, run.emit, partial(_show_preparing, run), wanted=wanted)
    run.view.stop()
    files = corpus.manifest["sources"]
    which = f" ({len(files):,} files, the first {files[0]['uri']})" if len(files) > 1 else ""
    run.view.note(f"text: {config.data.source}{which}")
    stream = Stream(
        corpus,
        "train",
        window=config.data.seq_len,
        stride=config.data.stride,
        batch=config.data.batch_size,
        order=config.data.order,
        documents=config.data.documents,
        random_seed=config.run.seed,
    ).share(world.rank, world.size)
    topology = topology_of(checkpoint) if checkpoint else ()
    if checkpoint:
        require_same(config, corpus.tokenizer, checkpoint)
    topology = change(config, corpus.tokenizer.vocab_size, topology)
    world.require_same({"settings": lambda: config_fingerprint(config), "text": lambda: corpus.fingerprint})
    state, weights = fresh(
        run,
        config,
        device,
        vocabulary=corpus.tokenizer.vocab_size,
        progress=Progress(cursor=stream.start()),
        topology=topology,
        checkpoint=checkpoint or begins_from,
    )
    world.require_same({"weights": lambda: weights})
    if config.data.resets:
        require_resets(state.model)
    if config.data.documents == "mask":
        require_masks(state.model)
    if config.aggregate.how != "mean":
        keep_graphs()
    return Job(config, device, corpus, stream, state, _backend(run, config, checkpoint, state.model))


def _device(run: Run, config: Config, checkpoint: Checkpoint | None) -> Device:
    """The device of this process; what ``auto`` measures, the first has measured for all."""
    world, part = run.world, from_checkpoint(own_device(run.world, config.device), checkpoint)
    if world.is_first:
        device = resolve(part, run.emit)
        world.broadcast("dtype", NAMES[device.dtype])
        return device
    return resolve(part.model_copy(update={"dtype": world.broadcast("dtype", "")}), run.emit)


def _backend(run: Run, config: Config, checkpoint: Checkpoint | None, model: nn.Module) -> Backend:
    """What the memories are computed by in every process; the first has measured for all. The event says which."""
    if run.world.is_first:
        chosen = choose_backend(model, config, next(model.parameters()).device, checkpoint)
        run.emit(Event("memory.backend", chosen.to_json()))
        run.world.broadcast("memory", json.dumps(chosen.to_json()))
        return chosen
    return Backend(**json.loads(run.world.broadcast("memory", "")))


def _show_preparing(run: Run, done_bytes: int, total_bytes: int | None) -> None:
    share = done_bytes / total_bytes if total_bytes else None
    run.view.update({"": f"{done_bytes / 1e6:.1f} MB"}, progress=share)


def begin(run: Run, job: Job, resume: str, checkpoint: Checkpoint | None) -> Safety:
    """Put the job where it goes on; an event says where, and readers then know which records were abandoned."""
    corpus, config, safety = job.corpus, job.config, Safety()
    if checkpoint:
        saved = Contents.of(checkpoint).of_process(run.world, config.data.batch_size)
        with room_for("what was saved", job.device.device):
            safety = restore(job, saved, run.emit)
    start = job.state.progress
    run.adopt(config)
    run.manifest.update(dataset_fingerprint=corpus.fingerprint, tokenizer_fingerprint=corpus.tokenizer.fingerprint)
    n_parameters = sum(parameter.numel() for parameter in job.model.parameters())
    if not run.is_first:
        name = str(checkpoint.path) if checkpoint else None
        payload = {"resume": resume, "resumed_from": start.step, "checkpoint": name, "n_parameters": n_parameters}
        payload["seq"] = checkpoint.manifest.get("seq", 0) if checkpoint else 0  # of the last record that it follows
        run.emit(Event("run.resumed", payload | {"changed": changed(config, checkpoint) if checkpoint else {}}))
    else:
        run.emit(Event("run.started", {"resume": resume, "from": start.step, "n_parameters": n_parameters}))
    begun = f"from the weights of {config.finetune.base}" if config.finetune.base else "from the beginning"
    where = f"from step {start.step}" if start.step else begun
    run.view.note(f"{config.run.name}: {n_parameters:,} parameters, {where}, in {run.directory}")
    return safety


class Companion(Protocol):
    """What goes along with a training: a recipe that does more between two steps than this one.

    beside: called in every step, between its gradients and its move; None for nothing. flops_per_token: of the model as
    it is, forward; None of a model that stays as it was.
    """

    @property
    def beside(self) -> Beside | None: ...

    @property
    def flops_per_token(self) -> float | None: ...

    def before(self) -> None:
        """Called before each step: what trains may be replaced by assignment to ``job.state``."""

    def after(self, step: Step) -> None:
        """Called after each sound step, before a state of the run is kept."""

    def evaluated(self, found: Likelihood) -> None:
        """Called after each evaluation, before a checkpoint is saved."""


class Nobody:
    """A companion that does nothing."""

    beside = None
    flops_per_token = None

    def before(self) -> None:
        pass

    def after(self, step: Step) -> None:
        pass

    def evaluated(self, found: Likelihood) -> None:
        pass


ALONE: Final = Nobody()


def train(run: Run, job: Job, recovery: Recovery, companion: Companion = ALONE) -> bool:
    """Step until a limit is reached, rolling back where the run is not sound. Whether it was interrupted before."""
    config, used_s = job.config, job.state.progress.seconds_used
    log = Log(run, job)
    evaluation = Interval(config.eval.every, config.eval.every_s, used_s)
    saving = Interval(config.checkpoint.every, config.checkpoint.every_s, used_s)
    run.view.start(config.run.name)
    traces = profiled(config.profile, run.directory / "profile", job.device.device, run.emit)
    with interruptible() as is_asked, traces as trace:

        def is_asked_to_stop() -> bool:
            return run.world.any(is_asked())

        is_interrupted = is_asked_to_stop()
        while not job.state.progress.is_over(config.train) and not is_interrupted:
            trouble: RollbackReason | None = None
            for trouble in train_until_trouble(job, recovery, log, companion):
                for path in trace(job.state.progress.step):
                    run.view.note(f"profile: {path}")
                if trouble is None:
                    evaluate_and_save(run, job, recovery, log, companion, evaluation=evaluation, saving=saving)
                is_interrupted = is_asked_to_stop()
                if is_interrupted:
                    break
            if trouble:
                recovery.roll_back(reason=trouble.reason, n_micro_batches=trouble.n_micro_batches)
                log.rolled_back()
        is_interrupted = is_asked_to_stop()
    run.view.stop()
    return is_interrupted


@dataclass(frozen=True)
class RollbackReason:
    """Why a run has to roll back. n_micro_batches: how many a batch is cut into then, if that is the remedy."""

    reason: str
    n_micro_batches: int | None = None


def train_until_trouble(
    job: Job, recovery: Recovery, log: Log, companion: Companion
) -> Iterator[RollbackReason | None]:
    """Steps, each checked: what is wrong after it, which ends them, or None; all are sound where a limit is reached."""
    try:
        for step in training_steps(job, companion):
            log.take(step)
            reason = recovery.check(step)
            if reason is None:
                companion.after(step)
                recovery.keep(step)
            yield RollbackReason(reason) if reason else None
            if reason:
                return
    except OutOfDeviceBytes as error:
        if error.fields.get("where") != MOVING:
            raise
        yield RollbackReason(str(error), n_micro_batches=2 * job.state.progress.n_micro_batches)


def training_steps(job: Job, companion: Companion = ALONE) -> Iterator[Step]:
    """The steps of a job from where it stands."""
    config, own = job.config, None
    schedule = partial(rate_factor, config.schedule)

    def flops(state: TrainingState) -> float:
        nonlocal own
        found = companion.flops_per_token
        if found is None:
            found = own = own or forward_flops(state.model, job.device, config.data.seq_len)
        return PASSES * found

    with prefetched(job.stream, config.data.prefetch_bytes) as batches:
        made = steps(
            job,
            batches,
            schedule,
            config=config.train,
            device=job.device,
            aggregate=config.aggregate,
            beside=companion.beside,
            flops=None if config.train.flops is None else flops,
        )
        if not job.state.progress.is_over(config.train):
            companion.before()
        for step in made:  # to its end: what the last step failed by is raised there
            yield step
            if not job.state.progress.is_over(config.train):
                companion.before()


def evaluate_and_save(
    run: Run,
    job: Job,
    recovery: Recovery,
    log: Log,
    companion: Companion,
    *,
    evaluation: Interval,
    saving: Interval,
) -> None:
    """Evaluate and save after a sound step, where either is due."""
    metrics: dict[str, float] = {}
    progress = job.state.progress
    if evaluation.is_due(progress) and not run.world.broadcast_number(recovery.should_skip_eval()):
        found = measure(run, job, job.config.eval.n_windows)
        recovery.evaluated(progress.step, found.nats)
        companion.evaluated(found)
        metrics, log.held_out = ranked(found), found.bits_per_byte
    if is_best(run, job.config, recovery, metrics):
        recovery.save(reason="best", metrics=metrics)
    elif saving.is_due(progress):
        recovery.save(reason="interval", metrics=metrics)


def measure(run: Run, job: Job, n_windows: int, task: str | None = None) -> Likelihood:
    """Read held-out text and record how well it was predicted."""
    progress = job.state.progress
    with room_for("an evaluation", job.device.device), job.engine.whole():
        batches = held_out(
            job.corpus,
            "val",
            window=job.config.data.seq_len,
            batch=job.config.eval.batch_size,
            max_windows=n_windows,
        )
        found = likelihood(job.model, batches, device=job.device, loss=cross_entropy)
    # All read the same, and may sum it in another order; what is made of it has to be the same.
    found = replace(found, total_nats=run.world.broadcast_number(found.total_nats))
    figures = {"nats": found.nats, "bits_per_byte": found.bits_per_byte}
    if job.config.train.flops is not None:
        figures["flops"] = progress.flops
    run.records.metrics(progress.step, progress.tokens, job.stream.epoch(progress.cursor), "val", figures, task)
    payload = figures | {"task": task, "n_tokens": found.n_tokens, "n_bytes": found.n_bytes}
    run.emit(Event("evaluation.done", payload))
    return found


def put_learn_rates(run: Run, job: Job) -> None:
    """Find how fast the weights of the model learn best while they read; after a short training not looked for."""
    n, learning = n_documents(job.state.progress.tokens), job.config.learn
    try:
        chosen = documents(job.corpus, "val", length=LENGTH, most=n) if n else None
    except CorpusTooShort:
        return
    if chosen is None or run.world.size > 1:
        return
    with room_for("the search of a learning rate", job.device.device), job.engine.whole():
        rates = find_learn_rates(
            job.model, chosen, learning, piece=job.config.data.seq_len, device=job.device, loss=cross_entropy
        )
    put_rates(job.model, rates)
    run.emit(Event("learn_rates.found", {"rates": rates, "n_documents": len(chosen.tokens_bt)}))


def ranked(found: Likelihood) -> dict[str, float]:
    """An evaluation by the names under which checkpoints are ranked."""
    return {"val/nats": found.nats, "val/bits_per_byte": found.bits_per_byte}


def is_best(run: Run, config: Config, recovery: Recovery, metrics: dict[str, float]) -> bool:
    """Whether something was measured, and nothing that is saved is better."""
    value = metrics.get(config.checkpoint.metric)
    if value is None:
        return False
    recovery.wait()
    best = best_so_far(run, config)
    is_better = best is None or (value < best.value if config.checkpoint.direction == "min" else value > best.value)
    # Only the first knows what is on the disk by now.
    return bool(run.world.broadcast_number(is_better))


def stop(run: Run, job: Job, recovery: Recovery) -> Result:
    """Leave an interrupted run so that it can go on."""
    path = recovery.save(reason="signal", metrics={})
    recovery.wait()
    run.end("interrupted", 130)
    progress = job.state.progress
    run.view.note(f"Interrupted at step {progress.step}. The same command goes on from there.")
    return _ended("interrupted", run, path, progress)


def finish(run: Run, job: Job, recovery: Recovery) -> Result:
    """Use up what waits, save, read more of the held-out text than before, let the model write, and report."""
    with room_for("the gradients that wait", job.device.device):
        job.optimizer.flush()
    part, progress = job.config.eval, job.state.progress
    metrics = ranked(measure(run, job, part.n_windows))
    if part.learn_rate:
        put_learn_rates(run, job)
    path = recovery.save(reason="final", metrics=metrics)
    found = measure(run, job, part.n_windows_end, task="end")
    with room_for("samples", job.device.device), job.engine.whole():
        samples = write_samples(run, job) if run.world.is_first else ()
        readings = read_unseen(job) if run.world.size == 1 else {}
    recovery.wait()
    if not run.world.is_first:
        run.end("finished", 0)
        return _ended("finished", run, path, progress)
    report = write_report(run, job, found, samples, readings)
    measured = {
        "peak_bytes": peak_bytes(job.device.device),
        "tokens_per_s": progress.tokens / max(progress.seconds_used, 1e-9),
    }
    run.manifest.update(plan=run.manifest.content["plan"] | {"measured": measured})
    run.end("finished", 0)
    for sample in samples:
        run.view.note(f"\n--- {sample.prompt!r} ---\n{sample.prompt}{sample.text}")
    if readings:
        n_tokens = next(iter(readings.values()))[-1][0]
        run.view.note(f"\nA text that it never saw, {n_tokens:,} tokens, in bits per byte:")
        for name, points in readings.items():
            run.view.note(f"  {points[-1][1]:.3f} {name}")
    run.view.note(f"\n{found.bits_per_byte:.3f} bits per byte on held-out text; the report is {report}")
    for command, purpose in go_on(run, job.config.train):
        run.view.note(f"  {command}   {purpose}")
    return replace(
        _ended("finished", run, path, progress),
        nats=found.nats,
        bits_per_byte=found.bits_per_byte,
        samples=samples,
        report=report,
    )


def _ended(status: Literal["finished", "interrupted"], run: Run, checkpoint: Path, at: Progress) -> Result:
    return Result(status, run.directory, checkpoint, at.step, at.tokens, at.seconds_used, at.flops)
