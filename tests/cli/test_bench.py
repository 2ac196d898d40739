"""``meristem bench`` prints a table for people and one line for programs."""

import json

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
