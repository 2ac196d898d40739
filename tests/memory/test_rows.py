"""Readers at different positions are one batch: a state is per row."""

import pytest
import torch

from meristem.memory.state import alike_rows, flatten, is_mixed, join_rows, select_rows, take_rows
from meristem.models.online import frozen
from zoo import ZOO, grown, ids

every_model = pytest.mark.parametrize("name", ZOO)
LENGTHS = (1, 4, 9)


def readers(model):
    """Three readers that have read 1, 4 and 9 tokens, and what each reads next."""
    states = [model(ids(1, n_time, random_seed=n_time))[1] for n_time in LENGTHS]
    return states, ids(3, 7, random_seed=23)


@every_model
@pytest.mark.parametrize("of", [lambda model: model, frozen], ids=["learning", "frozen"])
def test_readers_at_different_positions_read_in_one_batch_as_alone(name, of):
    """Token by token, in windows, and token by token after a window."""
    model = of(grown(name))
    states, next_bt = readers(model)
    with torch.no_grad():
        state, logits = join_rows(states), []
        for part_bt in next_bt.split([1, 1, 3, 1, 1], dim=1):
            logits_bto, state = model(part_bt, state)
            logits.append(logits_bto)
        for row, own in enumerate(states):
            alone_bto, last = model(next_bt[row : row + 1], own)
            torch.testing.assert_close(torch.cat(logits, dim=1)[row : row + 1], alone_bto, rtol=0, atol=1e-10)
            torch.testing.assert_close(flatten(take_rows(state, row, row + 1)), flatten(last), rtol=0, atol=1e-10)


@every_model
def test_rows_are_joined_picked_and_taken_apart_as_they_were(name):
    states, _ = readers(grown(name))
    joined = join_rows(states)
    again = join_rows([take_rows(joined, 0, 2), states[2]])
    for found, order in ((joined, [0, 1, 2]), (again, [0, 1, 2]), (select_rows(joined, [2, 0]), [2, 0])):
        for row, source in enumerate(order):
            own = take_rows(found, row, row + 1)
            assert not is_mixed(own)
            torch.testing.assert_close(flatten(own), flatten(states[source]), rtol=0, atol=0)


def test_rows_that_agree_again_have_one_integer():
    states = [{"level": {"count": count, "sum_bd": torch.ones(2, 3)}} for count in (4, 5)]
    mixed = join_rows(states)
    assert mixed["level"]["count"].tolist() == [4, 4, 5, 5]
    assert [rows for rows, _ in alike_rows(mixed)] == [[0, 1], [2, 3]]
    assert select_rows(mixed, [1, 0])["level"]["count"] == 4


@pytest.mark.parametrize("name", ["preset-titans-mag", "preset-hope"])
def test_decoding_readers_at_different_positions_is_one_batch(name, monkeypatch):
    """Not group by group: memories of exact rules count nothing, and a decoded self-reference counts row by row."""
    model = grown(name)
    states = [model(ids(1, n_time, random_seed=n_time))[1] for n_time in (6, 7, 9)]
    next_bt, state = ids(3, 3, random_seed=23), join_rows(states)
    assert is_mixed(state) == (name == "preset-hope")
    with torch.no_grad():
        expected = [model(next_bt[row : row + 1], own)[0] for row, own in enumerate(states)]
        monkeypatch.setattr("meristem.memory.state.alike_rows", lambda state: pytest.fail("rows are read apart"))
        logits = []
        for token_b1 in next_bt.split(1, dim=1):
            logits_bto, state = model(token_b1, state)
            logits.append(logits_bto)
    torch.testing.assert_close(torch.cat(logits, dim=1), torch.cat(expected), rtol=0, atol=1e-10)


def test_gradients_reach_every_reader_of_a_batch():
    model = grown("lm-mac-4-each")
    states, next_bt = readers(model)
    logits_bto, _ = model(next_bt, join_rows(states))
    alone = [model(next_bt[row : row + 1], own)[0] for row, own in enumerate(states)]
    parameters = list(model.parameters())
    found = torch.autograd.grad(logits_bto.square().sum(), parameters, retain_graph=True)
    expected = torch.autograd.grad(sum(x.square().sum() for x in alone), parameters)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
