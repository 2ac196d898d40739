"""``meristem runs`` tells runs apart from their directories alone."""

import csv
import io
import json

from meristem.checkpoint import run as runs
from meristem.cli import run
from meristem.train.emergency import FILE, Emergency, Level, SharedLevel, raised


def test_ls_shows_each_run_once(tmp_path, make_run, answered):
    """Finished ones with their last step, dead ones as dead; the link to the latest is no run of its own."""
    make_run("ada")
    dead = make_run("bob")
    manifest = json.loads((dead / runs.FILE).read_bytes())
    (dead / runs.FILE).write_text(
        json.dumps(manifest | {"status": "running", "heartbeat": "2026-01-01T00:00:00+00:00"})
    )
    (tmp_path / "latest").symlink_to("bob")
    code, rows = answered("runs", "ls", tmp_path)
    assert code == 0
    assert [(row["name"], row["status"], row["step"]) for row in rows] == [("ada", "finished", 20), ("bob", "died", 20)]


def test_show_has_manifest_and_last_metrics(finished, answered):
    """Of each split."""
    code, report = answered("runs", "show", finished)
    assert (code, report["name"], report["status"]) == (0, "ada", "finished")
    assert report["metrics"]["val"] == {"step": 20, "bits_per_byte": 1.5}


def test_show_tells_how_sound_a_run_is(finished, answered):
    """While it is written, from another process: that is what the file is for."""
    shared = SharedLevel(finished / FILE)
    shared.write(raised(Emergency(), Level.CONSERVATIVE, reason="divergence", origin="guard"))
    _, report = answered("runs", "show", finished)
    shared.close()
    assert report["emergency"] == {"level": 3, "reason": "divergence", "origin": "guard"}
    assert report["rollbacks"] == 0


def test_diff_prints_the_one_changed_key(finished, make_run, answered):
    """And nothing else; a run does not differ from itself."""
    other = make_run("bob", chunk=11)
    code, report = answered("runs", "diff", finished, other)
    assert (code, report["settings"]) == (1, {"memory.chunk": [7, 11]})
    assert answered("runs", "diff", finished, finished) == (0, {"settings": {}, "best": report["best"][:1] * 2})


def test_export_is_a_table(finished, tmp_path, capsys):
    """One line per step and split; a file holds what stdout shows."""
    assert run(["runs", "export", str(finished)]) == 0
    text = capsys.readouterr().out
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [(row["step"], row["split"], row["bits_per_byte"]) for row in rows] == [
        ("10", "train", "4.0"),
        ("10", "val", "3.0"),
        ("20", "train", "2.0"),
        ("20", "val", "1.5"),
    ]
    assert run(["runs", "export", str(finished), "--out", str(tmp_path / "a.csv")]) == 0
    assert (tmp_path / "a.csv").read_text() == text


def test_a_directory_without_a_run_is_named(tmp_path, capsys):
    """An error of the environment kind."""
    assert run(["runs", "show", str(tmp_path)]) == 3
    assert "is no run directory" in capsys.readouterr().err
