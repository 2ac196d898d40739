"""Memory as gate, as context and as layer: what each is made of. The laws of every model are in tests/models."""

import math

import pytest
import torch
import torch.nn.functional as F

from meristem.errors import WrongValue
from meristem.nn.attention import Attention
from meristem.nn.combine import COMBINATIONS
from meristem.nn.config import MemoryConfig
from meristem.nn.mac import MemoryAsContext
from meristem.nn.mag import MemoryAsGate
from meristem.nn.mal import MemoryAsLayer

WIDTH, N_TIME, SEGMENT, N_PERSISTENT = 12, 17, 5, 3
PART = MemoryConfig(head_dim=4, chunk=3)


def made(module, *, n_persistent=0, rope=True, span=5, **choice):
    torch.manual_seed(3)
    attention = Attention(WIDTH, 2, span=span, rope=rope, n_persistent=n_persistent)
    return module(WIDTH, PART, attention=attention, **choice).double()


def hidden(n_time=N_TIME):
    return torch.randn(2, n_time, WIDTH, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def silence(recall):
    """Leave the memory empty: nothing at the start, nothing written."""
    with torch.no_grad():
        for weight in recall.initial.learned.values():
            weight.zero_()
        recall.gates.weight_hd.zero_()
        recall.gates.bias_h.fill_(-1e4)


@pytest.mark.parametrize("name", ["gated", "normalised", "projected"])
def test_the_gate_of_memory_starts_open_and_stays_in_its_range(name):
    """S1-M12."""
    mag, ones_btd = made(MemoryAsGate, combine=name), torch.ones_like(hidden())
    recalled_btd = 30 * hidden()
    gate_btd = mag.combine(ones_btd, recalled_btd, hidden()) / kept(mag.combine, ones_btd)
    assert (gate_btd > 0).all() and (gate_btd < 1).all()
    open_btd = mag.combine(ones_btd, 0 * recalled_btd, hidden()) / kept(mag.combine, ones_btd)
    torch.testing.assert_close(open_btd, torch.full_like(open_btd, 1 / (1 + math.exp(-2))))


def kept(combine, attended_btd):
    """What a fully open gate lets through."""
    return combine.attention_norm(attended_btd) if hasattr(combine, "attention_norm") else attended_btd


@pytest.mark.parametrize("name", ["gated", "normalised"])
def test_attention_under_an_empty_memory_is_left_as_it_is(name):
    """S1-M12: with memory switched off, and the gate fully open, attention is left."""
    mag = made(MemoryAsGate, combine=name)
    silence(mag.recall)
    with torch.no_grad():
        mag.combine.bias_d.fill_(1e4)
    attended_btd, _ = mag.attention.mix(hidden())
    torch.testing.assert_close(mag(hidden())[0], mag.out(kept(mag.combine, attended_btd)))


def test_the_paper_gate_halves_attention_while_the_memory_is_empty():
    mag = made(MemoryAsGate, combine="sigmoid")
    silence(mag.recall)
    attended_btd, _ = mag.attention.mix(hidden())
    torch.testing.assert_close(mag(hidden())[0], mag.out(0.5 * attended_btd))


def test_an_additive_memory_that_is_empty_adds_nothing():
    mag = made(MemoryAsGate, combine="additive")
    silence(mag.recall)
    torch.testing.assert_close(mag(hidden())[0], mag.attention(hidden())[0])


def test_attention_over_an_empty_memory_reads_the_text_itself():
    """S1-M13: memory 0 with the residual equals attention(x)."""
    mal = made(MemoryAsLayer)
    silence(mal.memory.recall)
    torch.testing.assert_close(mal(hidden())[0], mal.attention(hidden())[0])


def test_without_the_residual_attention_reads_the_memory_only():
    mal = made(MemoryAsLayer, is_residual=False)
    read_btd, _ = mal.memory(hidden())
    torch.testing.assert_close(mal(hidden())[0], mal.attention(read_btd)[0])


@pytest.mark.parametrize("n_persistent", [0, N_PERSISTENT])
def test_context_from_an_empty_memory_is_attention_over_persistent_zero_and_text(n_persistent):
    """S1-M14: memory 0 and gate 1 equal attention over [p, 0, X] in every segment."""
    mac = made(MemoryAsContext, n_persistent=n_persistent, rope=False, span=None, segment=SEGMENT)
    silence(mac.recall)
    mac.combine.forward = lambda attended_btd, recalled_btd, hidden_btd: attended_btd
    expected = []
    for part_btd in hidden().split(SEGMENT, dim=1):
        n_time = part_btd.shape[1]
        joined = [torch.zeros_like(part_btd), part_btd]
        is_seen_ts = torch.ones(n_time, n_time, dtype=torch.bool).tril().repeat(1, 2)
        if n_persistent:
            joined.insert(0, mac.attention.persistent_gd.expand(2, -1, -1))
            is_seen_ts = F.pad(is_seen_ts, (n_persistent, 0), value=True)
        _, keys_bshk, values_bshv = mac.attention.project(torch.cat(joined, dim=1))
        query_bthk, _, _ = mac.attention.project(part_btd)
        mixed_bhtv = F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (query_bthk, keys_bshk, values_bshv)), attn_mask=is_seen_ts
        )
        expected.append(mac.out(mixed_bhtv.transpose(1, 2).flatten(2)))
    torch.testing.assert_close(mac(hidden())[0], torch.cat(expected, dim=1))


def first_changed(mac, at):
    """The first output that moves when the input at ``at`` does."""
    other_btd = hidden()
    other_btd[:, at] += 1
    moved_bt = (mac(other_btd)[0] != mac(hidden())[0]).any(-1)
    return int(moved_bt.any(0).nonzero()[0])


def met(mac):
    """Its memory holds something, so that what is recalled can leak."""
    with torch.no_grad():
        for weight in mac.recall.initial.learned.values():
            weight.normal_()
    return mac


@pytest.mark.parametrize("at", [3, 6, 9])
def test_no_token_sees_the_context_of_a_later_one(at):
    """S1-M14."""
    assert first_changed(met(made(MemoryAsContext, span=None, segment=SEGMENT)), at) == at


def test_a_plain_causal_mask_over_the_joined_sequence_leaks():
    """S1-M14: [h | X] in one causal sequence shows every h of a segment to its first token; the law above sees it."""
    mac = met(made(MemoryAsContext, rope=False, span=None, segment=SEGMENT))

    def attend_plainly(part, whole, seen):
        n_time = part.query_bthk.shape[1]
        keys_bshk = torch.cat([seen["context_keys_bshk"], seen["keys_bshk"]], dim=1)
        values_bshv = torch.cat([seen["context_values_bshv"], seen["values_bshv"]], dim=1)
        score_bhts = torch.einsum("bthk,bshk->bhts", part.query_bthk, keys_bshk)
        is_later_ts = torch.ones(n_time, keys_bshk.shape[1], dtype=torch.bool).triu(keys_bshk.shape[1] - n_time + 1)
        share_bhts = score_bhts.masked_fill(is_later_ts, -math.inf).softmax(-1)
        return torch.einsum("bhts,bshv->bthv", share_bhts, values_bshv).flatten(2)

    mac._attend = attend_plainly
    assert first_changed(mac, 8) == 5


def test_a_segment_reads_the_memory_as_it_was_when_it_began():
    """What is written in a segment reaches attention with the next one."""
    mac = met(made(MemoryAsContext, span=None, segment=SEGMENT))
    asked = []
    look = mac.recall.read
    mac.recall.read = lambda query_btd, state: asked.append(state["memory"]) or look(query_btd, state)
    _, state = mac(hidden())
    assert len(asked) == 4
    ends = [mac(hidden()[:, : SEGMENT * n])[1]["recall"]["memory"] for n in (1, 2, 3)]
    for began, ended in zip(asked[1:4], ends, strict=False):
        torch.testing.assert_close(began, ended)
    torch.testing.assert_close(state["start"]["memory"], ends[2])


def test_a_segment_of_no_token_is_refused():
    with pytest.raises(WrongValue, match="found a segment of 0 tokens; expected 1 or more"):
        made(MemoryAsContext, span=None, segment=0)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_every_combination_hears_both_sides(name):
    """A gradient reaches attention and memory from the first step on."""
    mag = made(MemoryAsGate, combine=name)
    attended_btd, recalled_btd = (hidden().requires_grad_() for _ in range(2))
    mag.combine(attended_btd, recalled_btd, hidden()).square().sum().backward()
    assert attended_btd.grad.any() and recalled_btd.grad.any()
