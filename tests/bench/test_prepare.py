"""``meristem bench prepare`` measures preparing a text beside the least that it takes."""

import orjson
import pytest

from meristem.bench import prepare
from meristem.cli import run


@pytest.mark.slow
def test_preparing_is_measured_beside_the_disk_and_the_library(capsys, monkeypatch):
    """How fast it is here is not judged."""
    monkeypatch.setattr(prepare, "_DOCUMENT_BYTES", 1 << 16)
    monkeypatch.setattr(prepare, "_LEARNED_FROM_BYTES", 1 << 16)
    monkeypatch.setattr(prepare, "ENTRIES", 300)
    assert run(["bench", "prepare", "--size-mb", "1", "--repeats", "1", "--json"]) in (0, 1)
    rows = {row["name"]: row for row in orjson.loads(capsys.readouterr().out)["rows"]}
    byte, pairs = (rows[f"preparing, {name}, beside {least}"] for name, least in prepare.LEAST.items())
    assert (byte["target"], pairs["target"]) == (2.0, 1.5)
    for name, row in (("byte", byte), ("bpe", pairs)):
        own, least = rows[f"preparing, {name}"], rows[f"{prepare.LEAST[name]}, {name}"]
        assert abs(row["measured"] - least["measured"] / own["measured"]) < 1e-6 and own["note"] == "1 MB"
    assert rows["peak memory of the process"]["measured"] > 10
