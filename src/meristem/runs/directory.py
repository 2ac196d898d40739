"""A run directory while it is written: who holds it, what is recorded in it, and what the user sees."""

import contextlib
import secrets
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import FrameType

import rich.console

from meristem.checkpoint import migrate
from meristem.checkpoint import run as runs
from meristem.checkpoint.atomic import write_atomic
from meristem.checkpoint.run import End, RunLock, RunManifest
from meristem.config import fingerprint, identity, leaves
from meristem.device.describe import describe
from meristem.device.resolve import own_gpu
from meristem.distributed.world import World
from meristem.errors import ConfigError, MeristemError, RunError, exit_code
from meristem.events import Emit, Event
from meristem.runs.config import Config, config_of
from meristem.safety.policy import BYPASSED, NO_POLICY, Policy, load_policy
from meristem.safety.secrets import redact_secrets
from meristem.sinks.console import Console
from meristem.sinks.emitter import SCREEN, Emitter, Sink
from meristem.sinks.records import STREAMS, Records
from meristem.sinks.system import SystemSampler
from meristem.sinks.trackers.follow import Followed, Follower
from meristem.sinks.trackers.start import followers, require

RANKS = "ranks"
"""Where in a run directory the processes but the first have theirs, each under its number."""

LATEST = "latest"
"""A link beside the runs of ``run.dir`` to the one begun or continued last."""


@dataclass(frozen=True)
class Run:
    """The directory and everything that writes into it.

    is_first: nothing was run in it before. world: the processes that make the run; each has a directory of its own,
        that of the first is the run's, and it alone writes ``checkpoints``. policy: of the texts that it writes down.
    """

    directory: Path
    is_first: bool
    manifest: RunManifest
    emitter: Emitter
    view: Console
    world: World
    checkpoints: Path
    policy: Policy = NO_POLICY

    @property
    def records(self) -> Records:
        """What is written down of the run."""
        return self.emitter.records

    def emit(self, event: Event) -> None:
        """Record an event at the step that was last recorded; the user sees those that are no mere information.

        ``run.json`` says of a run that anything was bypassed in it.
        """
        if event.name == BYPASSED:
            self.manifest.update(bypass=True)
        self.emitter.emit(event)

    def adopt(self, config: Config) -> None:
        """From now on this is the configuration of the run."""
        write_atomic(self.directory / "config.yaml", migrate.settings_text(config).encode())
        self.manifest.update(config_sha256=fingerprint(config), random_seed=config.run.seed)

    def end(self, status: End, exit_code: int) -> None:
        """Say how the run ended, in its manifest and its records."""
        self.emit(Event("run.ended", {"status": status, "exit": exit_code}))
        self.manifest.end(status, exit_code)


def directory_for(config: Config, resume: str, n_restarts: int = 0) -> Path:
    """The directory of a run that was given none: the unfinished one that trains the same, else a new one.

    It trains the same where ``config.identity`` is the same, with today's default for a key that there was not yet.
    n_restarts: how often its processes were started again; then it is that which they had.
    They are called ``name``, ``name-2``, ``name-3`` under ``run.dir``.
    """
    number = 1
    while True:
        directory = config.run.dir / (config.run.name if number == 1 else f"{config.run.name}-{number}")
        goes_on = resume in ("auto", "must") or n_restarts > 0
        if not directory.exists() or (goes_on and _is_unfinished(directory, config)):
            return directory
        number += 1


def _is_unfinished(directory: Path, config: Config) -> bool:
    if not (directory / runs.FILE).exists():
        return False
    if runs.read(directory)["status"] == "finished":
        return False
    try:
        return identity(config_of(directory)) == identity(config)
    except ConfigError:
        # Settings that are none of today's are not these.
        return False


@contextlib.contextmanager
def opened(
    config: Config,
    directory: Path,
    view: Console,
    *,
    is_new: bool,
    sinks: Mapping[str, Sink] | None = None,
    world: World | None = None,
) -> Iterator[Run]:
    """Hold a run directory while the block runs; however the block ends, the directory says how.

    is_new: refuse a directory that holds a run already.
    sinks: by name, what is shown every record besides the files and ``view``. They are closed at the end.
    world: the processes of the run; any but the first hold a directory within that of the run, and show nothing.
    """
    world, checkpoints = world or World(), directory / "checkpoints"
    require(config.sinks.use, config.sinks.places)
    said: list[Event] = []
    path, bypass = config.safety.policy, config.safety.bypass
    policy = NO_POLICY if path is None else load_policy(path, bypass, said.append)
    rank = None if world.size == 1 else world.rank
    if rank:
        directory, view = directory / RANKS / str(rank), Console(screen=rich.console.Console(quiet=True))
        is_new = False
    was_there = directory.exists()
    with RunLock(directory), _unwound_by_sigterm():
        described = describe()
        is_first = is_new or not (directory / runs.FILE).exists()
        manifest = RunManifest.create(directory, name=config.run.name) if is_first else RunManifest.reopen(directory)
        command = redact_secrets(" ".join(sys.argv))
        manifest.update(command=command, policy_fingerprint=policy.fingerprint)
        manifest.update(record_streams=[f"{name}.ndjson" for name in STREAMS], **described)
        rotate_size_bytes = config.sinks.rotate_mib << 20
        records = Records(
            directory, manifest.content["id"], rotate_size_bytes=rotate_size_bytes, rank=rank, redact=redact_secrets
        )
        missing: list[Event] = []
        if not rank:
            with _undone(directory, records, is_all=not was_there) if is_first else contextlib.nullcontext():
                sinks = {**(sinks or {}), **_trackers(config, directory, manifest, missing.append)}
        emitter = Emitter(records, sinks, screen=view.show)
        for event in missing:
            emitter.emit(event)
        run = Run(directory, is_first, manifest, emitter, view, world, checkpoints, policy)
        for event in said:
            run.emit(event)
        view.through(partial(run.emitter.later, SCREEN), run.emit)
        try:
            if is_first:
                run.adopt(config)
            _link_latest(config, directory)
            gpu = own_gpu(config.device, world.local_rank)
            sampler = SystemSampler(records, config.sinks.system_every_s, emit=run.emit, gpu=gpu)
            with manifest.beating(run.emit), sampler:
                yield run
        except BaseException as error:
            # The last words may fail for the very reason that ended the run, as a full disk.
            with contextlib.suppress(RunError):
                _say_why(run, error)
            raise
        finally:
            _close(run)


@contextlib.contextmanager
def _undone(directory: Path, records: Records, *, is_all: bool) -> Iterator[None]:
    """Leave nothing of a run that fails in the block, before its first step: no directory, or only what was there."""
    try:
        yield
    except MeristemError:
        records.close()
        if is_all:
            shutil.rmtree(directory, ignore_errors=True)
        for name in (runs.FILE, *(f"{stream}.ndjson" for stream in STREAMS)):
            (directory / name).unlink(missing_ok=True)
        raise


def _trackers(config: Config, directory: Path, manifest: RunManifest, emit: Emit) -> dict[str, Follower]:
    settings = leaves(config.model_dump(mode="json"))
    run = Followed(directory, manifest.content["id"], directory.name, config.sinks.project, None, settings)
    return followers(config.sinks.use, run, config.sinks.places, emit)


def _close(run: Run) -> None:
    """End what listens to the run, within its time, then the records; the manifest keeps what became of the sinks."""
    run.view.stop()
    # As with the last words: what a full disk does not take may not hide why the run ended.
    with contextlib.suppress(RunError):
        told = {each.name: each for each in run.emitter.close()}
        if told[SCREEN].status == "hung":
            run.view.lose("it takes no more text")
        run.manifest.update(sinks=[asdict(end) for end in told.values()])
    run.view.through()
    run.records.close()


@contextlib.contextmanager
def _unwound_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does, where it would end the process with everything open; a second one does.

    Only in the main thread, and where nobody else takes the signal.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def unwind(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _say_why(run: Run, error: BaseException) -> None:
    if isinstance(error, KeyboardInterrupt):
        run.end("interrupted", 130)
        return
    run.emit(Event("exception", {"type": type(error).__name__, "message": str(error)}, "error"))
    run.end("failed", exit_code(error))


def _link_latest(config: Config, directory: Path) -> None:
    """Point ``latest`` at this run; file systems without links go without it."""
    if directory.parent != config.run.dir:
        return
    new = config.run.dir / f".{LATEST}.{secrets.token_hex(4)}"
    with contextlib.suppress(OSError):
        new.symlink_to(directory.name)
        try:
            new.replace(config.run.dir / LATEST)
        finally:
            new.unlink(missing_ok=True)
