"""Several processes from one command line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from distributed.test_train import SETTINGS, losses, run, saved
from meristem.distributed.launch import _ended
from meristem.distributed.world import launched_rank, require_not_launched
from meristem.errors import WrongValue
from meristem.models.load import load
from recipes.small import overrides, write_text

PROGRAM = [sys.executable, "-m", "meristem"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]


def started(command: list[str], folder: Path, *more: str) -> subprocess.Popen[str]:
    """A command that trains, its stdout kept."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = overrides(write_text(folder), *SETTINGS, *(word for word in more if "=" in word))
    options = [word for word in more if "=" not in word]
    words = [
        *command,
        "train",
        "titans-mag",
        *settings,
        "--run-dir",
        str(folder / "run"),
        "--json",
        "--no-plan",
        *options,
    ]
    with open(folder / "err", "w") as err:
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=err, text=True, env=_environment())


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")} | {
        "OMP_NUM_THREADS": "1"
    }


def wait_for(process: subprocess.Popen[str], path: Path) -> None:
    """Until ``path`` is there, however busy the machine; only the time of the whole test is limited."""
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.02)


def worker(process: subprocess.Popen[str], rank: int) -> int:
    """The process id of a rank."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and (folder / "stat").read_text().rsplit(")", 1)[1].split()[1] == str(process.pid):
            if f"RANK={rank}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                return int(folder.name)
    raise AssertionError(f"no process of rank {rank}")


@pytest.mark.fault
def test_s2_a_killed_process_is_started_again(stage, tmp_path):
    """One of two under torchrun is killed in the middle: the run ends by itself, with the losses of an undisturbed one.

    Under ``--nproc`` the drill ``rank-killed`` shows the same.
    """
    more = ("train.steps=100", "checkpoint.every=10", "eval.every=1000")
    process = started([*TORCHRUN, "-m", "meristem"], tmp_path / "broken", *more)
    wait_for(process, tmp_path / "broken/run/checkpoints/step-00000020")
    os.kill(worker(process, 1), signal.SIGKILL)
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 0, (tmp_path / "broken/err").read_text()
    told = [json.loads(line) for line in out.splitlines()]
    assert told[-1]["status"] == "finished" and told[-1]["step"] == 100
    run(stage, 2, tmp_path / "whole", *more).found()
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 100
    load(tmp_path / "broken/run")


@pytest.mark.fault
def test_ctrl_c_leaves_a_run_that_goes_on(stage, tmp_path):
    """130, one answer, a checkpoint; and one process makes the rest."""
    process = started(PROGRAM, tmp_path, "--nproc", "2", "train.steps=10000")
    wait_for(process, tmp_path / "run/checkpoints/step-00000003")
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate()
    assert process.returncode == 130
    told = json.loads(out)
    assert told["status"] == "interrupted" and told["step"] == saved(tmp_path).step
    found = run(stage, 1, tmp_path, f"train.steps={told['step'] + 2}", resume="must").found()
    assert found["step"] == told["step"] + 2


@pytest.mark.fault
def test_what_was_asked_wrongly_is_not_started_again(tmp_path):
    """Seven rows for two processes: one answer with the code of settings, and no second start."""
    process = started(PROGRAM, tmp_path, "--nproc", "2", "data.batch_size=7")
    out, _ = process.communicate()
    assert process.returncode == 2, (tmp_path / "err").read_text()
    assert "2 processes cannot share them evenly" in json.loads(out)["error"]["message"]
    assert "start again" not in (tmp_path / "err").read_text()


def test_nproc_within_torchrun_is_refused():
    require_not_launched({})
    with pytest.raises(WrongValue, match="this one was started as 2 of 3 .* Leave --nproc out under torchrun"):
        require_not_launched({"WORLD_SIZE": "3", "RANK": "1"})
    assert launched_rank({}) == 0 and launched_rank({"RANK": "2"}) == 2


@pytest.mark.parametrize(
    ("ends", "found"),
    [
        ({1: (-9, "")}, (0, "process 1 was ended by SIGKILL")),
        ({0: (130, ""), 1: (-9, "")}, (0, "process 1 was ended by SIGKILL")),
        ({0: (-15, ""), 1: (2, "ConflictingKeys")}, (2, None)),
        ({0: (5, "AgreementFailed"), 1: (4, "DataError")}, (4, None)),
        ({0: (5, "AgreementFailed"), 1: (-15, "")}, (0, "process 0 was left without an answer")),
        ({0: (130, ""), 1: (130, "")}, (130, None)),
        ({0: (5, "Halted"), 1: (5, "Halted")}, (5, None)),
    ],
)
def test_what_ended_first_is_what_counts(tmp_path, ends, found):
    """Lost is who was killed, or all that were left without an answer; an error of its own keeps its exit code."""
    failures = {}
    for rank, (code, error) in ends.items():
        file = tmp_path / f"{rank}.json"
        if error:
            file.write_text(json.dumps({"message": {"message": f"{error}: why", "extraInfo": {"timestamp": "1"}}}))
        failures[rank] = ProcessFailure(rank, 1, code, str(file))
    assert _ended(failures) == found
