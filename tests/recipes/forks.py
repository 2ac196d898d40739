"""Runs in processes that can be killed, without importing torch for each of them.

A server process imports everything once and computes nothing, so that no pool of threads exists when it forks; each
run is a child of it. One line of JSON in starts a run or waits for one, one line out answers. A run that has ended
keeps its process id until it was waited for, so that killing it hits nobody else.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any


class Runs:
    """Starts runs in children of one server process."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self._read() == {"ready": True}

    def start(
        self,
        preset: str,
        overrides: Sequence[str],
        run_dir: Path,
        resume: str = "auto",
        *,
        garbled: Sequence[int] = (),
        dies: tuple[str, int] | None = None,
    ) -> int:
        """Begin a run and give its process id.

        garbled: the batches, counted from 0, whose text is corrupt.
        dies: in which of ``PIECES`` the process kills itself, and at the how manieth call of a function there. Where it
        lives on, it leaves the number of these calls in the file ``calls-PIECE`` of the run.
        """
        order = {"preset": preset, "overrides": list(overrides), "run_dir": str(run_dir), "resume": resume}
        return int(self._ask(order | {"garbled": list(garbled), "dies": dies})["pid"])

    def wait(self, pid: int) -> int:
        """The exit code of the run, or minus the signal that killed it."""
        return int(self._ask({"wait": pid})["code"])

    def run(
        self,
        preset: str,
        overrides: Sequence[str],
        run_dir: Path,
        resume: str = "auto",
        *,
        garbled: Sequence[int] = (),
        dies: tuple[str, int] | None = None,
    ) -> int:
        """The exit code of a run that nobody else disturbs."""
        return self.wait(self.start(preset, overrides, run_dir, resume, garbled=garbled, dies=dies))

    def start_sweep(self, file: Path) -> int:
        """Begin a sweep whose runs are forked too, and give its process id."""
        return int(self._ask({"sweep": str(file)})["pid"])

    def close(self) -> None:
        assert self._server.stdin and self._server.stdout
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()

    def _ask(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self._server.stdin
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._server.stdout
        answer: dict[str, Any] = json.loads(self._server.stdout.readline())
        return answer


def _serve() -> None:
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401 - imported so that no child has to

    import meristem.drills.training
    import meristem.models.lm
    import meristem.recipes.pretrain
    import meristem.recipes.sweeps.run
    import meristem.runs.directory

    # Asking every installed package for its version takes a quarter of a tiny run.
    described = meristem.runs.directory.describe()
    meristem.runs.directory.describe = lambda: described
    _say({"ready": True})
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            _, status = os.waitpid(order["wait"], 0)
            _say({"code": os.waitstatus_to_exitcode(status)})
            continue
        pid = os.fork()
        if pid == 0:
            os._exit(_sweep(order) if "sweep" in order else _run(order))
        _say({"pid": pid})


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def _run(order: dict[str, Any]) -> int:
    from meristem.drills.training import garble
    from meristem.errors import MeristemError
    from meristem.recipes.grow import grow
    from meristem.recipes.pretrain import prepare_job, pretrain
    from meristem.runs.config import load_config
    from meristem.sinks.console import Console

    breaks = garble(order["garbled"])
    count = _dying(*order["dies"]) if order["dies"] else None
    config = load_config(order["preset"], order["overrides"], {}).tree
    # stdout carries the answers of the server; the words of a run go to stderr, and stderr nowhere.
    sys.stderr = open(os.devnull, "w")
    how = {"run_dir": Path(order["run_dir"]), "resume": order["resume"], "view": Console(json=True)}
    try:
        if config.grow.enabled:
            result = grow(config, **how)
        else:
            result = pretrain(config, **how, make_job=lambda run, *given: breaks(run, prepare_job(run, *given)))
    except MeristemError as error:
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    if count:
        (Path(order["run_dir"]) / f"calls-{order['dies'][0]}").write_text(str(count[0]))
    return result.exit_code


def _sweep(order: dict[str, Any]) -> int:
    from meristem.recipes.sweeps import run, work

    work.started = _Forked
    _, _, is_done = run.sweep(run.read_sweep(Path(order["sweep"])), lambda line: None)
    return 0 if is_done else 130


class _Forked:
    """What ``work.started`` gives, without a new interpreter: a fork that says ``meristem`` and these words."""

    def __init__(self, words: Sequence[str], log: Path) -> None:
        from meristem.recipes.sweeps.work import end_with

        prepare = end_with(os.getpid())
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            prepare()
            os._exit(self._main(words, log))

    def poll(self) -> int | None:
        return self._waited(os.WNOHANG)

    def wait(self, timeout: float | None = None) -> int | None:
        return self._waited(0)

    def terminate(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def _waited(self, how: int) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, how)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    @staticmethod
    def _main(words: Sequence[str], log: Path) -> int:
        from meristem.cli import main

        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdin = open(os.devnull)
        sys.argv = ["meristem", *words, "--no-plan"]
        try:
            main()
        except SystemExit as ended:
            return int(ended.code or 0)
        return 0


PIECES = ("save", "rollback", "resume")
"""Pieces of a run in which a process can kill itself: in the thread that writes checkpoints, while it goes back to an
earlier state, and from putting back what a checkpoint holds to its first step."""


def _dying(piece: str, at: int) -> list[int]:
    """Count the calls of functions, Python's and C's, in a piece of the run; the process dies at number ``at``."""
    from meristem.checkpoint import store
    from meristem.checkpoint.saver import Saver
    from meristem.recipes import pretrain
    from meristem.runs.recovery import Recovery

    count = [0]

    def watch(frame: FrameType, event: str, argument: object) -> None:
        if event in ("call", "c_call"):
            count[0] += 1
            if count[0] == at:
                os.kill(os.getpid(), signal.SIGKILL)

    def begins(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            sys.setprofile(watch)
            return function(*given, **named)

        return call

    def ends(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            sys.setprofile(None)
            return function(*given, **named)

        return call

    def ends_after(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            try:
                return function(*given, **named)
            finally:
                sys.setprofile(None)

        return call

    if piece == "save":
        store.save, Saver._run = begins(store.save), ends_after(Saver._run)
    elif piece == "rollback":
        Recovery.roll_back = begins(ends_after(Recovery.roll_back))
    else:
        pretrain.begin, pretrain.train = begins(pretrain.begin), ends(pretrain.train)
    return count


if __name__ == "__main__":
    _serve()
