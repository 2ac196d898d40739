"""``meristem doctor`` says of each thing whether it is fit, and fails when one is in the way."""

import shutil
from dataclasses import replace

from meristem.cli import doctor, run
from meristem.drills.catalogue import drills
from meristem.drills.drill import Seen


def test_this_machine_is_fit(answered, tmp_path):
    """Everything is looked at, and what runs these tests can run."""
    code, report = answered("doctor", "--run-root", tmp_path / "runs")
    status = {item["name"]: item["status"] for item in report["items"]}
    assert (code, report["status"]) == (0, "warn" if "warn" in status.values() else "ok")
    wanted = {"python", "torch", "threads", "device cpu", "disk", "ram", "run root", "clock", "plugins"}
    assert wanted <= set(status)
    assert {status[name] for name in ("torch", "device cpu", "tokenizer byte", "tokenizer bpe")} == {"ok"}


def test_what_is_in_the_way_fails(monkeypatch, capsys, tmp_path):
    """A disk without room is code 1 and a line that says so."""
    monkeypatch.setattr(doctor, "NO_DISK_BYTES", 1e30)
    monkeypatch.setattr(doctor, "LOW_DISK_BYTES", 1e30)
    assert run(["doctor", "--run-root", str(tmp_path)]) == 1
    assert any(line.split()[:2] == ["disk", "fail"] for line in capsys.readouterr().out.splitlines())


def test_plugins_load(answered):
    """Every entry of every registry."""
    code, findings = answered("plugins", "check")
    assert (code, all(finding["ok"] for finding in findings)) == (0, True)
    assert {"memory", "model"} <= {finding["kind"] for finding in findings}
    listed = answered("plugins", "ls", "--kind", "memory")[1]
    assert "titans" in [entry["name"] for entry in listed]


def test_an_unknown_kind_is_named(capsys):
    """With the kinds that there are."""
    assert run(["plugins", "ls", "--kind", "memry"]) == 2
    assert "memory" in capsys.readouterr().err


def test_a_drill_shows_its_outcome(answered):
    """Once, however often it is named."""
    code, report = answered("doctor", "--drill", "hanging-worker", "--drill", "hanging-worker")
    assert (code, report["status"]) == (0, "ok")
    (found,) = report["drills"]
    assert found["name"] == "hanging-worker" and found["is_as_expected"] and all(found["checks"].values())


def test_a_drill_that_ends_otherwise_fails(monkeypatch, capsys):
    """Exit code 1, the sentence that was not so, and where to look."""
    broken = replace(drills.get("nan-loss"), act=lambda drill, place: Seen({"the run goes on": False}))
    monkeypatch.setitem(drills._entries, "nan-loss", broken)
    assert run(["doctor", "--drill", "nan-loss"]) == 1
    out = capsys.readouterr().out
    assert "NOT SO    the run goes on" in out
    shutil.rmtree(out.split("stands in ")[1].split()[0])


def test_an_unknown_drill_is_refused_before_anything_is_broken(capsys):
    """With the nearest."""
    assert run(["doctor", "--drill", "hanging-worker", "--drill", "torn-chekpoint"]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and "Nearest: torn-checkpoint" in shown.err
