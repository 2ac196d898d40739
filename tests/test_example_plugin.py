"""The plug-in under examples/ is installed as a user would, found, checked, and used."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_rule_a_text_a_tracker_a_task_and_a_metric_of_a_package_of_their_own(tmp_path: Path) -> None:
    source, site = tmp_path / "plugin", tmp_path / "site"
    shutil.copytree(ROOT / "examples" / "plugin", source)
    pip = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--no-build-isolation", "--target", str(site)]
    subprocess.run([*pip, str(source)], check=True)
    paths = os.pathsep.join([str(site), str(ROOT / "src")])
    environment = os.environ | {"PYTHONPATH": paths, "MERISTEM_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}

    def meristem(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "meristem", *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done

    found = json.loads(meristem("plugins", "check", "--json").stdout)
    theirs = {(each["kind"], each["name"]): each["ok"] for each in found if each["distribution"] == "meristem-example"}
    kinds = {"cautious": "memory", "csv": "sink", "squares": "source", "sums": "task", "brevity": "metric"}
    assert theirs == {(kind, name): True for name, kind in kinds.items()}
    settings = (
        "memory.rule=cautious data.source=squares sinks.use=[csv] train.steps=12 train.log_every=4 data.seq_len=32"
    )
    small = "model.dim=32 model.n_layers=1 memory.head_dim=16 eval.n_windows_end=4 eval.learn_rate=false"
    meristem("train", "lmm", *settings.split(), *small.split(), "--run-dir", "runs/mine")
    with open(tmp_path / "runs" / "mine" / "curve.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [4, 8, 12]
    assert float(rows[-1]["bits_per_byte"]) < float(rows[0]["bits_per_byte"])
    (task,) = json.loads(meristem("eval", "runs/mine", "--task", "sums", "--json").stdout)["tasks"]
    assert (task["name"], task["n"], list(task["metrics"])) == ("sums", 25, ["exact_match", "brevity"])
