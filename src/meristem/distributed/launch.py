"""A command started in several processes of this machine by torch's own agent, and again where one of them is lost."""

import contextlib
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from meristem.device.limits import n_cpus
from meristem.distributed.config import DistributedConfig
from meristem.errors import AgreementFailed

INTERRUPTED: Final = 130

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""What the agent takes over, and hands on to the processes."""


GRACE_S: Final = 60
"""What a process has to end its step and to save, after a signal or the loss of another one, before it is killed."""


def launch(
    command: Callable[[int], Sequence[str]],
    n_processes: int,
    config: DistributedConfig,
    *,
    on_restart: Callable[[str], None],
    on_output: Callable[[str], None] | None = None,
) -> int:
    """The exit code of what was run in so many processes; a signal to this one reaches all of them, once.

    command: words after the interpreter, given how often all were started again. Only the first process writes to
        stdout.
    on_output: given what that one wrote to stdout when all have ended for good; None lets it write there by itself.
    on_restart: given why all are started again, as they are where one was killed or left the others without an answer:
        what failed for a reason of its own, as wrong settings, would fail again. torchrun by itself starts all again.
    Raises AgreementFailed where ``distributed.max_restarts`` are used up.
    """
    for n_restarts in range(config.max_restarts + 1):
        code, lost = _once(command(n_restarts), n_processes, on_output)
        if lost is None:
            return code
        if n_restarts < config.max_restarts:
            on_restart(f"{lost}. All start again from the last checkpoint ({n_restarts + 1} of {config.max_restarts})")
    raise AgreementFailed(
        f"{lost}, and all {n_processes} were started again {config.max_restarts} times (distributed.max_restarts). Its "
        f"own output, or the system's log, says why it ends. The same command goes on from the last checkpoint.",
        n_restarts=config.max_restarts,
    )


def _once(words: Sequence[str], n_processes: int, on_output: Callable[[str], None] | None) -> tuple[int, str | None]:
    """The exit code of all; and which process was lost, if that is why they ended."""
    first = 0 if on_output else 1
    with _signals_restored(n_processes), tempfile.TemporaryDirectory(prefix="meristem-") as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=n_processes,
            run_id="meristem",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=logs, redirects=dict.fromkeys(range(first, n_processes), Std.OUT)),
            shutdown_timeout=GRACE_S,
        )
        code, lost = 0, None
        try:
            elastic_launch(config, sys.executable)(*words)
        except SignalException:
            code = INTERRUPTED
        except ChildFailedError as error:
            code, lost = _ended(error.failures)
        if on_output and lost is None:
            for log in Path(logs).glob("**/0/stdout.log"):
                on_output(log.read_text())
    return code, lost


def _ended(failures: dict[int, ProcessFailure]) -> tuple[int, str | None]:
    """What came of processes of which at least one failed: the exit code, or who was lost.

    The agent ends the others by SIGTERM, and lists them too; who only missed the others did not fail by itself either.
    """
    codes = {rank: each.exitcode for rank, each in failures.items() if each.exitcode != -signal.SIGTERM}
    killed = [(rank, -code) for rank, code in codes.items() if code < 0]
    if killed:
        rank, number = killed[0]
        return 0, f"process {rank} was ended by {signal.Signals(number).name}"
    left = [rank for rank, each in failures.items() if _message(each) == AgreementFailed.__name__]
    own = [code for rank, code in codes.items() if rank not in left and code != INTERRUPTED]
    if own:
        return own[0], None
    return (0, f"process {left[0]} was left without an answer") if left else (INTERRUPTED, None)


def _message(failure: ProcessFailure) -> str:
    """What the process recorded of its error (``world.recorded_errors``): the name of its type, then its text."""
    error = failure.error_file_data.get("message", "") if isinstance(failure.error_file_data, dict) else ""
    return str(error.get("message", "") if isinstance(error, dict) else error).split(":")[0]


@contextlib.contextmanager
def _signals_restored(n_processes: int) -> Iterator[None]:
    """The cores shared out among the processes, unless somebody did; and signals go where they went, afterwards."""
    # It warns of every signal that is handed on.
    logger = logging.getLogger("torch.distributed.elastic")
    level = logger.level
    logger.setLevel(logging.ERROR)
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    given = os.environ.get("OMP_NUM_THREADS")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, n_cpus() // n_processes)))
    try:
        yield
    finally:
        logger.setLevel(level)
        if given is None:
            del os.environ["OMP_NUM_THREADS"]
        for number, handler in before.items():
            # One that was not set from Python cannot be set again from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
