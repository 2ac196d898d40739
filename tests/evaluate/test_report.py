"""The report and its picture."""

import sys
from dataclasses import replace

import pytest

from meristem.errors import MissingExtra
from meristem.evaluate.baselines import Baseline
from meristem.evaluate.picture import draw_loss
from meristem.evaluate.report import Report, Sample

REPORT = Report(
    title="Run r",
    summary="It ran.",
    model_bits_per_byte=1.75,
    baselines=[Baseline("gzip", 2.5), Baseline("xz", 1.25)],
    facts=[("steps", "7")],
    memory=[],
    readings=[],
    samples=[Sample("def ", "f():\n```\nx")],
    settings=[("model.dim", "128")],
    go_on=[("meristem chat r", "talks")],
    has_picture=False,
)


def test_model_stands_among_the_compressors_by_what_it_needs():
    rows = [line for line in REPORT.to_markdown().splitlines() if line.startswith("| ") and line.endswith("0 |")]
    assert rows == ["| xz | 1.250 |", "| **this model** | 1.750 |", "| gzip | 2.500 |"]


def test_backticks_in_a_sample_do_not_end_it():
    assert "````text\ndef f():\n```\nx\n````" in REPORT.to_markdown()


def test_what_is_not_there_is_not_shown():
    text = REPORT.to_markdown()
    assert "loss.png" not in text and "## The memory" not in text and "never saw" not in text


def test_a_text_that_was_held_out_is_told_by_how_it_was_read():
    told = replace(
        REPORT, readings=[("static", "2.100"), ("with weights that learn as well", "1.600")], has_picture=True
    )
    text = told.to_markdown()
    assert "| static | 2.100 |\n| with weights that learn as well | 1.600 |" in text and "(reading.png)" in text


def test_picture_is_a_png(tmp_path):
    path = tmp_path / "loss.png"
    draw_loss(path, [(100, 8.1), (200, 5.0)], [(200, 5.2)], [("gzip", 2.5)])
    assert path.read_bytes().startswith(b"\x89PNG\r\n")


def test_missing_matplotlib_names_the_extra(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtra, match=r"pip install 'meristem\[plot\]'"):
        draw_loss(tmp_path / "loss.png", [], [], [])
