"""Every fault is caused for real, and leads to what the table of faults says."""

import shutil

import pytest
import torch

from meristem.device.lost import answering
from meristem.drills import disk
from meristem.drills.catalogue import drills, run_drill
from meristem.drills.drill import Drill, Outcome, Seen
from meristem.drills.scene import Scene, cut_off
from meristem.drills.training import not_a_number, spoil_output
from meristem.errors import DeviceLost, WrongValue

pytestmark = pytest.mark.fault

ROWS = {
    "NaN in data": "nan-data",
    "NaN in loss": "nan-loss",
    "NaN in gradient": "nan-gradient",
    "NaN in weight": "nan-weight",
    "NaN in memory": "nan-memory",
    "corrupt stretch": "spike",
    "OOM in forward": "out-of-memory-forward",
    "OOM in backward": "out-of-memory-backward",
    "OOM in optimizer": "out-of-memory-step",
    "device lost": "device-lost",
    "disk full": "disk-full",
    "torn write": "torn-checkpoint",
    "flipped byte": "flipped-byte",
    "SIGTERM": "terminated",
    "SIGKILL at a random step": "killed",
    "SIGKILL in a save": "killed-while-saving",
    "SIGKILL in a rollback": "killed-in-rollback",
    "data file truncated": "truncated-corpus",
    "hanging worker": "hanging-worker",
    "slow sink": "slow-sink",
    "failing sink": "dying-sink",
    "clock jump": "clock-jump",
    "corrupt record": "corrupt-record",
}
"""The fault table of platform.md 14 and the faults of issue 5, but for those of several processes."""


def test_tr9_every_row_of_the_fault_table_has_a_drill():
    assert set(ROWS.values()) <= set(drills.names())


@pytest.mark.parametrize("name", drills.names())
def test_tr9_fault_has_its_outcome(name, tmp_path):
    outcome = run_drill(drills.get(name), tmp_path)
    assert outcome.error is None
    assert [sentence for sentence, was_so in outcome.seen.checks.items() if not was_so] == [], outcome.seen.told
    assert outcome.is_as_expected
    exit_code = outcome.seen.told.get("exit_code")
    assert exit_code is None or drills.get(name).exit_code == exit_code


@pytest.mark.parametrize("name", ["disk-full", "disk-full-records"])
def test_tr9_disk_full_without_leave_to_mount(name, tmp_path, monkeypatch):
    """Whoever may not mount a small disk has the same drill with a limit on the size of files."""
    monkeypatch.setattr(disk.shutil, "which", lambda _: None)
    outcome = run_drill(drills.get(name), tmp_path)
    assert outcome.seen.told["disk"] == "file size limit"
    assert outcome.is_as_expected, outcome


def drilled(act) -> Outcome:
    return run_drill(Drill("one", "a fault", "something", "nothing to do", 0, act), None)


def test_a_drill_can_fail():
    """When a single thing is not so, when nothing was looked at, and when the drill itself breaks."""
    assert drilled(lambda drill, place: Seen({"this": True})).is_as_expected
    assert not drilled(lambda drill, place: Seen({"this": True, "that": False})).is_as_expected
    assert not drilled(lambda drill, place: Seen({})).is_as_expected
    broken = drilled(lambda drill, place: 1 / 0)
    assert not broken.is_as_expected and "ZeroDivisionError" in broken.error


def test_a_run_that_is_not_protected_fails_its_drill(tmp_path, monkeypatch):
    """The drills see a difference: without the guard, weights that are spoilt stay so."""
    from meristem.drills import scene

    monkeypatch.setattr(scene, "SETTINGS", (*scene.SETTINGS, "guard.enabled=false"))
    outcome = run_drill(drills.get("nan-weight"), tmp_path)
    assert not outcome.is_as_expected
    assert outcome.seen.told["error"] == "NonFinite"


def test_a_process_goes_back_behind_where_it_began(tmp_path):
    """Resumed from a checkpoint that is gone when it is needed again; the pace that is shown counts from there."""
    scene = Scene.at(tmp_path)
    assert scene.run("run", breaks=cut_off(14)).error == "Crash"
    spoilt = spoil_output(range(1, 4), not_a_number)

    def breaks(run, job):
        lost = run.checkpoints / "step-00000012"
        return disk.in_step(1, lambda job: shutil.rmtree(lost))(run, spoilt(run, job))

    ended = scene.run("run", "rollback.snapshots=0", breaks=breaks)
    assert [event["resumed_from"] for event in ended.events("run.resumed", "rollback.done")] == [12, 8]
    assert (ended.exit_code, ended.n_steps(), ended.is_finite()) == (0, 24, True)


def test_an_unknown_drill_is_answered_with_the_nearest():
    with pytest.raises(WrongValue, match=r"no drill is called 'kiled'\. Nearest: killed"):
        drills.get("kiled")


def test_only_a_lost_device_is_lost():
    """A device that is merely full, or a mistake of the model, is another error."""
    with pytest.raises(
        DeviceLost, match=r"cuda:1 stopped responding: CUDA error: unspecified launch failure\. .*again"
    ):
        with answering(torch.device("cuda:1")):
            raise torch.AcceleratorError("CUDA error: unspecified launch failure\nmore words")
    for error in (torch.OutOfMemoryError("full"), RuntimeError("shapes differ")):
        with pytest.raises(type(error), match=str(error)), answering(torch.device("cuda:1")):
            raise error
