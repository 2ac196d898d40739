"""Real processes that meet on this machine, as ``torchrun`` would start them, without importing torch for each.

A server imports everything once and computes nothing, so that no pool of threads exists when it forks; the processes of
a scene are its children. One line of JSON in plays a scene, one line out tells how its processes ended.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]

SMOOTH = "optim.eps=1e-4"
"""For a run that is compared with one in another number of processes. Adam divides a gradient by its own size, so where
the terms of a gradient cancel, what rounding left decides on a whole step of the learning rate: noise of 6e-8 of the
largest gradient moved up to four of the 21,072 weights of a head by 6e-5 with eps=1e-8, and none by 1e-5 with this."""


@dataclass(frozen=True)
class Played:
    """A scene that is over. codes: the exit code of each process, or minus the signal that killed it."""

    folder: Path
    codes: list[int]

    def found(self, rank: int = 0) -> dict[str, Any]:
        """What a process wrote down; fails with what it said where it did not come so far."""
        assert self.codes[rank] == 0, (self.codes, (self.folder / f"{rank}.err").read_text())
        values: dict[str, Any] = json.loads((self.folder / f"{rank}.json").read_text())
        return values


class Stage:
    """Plays scenes in children of one server process."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
        command = [sys.executable, "-m", "distributed.processes"]
        self._server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self._read() == {"ready": True}

    def play(self, n_processes: int, scene: str, folder: Path, **more: Any) -> Played:
        """Play a scene of ``scenes`` in so many processes, which write what they find into ``folder``."""
        assert self._server.stdin
        folder.mkdir(parents=True, exist_ok=True)
        order = {"n_processes": n_processes, "scene": scene, "folder": str(folder), "more": more}
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        return Played(folder, self._read()["codes"])

    def close(self) -> None:
        assert self._server.stdin and self._server.stdout
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()

    def _read(self) -> dict[str, Any]:
        assert self._server.stdout
        answer: dict[str, Any] = json.loads(self._server.stdout.readline())
        return answer


def _serve() -> None:
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401 - imported so that no child has to

    import meristem.recipes.grow  # noqa: F401
    from distributed import scenes

    _say({"ready": True})
    for line in sys.stdin:
        order = json.loads(line)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        os.environ.update(meeting, WORLD_SIZE=str(order["n_processes"]))
        pids = []
        for rank in range(order["n_processes"]):
            pid = os.fork()
            if pid == 0:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
                os._exit(_act(scenes.play, order, rank))
            pids.append(pid)
        _say({"codes": _ends(pids, limit_s=100)})


def _act(play: Any, order: dict[str, Any], rank: int) -> int:
    folder = Path(order["folder"])
    # stdout carries the answers of the server.
    said = os.open(folder / f"{rank}.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    try:
        play(order["scene"], folder, **order["more"])
    except BaseException:  # noqa: BLE001 - the traceback is all that a test learns
        traceback.print_exc()
        sys.stderr.flush()
        return 1
    return 0


def _ends(pids: list[int], *, limit_s: float) -> list[int]:
    """How each ended; who is not done in time is killed."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + limit_s
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    codes[pid] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > deadline:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    _serve()
