"""A memory in somebody else's model: documents in one window, padding, and what it takes and refuses."""

import subprocess
import sys

import pytest
import torch
from torch.func import functional_call, grad, vmap

from meristem.errors import CapabilityError, ConflictingKeys, ShapeError, WrongValue
from meristem.memory import named
from meristem.memory.forms import accepting
from meristem.memory.named import rules
from meristem.memory.state import flatten, join_rows, take_rows
from meristem.nn import NeuralMemory, detach, reset_mask
from meristem.nn.config import MemoryConfig

PAIRS = [(name, form) for name in rules.names() for form in accepting(named(name))]
every_form = pytest.mark.parametrize("rule, form", PAIRS)


def made(rule="titans", form="auto", **settings):
    torch.manual_seed(0)
    memory = NeuralMemory(12, 3, rule=rule, form=form, chunk=3, dtype=torch.float64, **settings)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return memory


def text(batch, n_time, seed=1):
    return torch.randn(batch, n_time, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outcome(memory, reads, states):
    loss = sum(read.square().sum() for read in reads)
    gradients = torch.autograd.grad(loss, list(memory.parameters()), allow_unused=True, retain_graph=True)
    return reads, [flatten(state) for state in states], [g for g in gradients if g is not None]


@every_form
def test_documents_in_one_window_are_documents_alone(rule, form):
    """Reads, the states left behind and gradients; the first of a row goes on with the state that comes in."""
    memory, before_btd, hidden_btd = made(rule, form), text(2, 4), text(2, 11, 2)
    starts = [[0, 2, 7, 11], [0, 5, 6, 11]]
    mask_bt = torch.zeros(2, 11, dtype=torch.bool)
    for row, cuts in enumerate(starts):
        mask_bt[row, cuts[1:-1]] = True
    _, state = memory(before_btd)
    read_btd, after = memory(hidden_btd, state, reset_mask=mask_bt)
    alone, last = [], []
    for row, cuts in enumerate(starts):
        own, parts = take_rows(state, row, row + 1), []
        for begin, stop in zip(cuts, cuts[1:], strict=False):
            part_btd, left = memory(hidden_btd[row : row + 1, begin:stop], own)
            parts.append(part_btd)
            own = None
        alone.append(torch.cat(parts, dim=1))
        last.append(left)
    found = outcome(
        memory, [read_btd[row : row + 1] for row in range(2)], [take_rows(after, n, n + 1) for n in range(2)]
    )
    torch.testing.assert_close(found, outcome(memory, alone, last), rtol=1e-10, atol=1e-10)


@every_form
def test_padding_is_as_if_it_were_not_there(rule, form):
    """Rows of 9 tokens, the first 4, the last 5 and none: reads, states and gradients are those of the rows alone."""
    memory, hidden_btd, places = made(rule, form), text(4, 9, 2), torch.arange(9)
    mask_bt = torch.stack([places >= 0, places < 4, places >= 4, places < 0])
    _, state = memory(text(4, 4))
    read_btd, after = memory(hidden_btd, state, padding_mask=mask_bt)
    assert not read_btd[~mask_bt].any()
    reads, alone, last = [], [], []
    for row in range(3):
        reads.append(read_btd[row][mask_bt[row]][None])
        own_btd, left = memory(hidden_btd[row][mask_bt[row]][None], take_rows(state, row, row + 1))
        alone.append(own_btd)
        last.append(left)
    states = [take_rows(after, row, row + 1) for row in range(3)]
    torch.testing.assert_close(outcome(memory, reads, states), outcome(memory, alone, last), rtol=1e-10, atol=1e-10)
    kept = flatten(take_rows(state, 3, 4))
    torch.testing.assert_close(flatten(take_rows(after, 3, 4)), kept, rtol=0, atol=0)


def test_a_reset_at_the_first_token_begins_the_row_afresh():
    memory, hidden_btd = made(), text(2, 5, 2)
    _, state = memory(text(2, 4))
    mask_bt = torch.zeros(2, 5, dtype=torch.bool)
    mask_bt[1, 0] = True
    read_btd, _ = memory(hidden_btd, state, reset_mask=mask_bt)
    torch.testing.assert_close(read_btd[1:], memory(hidden_btd[1:])[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(read_btd[:1], memory(hidden_btd[:1], take_rows(state, 0, 1))[0], rtol=0, atol=1e-12)


def test_cumulative_lengths_say_where_documents_begin():
    assert reset_mask(torch.tensor([0, 3, 4, 6])).tolist() == [[True, False, False, True, True, False]]


def test_a_window_of_padding_alone_begins_a_state():
    memory = made()
    read_btd, state = memory(text(2, 3), padding_mask=torch.zeros(2, 3, dtype=torch.bool))
    assert not read_btd.any()
    torch.testing.assert_close(flatten(state), flatten(memory.init_state(text(2, 1))), rtol=0, atol=0)


def test_masks_that_do_not_fit_are_refused():
    with pytest.raises(ShapeError, match=r"padding_mask is torch.int64 of shape \(2, 3\).*torch.bool.*mask.bool"):
        made()(text(2, 3), padding_mask=torch.ones(2, 3, dtype=torch.int64))


def test_it_is_the_memory_of_a_configuration():
    torch.manual_seed(3)
    first = NeuralMemory(12, 3, rule="delta", half_life=8.0)
    torch.manual_seed(3)
    second = NeuralMemory.from_config(12, MemoryConfig(head_dim=4, rule="delta", half_life=8.0))
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("wrong", [{"n_heads": 5}, {"n_heads": 3, "levels": {"count": 2}}, {"n_heads": 3, "hue": 1}])
def test_settings_that_it_does_not_read_are_refused(wrong):
    with pytest.raises(WrongValue, match="divides its width, and the settings bias, chunk, conv"):
        NeuralMemory(12, **wrong)


def test_device_and_dtype():
    assert all(parameter.is_meta for parameter in NeuralMemory(12, 3, device="meta").parameters())
    memory = NeuralMemory(12, 3, dtype=torch.bfloat16)
    read_btd, state = memory(torch.randn(1, 5, 12, dtype=torch.bfloat16))
    assert read_btd.dtype == torch.bfloat16 and memory.qkv.weight.dtype == torch.bfloat16
    assert {leaf.dtype for leaf in state["memory"].values()} == {torch.float32} == {memory.gates.weight_hd.dtype}
    assert not any(leaf.requires_grad for leaf in flatten(detach(state)).values())


def test_functional_call_runs_and_transforms_say_why_not():
    memory, hidden_btd = made(), text(2, 5)
    weights = dict(memory.named_parameters())
    read_btd, _ = functional_call(memory, weights, (hidden_btd,))
    torch.testing.assert_close(read_btd, memory(hidden_btd)[0], rtol=0, atol=0)
    with pytest.raises(CapabilityError, match="inside a transform of torch.func.*torch.autograd.grad"):
        grad(lambda own: functional_call(memory, own, (hidden_btd,))[0].sum())(weights)
    with pytest.raises(CapabilityError, match="put what vmap would map over into the batch"):
        vmap(lambda own_btd: memory(own_btd[None])[0])(hidden_btd)


def test_readers_at_different_positions_may_be_padded_together():
    memory = made("titans_mlp", "frozen_chunk")
    states = [memory(text(1, n_time, n_time))[1] for n_time in (2, 4)]
    mask_bt = torch.tensor([[True, True, True], [False, False, True]])
    read_btd, _ = memory(text(2, 3, 9), join_rows(states), padding_mask=mask_bt)
    torch.testing.assert_close(read_btd[1:, 2:], memory(text(2, 3, 9)[1:, 2:], states[1])[0], rtol=0, atol=1e-12)


def test_the_room_is_entered_without_torch():
    code = "import meristem.nn.config, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_memory_that_begins_as_an_induction_head_finds_what_came_after_a_token_like_this_one():
    """Before any training, the read at a repeated token is nearest to the value of the token that followed it."""
    torch.manual_seed(0)
    hidden_btd = torch.randn(12, 64)[torch.tensor([[*range(12), *range(12)]])]

    def hits(init):
        memory = NeuralMemory(64, 2, rule="gated_delta", init=init, write_rate=0.5, half_life=4096.0)
        read_btd, _ = memory(hidden_btd)
        value_btd = memory.project(hidden_btd, None)[2].flatten(2)
        near_ts = torch.cosine_similarity(read_btd[0, 12:23, None], value_btd[:, :12], dim=-1)
        return (near_ts.argmax(dim=1) == torch.arange(1, 12)).tolist()

    assert all(hits("induction")) and sum(hits("random")) < 3


@pytest.mark.parametrize("settings", [{"conv": 1}, {"rule": "lattice"}])
def test_what_has_no_keys_of_the_token_before_cannot_begin_as_an_induction_head(settings):
    with pytest.raises(ConflictingKeys, match=r"memory.init is 'induction'.*Set memory.init=random"):
        NeuralMemory(12, 3, **{"rule": "delta", "init": "induction"} | settings)
