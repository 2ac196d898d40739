"""What each rule of the catalogue means: golden numbers, invariants, and oracles that share no code with ``scan``."""

import math

import pytest
import torch
from torch import Tensor

from memory.inputs import HEADS, window
from meristem.errors import WrongValue
from meristem.memory import Gates, named, run, scan
from meristem.memory.named import rules
from meristem.memory.rule import write

GOLDEN = {
    # memory.md 3.2, set 2: reads per token, then the rows of M (value x key) after the last.
    "hebbian": ([[0.5, 1], [2.55, 0.9], [1.795, 1.31]], [[1.215, 0.58], [0.81, 0.5]]),
    "delta": ([[0.5, 1], [2.34, 0.48], [1.066, 1.052]], [[1.134, -0.068], [0.648, 0.404]]),
    "gated_delta": ([[0.5, 1], [2.361, 0.522], [1.1335, 1.067]], [[1.1421, -0.0086], [0.6642, 0.4028]]),
    "titans": ([[0.5, 1], [2.59, 0.98], [2.361, 1.542]], [[1.889, 0.472], [1.258, 0.284]]),
}


def gates_of(n_time: int, *, retain: float, write_rate: float, momentum: float | None) -> Gates:
    def full(value: float) -> Tensor:
        return torch.full((1, n_time, 1), value, dtype=torch.float64)

    return Gates(full(retain), full(write_rate), None if momentum is None else full(momentum))


@pytest.mark.parametrize("name", rules.names())
def test_golden_numbers(name: str) -> None:
    rule = named(name)
    keys = torch.tensor([[1, 0], [0.6, 0.8], [0, 1]], dtype=torch.float64)[None, :, None]
    values = torch.tensor([[1, 2], [3, 0], [-1, 1]], dtype=torch.float64)[None, :, None]
    momentum = 0.5 if rule.update.has_momentum else None
    gates = gates_of(3, retain=0.9, write_rate=0.5, momentum=momentum)
    memory = rule.init(1, 1, 2, 2, like=keys)
    read_bthv, memory = scan(rule, memory, keys, values, torch.ones_like(keys), gates)
    reads, matrix = GOLDEN[name]
    torch.testing.assert_close(read_bthv[0, :, 0], torch.tensor(reads, dtype=torch.float64), rtol=0, atol=6e-5)
    torch.testing.assert_close(
        memory["matrix_bhkv"][0, 0].mT, torch.tensor(matrix, dtype=torch.float64), rtol=0, atol=6e-5
    )


def test_titans_momentum_is_that_of_the_golden_table() -> None:
    keys = torch.tensor([[1, 0], [0.6, 0.8], [0, 1]], dtype=torch.float64)[None, :, None]
    values = torch.tensor([[1, 2], [3, 0], [-1, 1]], dtype=torch.float64)[None, :, None]
    rule = named("titans")
    gates = gates_of(3, retain=0.9, write_rate=0.5, momentum=0.5)
    _, memory = scan(rule, rule.init(1, 1, 2, 2, like=keys), keys, values, keys, gates)
    expected = torch.tensor([[0.53, -0.5], [0.16, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(memory["matrix_momentum_bhkv"][0, 0].mT, expected, rtol=0, atol=6e-5)


def test_titans_is_sgd_with_momentum_on_the_squared_error() -> None:
    """torch.optim.SGD on 1/2 |W k - v|^2, with the weights scaled by retain between backward and step."""
    rule = named("titans")
    inputs = window(rule, 13, batch=1)
    gates = Gates(
        retain_bth=torch.full_like(inputs.gates.retain_bth, 0.93),
        write_bth=torch.full_like(inputs.gates.write_bth, 0.21),
        momentum_bth=torch.full_like(inputs.gates.write_bth, 0.6),
    )
    memory = {name: torch.zeros_like(x) for name, x in inputs.memory.items()}
    read_bthv, _ = scan(rule, memory, inputs.keys_bthk, inputs.values_bthv, inputs.queries_bthk, gates)
    for head in range(HEADS):
        weight = torch.zeros(
            inputs.values_bthv.shape[-1], inputs.keys_bthk.shape[-1], dtype=torch.float64, requires_grad=True
        )
        optimizer = torch.optim.SGD([weight], lr=0.21, momentum=0.6)
        for t in range(13):
            optimizer.zero_grad()
            (0.5 * (weight @ inputs.keys_bthk[0, t, head] - inputs.values_bthv[0, t, head]).square().sum()).backward()
            with torch.no_grad():
                weight.mul_(0.93)
            optimizer.step()
            torch.testing.assert_close(read_bthv[0, t, head], weight.detach() @ inputs.queries_bthk[0, t, head])


@pytest.mark.parametrize("name", rules.names())
def test_surprise_is_the_gradient_of_the_written_loss(name: str) -> None:
    """One write without retention moves the memory by -write * d loss / d M, the loss written here by hand."""
    losses = {"Dot": lambda o, v: -(o * v).sum(), "Squared": lambda o, v: 0.5 * (o - v).square().sum()}
    rule = named(name)
    inputs = window(rule, 1)
    memory = {key: x if "momentum" not in key else torch.zeros_like(x) for key, x in inputs.memory.items()}
    gates = Gates(torch.ones_like(inputs.gates.retain_bth), inputs.gates.write_bth, inputs.gates.momentum_bth).at(0)
    after = write(rule, memory, inputs.keys_bthk[:, 0], inputs.values_bthv[:, 0], gates)
    matrix_bhkv = memory["matrix_bhkv"].clone().requires_grad_()
    recalled_bhv = torch.einsum("bhkv,bhk->bhv", matrix_bhkv, inputs.keys_bthk[:, 0])
    losses[type(rule.bias).__name__](recalled_bhv, inputs.values_bthv[:, 0]).backward()
    expected = memory["matrix_bhkv"] - gates.write_bh[..., None, None] * matrix_bhkv.grad
    torch.testing.assert_close(after["matrix_bhkv"], expected)


@pytest.mark.parametrize("name", ["delta", "gated_delta"])
def test_a_unit_key_written_at_rate_one_is_recalled_exactly(name: str) -> None:
    rule = named(name)
    inputs = window(rule, 1)
    gates = Gates(torch.ones_like(inputs.gates.retain_bth), torch.ones_like(inputs.gates.write_bth))
    read_bthv, memory = scan(rule, inputs.memory, inputs.keys_bthk, inputs.values_bthv, inputs.keys_bthk, gates)
    torch.testing.assert_close(read_bthv, inputs.values_bthv)
    _, again = scan(rule, memory, inputs.keys_bthk, inputs.values_bthv, inputs.keys_bthk, gates)
    torch.testing.assert_close(again, memory)


@pytest.mark.parametrize("name", rules.names())
def test_a_memory_nobody_writes_halves_in_its_half_life(name: str) -> None:
    rule = named(name)
    half_life = 17
    inputs = window(rule, half_life)
    memory = {key: x if "momentum" not in key else torch.zeros_like(x) for key, x in inputs.memory.items()}
    zero = torch.zeros_like(inputs.gates.write_bth)
    gates = Gates(torch.full_like(zero, 2 ** (-1 / half_life)), zero, zero if rule.update.has_momentum else None)
    _, after = scan(rule, memory, inputs.keys_bthk, inputs.values_bthv, inputs.queries_bthk, gates)
    torch.testing.assert_close(after["matrix_bhkv"], memory["matrix_bhkv"] / 2)


def test_without_momentum_titans_is_delta_to_the_bit() -> None:
    inputs = window(named("titans"), 19)
    gates = Gates(inputs.gates.retain_bth, inputs.gates.write_bth, torch.zeros_like(inputs.gates.write_bth))
    memory = {key: x if "momentum" not in key else torch.zeros_like(x) for key, x in inputs.memory.items()}
    rest = inputs.keys_bthk, inputs.values_bthv, inputs.queries_bthk
    read_bthv, _ = scan(named("titans"), memory, *rest, gates)
    matrix_only = {"matrix_bhkv": memory["matrix_bhkv"]}
    delta_bthv, _ = scan(named("delta"), matrix_only, *rest, Gates(gates.retain_bth, gates.write_bth))
    assert torch.equal(read_bthv, delta_bthv)


def test_cold_delta_is_warm_delta_in_other_letters() -> None:
    """cold(retain, write, v) = warm(retain, write / retain, retain v): memory.md 3.1."""
    inputs = window(named("delta"), 23)
    retain_bth, write_bth = inputs.gates.retain_bth, inputs.gates.write_bth
    cold_bthv, _ = scan(named("delta"), *inputs.arguments())
    values_bthv = retain_bth[..., None] * inputs.values_bthv
    warm_gates = Gates(retain_bth, write_bth / retain_bth)
    warm_bthv, _ = scan(
        named("gated_delta"), inputs.memory, inputs.keys_bthk, values_bthv, inputs.queries_bthk, warm_gates
    )
    torch.testing.assert_close(cold_bthv, warm_bthv)


def test_hebbian_without_decay_is_causal_linear_attention() -> None:
    inputs = window(named("hebbian"), 29)
    ones = torch.ones_like(inputs.gates.retain_bth)
    empty = {name: torch.zeros_like(x) for name, x in inputs.memory.items()}
    rest = inputs.keys_bthk, inputs.values_bthv, inputs.queries_bthk
    read_bthv, _ = scan(named("hebbian"), empty, *rest, Gates(ones, ones))
    score_bhts = torch.einsum("bthk,bshk->bhts", inputs.queries_bthk, inputs.keys_bthk).tril()
    torch.testing.assert_close(read_bthv, torch.einsum("bhts,bshv->bthv", score_bhts, inputs.values_bthv))


@pytest.mark.parametrize("rate, grows", [(1.9, False), (2.1, True)])
def test_titans_is_stable_up_to_a_summed_rate_of_two(rate: float, grows: bool) -> None:
    """With unit keys that come back after the momentum has died out: write / (1 - momentum) < 2 (memory.md 2.3)."""
    rule, momentum = named("titans"), 0.5
    generator = torch.Generator().manual_seed(0)
    n_time, width = 4000, 64
    keys = torch.randn(1, n_time, 1, width, generator=generator, dtype=torch.float64)
    keys = keys / keys.norm(dim=-1, keepdim=True)
    values = torch.randn(1, n_time, 1, 3, generator=generator, dtype=torch.float64)
    gates = gates_of(n_time, retain=1.0, write_rate=rate * (1 - momentum), momentum=momentum)
    _, memory = run(rule, rule.init(1, 1, width, 3, like=keys), keys, values, keys, gates)
    # Bounded means of the size of the values that it holds: 64 keys of 3 values each.
    assert (memory["matrix_bhkv"].norm() > 100 * math.sqrt(width * 3)) == grows


def test_an_unknown_rule_names_the_nearest() -> None:
    with pytest.raises(WrongValue, match="titans"):
        named("titan")


def test_the_function_is_public_even_after_the_module_was_imported() -> None:
    import meristem.memory as memory

    assert callable(memory.named)
