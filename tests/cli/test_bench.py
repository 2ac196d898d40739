"""``meristem bench`` prints a table for people and one line for programs."""

import json

from bench.evidences import listed, tables
from meristem.bench import growth_study, stability, suite
from meristem.bench.measure import Row
from meristem.bench.stability import Cell
from meristem.cli import run


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
    assert "No such option: --picture" in capsys.readouterr().err


def test_alone_it_measures_all_speeds(capsys, monkeypatch):
    """As it did before there was more to measure."""
    for name in suite.SECTIONS:
        monkeypatch.setitem(suite.SECTIONS, name, (lambda n_repeats, name=name: iter([Row(name, 1.0, "x")]),))
    monkeypatch.setattr(suite.rules, "speeds", lambda *given: iter(()))
    assert run(["bench"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]] == list(suite.SECTIONS)


def test_the_evidence_is_asked_for_by_its_file(answered, capsys, tmp_path):
    """Both ways to say it; the page stands where it was asked for, and the second call finds all of it done."""
    table = {"memory": tables(tmp_path)["memory"] | {"variants": ["titans"]}}
    config, out = listed(tmp_path, seeds=[3], rates=[1e-3], tables=table), tmp_path / "pages" / "mine.md"
    assert run(["bench", "evidence", "--config", str(config), "--out", str(out), "--only", "memory"]) == 0
    said = capsys.readouterr().out
    assert "0 runs are known, 1 can go now" in said and "a single seed, so no interval" in said
    code, report = answered("bench", "evidence", "--config", config, "--out", out)
    assert code == 0 and report["schema"] == "meristem.evidence/1"
    assert [outcome["name"] for outcome in report["outcomes"]] == ["titans-3 on text.txt at 0.001"]
    assert f"`meristem bench evidence --config {config} --jobs 1`" in out.read_text()
    assert out.with_name("mine-memory.png").exists()


def test_a_missing_file_of_evidence_or_table_is_refused(tmp_path, capsys):
    assert run(["bench", "evidence", "--config", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml cannot be read" in capsys.readouterr().err
    words = ["bench", "evidence", "--config", str(listed(tmp_path)), "--out", str(tmp_path / "mine.md")]
    assert run([*words, "--only", "rule"]) == 2
    assert "there is no table 'rule'; there are memory, reading" in capsys.readouterr().err


def test_growth_tells_by_its_exit_code(answered, tmp_path, monkeypatch):
    for is_worth_it, wanted in ((True, 0), (False, 1)):
        report = {"is_worth_it": is_worth_it, "sentences": ["said"]}
        monkeypatch.setattr(growth_study, "growth_study", lambda *given, report=report, **rest: report)
        found = answered("bench", "growth", "--config", tmp_path / "growth.yaml", "--out", tmp_path / "a" / "mine.md")
        assert found == (wanted, report)


def test_stability_tells_by_its_exit_code(answered, capsys, tmp_path, monkeypatch):
    """The table is written cell by cell, and a cell that is not finite is a negative result."""
    good, bad = Cell("delta", "mag", 1, 3.0, 2.0, True), Cell("titans", "mag", 2, 3.0, 2.0, False)
    monkeypatch.setattr(stability, "sweep", lambda steps: iter([good, bad]))
    out = tmp_path / "stability.md"
    assert run(["bench", "stability", "--steps", "7", "--out", str(out)]) == 1
    assert "NOT FINITE" in capsys.readouterr().out and "not finite" in out.read_text()
    monkeypatch.setattr(stability, "sweep", lambda steps: iter([good]))
    code, report = answered("bench", "stability", "--steps", 7, "--out", out)
    assert (code, report["steps"], report["is_stable"], len(report["cells"])) == (0, 7, True, 1)


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
