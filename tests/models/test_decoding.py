"""What the native core reads token by token is what the model reads: to rounding, and to the bit whatever stands beside
it."""

import copy
import gc
import random

import pytest
import torch

import zoo
from meristem.errors import WrongValue
from meristem.memory.kernels.select import force_reference
from meristem.memory.state import as_tensors, flatten, from_tensors, is_mixed, join_rows, select_rows, take_rows
from meristem.models.build import build
from meristem.models.config import ModelConfig
from meristem.models.decoding import Decoding
from meristem.models.generate import Sampling, generate
from meristem.models.load import load
from meristem.models.online import frozen
from meristem.models.packed import MANY_THREADS, NotTaken, parts_of
from meristem.native.library import core
from meristem.nn.config import MemoryConfig
from models.decodings import assert_same_state, read_on, relative

pytestmark = pytest.mark.skipif(core().library is None, reason=f"the native core is not there: {core().said}")

N_TIME = 23
"""Tokens: the longest that every model of the zoo reads at once; a window of 5 wraps four times."""

SIZES = {"dim": 12, "n_layers": 2, "n_heads": 2, "mlp_dim": 17, "sliding_window": 5}
RULES = ("hebbian", "delta", "gated_delta", "implicit_delta", "delta_descent", "titans", "momentum_delta")


def settings_of(model: dict, memory: dict) -> tuple[ModelConfig, MemoryConfig]:
    reads = ModelConfig.model_validate(model).reads
    model = {key: value for key, value in SIZES.items() if key in reads} | model
    return ModelConfig.model_validate(model), MemoryConfig.model_validate({"head_dim": 4, "chunk": 3} | memory)


VARIED = {
    **{f"memory-{rule}": ({"mixer": "memory"}, {"rule": rule}) for rule in RULES},
    **{
        f"combine-{name}": ({"combine": name}, {})
        for name in ("gated", "normalised", "projected", "sigmoid", "additive")
    },
    "mal": ({"mixer": "mal", "is_residual": False}, {"rule": "delta"}),
    "persistent": ({"n_persistent_tokens": 3, "combine": "additive"}, {}),
    "persistent-mal": ({"mixer": "mal", "n_persistent_tokens": 1, "rope": False}, {}),
    "not-rotated": ({"mixer": "attention", "rope": False, "tied": True, "mlp": "gelu"}, {}),
    "one-key": ({"sliding_window": 1}, {"conv": 1}),
    "two-taps": ({"dim": 10, "n_heads": 1}, {"conv": 2, "head_dim": 5}),
    "warm-before": ({"mixer": "memory"}, {"rule": "gated_delta", "reads": "before", "write_limit": 0.7}),
    "leader": ({"mixer": "memory"}, {"rule": "delta", "update": "leader"}),
    "scan": ({"mixer": "memory"}, {"rule": "titans", "form": "scan", "retain_lr": 0.1}),
    "layers": ({"layers": [{"mixer": "memory", "rule": "delta"}, {"mixer": "attention"}]}, {}),
    **{
        f"self-{name}": (
            {"mixer": "self_reference"},
            {"self_reference": {"chunk_memory": 2, "chunk_other": 4, "eta_scale": 0.3, "half_life": 9} | chosen},
        )
        for name, chosen in {
            "squared": {"loss": "squared"},
            "asking": {"adaptive_query": True, "chunk_memory": 8},
            "adaptive": {"setting": "adaptive", "unit_value": False},
            "adaptive-squared": {"setting": "adaptive", "loss": "squared", "adaptive_query": True},
            "static-squared": {"setting": "static", "loss": "squared"},
            "every-token": {"chunk_memory": 1, "chunk_other": 1},
        }.items()
    },
    **{
        f"levels-{name}": (
            {"mixer": "self_reference", "mlp": "levels", "levels": {"count": 3, "periods": [1, 2, 5]} | chosen},
            {"head_dim": 12, "conv": 2},
        )
        for name, chosen in {
            "slowest": {"order": "slowest", "tokens": "pooled"},
            "independent": {"variant": "independent"},
            "independent-pooled": {"variant": "independent", "tokens": "pooled"},
        }.items()
    },
    "levels-hybrid": (
        {
            "layers": [{"mixer": "self_reference"}, {"mixer": "mag"}],
            "mlp": "levels",
            "levels": {"count": 2, "tokens": "pooled", "periods": [1, 3]},
        },
        {"conv": 1},
    ),
    "wide-self": ({"mixer": "self_reference", "dim": 72, "mlp": "levels", "mlp_dim": 70}, {"head_dim": 36}),
    "wide": ({"dim": 96, "n_heads": 2, "mlp_dim": 70, "sliding_window": 37}, {"head_dim": 48, "init": "induction"}),
}
"""Every linear rule, every way to combine, every mixer and knob that the core knows, at odd sizes."""


def begun(model, tokens_bt):
    with torch.no_grad():
        return model(tokens_bt)[1]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", zoo.ZOO)
def test_the_core_takes_what_it_is_said_to_take(name):
    """No model is read by torch unnoticed; what is not taken says why, and goes on as it did."""
    model, tokens_bt = zoo.grown(name), zoo.ids(2)
    decoding = Decoding(model, begun(model, tokens_bt[:, :9]))
    assert (not decoding.refusal) == (name in zoo.NATIVE), decoding.refusal
    torch.testing.assert_close(read_on(decoding, tokens_bt[:, 9:]), model(tokens_bt)[0][:, 9:], rtol=0, atol=1e-10)
    torch.testing.assert_close(flatten(decoding.state), flatten(begun(model, tokens_bt)), rtol=0, atol=1e-10)


@pytest.mark.parametrize("n_begun", [1, 4, 7])
@pytest.mark.parametrize("name", [*sorted(zoo.NATIVE), *VARIED])
def test_decoding_is_prefill(name, n_begun):
    """Float64: predictions and state after any beginning are those of one forward, to 1e-13."""
    model = zoo.grown(name) if name in zoo.ZOO else zoo.moved(*settings_of(*VARIED[name]))
    tokens_bt = zoo.ids(3, 90 if name.startswith("wide") else N_TIME)
    decoding = Decoding(model, begun(model, tokens_bt[:, :n_begun]))
    assert not decoding.refusal
    found_bto, (true_bto, last) = read_on(decoding, tokens_bt[:, n_begun:]), model(tokens_bt)
    assert relative(found_bto, true_bto[:, n_begun:]) < 1e-13
    true, found = flatten(last), flatten(decoding.state)
    assert found.keys() == true.keys()
    assert all(
        relative(found[name], leaf) < 1e-13 if isinstance(leaf, torch.Tensor) else found[name] == leaf
        for name, leaf in true.items()
        if not isinstance(leaf, torch.Tensor) or leaf.numel()
    )


@pytest.mark.parametrize("name", sorted(zoo.NATIVE))
def test_float32_is_as_near_to_the_truth_as_torch(name):
    """3e-6 of the predictions' length from the same weights in float64, and within twice what torch is off."""
    model, tokens_bt = zoo.grown(name, torch.float32), zoo.ids(16, N_TIME)
    true_bto = copy.deepcopy(model).double()(tokens_bt)[0][:, 4:]
    state = begun(model, tokens_bt[:, :4])
    found_bto = read_on(Decoding(model, state), tokens_bt[:, 4:])
    with force_reference():
        plain_bto = read_on(Decoding(model, state), tokens_bt[:, 4:])
    assert relative(found_bto, true_bto) < min(3e-6, 2 * relative(plain_bto, true_bto))


@pytest.mark.parametrize(
    "name", ["preset-titans-mag", "preset-default", "preset-titans-mal", "preset-hope", "levels-hybrid", "wide"]
)
def test_a_row_has_the_bits_that_it_has_alone(name):
    """Alone, and in batches of up to 64 rows that have read texts of other lengths, one of which holds NaN."""
    model = zoo.grown(name, torch.float32) if name in zoo.ZOO else zoo.moved(*settings_of(*VARIED[name]), torch.float32)
    draw = random.Random(5)
    texts = [begun(model, zoo.ids(8, 1 + n, random_seed=n)) for n in range(0, 16, 2)]
    states = [take_rows(texts[row // 8], row % 8, row % 8 + 1) for row in range(64)]
    later_bt = zoo.ids(64, 7, random_seed=3)
    alone = [Decoding(model, state) for state in states]
    true_bto = torch.cat([read_on(each, later_bt[row : row + 1]) for row, each in enumerate(alone)])
    poisoned = {
        key: leaf * float("nan") if leaf.is_floating_point() else leaf
        for key, leaf in as_tensors(begun(model, zoo.ids(1, 6))).items()
    }
    for size in (1, 2, 3, 4, 5, 6, 11, 63):
        rows = draw.sample(range(64), size)
        together = Decoding(model, join_rows([from_tensors(poisoned), *(states[row] for row in rows)]))
        found_bto = read_on(together, torch.cat([later_bt[:1], later_bt[rows]]))
        assert not together.refusal and torch.equal(found_bto[1:], true_bto[rows]) and found_bto[0].isnan().all()
        assert_same_state(select_rows(together.state, [size]), alone[rows[-1]].state)


@pytest.mark.parametrize(
    "name",
    [
        *("preset-titans-mag", "preset-default", "preset-titans-mal", "preset-lmm", "one-key"),
        *("preset-hope", "self-asking", "levels-slowest", "levels-hybrid"),
    ],
)
def test_a_state_comes_and_goes_without_a_bit_lost(name):
    """Taken out and put in at any token, saved and loaded in between: the future is the same, and torch can go on."""
    model = zoo.grown(name, torch.float32) if name in zoo.ZOO else zoo.moved(*settings_of(*VARIED[name]), torch.float32)
    tokens_bt = zoo.ids(3, N_TIME)
    state = begun(model, tokens_bt[:, :2])
    whole = Decoding(model, state)
    assert not whole.refusal
    assert_same_state(Decoding(model, state).state, state)
    for at in range(2, N_TIME):
        again = Decoding(model, state)
        assert torch.equal(again.step(tokens_bt[:, at].tolist()), whole.step(tokens_bt[:, at].tolist()))
        state = from_tensors({key: leaf.clone() for key, leaf in as_tensors(again.state).items()})
        assert_same_state(state, whole.state)
    later_bt = zoo.ids(3, 5, random_seed=9)
    torch.testing.assert_close(
        model(later_bt, whole.state)[0], model(torch.cat([tokens_bt, later_bt], 1))[0][:, -5:], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", ["preset-titans-mag", "preset-hope", "lm-levels-pooled"])
def test_rows_that_have_read_differently_go_together(name):
    """Their state says so, and each row of it is that of the row alone."""
    model = zoo.grown(name)
    states = [begun(model, zoo.ids(1, n)) for n in (1, 3, 11)]
    together = Decoding(model, join_rows(states))
    together.step([1, 2, 3])
    assert not together.refusal and is_mixed(together.state)
    for row, state in enumerate(states):
        alone = Decoding(model, state)
        alone.step([row + 1])
        found = select_rows(together.state, [row])
        assert_same_state(found, alone.state)


@pytest.mark.parametrize("name", ["preset-hope", "self-static-squared", "levels-hybrid"])
def test_a_frozen_self_reference_is_read_and_not_written(name):
    """Its memories and their count stay to the bit, while levels go on counting; then it is written again."""
    model = zoo.grown(name) if name in zoo.ZOO else zoo.moved(*settings_of(*VARIED[name]))
    still, tokens_bt = frozen(model), zoo.ids(2, N_TIME)
    state = begun(model, tokens_bt[:, :9])
    decoding = Decoding(still, state)
    assert relative(read_on(decoding, tokens_bt[:, 9:]), still(tokens_bt[:, 9:], state)[0]) < 1e-13
    found, true, before = flatten(decoding.state), flatten(still(tokens_bt[:, 9:], state)[1]), flatten(state)
    for key in before:
        if ".memory." in key and "matrix" in key:
            assert torch.equal(found[key], before[key]), key
        if isinstance(before[key], int):
            assert found[key] == true[key], key
    again = Decoding(model, decoding.state)
    assert not decoding.refusal and not again.refusal
    assert relative(again.step([1, 2]), model(torch.tensor([[1], [2]]), decoding.state)[0][:, -1]) < 1e-13


@pytest.mark.parametrize("mixer", ["mag", "mal", "memory"])
def test_a_frozen_memory_is_read_and_not_written(mixer):
    """``models.online.frozen``: the memory stays to the bit, and what is read is what the model reads."""
    model = zoo.moved(*settings_of({"mixer": mixer}, {"rule": "momentum_delta"}))
    still, tokens_bt = frozen(model), zoo.ids(2, N_TIME)
    state = begun(model, tokens_bt[:, :9])
    decoding = Decoding(still, state)
    assert not decoding.refusal
    assert relative(read_on(decoding, tokens_bt[:, 9:]), still(tokens_bt[:, 9:], state)[0]) < 1e-13
    found, before = flatten(decoding.state), flatten(state)
    assert all(torch.equal(found[name], before[name]) for name in before if "matrix" in name)


def test_weights_that_change_are_packed_anew():
    """In place, by an optimizer's step or a new storage, in the middle of a text."""
    model = zoo.moved(*zoo.ZOO["preset-titans-mag"])
    state, one = begun(model, zoo.ids(1, 6)), [[3], [4], [5]]
    decoding, truth = Decoding(model, state), Decoding(model, state)
    for change in range(3):
        weight = model.blocks[change % 2].mlp.gate_up.weight
        if change == 0:
            weight.mul_(1.5)
        elif change == 1:
            weight.data = weight.data * 0.5
        else:
            weight.grad = torch.ones_like(weight)
            torch.optim.SGD([weight], lr=0.1).step()
        with force_reference():
            truth = Decoding(model, truth.state)
            true_bo = truth.step(one[change])
        assert relative(decoding.step(one[change]), true_bo) < 1e-13 and not decoding.refusal


def test_what_listens_to_a_module_is_heard():
    """A model with a hook is read by torch."""
    model, heard = zoo.moved(*zoo.ZOO["preset-titans-mag"]), []
    state = begun(model, zoo.ids(1, 6))
    handle = model.blocks[1].mlp.register_forward_hook(lambda *args: heard.append(1))
    decoding = Decoding(model, state)
    decoding.step([1])
    assert decoding.refusal == "something listens to a SwiGLU of it" and heard == [1]
    handle.remove()
    assert not Decoding(model, state).refusal


def test_force_reference_turns_it_off():
    model = zoo.grown("preset-titans-mag")
    state = begun(model, zoo.ids(1, 6))
    with force_reference():
        decoding = Decoding(model, state)
        assert "force_reference" in decoding.refusal
        assert torch.equal(decoding.step([5]), model(torch.tensor([[5]]), state)[0][:, -1])


def test_a_large_model_is_left_to_many_threads(monkeypatch):
    """Its weights arrive sooner with several threads, which the core does not have."""
    model = zoo.grown("preset-titans-mag")
    state, before = begun(model, zoo.ids(1, 6)), torch.get_num_threads()
    monkeypatch.setattr("meristem.models.packed.LARGE_BYTES", 1 << 10)
    try:
        torch.set_num_threads(MANY_THREADS)
        assert Decoding(model, state).refusal.endswith(f"MiB, and torch reads them with {MANY_THREADS} threads")
        torch.set_num_threads(1)
        assert not Decoding(model, state).refusal
    finally:
        torch.set_num_threads(before)


def test_not_a_number_stays_one():
    """In a weight or in a state, and in that row alone."""
    model = zoo.moved(*zoo.ZOO["preset-default"], torch.float32)
    state = begun(model, zoo.ids(2, 6))
    for name in flatten(state):
        bad = {key: leaf.clone() for key, leaf in as_tensors(state).items()}
        bad[name][0] = float("nan")
        logits_bo = Decoding(model, from_tensors(bad)).step([1, 2])
        assert logits_bo[0].isnan().all() and torch.equal(logits_bo[1], Decoding(model, state).step([1, 2])[1]), name
    model.blocks[0].mixer.recall.gates.bias_h[0] = float("nan")
    assert Decoding(model, state).step([1, 2]).isnan().all()


@pytest.mark.parametrize("token_id", [-1, zoo.VOCABULARY, 2**40])
def test_a_token_that_is_none_is_refused_and_nothing_is_read(token_id):
    model = zoo.grown("preset-titans-mag")
    state = begun(model, zoo.ids(2, 6))
    decoding = Decoding(model, state)
    with pytest.raises(WrongValue, match=f"the vocabulary of this model holds 0 to {zoo.VOCABULARY - 1}"):
        decoding.step([1, token_id])
    assert_same_state(decoding.state, state)


def test_packed_weights_go_with_their_model_and_are_shared_by_its_readers():
    model = zoo.moved(*zoo.ZOO["preset-titans-mag"])
    state = begun(model, zoo.ids(1, 6))
    first, second = Decoding(model, state), Decoding(model, state)
    assert first._rows.packed is second._rows.packed
    packed = first._rows.packed
    tensors = len(packed.tensors)
    assert tensors == len([*model.parameters(), *model.buffers()])
    del first, second, model
    gc.collect()
    from meristem.models.packed import _LAST

    assert packed not in [*_LAST.values()]


BEGINNING = "My name is Ada. I live in Oslo and I work as a baker.\nWhere do I"


def written(loaded, n_tokens):
    ids_bt = torch.tensor([loaded.tokenizer.encode(BEGINNING)])
    how = {"max_tokens": n_tokens, "sampling": Sampling(temperature=0), "generator": torch.Generator()}
    return ids_bt, [drawn.token_id for drawn in generate(loaded.model, ids_bt, **how)]


def test_greedy_text_is_that_of_one_forward():
    """Five hundred tokens of the model in the box, whose window wraps seven times."""
    loaded = load()
    ids_bt, found = written(loaded, 500)
    assert not Decoding(loaded.model, begun(loaded.model, ids_bt)).refusal
    predicted_bto, _ = loaded.model(torch.cat([ids_bt, torch.tensor([found])], dim=1))
    assert predicted_bto[0, ids_bt.shape[1] - 1 : -1].argmax(-1).tolist() == found


@pytest.mark.slow
def test_greedy_text_is_that_of_torch():
    """The same, token by token."""
    loaded = load()
    _, found = written(loaded, 500)
    with force_reference():
        assert written(loaded, 500)[1] == found


def test_the_state_of_a_drawn_token_is_the_one_of_its_time():
    """Whenever it is asked for, also after the text has gone on."""
    model = zoo.grown("preset-titans-mag", torch.float32)
    how = {"sampling": Sampling(temperature=0), "generator": torch.Generator()}
    at_once = [flatten(drawn.state) for drawn in generate(model, zoo.ids(1, 5), max_tokens=6, **how)]
    later = [flatten(drawn.state) for drawn in list(generate(model, zoo.ids(1, 5), max_tokens=6, **how))]
    assert all(torch.equal(one[name], other[name]) for one, other in zip(at_once, later, strict=True) for name in one)


def test_a_model_of_another_kind_of_state_goes_on_in_torch():
    """A state that holds what the core does not is left to the model, which reads it or says what is wrong."""
    model = zoo.grown("preset-titans-mag")
    state = begun(model, zoo.ids(2, 6))
    del state["layer"]["1"]
    decoding = Decoding(model, state)
    assert decoding.refusal.startswith("its state has or lacks what the core does not hold: layer.1.")
    part = Decoding(
        build(*zoo.ZOO["preset-titans-mag"], zoo.VOCABULARY, 3), take_rows(begun(model, zoo.ids(2, 6)), 0, 1)
    )
    assert "torch.float64" in part.refusal


@pytest.mark.parametrize("name", ["preset-hope", "lm-levels-each"])
def test_what_only_the_core_of_this_process_has_is_not_given_to_others(name):
    """The library of the edge reads no self-reference and no levels, and is given none."""
    with pytest.raises(NotTaken, match="layer 0 has a self-reference or levels"):
        parts_of(zoo.grown(name))
