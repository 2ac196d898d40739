"""The plan says which form runs every memory, and whether it is exact: as text and as JSON."""

import json
from pathlib import Path

from meristem.recipes.plan.dry_run import plan
from meristem.recipes.plan.report import PlanReport, sections
from meristem.runs.config import load_config


def report_of(tmp_path: Path, preset: str, *overrides: str) -> PlanReport:
    overrides = (f"data.root={tmp_path}", "data.source=stdlib-docs", "data.seq_len=8", *overrides)
    return plan(load_config(preset, list(overrides), {}).tree, until="build")


def told(report: PlanReport) -> list[str]:
    return [row[1] for section in sections(report) for row in section.rows if row[0] == "runs by"]


def test_the_form_that_auto_chose_is_told_with_its_exactness(tmp_path: Path) -> None:
    report = report_of(tmp_path, "lmm-titans_mlp")
    assert told(report) == ["frozen_chunk (not exact), which auto chose; chunks of 32"]
    assert told(report_of(tmp_path, "lmm-titans")) == ["exact_chunk (exact), which auto chose; chunks of 32"]
    assert told(report_of(tmp_path, "lmm-titans", "memory.form=scan")) == ["scan (exact); chunks of 32"]
    written = json.loads(report.model_dump_json())["memory"]["memories"]
    assert [(row["form"], row["is_exact"]) for row in written] == [("frozen_chunk", False)] * 2


def test_layers_with_rules_of_their_own_are_told_apart(tmp_path: Path) -> None:
    report = report_of(tmp_path, "lmm-titans", "model.layers=[{rule: titans}, {rule: lattice}]")
    exact, rough = told(report)
    assert exact.startswith("exact_chunk (exact)") and rough.startswith("lattice (not exact)")
    assert report.memory is not None
    paths = [row.path for row in report.memory.memories]
    assert exact.endswith(f": {paths[0]}") and rough.endswith(f": {paths[1]}")
