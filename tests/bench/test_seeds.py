"""``meristem bench seeds`` times every part of growing beside its budget."""

from meristem.bench import seeds


def test_ka4_every_part_of_growing_has_a_time_and_a_budget(monkeypatch):
    """Each part in the file of budgets is measured and each that is measured is there; a row over its budget is
    missed. How long it takes here is not judged."""
    monkeypatch.setattr(seeds, "N_TIME", 16)
    monkeypatch.setattr(seeds, "N_ROWS", 1)
    rows = {row.name: row for row in seeds.seeds(1)}
    assert rows.keys() == seeds.budgets().keys() and all(row.measured > 0 for row in rows.values())
    monkeypatch.setattr(seeds, "budgets", lambda: dict.fromkeys(rows, 0.0) | {"gate G2": 1e9})
    missed = {row.name for row in seeds.seeds(1) if not row.is_met}
    assert missed == rows.keys() - {"gate G2"}
