"""``meristem bench`` prints a table for people and one line for programs."""

import json

from meristem.cli import run
from meristem.recipes.bench import suite
from meristem.recipes.bench.measure import Row


def test_table_and_line(capsys):
    """The row stands in both; the exit code says whether its target was met."""
    code = run(["bench", "start", "--repeats", "1"])
    row, line = capsys.readouterr().out.splitlines()
    report = json.loads(line)
    (measured,) = report["rows"]
    assert row.startswith(measured["name"])
    assert (report["schema"], measured["unit"]) == ("meristem.bench/1", "s")
    assert code == (0 if measured["is_met"] else 1)


def test_json_is_the_line_alone(answered):
    """For programs."""
    _, report = answered("bench", "start", "--repeats", "1")
    assert report["repeats"] == 1


def test_a_picture_of_nothing_is_refused_at_once(tmp_path, capsys):
    assert run(["bench", "start", "--picture", str(tmp_path / "rules.png")]) == 2
    assert "'start' measures no rule" in capsys.readouterr().err


def test_the_table_of_rules_is_asked_for_by_width_and_window(answered, tmp_path, monkeypatch):
    """They reach the bench as typed; its figures stand in the line, and the picture is drawn of them."""
    asked = []

    def measured(n_repeats, widths, windows):
        asked.append((n_repeats, widths, windows))
        for width in widths:
            figures = {"rule": "delta", "form": "scan", "width": width, "n_time": 32, "training_tokens_per_s": 5e4}
            yield Row(f"delta {width}", 5e4, "tokens/s", figures=figures)

    monkeypatch.setitem(suite.SECTIONS, "memory", ())
    monkeypatch.setattr(suite.rules, "speeds", measured)
    words = ["bench", "memory", "--repeats", "2", "--width", "64", "--width", "96", "--window", "32"]
    code, report = answered(*words, "--picture", tmp_path / "rules.png")
    assert code == 0 and [tuple(map(tuple, row[1:])) for row in asked] == [((64, 96), (32,))]
    assert [row["figures"]["width"] for row in report["rows"]] == [64, 96]
    assert (tmp_path / "rules.png").stat().st_size > 0


def test_large_figures_are_written_out(capsys, monkeypatch):
    monkeypatch.setitem(suite.SECTIONS, "start", (lambda n_repeats: iter([Row("a", 28440.4, "tokens/s")]),))
    assert run(["bench", "start"]) == 0
    assert "28,440 tokens/s" in capsys.readouterr().out
