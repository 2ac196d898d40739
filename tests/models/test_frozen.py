"""A frozen reader reads what a learning one would at that moment, if the token it reads were not written."""

from dataclasses import replace

import pytest
import torch

from memory.inputs import named, window
from meristem.memory import rule, run
from meristem.memory.forms import accepting, read_trusted, run_trusted, tnt
from meristem.memory.named import rules
from meristem.memory.rule import read
from meristem.memory.state import flatten, unflatten
from meristem.models.online import frozen
from meristem.nn.gates import GateMap
from meristem.nn.memory import initial_state
from meristem.nn.self_reference import SelfReference
from zoo import N_TIME, ZOO, ids, moved, small, small_memory

MIXERS = ("mag", "mac", "mal")


def others():
    """What the zoo has no model of: levels that begin afresh, every way to keep memories, with mixers in turn."""
    for mixer, tokens in (("mag", "pooled"), ("mac", "each"), ("mac", "pooled"), ("memory", "each")):
        levels = {"count": 3, "periods": [1, 2, 5], "tokens": tokens, "reset_after": [4, 2, 1]}
        yield f"{mixer}-reset-{tokens}", small({"mixer": mixer}), small_memory({"levels": levels})
    for turn, how in enumerate(("sum", "gated", "sparse", "soup")):
        kept = {"read": how, "length": 4} | ({"top": 1} if how == "sparse" else {})
        fresh, joined = kept | {"write": "fresh"}, kept | {"segments": "logarithmic"}
        one, other = MIXERS[turn % 3], MIXERS[(turn + 1) % 3]
        yield f"{one}-kept-{how}", small({"mixer": one}), small_memory({"cache": fresh})
        yield f"{other}-kept-tnt-{how}", small({"mixer": other}), small_memory({"form": "tnt", "cache": joined})


MODELS = ZOO | {name: settings for name, *settings in others()}
every_model = pytest.mark.parametrize("name", MODELS)


def grown(name):
    return moved(*MODELS[name])


@pytest.fixture
def void(monkeypatch):
    """Gates under which a token changes no memory: retain 1, write rate 0, momentum 0; and a scan without writes, for
    retentions that are more than a factor."""
    gates_of, made_of = GateMap.forward, SelfReference._projections

    def gates(self, hidden_btd):
        found = gates_of(self, hidden_btd)
        kept = {"retain_bth": torch.ones_like(found.retain_bth), "write_bth": torch.zeros_like(found.write_bth)}
        zero = found.momentum_bth is not None and {"momentum_bth": torch.zeros_like(found.momentum_bth)}
        return type(found)(**(vars(found) | {"log_retain_bth": None, "log_momentum_bth": None} | kept | (zero or {})))

    def made(self, *inputs):
        found = made_of(self, *inputs)
        return replace(found, log_retain=torch.zeros_like(found.log_retain), rate=torch.zeros_like(found.rate))

    solved = tnt.solved

    def unshown(rule, memory, window, gates, **how):
        return solved(rule, memory, (*(torch.zeros_like(x) for x in window[:2]), window[2]), gates, **how)

    def start():
        monkeypatch.setattr(tnt, "solved", unshown)
        monkeypatch.setattr(GateMap, "forward", gates)
        monkeypatch.setattr(SelfReference, "_projections", made)
        monkeypatch.setattr(rule, "write", lambda rule, memory, *inputs: memory)

    return start


@every_model
def test_a_frozen_reader_reads_as_a_learning_one_that_does_not_write(name, void):
    """After every number of tokens, so at, before and after the borders of chunks, segments and periods."""
    model, tokens_bt = grown(name), ids(2)
    reader, states, state = frozen(model), [None], None
    for index in range(N_TIME - 1):
        _, state = model(tokens_bt[:, index : index + 1], state)
        states.append(state)
    found = [reader(tokens_bt[:, index : index + 1], state)[0] for index, state in enumerate(states) if index]
    void()
    expected = [model(tokens_bt[:, index : index + 1], state)[0] for index, state in enumerate(states) if index]
    torch.testing.assert_close(torch.cat(found, dim=1), torch.cat(expected, dim=1), rtol=0, atol=1e-10)


@every_model
def test_a_frozen_text_may_be_cut_anywhere_and_changes_no_memory(name):
    """Also where it goes over borders of chunks, segments and periods."""
    model, tokens_bt = grown(name), ids(2)
    _, state = model(tokens_bt[:, :4])
    reader, before = frozen(model), flatten(state)
    whole_bto, last = reader(tokens_bt[:, 4:], state)
    parts, after = [], state
    for part_bt in tokens_bt[:, 4:].split([1, 5, 1, 2], dim=1):
        logits_bto, after = reader(part_bt, after)
        parts.append(logits_bto)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole_bto, rtol=0, atol=1e-10)
    torch.testing.assert_close(flatten(after), flatten(last), rtol=0, atol=1e-10)
    # A segment of MAC that begins anew is given the memory as it stands.
    held = [
        path for path in before if (".memory." in path or ".kept." in path) and ".start." not in path.split("mem")[0]
    ]
    assert all(torch.equal(torch.as_tensor(before[path]), torch.as_tensor(flatten(after)[path])) for path in held)


@pytest.mark.parametrize("name, form", [(name, form) for name in rules.names() for form in accepting(named(name))])
def test_every_form_reads_frozen_what_the_next_token_would(name, form):
    """Inside a chunk and at its borders. The next token has a zero key, write rate 0, and retains all."""
    rule = named(name)
    for n_time in range(1, 9):
        inputs = window(rule, n_time + 1)
        gates = dict(vars(inputs.gates))
        for gate, value in {"retain_bth": 1.0, "write_bth": 0.0, "momentum_bth": 0.0}.items():
            if gates[gate] is not None:
                gates[gate][:, -1] = value
        last, at = inputs.cut(n_time, n_time + 1), {"form": form, "chunk": 3}
        vectors = torch.zeros_like(last.keys_bthk), last.values_bthv, last.queries_bthk
        _, left = run(rule, *inputs.cut(0, n_time).arguments(), **at)
        found = read_trusted(rule, left, last.queries_bthk, form=form)
        if form == "scan" and rule.reads == "after":
            # Some retentions act where nothing is written as well.
            expected = read(rule, left, last.queries_bthk[:, 0])[:, None]
        else:
            expected, _ = run_trusted(rule, left, vectors, last.gates, **at)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("mixer", ["mag", "mal"])
def test_persistent_tokens_are_written_into_a_fresh_memory_also_of_a_frozen_reader(mixer):
    model = moved(small({"mixer": mixer, "n_persistent_tokens": 3}), small_memory({}))
    layer, tokens_bt = model.blocks[0].mixer, ids(2)
    recall = layer.recall if mixer == "mag" else layer.memory.recall
    written = initial_state(recall, layer.attention.persistent_gd, model.embedding(tokens_bt))
    _, state = frozen(model)(tokens_bt)
    torch.testing.assert_close(state["layer"]["0"]["recall"]["memory"], written["memory"], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["lm-mac-4-each", "lm-mag-frequency-output"])
def test_a_state_from_before_frozen_tokens_were_counted_reads_on(name):
    model, tokens_bt = grown(name), ids(2)
    _, state = model(tokens_bt[:, :7])
    older = unflatten({path: leaf for path, leaf in flatten(state).items() if not path.endswith("n_frozen")})
    for reader in (model, frozen(model)):
        (found_bto, after), (expected_bto, last) = (reader(tokens_bt[:, 7:], before) for before in (older, state))
        torch.testing.assert_close(found_bto, expected_bto, rtol=0, atol=0)
        torch.testing.assert_close(flatten(after), flatten(last), rtol=0, atol=0)
