"""S1-M16: eight rules in three compositions with one, two and four levels."""

import itertools

import pytest
import torch

from meristem.bench import stability
from meristem.bench.stability import Cell, counting, is_stable, sweep, table, to_json
from meristem.nn.cms_memory import CMSMemory


def test_every_cell_is_finite_and_most_learn():
    """S1-M16, a few steps of each; ``meristem bench stability --steps 300`` (or 100000) is the same with more."""
    cells = list(sweep(3))
    assert len(cells) == 8 * 3 * 3 and is_stable(cells)
    assert len({(cell.rule, cell.composition, cell.n_levels) for cell in cells}) == len(cells)
    page = table(cells, 3)
    assert page.count("\n| ") == 1 + 8 * 3 and "72 are finite" in page
    assert to_json(cells, 3)["is_stable"] is True


@pytest.mark.parametrize("composition, count", [*itertools.product(stability.COMPOSITIONS, stability.COUNTS)])
def test_a_cell_has_the_levels_that_it_is_called_by(composition, count):
    """And each of them writes within a window: the periods are shorter."""
    model = stability._model("delta", composition, count)
    found = [len(list(module.named_levels())) for module in model.modules() if isinstance(module, CMSMemory)]
    assert found == ([] if count == 1 else [count])
    assert max(stability.PERIODS) < stability.LENGTH


def cell(first, last, is_finite=True):
    return Cell("delta", "mag", 1, first, last, is_finite)


def test_four_in_five_have_to_fall_and_all_to_be_finite():
    good, flat, broken = cell(3.0, 2.0), cell(2.0, 2.0), cell(3.0, 2.0, is_finite=False)
    assert is_stable([good] * 4 + [flat]) and not is_stable([good] * 3 + [flat] * 2)
    assert not is_stable([good] * 9 + [broken])
    assert "not finite" in table([broken], 3) and "does not fall" in table([flat], 3)


def test_a_cell_that_blows_up_is_found(monkeypatch):
    """A rate that no model survives."""
    monkeypatch.setattr(stability, "RATE", 1e30)
    assert not stability.trained("delta", "mag", 1, steps=5).is_finite


def test_every_id_says_what_comes_next():
    tokens_bt = counting(5, 9, torch.Generator().manual_seed(0))
    assert torch.equal(tokens_bt[:, 1:], (3 * tokens_bt[:, :-1] + 1) % stability.VOCABULARY)
