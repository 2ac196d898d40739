"""A step that was recorded is the step: to the bit, whatever rows join and leave, and no state that was taken changes.

What records on a GPU needs one; here the recorded step is run again by calling it, in the same fixed places.
"""

import copy
import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import zoo
from meristem.memory.kernels.select import force_reference
from meristem.memory.state import clone, flatten, join_rows, take_rows
from meristem.models import recorded
from meristem.models.decoding import Decoding
from meristem.models.generate import Sampling, generate
from meristem.models.recorded import AFTER, Steps
from meristem.nn import attention
from meristem.serve.batch import Batch
from models.decodings import assert_same_state, read_on

N_READ = 7
"""Tokens before the first step: more than any span of the zoo."""

RECORDED = {
    *("preset-attention", "preset-charrnn", "preset-chargru", "preset-default", "preset-delta-mag"),
    *("preset-gated-delta", "preset-hope-attention", "preset-lmm", "preset-titans-mag", "preset-titans-mal"),
    "lm-levels-each",
}
"""Models of the zoo whose state keeps its shapes."""


class Recorder:
    """What a device does that records: the step is run a few times, and again from the places that it was given."""

    def __init__(self):
        self.n_recorded = 0

    def __call__(self, step, device):
        for _ in range(3):
            found = step()
        self.n_recorded += 1
        return lambda: found.copy_(step()), found


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setitem(recorded.RECORDERS, "cpu", made := Recorder())
    return made


@pytest.fixture(autouse=True)
def _plainly():
    with torch.no_grad(), force_reference():
        yield


def begun(model, tokens_bt):
    return model(tokens_bt)[1]


@pytest.mark.parametrize("name", zoo.ZOO)
def test_a_recorded_step_is_the_step(name, recorder):
    """Predictions and states of every model, and which of them are recorded."""
    model, tokens_bt = zoo.grown(name), zoo.ids(2, 3 * N_READ)
    state = begun(model, tokens_bt[:, :N_READ])
    decoding = Decoding(model, state)
    taken = []
    for column_b in tokens_bt[:, N_READ:].unbind(1):
        with torch.no_grad():
            true_bto, state = model(column_b[:, None], state)
        assert torch.equal(decoding.step(column_b.tolist()), true_bto[:, -1])
        taken.append((decoding.state, clone(state)))
    assert recorder.n_recorded == (name in RECORDED)
    assert decoding.is_in_place == (name in RECORDED)
    for found, true in taken:
        assert_same_state(found, true)


class Watch(TorchDispatchMode):
    """Operations that read what a tensor holds, or bring numbers of the host to a device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if any(part in name for part in ("_local_scalar", "nonzero", "lift_fresh", "aten.equal", "masked_select")):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", sorted(RECORDED))
def test_nothing_of_a_step_waits_for_the_host(name):
    """What a CUDA graph cannot record."""
    model, tokens_bt = zoo.grown(name), zoo.ids(2, N_READ + 1)
    state = begun(model, tokens_bt[:, :N_READ])
    with Watch() as watch:
        model(tokens_bt[:, N_READ:], state)
    assert not watch.found


@pytest.mark.parametrize("name", ["preset-default", "preset-titans-mag", "preset-titans-mal"])
def test_rows_come_and_go(name, recorder):
    """Selected, joined by others and taken out, before and after a step was recorded, rows read as they do alone."""
    model, tokens_bt = zoo.grown(name), zoo.ids(4, 6 * N_READ)
    alone = [Decoding(model, begun(model, row_1t[:, :N_READ])) for row_1t in tokens_bt.split(1)]
    true_bto = torch.cat([read_on(each, row[:, N_READ:]) for each, row in zip(alone, tokens_bt.split(1), strict=True)])
    assert recorder.n_recorded == 4

    def close(found, rows, first, last):
        torch.testing.assert_close(found, true_bto[rows, first:last], rtol=0, atol=1e-12)

    decoding, at = Decoding(model, begun(model, tokens_bt[:3, :N_READ])), N_READ
    close(read_on(decoding, tokens_bt[:3, at : at + 12]), [0, 1, 2], 0, 12)
    other = Decoding(model, begun(model, tokens_bt[3:, :N_READ]))
    read_on(other, tokens_bt[3:, at : at + 12])
    decoding.select([2, 0])
    decoding.extend([other])
    close(read_on(decoding, tokens_bt[[2, 0, 3], at + 12 : at + 24]), [2, 0, 3], 12, 24)
    last = decoding.row(1)
    assert recorder.n_recorded == 4 + 3
    again = Decoding(model, last)
    close(read_on(again, tokens_bt[:1, at + 24 :]), [0], 24, true_bto.shape[1])


def test_a_batch_goes_on_with_its_record(recorder):
    """A row that takes a free place of a batch is written where the recorded step reads it; what stood there, NaN, is
    read by no other row."""
    model, tokens_bt = zoo.grown("preset-titans-mag"), zoo.ids(4, 6 * N_READ)
    states = [begun(model, row_1t[:, :N_READ]) for row_1t in tokens_bt.split(1)]
    true = Batch.of(model, 4, list(zip(states, range(4), strict=True)))
    later = tokens_bt[:, N_READ:].T.tolist()
    truths = [true.read(each) for each in later]
    recorder.n_recorded = 0
    batch = Batch.of(model, 4, list(zip(states[:3], range(3), strict=True)))
    found = [batch.read([*each[:3], 0]) for each in later[:AFTER]]
    assert recorder.n_recorded == 1
    for leaf in flatten(batch.state).values():
        leaf[3:] = torch.nan
    found += [batch.read([*each[:3], 0]) for each in later[AFTER : 2 * AFTER]]
    behind = states[3]
    for token_id in tokens_bt[3, N_READ : N_READ + 2 * AFTER]:
        _, behind = model(token_id[None, None], behind)
    batch.put(behind, 3)
    found += [batch.read(each) for each in later[2 * AFTER :]]
    assert recorder.n_recorded == 1
    for at, (row_bo, true_bo) in enumerate(zip(found, truths, strict=True)):
        n = 3 if at < 2 * AFTER else 4
        torch.testing.assert_close(row_bo[:n], true_bo[:n], rtol=0, atol=1e-12)


def test_a_text_is_written_as_before(recorder):
    """The tokens, and the state before each of them, which nobody asked for while the step moved on."""
    model = zoo.grown("preset-titans-mag")
    said = {"max_tokens": 30, "sampling": Sampling(temperature=1.0)}
    texts = []
    for n_recorded in (1, 0):
        recorder.n_recorded = 0
        if not n_recorded:
            del recorded.RECORDERS["cpu"]
        random = torch.Generator().manual_seed(1)
        texts.append(list(generate(model, zoo.ids(1, N_READ), generator=random, **said)))
        assert recorder.n_recorded == n_recorded
    recorded.RECORDERS["cpu"] = recorder  # the fixture takes it out again
    ours, plain = texts
    assert [each.token_id for each in ours] == [each.token_id for each in plain]
    for at in (0, AFTER, AFTER + 1, 29):
        assert_same_state(ours[at].state, plain[at].state)


def test_weights_may_change(recorder):
    """In place, the recorded step reads them as they are; in another place, it is recorded anew."""
    model, tokens_bt = copy.deepcopy(zoo.grown("preset-default")), zoo.ids(2, 6 * N_READ)
    steps, state = Steps(model), begun(model, tokens_bt[:, :N_READ])
    columns = iter(tokens_bt[:, N_READ:].T.tolist())
    for _ in range(AFTER):
        _, state = steps(next(columns), state)
    assert recorder.n_recorded == 1 and steps.is_recorded
    for change in (lambda x: x.mul_(1.1), lambda x: setattr(x, "data", x.data * 1.1)):
        change(model.head.weight)
        token_ids, before = next(columns), clone(state)
        logits_bo, state = steps(token_ids, state)
        assert torch.equal(logits_bo, model(torch.tensor(token_ids)[:, None], before)[0][:, -1])
    assert not steps.is_recorded


def test_what_a_step_reads_is_held(recorder):
    """Also what a cache forgets: the record of a device has addresses alone."""
    model, tokens_bt = zoo.grown("preset-default"), zoo.ids(2, 4 * N_READ)
    steps, state = Steps(model), begun(model, tokens_bt[:, :N_READ])
    for column_b in tokens_bt[:, N_READ : N_READ + AFTER].unbind(1):
        _, state = steps(column_b.tolist(), state)
    assert steps.is_recorded
    span = zoo.SMALL["sliding_window"]
    tables = [weakref.ref(x) for x in attention.rope_angles(torch.zeros(1, span, 2, 6, dtype=torch.float64))]
    attention._angles.cache_clear()
    gc.collect()
    assert all(each() is not None for each in tables)
    del steps
    gc.collect()
    assert all(each() is None for each in tables)


def test_a_step_that_cannot_be_recorded_is_read_on(monkeypatch):
    """It is tried once, and says why."""
    tried = []

    def refuses(step, device):
        tried.append(step())
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")

    monkeypatch.setitem(recorded.RECORDERS, "cpu", refuses)
    model, tokens_bt = zoo.grown("preset-default"), zoo.ids(2, 5 * N_READ)
    steps, state = Steps(model), begun(model, tokens_bt[:, :N_READ])
    for column_b in tokens_bt[:, N_READ:].unbind(1):
        true_bto, after = model(column_b[:, None], state)
        logits_bo, state = steps(column_b.tolist(), state)
        assert torch.equal(logits_bo, true_bto[:, -1])
        assert_same_state(state, after)
    assert len(tried) == 1
    assert steps.refusal == "a step cannot be recorded: operation not permitted when stream is capturing"


def test_rows_that_differ_are_not_recorded(recorder):
    """Their lengths are read on the host; alike again, once all spans are full, they are."""
    model, tokens_bt = zoo.grown("preset-default"), zoo.ids(2, 6 * N_READ)
    states = [begun(model, tokens_bt[:1, :2]), begun(model, tokens_bt[1:, :4])]
    steps, state = Steps(model), join_rows(states)
    for at in range(4 * N_READ):
        token_ids = [int(tokens_bt[0, 2 + at]), int(tokens_bt[1, 4 + at])]
        logits_bo, state = steps(token_ids, state)
        for row, token_id in enumerate(token_ids):
            true_bto, states[row] = model(torch.tensor([[token_id]]), states[row])
            torch.testing.assert_close(logits_bo[row], true_bto[0, -1], rtol=0, atol=1e-12)
    assert recorder.n_recorded == 1
    assert take_rows(state, 0, 1).keys() == states[0].keys()
