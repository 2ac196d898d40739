"""A memory that is written by one call of the native core reads and learns as tensor code has it."""

import copy
import ctypes
from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from meristem.memory.kernels.select import force_reference, plain_layers
from meristem.memory.state import State, clone, flatten
from meristem.native import write
from meristem.native.library import core, library
from meristem.nn import neural_memory
from meristem.nn.neural_memory import NeuralMemory
from meristem.nn.write import can_write, inputs_of, rule_of
from native.compared import apart

pytestmark = pytest.mark.skipif(library() is None, reason=f"there is no native core: {core().said}")

RULES = ("titans", "delta", "gated_delta", "hebbian")
MOST = {torch.float64: 1e-13, torch.float32: 3e-6}
"""How far from ``scan`` in float64 a result may be, over its length; in float32 twice what tensor code is off more."""


def memory_of(rule: str, *, spread: float = 0.3, **settings: object) -> NeuralMemory:
    """One whose gates differ from token to token."""
    module = NeuralMemory(32, 2, rule=rule, **settings)
    nn.init.normal_(module.gates.weight_hd, std=spread)
    for each in module.initial.parameters():
        nn.init.normal_(each, std=0.1)
    return module


def truth_of(module: NeuralMemory, hidden: Tensor, state: State | None = None) -> dict[str, Tensor]:
    """By ``scan``, in float64."""
    plain = copy.deepcopy(module).double()
    plain.form = "scan"
    return results(plain, hidden, state, is_native=False)


def results(module: NeuralMemory, hidden: Tensor, state: State | None, *, is_native: bool) -> dict[str, Tensor]:
    """What is read and left, and every gradient of a loss that weighs each number differently."""
    wide = module.gates.weight_hd.dtype
    hidden_btd = hidden.detach().to(wide).requires_grad_()
    with nullcontext() if is_native else force_reference():
        begun = module.init_state(hidden_btd)
        leaves = {"hidden": hidden_btd} | dict(module.named_parameters())
        if state is not None:
            for name, leaf in flatten(state).items():
                group, last = name.split(".")
                assert isinstance(leaf, Tensor)
                begun[group] = begun[group] | {last: leaf.detach().to(wide).requires_grad_()}
                leaves[name] = begun[group][last]
        read_btf, after = module(hidden_btd, begun)
        left = {"read": read_btf} | {f"after {name}": x for name, x in flatten(after).items() if isinstance(x, Tensor)}
        generator = torch.Generator().manual_seed(9)
        loss = torch.zeros((), dtype=torch.float64)
        for x in left.values():
            loss = loss + (x.double() * torch.randn(x.shape, generator=generator, dtype=torch.float64)).sum()
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    gradients = {f"d {name}": x for name, x in zip(leaves, found, strict=True) if x is not None}
    # The map of the gates as one: what is summed for a bias may cancel.
    both = [gradients.pop(f"d gates.{name}") for name in ("weight_hd", "bias_h")]
    gradients["d gates"] = torch.cat([each.flatten() for each in both])
    return {name: x.detach() for name, x in left.items()} | gradients


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is called of the core."""
    seen: list[str] = []
    run = write._run

    def counting(what: str, given: write.Write) -> None:
        seen.append(what)
        run(what, given)

    monkeypatch.setattr(write, "_run", counting)
    yield seen


def given() -> tuple[NeuralMemory, write.Inputs]:
    module, hidden = memory_of("titans").double(), torch.randn(2, 11, 32, dtype=torch.float64)
    inputs = inputs_of(module, module.qkv(hidden), module.gates.logits(hidden), module.init_state(hidden))
    return module, write.Inputs(*(x.detach().clone().requires_grad_() for x in inputs if x is not None))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("n_time, chunk", [(2, 64), (33, 16), (70, 64)])
def test_a_write_is_that_of_tensor_code(rule: str, n_time: int, chunk: int, calls: list[str]) -> None:
    """From the start and going on: reads, what is left, and every gradient; float32 is held to float64 as well."""
    module = memory_of(rule, chunk=chunk)
    hidden = torch.randn(2, n_time, 32).bfloat16().double()
    with torch.no_grad():
        _, before = copy.deepcopy(module).double()(torch.randn(2, 9, 32).double())
    calls.clear()
    for state in (None, before):
        truth = truth_of(module, hidden, state)
        plain = apart(results(module, hidden, state, is_native=False), truth)
        assert not calls
        for dtype, most in MOST.items():
            found = results(copy.deepcopy(module).to(dtype), hidden, state, is_native=True)
            assert calls == ["forward", "backward"], "the core was not called"
            calls.clear()
            for name, error in apart(found, truth).items():
                assert error < most + (2 * plain[name] if dtype == torch.float32 else 0), (dtype, name, error)


@pytest.mark.parametrize("conv", [1, 2, 8])
def test_a_sequence_shorter_than_the_convolution(conv: int) -> None:
    """Part of the tail is older than the sequence, and its gradient goes on to what was there before."""
    module, hidden = memory_of("titans", conv=conv).double(), torch.randn(2, 3, 32).double()
    with torch.no_grad():
        _, before = module(torch.randn(2, 9, 32).double())
    errors = apart(results(module, hidden, before, is_native=True), truth_of(module, hidden, before))
    assert max(errors.values()) < 1e-13, errors


@pytest.mark.parametrize("rule", RULES)
def test_gates_at_their_limits(rule: str) -> None:
    """Momentum and write rate at the border of the region, where a limit that is not smooth would be noticed."""
    module = memory_of(rule, spread=0.6, half_life=1.0, write_rate=0.9).double()
    hidden = torch.randn(2, 40, 32).double()
    errors = apart(results(module, hidden, None, is_native=True), truth_of(module, hidden))
    assert max(errors.values()) < 1e-13, errors


@pytest.mark.parametrize("rule", RULES)
def test_gates_far_beyond_their_limits(rule: str, monkeypatch: pytest.MonkeyPatch, calls: list[str]) -> None:
    """Factors of nearly 0 count as a floor, which ``scan`` has not: as in the operations that this one is made of."""
    module = memory_of(rule, spread=6.0, half_life=1.0, write_rate=0.9).double()
    hidden = torch.randn(2, 40, 32).double()
    found = results(module, hidden, None, is_native=True)
    single = results(copy.deepcopy(module).float(), hidden, None, is_native=True)
    monkeypatch.setattr(neural_memory, "can_write", lambda *_: False)
    truth = results(module, hidden, None, is_native=True)
    plain = apart(results(copy.deepcopy(module).float(), hidden, None, is_native=False), truth)
    assert calls == ["forward", "backward"] * 2
    errors = apart(found, truth)
    assert max(errors.values()) < 1e-12, errors
    assert all(error <= 2 * plain[name] + 3e-6 for name, error in apart(single, truth).items())


@pytest.mark.parametrize("rule", ["titans", "gated_delta"])
def test_what_is_projected_in_bfloat16(rule: str, calls: list[str]) -> None:
    """At most twice as far from float64 as tensor code is, and a rounding more."""
    module, hidden = memory_of(rule), torch.randn(2, 33, 32).bfloat16().double()
    truth, found = truth_of(module, hidden), []
    for is_native in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(results(module, hidden, None, is_native=is_native))
    assert calls == ["forward", "backward"]
    assert [x.dtype for x in found[0].values()] == [x.dtype for x in found[1].values()]
    ours, theirs = (apart(each, truth) for each in found)
    for name, error in ours.items():
        assert error <= 2 * theirs[name] + 2**-9, name


@pytest.mark.parametrize("cuts", [[33], [1, 3, 2, 20, 7], [16, 17]])
def test_a_write_does_not_depend_on_where_a_sequence_is_cut(cuts: list[int]) -> None:
    module, hidden = memory_of("titans").double(), torch.randn(2, 33, 32).double().requires_grad_()
    whole, after = module(hidden)
    parts, state = [], None
    for part in hidden.split(cuts, dim=1):
        read, state = module(part, state)
        parts.append(read)
    assert state is not None
    ends = [{"read": torch.cat(parts, dim=1)} | flatten(state), {"read": whole} | flatten(after)]
    gradients = [torch.autograd.grad(sum(x.square().sum() for x in end.values()), hidden)[0] for end in ends]
    for one, other in zip((*ends[0].values(), gradients[0]), (*ends[1].values(), gradients[1]), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_documents_inside_a_sequence(calls: list[str]) -> None:
    """Each is read as if it stood alone, with every gradient."""
    module, hidden = memory_of("titans").double(), torch.randn(2, 40, 32).double().requires_grad_()
    reset_mask = torch.zeros(2, 40, dtype=torch.bool)
    reset_mask[0, 13] = reset_mask[1, 5] = reset_mask[1, 31] = True
    found = []
    for is_native in (True, False):
        with nullcontext() if is_native else force_reference():
            read, _ = module(hidden, None, reset_mask=reset_mask)
            found.append((read, torch.autograd.grad(read.sin().sum(), [hidden, *module.parameters()])))
    assert "forward" in calls
    torch.testing.assert_close(found[0], found[1], rtol=1e-11, atol=1e-11)
    alone, _ = module(hidden[1:, 5:31])
    torch.testing.assert_close(found[0][0][1:, 5:31], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("of", ["read", "matrix_bhkv", "matrix_momentum_bhkv", "tail_bsd"])
def test_a_loss_of_one_result_alone(of: str) -> None:
    module, hidden = memory_of("titans").double(), torch.randn(2, 19, 32).double().requires_grad_()
    gradients = []
    for is_native in (True, False):
        with nullcontext() if is_native else force_reference():
            read, after = module(hidden)
            (({"read": read} | after["memory"] | after["conv"])[of]).square().sum().backward()
        gradients.append(hidden.grad)
        hidden.grad = None
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-11)


def test_without_gradients_nothing_is_kept_and_the_values_are_the_same() -> None:
    module, hidden = memory_of("titans"), torch.randn(2, 70, 32)
    read, after = module(hidden)
    assert [x.numel() > 0 for x in read.grad_fn.saved_tensors[7:]] == [True] * 4
    with torch.no_grad():
        plain, left = module(hidden)
    assert torch.equal(read, plain)
    assert all(torch.equal(x, left["memory"][name]) for name, x in after["memory"].items())
    inputs = inputs_of(module, module.qkv(hidden), module.gates.logits(hidden), module.init_state(hidden))
    with torch.no_grad():
        made = torch.ops.meristem.memory_write.default(*inputs, list(rule_of(module)), False)
    assert [x.numel() for x in made[4:]] == [0] * 4


def test_a_second_derivative_is_refused() -> None:
    module, hidden = memory_of("delta"), torch.randn(2, 9, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(module(hidden)[0].square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        gradient.sum().backward()


def test_the_bits_do_not_depend_on_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "WORTH_A_THREAD", 1.0)
    module, inputs = given()
    rule, found, before = rule_of(module)._replace(chunk=4), [], torch.get_num_threads()
    try:
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            left = write.memory_write(inputs, rule)
            loss = sum(x.sin().sum() for x in left if x is not None)
            found.append((*left, *torch.autograd.grad(loss, list(inputs))))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))


def test_nan_in_a_token_is_nan_in_its_row_alone() -> None:
    module, hidden = memory_of("titans", chunk=16), torch.randn(2, 48, 32)
    hidden[0, 20, 3] = float("nan")
    hidden.requires_grad_()
    read, after = module(hidden)
    assert read[0, 32:].isnan().all() and read[0, :16].isfinite().all() and read[1].isfinite().all()
    assert after["memory"]["matrix_bhkv"][0].isnan().any() and after["memory"]["matrix_bhkv"][1].isfinite().all()
    read.sum().backward()
    assert hidden.grad is not None and hidden.grad[0, 20].isnan().any() and hidden.grad[1].isfinite().all()


def test_who_decides(calls: list[str]) -> None:
    """Rules of another rate, forms that are not exact, one token, and runs that keep to tensor code."""
    hidden = torch.randn(2, 5, 32)

    def takes(module: NeuralMemory, part: Tensor = hidden, state: State | None = None) -> bool:
        return can_write(module, part, module.init_state(part) if state is None else state)

    module = memory_of("titans")
    assert takes(module) and not takes(module, hidden[:, :1]) and not takes(module, hidden.half())
    for rule in ("delta_descent", "implicit_delta", "omega", "titans_mlp"):
        assert not takes(memory_of(rule)), rule
    for form in ("scan", "frozen_chunk"):
        assert not takes(memory_of("titans", form=form)), form
    for settings in ({"gates": "channel"}, {"gate_rank": 4}, {"conv": 9}):
        assert not takes(memory_of("titans", **settings)), settings
    state = clone(module.init_state(hidden))
    state["memory"]["matrix_bhkv"] = state["memory"]["matrix_bhkv"].bfloat16()
    assert not takes(module, hidden, state)
    for part in (module.gates, module.conv):
        handle = part.register_forward_hook(lambda *_: None)
        assert not takes(module), "a hook would not hear what goes through the core"
        handle.remove()
    assert takes(module)
    with plain_layers():
        assert not takes(module)
        module(hidden)
    with force_reference():
        assert not takes(module)
        module(hidden)
    assert not calls
    module(hidden)
    assert calls == ["forward"]


@pytest.mark.parametrize("has_momentum", [False, True])
def test_the_operation_is_what_torch_expects_of_one(has_momentum: bool) -> None:
    """Shapes without values are those with them, and nothing that is given is changed."""
    module, inputs = given()
    if not has_momentum:
        logits = inputs.logits_btf[..., :4].detach().clone().requires_grad_()
        inputs = inputs._replace(most_h=None, moving_bhkv=None, logits_btf=logits)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    arguments = *inputs, list(rule_of(module)), True
    torch.library.opcheck(torch.ops.meristem.memory_write.default, arguments, test_utils=checks)


def test_channels_that_are_no_queries_keys_and_values_are_an_error() -> None:
    module, inputs = given()
    with pytest.raises(ValueError, match="found 95 channels; expected queries, keys and values of 2 x 16"):
        write.memory_write(inputs._replace(mixed_btd=inputs.mixed_btd[..., :95]), rule_of(module))


def test_the_core_refuses_what_does_not_fit() -> None:
    """A code, and nothing is touched."""
    found = library()
    assert found is not None
    module, inputs = given()
    call = {name: getattr(found, f"meristem_write_{name}") for name in ("forward", "backward")}

    def asked(change: Sequence[tuple[str, object]] = ()) -> list[int]:
        structure = write._given(inputs.dense(), rule_of(module))
        for path, value in change:
            *outer, last = path.split(".")
            part: ctypes.Structure = structure
            for name in outer:
                part = getattr(part, name)
            setattr(part, last, value)
        return [run(ctypes.byref(structure)) for run in call.values()]

    assert asked() == [2, 2], "there are no places for results"
    number = torch.zeros(1 << 16, dtype=torch.float64)
    at = number.data_ptr()
    view = write.View(at, 0, 16, 0)
    names = ("last", "last_moving", "read", "d_read", "d_last", "d_last_moving", "d_memory", "d_moving")
    places = [(f"form.{name}", view) for name in names]
    places += [(f"vectors.{name}", at) for name in ("d_x", "d_before", "d_weight")] + [("d_logits", at), ("d_most", at)]
    assert asked(places) == [2, 2], "there is no scratch"
    places.append(("form.scratch", at))
    assert asked(places) == [1, 2], "there is not enough scratch, and nothing was kept for the backward pass"
    for wrong in ("form.time", "form.heads", "form.key", "vectors.taps", "vectors.vectors", "vectors.numbers"):
        assert asked([*places, (wrong, 0)])[0] == 1, wrong
    assert number.count_nonzero() == 0


def test_the_law_above_can_fail() -> None:
    """Another limit of the write rate gives other reads."""
    module, inputs = given()
    rule = rule_of(module)
    read, *_ = write.memory_write(inputs, rule)
    other, *_ = write.memory_write(inputs, rule._replace(write_limit=0.999 * rule.write_limit))
    assert float(((read - other).norm() / read.norm()).detach()) > 1e-6
