"""``meristem bench snapshot`` measures what a run waits for, or says why it does not."""

import psutil
import pytest

from meristem.bench import snapshot


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(snapshot, "N_LAYERS", 3)
    monkeypatch.setattr(snapshot, "WIDTH", 250)
    monkeypatch.setattr(snapshot, "HIDDEN", 199)


def test_rows_of_a_small_model(small):
    """Snapshot and restore have their deadline; their share is that of a copy of the same bytes."""
    rows = {row.name: row for row in snapshot.snapshots(3)}
    assert all(row.measured > 0 for row in rows.values())
    assert {name for name, row in rows.items() if row.target == 500 and row.sense == "<="} == {
        "snapshot",
        "restore",
    }
    plain_s = 3 * 4 * 3 * 250 * 200 / rows["copy bandwidth"].measured / 1e9
    for name in ("snapshot", "restore"):
        share = rows[f"{name}, share of the copy bandwidth"].measured
        assert share == pytest.approx(plain_s / (rows[name].measured / 1e3))
        assert "24 tensors" in rows[name].note


def test_too_little_room_is_said(monkeypatch):
    """Nothing is measured, and nothing is killed for it."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Found", (), {"available": 2e9}))
    (row,) = snapshot.snapshots(3)
    assert (row.measured, row.is_met, row.note) == (None, None, "needs 6 GB of RAM, 2 GB are free")
