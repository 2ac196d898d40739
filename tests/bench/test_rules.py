"""The table of rules and forms: what is measured is what is said, and nothing is passed over in silence."""

import pytest
import torch

from meristem.bench import rules as bench
from meristem.bench.picture import plot_speeds
from meristem.memory import named
from meristem.memory.forms import accepting
from meristem.memory.named import rules
from meristem.memory.state import size_bytes
from meristem.nn.memory import MemoryLayer

WIDTH, N_TIME = 32, 48


@pytest.fixture(scope="module")
def rows():
    """One small table."""
    return list(bench.in_all_forms("hebbian", WIDTH, N_TIME, limit=1e11, n_repeats=1))


def test_every_form_that_takes_the_rule_has_a_row(rows):
    assert [row.figures["form"] for row in rows] == accepting(named("hebbian"))
    assert all(row.measured > 0 and row.figures["forward_tokens_per_s"] > 0 for row in rows)


def test_state_is_that_of_a_session(rows):
    """The bytes of the state that the layer leaves behind, whatever the form."""
    layer = MemoryLayer(WIDTH, bench.part_of("hebbian"))
    _, state = layer(torch.randn(1, N_TIME, WIDTH))
    assert next(row for row in rows if row.figures["form"] == "scan").figures["state_bytes"] == size_bytes(state)


def test_the_share_is_that_of_counted_products(rows):
    """Operations of a step, a second, over the limit."""
    for row in rows:
        found = row.figures
        seconds = N_TIME / found["training_tokens_per_s"]
        assert found["limit_share"] == pytest.approx(found["training_flops"] / seconds / 1e11)


def test_products_are_counted_with_their_gradients():
    """Two operations a multiply-add, and the backward pass of a product is two products."""
    left, right = torch.randn(3, 5, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    assert bench.flops_in(lambda: (left @ right).sum().backward()) == 3 * 2 * 3 * 5 * 7


def test_the_scan_is_continued_on_a_line(monkeypatch):
    """Measured over a window half as long, the work is the same and the peak nearly so."""
    monkeypatch.setattr(bench, "SCANNED", N_TIME)
    (whole,) = (r for r in bench.in_all_forms("delta", WIDTH, N_TIME, 1e11, 1) if r.figures["form"] == "scan")
    monkeypatch.setattr(bench, "SCANNED", N_TIME // 2)
    (half,) = (r for r in bench.in_all_forms("delta", WIDTH, N_TIME, 1e11, 1) if r.figures["form"] == "scan")
    # The convolution's gradient works on the padding too, which a window has once whatever its length.
    assert half.figures["training_flops"] == pytest.approx(whole.figures["training_flops"], rel=2e-3)
    assert half.figures["peak_bytes"] == pytest.approx(whole.figures["peak_bytes"], rel=0.1)
    assert f"from {N_TIME // 2} tokens" in half.note


def test_what_is_not_run_is_said(monkeypatch):
    """A form beyond its longest window has a row with the reason, and no figure."""
    monkeypatch.setattr(bench, "COMPARED", 40)
    monkeypatch.setattr(bench, "LONGEST", {"associative": 24})
    found = {row.figures["form"]: row for row in bench.over_scan("hebbian", WIDTH, 1)}
    assert set(found) == set(accepting(named("hebbian"))) - {"scan"}
    assert found["associative"].measured is None and "beyond 24 tokens" in found["associative"].note
    assert found["exact_chunk"].target == 10 and found["exact_chunk"].measured > 1


def test_the_table_begins_with_the_limit(monkeypatch):
    """Then the rule at each width and window, and each width over its scan."""
    monkeypatch.setattr(bench, "LIMIT_SIZE", 64)
    monkeypatch.setattr(bench, "COMPARED", 20)
    limit, *others = bench.speeds(1, widths=(WIDTH, 2 * WIDTH), windows=(16, 24), only=("ftrl",))
    assert limit.unit == "GFLOP/s" and limit.measured > 0
    n_forms = len(accepting(named("ftrl")))
    assert len([row for row in others if row.unit == "tokens/s"]) == 2 * 2 * n_forms
    assert len([row for row in others if row.unit == "x"]) == 2 * (n_forms - 1)


def test_every_rule_of_the_catalogue_can_be_built():
    for name in rules.names():
        assert bench.part_of(name).rule == name


def test_the_picture_shows_the_speeds(rows, tmp_path):
    plot_speeds(tmp_path / "rules.png", [{}, *(row.figures for row in rows)])
    assert (tmp_path / "rules.png").read_bytes().startswith(b"\x89PNG")
