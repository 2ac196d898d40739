"""Token by token by the native core while weights learn: what the learner makes of the text, and every row alone."""

import random

import pytest
import torch

import zoo
from meristem.errors import WrongValue
from meristem.memory.kernels.select import force_reference
from meristem.memory.state import as_tensors, flatten, from_tensors, join_rows, select_rows
from meristem.models.config import LearnConfig
from meristem.models.decoding import Decoding, refusal
from meristem.models.online import online_reader
from meristem.native.library import core, library
from meristem.train.loss import cross_entropy
from models.decodings import assert_same_state, read_on, relative

pytestmark = pytest.mark.skipif(library() is None, reason=f"there is no native core: {core().said}")

CHUNK, N_TIME = 4, 23
WHICH = ["head", "last_mlp", "mlp", "all"]


def learner(model, which, lr=None):
    return online_reader(model, "weights", cross_entropy, LearnConfig(which=which, chunk=CHUNK, lr=lr))


def begun(reader, tokens_bt):
    """Read as rows that learn apart do: one by one where the learner reads no more."""
    with torch.no_grad():
        return join_rows([reader(tokens_1t, None)[1] for tokens_1t in tokens_bt.split(1)])


@pytest.mark.parametrize("n_begun", [1, 4, 7])
@pytest.mark.parametrize(
    "name, which",
    [
        *((name, which) for name in ("preset-default", "preset-titans-mal") for which in WHICH),
        *(("preset-hope-attention", which) for which in ("head", "all")),  # its last part are levels
    ],
)
def test_decoding_is_prefill_while_weights_learn(name, which, n_begun):
    """Float64, five chunks that are learned: predictions and state are those of one call, to 1e-10."""
    reader, tokens_bt = learner(zoo.grown(name), which, lr=0.3), zoo.ids(1, N_TIME)
    decoding = Decoding(reader, begun(reader, tokens_bt[:, :n_begun]))
    assert not decoding.refusal and not refusal(reader)
    found_bto, (true_bto, last) = read_on(decoding, tokens_bt[:, n_begun:]), reader(tokens_bt, None)
    assert int(last["learned"]["steps_b"]) == (N_TIME - (which in ("head", "last_mlp"))) // CHUNK, "nothing was learned"
    assert relative(found_bto, true_bto[:, n_begun:]) < 1e-10
    true, found = flatten(last), flatten(decoding.state)
    assert found.keys() == true.keys()
    for key, leaf in true.items():
        if isinstance(leaf, int) or not leaf.is_floating_point():
            assert torch.equal(torch.as_tensor(found[key]), torch.as_tensor(leaf)), key
        elif leaf.numel():
            assert relative(found[key], leaf) < 1e-6 or float((found[key] - leaf).abs().max()) < 1e-10, key


@pytest.mark.parametrize("which", WHICH)
def test_a_row_that_learns_has_the_bits_that_it_has_alone(which):
    """Beside rows that stand elsewhere in their chunks, join late, leave and change places."""
    reader = learner(zoo.grown("preset-default", torch.float32), which)
    draw, later_bt = random.Random(5), zoo.ids(8, 11, random_seed=3)
    states = [begun(reader, zoo.ids(1, 1 + n, random_seed=n)) for n in range(8)]
    alone = [Decoding(reader, state) for state in states]
    true_bto = torch.cat([read_on(each, later_bt[row : row + 1]) for row, each in enumerate(alone)])
    rows = draw.sample(range(8), 5)
    together = Decoding(reader, join_rows([states[row] for row in rows[:3]]))
    together.extend([Decoding(reader, states[row]) for row in rows[3:]])
    assert not together.refusal
    assert torch.equal(read_on(together, later_bt[rows, :6]), true_bto[rows, :6])
    kept = [4, 0, 2]
    together.select(kept)
    rows = [rows[at] for at in kept]
    assert torch.equal(read_on(together, later_bt[rows, 6:]), true_bto[rows, 6:])
    assert_same_state(select_rows(together.state, [1]), alone[rows[1]].state)
    assert_same_state(together.row(1), alone[rows[1]].state)


@pytest.mark.parametrize("which", WHICH)
def test_a_state_that_learns_comes_and_goes_without_a_bit_lost(which):
    """Taken out and put in after any token, saved in between; what was taken out does not change later."""
    reader, tokens_bt = learner(zoo.grown("preset-titans-mag", torch.float32), which), zoo.ids(1, N_TIME)
    state = begun(reader, tokens_bt[:, :2])
    whole = Decoding(reader, state)
    for at in range(2, N_TIME):
        before = {key: leaf.clone() for key, leaf in as_tensors(state).items()}
        again = Decoding(reader, state)
        assert torch.equal(again.step(tokens_bt[:, at].tolist()), whole.step(tokens_bt[:, at].tolist()))
        assert_same_state(state, from_tensors(before))
        state = from_tensors({key: leaf.clone() for key, leaf in as_tensors(again.state).items()})
        assert_same_state(state, whole.state)


def test_a_low_rank_change_is_read_by_torch():
    """It is no weight of the model; the reason is said, and the text goes on as it did."""
    reader, tokens_bt = learner(zoo.grown("preset-default"), "low_rank"), zoo.ids(1, 9)
    decoding = Decoding(reader, begun(reader, tokens_bt[:, :5]))
    assert decoding.refusal == refusal(reader) != "" and "low-rank" in decoding.refusal
    assert relative(read_on(decoding, tokens_bt[:, 5:]), reader(tokens_bt, None)[0][:, 5:]) < 1e-12


@pytest.mark.parametrize("which", WHICH)
def test_a_token_that_is_none_leaves_every_row_as_it_was(which):
    reader = learner(zoo.grown("preset-default"), which)
    state = begun(reader, zoo.ids(2, 6))
    decoding = Decoding(reader, state)
    with pytest.raises(WrongValue, match=f"holds 0 to {zoo.VOCABULARY - 1}"):
        decoding.step([1, zoo.VOCABULARY])
    assert_same_state(decoding.state, state)


@pytest.mark.parametrize("which", WHICH)
def test_weights_that_change_below_what_was_learned_are_read(which):
    """The sum of both is what predicts, as it is where torch reads."""
    model = zoo.moved(*zoo.ZOO["preset-default"])
    reader = learner(model, which, lr=0.3)
    state = begun(reader, zoo.ids(1, 10))
    decoding = Decoding(reader, state)
    decoding.step([3])
    with torch.no_grad():
        for parameter in (model.blocks[1].mlp.gate_up.weight, model.head.weight):
            parameter.mul_(1.5)
    with force_reference():
        truth = Decoding(reader, decoding.state)
        true_bo = truth.step([4])
    assert not decoding.refusal and relative(decoding.step([4]), true_bo) < 1e-10
