"""Recurrent stacks compute the equations of their docstrings."""

import torch

from meristem.nn.recurrent import elman_stack, gru_stack


def weights(stack, layer):
    return [getattr(stack.cells, f"{name}_l{layer}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]


def test_elman_cells_follow_their_equation():
    stack = elman_stack(5, 2).double()
    hidden_btd = torch.randn(3, 7, 5, dtype=torch.float64)
    wanted_btd = hidden_btd
    for layer in range(2):
        in_dd, on_dd, in_d, on_d = weights(stack, layer)
        last_bd, rows = torch.zeros(3, 5, dtype=torch.float64), []
        for now_bd in wanted_btd.unbind(1):
            last_bd = torch.tanh(now_bd @ in_dd.T + in_d + last_bd @ on_dd.T + on_d)
            rows.append(last_bd)
        wanted_btd = torch.stack(rows, dim=1)
    torch.testing.assert_close(stack(hidden_btd)[0], wanted_btd, rtol=0, atol=1e-12)


def test_gated_cells_follow_their_equation():
    stack = gru_stack(5, 1).double()
    hidden_btd = torch.randn(3, 7, 5, dtype=torch.float64)
    in_dd, on_dd, in_d, on_d = weights(stack, 0)
    last_bd, rows = torch.zeros(3, 5, dtype=torch.float64), []
    for now_bd in hidden_btd.unbind(1):
        reset_in, keep_in, new_in = (now_bd @ in_dd.T + in_d).chunk(3, -1)
        reset_on, keep_on, new_on = (last_bd @ on_dd.T + on_d).chunk(3, -1)
        new_bd = torch.tanh(new_in + (reset_in + reset_on).sigmoid() * new_on)
        keep_bd = (keep_in + keep_on).sigmoid()
        last_bd = (1 - keep_bd) * new_bd + keep_bd * last_bd
        rows.append(last_bd)
    torch.testing.assert_close(stack(hidden_btd)[0], torch.stack(rows, dim=1), rtol=0, atol=1e-12)


def test_the_last_hidden_vectors_carry_a_stack_across_a_cut():
    for stack in (elman_stack(5, 3).double(), gru_stack(5, 3).double()):
        hidden_btd = torch.randn(2, 9, 5, dtype=torch.float64)
        whole_btd, last = stack(hidden_btd)
        _, state = stack(hidden_btd[:, :4])
        rest_btd, state = stack(hidden_btd[:, 4:], state)
        torch.testing.assert_close(rest_btd, whole_btd[:, 4:], rtol=0, atol=1e-12)
        torch.testing.assert_close(state["hidden_lbd"], last["hidden_lbd"], rtol=0, atol=1e-12)
