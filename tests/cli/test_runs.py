"""``meristem runs`` tells runs apart from their directories alone."""

import contextlib
import csv
import io
import json
import math
import shutil
import sqlite3

import pytest

from meristem.checkpoint import run as runs
from meristem.cli import run
from meristem.evaluate import picture
from meristem.events import Event
from meristem.sinks.records import Records
from meristem.train.emergency import FILE, Emergency, Level, SharedLevel, raised


def test_ls_shows_each_run_once(tmp_path, make_run, answered):
    """CX-13.1: finished ones with their last step, dead ones as dead; the link to the latest is no run of its own."""
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
    """CX-13.1: and nothing else; a run does not differ from itself."""
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


def test_compare_draws_the_curves_of_several_runs(finished, make_run, tmp_path, answered, capsys, monkeypatch):
    """A panel for each metric, a curve for each run, and the ends of each as numbers; abandoned steps are left out."""
    drawn = {}
    original = picture.draw_runs

    def draw(path, panels, along):
        drawn.update(panels=panels, along=along)
        original(path, panels, along)

    monkeypatch.setattr(picture, "draw_runs", draw)
    other, out = make_run("bob"), tmp_path / "curves.png"
    records = Records(other, "bob")
    records.event(Event("rollback.done", {"resumed_from": 10}))
    records.metrics(15, 1500, 0.1, "val", {"bits_per_byte": 2.5, "nats": math.nan})
    records.close()
    code, found = answered("runs", "compare", finished, other, "--picture", out)
    assert code == 0 and out.read_bytes().startswith(b"\x89PNG")
    val = {"ada": [(1000, 3.0), (2000, 1.5)], "bob": [(1000, 3.0), (1500, 2.5)]}
    train = {"ada": [(1000, 4.0), (2000, 2.0)], "bob": [(1000, 4.0)]}
    assert drawn == {"panels": {"val/bits_per_byte": val, "train/bits_per_byte": train}, "along": "tokens read"}
    assert found["runs"][1] == {
        **{"run": "bob", "metric": "val/bits_per_byte", "first": 3.0, "last": 2.5, "at": 1500},
        **{"least": 2.5, "least_at": 1500},
    }
    words = ["runs", "compare", str(finished), str(other), "--picture", str(out)]
    assert run([*words, "--metric", "val/bits_per_byte", "--along", "steps"]) == 0
    assert drawn["panels"] == {"val/bits_per_byte": {"ada": [(10, 3.0), (20, 1.5)], "bob": [(10, 3.0), (15, 2.5)]}}
    capsys.readouterr()
    assert run([*words, "--metric", "val/nats"]) == 3
    assert "they have train/bits_per_byte, val/bits_per_byte. Give one of these" in capsys.readouterr().err
    assert run(["runs", "compare", str(finished), str(finished)]) == 3
    assert "given twice" in capsys.readouterr().err


def test_export_as_a_database(finished, tmp_path, answered, capsys):
    """SQLite says it by the ending of the file or by --to; what is not finite is null there, and itself in CSV."""
    run_dir = shutil.copytree(finished, tmp_path / "run")
    records = Records(run_dir, "run")
    records.metrics(30, 3000, 0.3, "val", {"bits_per_byte": math.nan, "nats": math.inf})
    records.close()
    code, said = answered("runs", "export", run_dir, "--out", tmp_path / "a.db")
    assert (code, said["format"], said["rows"]) == (0, "sqlite", 5)
    with contextlib.closing(sqlite3.connect(tmp_path / "a.db")) as database:
        rows = database.execute("SELECT step, split, bits_per_byte, nats FROM metrics").fetchall()
    assert rows[:2] == [(10, "train", 4.0, None), (10, "val", 3.0, None)] and rows[-1] == (30, "val", None, math.inf)
    answered("runs", "export", run_dir, "--out", tmp_path / "named", "--to", "sqlite")
    assert (tmp_path / "named").read_bytes() == (tmp_path / "a.db").read_bytes()
    run(["runs", "export", str(run_dir)])
    assert capsys.readouterr().out.endswith("30,3000,0.3,val,,nan,inf\n")
    assert run(["runs", "export", str(run_dir), "--to", "parquet"]) == 2
    assert "Add --out FILE" in capsys.readouterr().err


@pytest.mark.extras
def test_export_as_parquet(finished, tmp_path, answered):
    """With the types of the columns."""
    import pyarrow.parquet

    assert answered("runs", "export", finished, "--out", tmp_path / "a.parquet")[0] == 0
    read = pyarrow.parquet.read_table(tmp_path / "a.parquet")
    assert [str(field.type) for field in read.schema] == ["int64", "int64", "double", "string", "string", "double"]
    assert read.column("bits_per_byte").to_pylist() == [4.0, 3.0, 2.0, 1.5]
    assert read.column("task").to_pylist() == [None] * 4


def test_a_directory_without_a_run_is_named(tmp_path, capsys):
    """An error of the environment kind."""
    assert run(["runs", "show", str(tmp_path)]) == 3
    assert "is no run directory" in capsys.readouterr().err
