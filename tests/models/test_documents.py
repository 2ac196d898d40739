"""What every model of the zoo keeps when one row holds several documents: each reads as if it stood alone."""

import pytest
import torch

from meristem.errors import CapabilityError, ShapeError
from meristem.memory.state import flatten, take_rows
from meristem.models.validate import require_masks
from meristem.nn.attention import Attention
from zoo import N_TIME, VOCABULARY, ZOO, grown, ids

every_model = pytest.mark.parametrize("name", ZOO)
CUTS = ([0, 2, 7, N_TIME], [0, 5, 6, N_TIME], [0, N_TIME])
"""Where the documents of three rows begin, and where the rows end."""


def mask_of(cuts, n_time=N_TIME):
    mask_bt = torch.zeros(len(cuts), n_time, dtype=torch.bool)
    for row, edges in enumerate(cuts):
        mask_bt[row, edges[:-1]] = True
    return mask_bt


def read_alone(model, tokens_bt, cuts):
    """The logits of all rows, each document read by itself, and the states of the last document of each row."""
    rows, states = [], []
    for row, edges in enumerate(cuts):
        parts = []
        for start, stop in zip(edges, edges[1:], strict=False):
            logits_bto, state = model(tokens_bt[row : row + 1, start:stop])
            parts.append(logits_bto)
        rows.append(torch.cat(parts, dim=1))
        states.append(state)
    return torch.cat(rows), states


def read_in_windows(model, tokens_bt, mask_bt, lengths):
    """The logits of the same rows in windows of these lengths, the state carried on, and the state after them."""
    parts, state = [], None
    for part_bt, part_mask_bt in zip(tokens_bt.split(lengths, dim=1), mask_bt.split(lengths, dim=1), strict=True):
        logits_bto, state = model(part_bt, state, reset_mask_bt=part_mask_bt)
        parts.append(logits_bto)
    return torch.cat(parts, dim=1), state


@every_model
def test_packed_documents_are_documents_alone(name):
    """Logits, and the states left behind, however windows cut the documents, token by token included."""
    model, tokens_bt = grown(name), ids(3)
    with torch.no_grad():
        alone_bto, states = read_alone(model, tokens_bt, CUTS)
        packed_bto, after = read_in_windows(model, tokens_bt, mask_of(CUTS), [4, 1, 1, 1, N_TIME - 7])
    torch.testing.assert_close(packed_bto, alone_bto, rtol=0, atol=1e-10)
    for row, state in enumerate(states):
        torch.testing.assert_close(flatten(take_rows(after, row, row + 1)), flatten(state), rtol=0, atol=1e-10)


ATTENDING = {"attention", "mag", "mal"}
MASKING = [
    name
    for name, (model, _) in ZOO.items()
    if model.name == "lm" and ATTENDING & set(model.mixers) and set(model.mixers) <= ATTENDING | {"memory"}
]


@pytest.mark.parametrize("name", MASKING)
def test_masked_documents_are_seen_by_memories_alone(name):
    """DD-1: with ``attend_mask_bt``, a model without a memory reads documents as if each stood alone, in any windows;
    one with a memory carries it over. Windows of any lengths read the same."""
    model, tokens_bt, mask_bt = grown(name), ids(3), mask_of(CUTS)
    require_masks(model)
    with torch.no_grad():
        whole_bto, _ = model(tokens_bt, attend_mask_bt=mask_bt)
        state, parts = None, []
        lengths = [4, 1, 1, 1, N_TIME - 7]
        for part_bt, part_mask_bt in zip(tokens_bt.split(lengths, 1), mask_bt.split(lengths, 1), strict=True):
            logits_bto, state = model(part_bt, state, attend_mask_bt=part_mask_bt)
            parts.append(logits_bto)
        alone_bto, _ = read_alone(model, tokens_bt, CUTS)
        joined_bto, _ = model(tokens_bt)
    torch.testing.assert_close(torch.cat(parts, 1), whole_bto, rtol=0, atol=1e-10)
    torch.testing.assert_close(whole_bto[2], joined_bto[2], rtol=0, atol=1e-10)
    torch.testing.assert_close(whole_bto[:, :2], joined_bto[:, :2], rtol=0, atol=1e-10)
    assert not torch.allclose(whole_bto[0, 2:], joined_bto[0, 2:], atol=1e-6), "attention looks back no more"
    carries = [
        not isinstance(each.mixer, Attention) or getattr(each.mlp, "is_carrying", False) for each in model.blocks
    ]
    is_plain = not any(carries)
    assert torch.allclose(whole_bto, alone_bto, rtol=0, atol=1e-10) == is_plain


@pytest.mark.parametrize("name, why", [("charrnn", "takes no attend_mask_bt"), ("mac", "the mixer MemoryAsContext")])
def test_models_that_cannot_mask_are_refused(name, why):
    with pytest.raises(CapabilityError, match=f"mask keeps attention within a document .*{why}.*reset"):
        require_masks(grown(next(each for each in ZOO if name in each)))


@every_model
def test_packed_documents_teach_what_documents_alone_teach(name):
    """Gradients, also through a state that is carried from window to window."""
    model, tokens_bt = grown(name), ids(3)
    parameters = list(model.parameters())
    alone_bto, _ = read_alone(model, tokens_bt, CUTS)
    packed_bto, _ = read_in_windows(model, tokens_bt, mask_of(CUTS), [8, N_TIME - 8])
    torch.testing.assert_close(packed_bto, alone_bto, rtol=0, atol=1e-10)
    alone = torch.autograd.grad(alone_bto.square().sum(), parameters, materialize_grads=True)
    packed = torch.autograd.grad(packed_bto.square().sum(), parameters, materialize_grads=True)
    torch.testing.assert_close(packed, alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["preset-titans-mag", "lm-mac-4-each", "preset-charformer", "preset-chargru"])
def test_one_window_of_documents_is_each_of_them(name):
    model, tokens_bt = grown(name), ids(3)
    packed_bto, _ = model(tokens_bt, reset_mask_bt=mask_of(CUTS))
    torch.testing.assert_close(packed_bto, read_alone(model, tokens_bt, CUTS)[0], rtol=0, atol=1e-10)


@every_model
def test_no_gradient_flows_into_another_document_or_a_later_token(name):
    model, now = grown(name), 9
    _, state = model(ids(2, 6, random_seed=11))
    # Every id stands at one place, so that the gradient of its embedding is that of the place.
    tokens_bt = torch.arange(2 * N_TIME).view(2, N_TIME)
    embeddings, hook = [], lambda module, inputs, hidden_btd: record(embeddings, inputs[0], hidden_btd)
    with model.embedding.register_forward_hook(hook):
        logits_bto, _ = model(tokens_bt, state, reset_mask_bt=mask_of(CUTS[:2]))
    leaves = [leaf for _, leaf in embeddings]
    found = torch.autograd.grad(logits_bto[:, now].square().sum(), leaves, materialize_grads=True)
    upstream_od = torch.zeros(VOCABULARY, found[0].shape[-1], dtype=torch.float64)
    for (seen_bt, _), each_btd in zip(embeddings, found, strict=True):
        upstream_od.index_add_(0, seen_bt.flatten(), each_btd.flatten(0, 1))
    for row, begin in enumerate((7, 6)):
        upstream_td = upstream_od[tokens_bt[row]]
        assert not upstream_td[:begin].any() and not upstream_td[now + 1 :].any()
        assert upstream_td[begin : now + 1].any()


def record(embeddings, tokens_bt, hidden_btd):
    """The embeddings of one call as leaves to differentiate by."""
    embeddings.append((tokens_bt, hidden_btd.detach().requires_grad_()))
    return embeddings[-1][1]


@every_model
def test_other_documents_and_the_state_before_them_change_nothing(name):
    """What is read from a document's first token on, and what it leaves, is the same after any other text."""
    model, mask_bt = grown(name), mask_of(([7, N_TIME], [7, N_TIME]))
    tokens_bt, other_bt = ids(2), ids(2)
    other_bt[0, :7] = ids(1, 7, random_seed=19)
    with torch.no_grad():
        states = [model(ids(2, n, random_seed=n))[1] for n in (3, 4)]
        first_bto, first = model(tokens_bt, states[0], reset_mask_bt=mask_bt)
        second_bto, second = model(other_bt, states[1], reset_mask_bt=mask_bt)
    torch.testing.assert_close(first_bto[:, 7:], second_bto[:, 7:], rtol=0, atol=1e-10)
    torch.testing.assert_close(flatten(first), flatten(second), rtol=0, atol=1e-10)


@every_model
def test_resets_that_do_not_fit_are_refused(name):
    with pytest.raises(ShapeError, match=r"reset_mask is torch.bool of shape \(2, 4\).*torch.bool of shape \(2, 13\)"):
        grown(name)(ids(2), reset_mask_bt=torch.zeros(2, 4, dtype=torch.bool))
