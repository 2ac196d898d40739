"""What each rule of the catalogue means: golden numbers, invariants, and oracles that share no code with ``scan``."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from memory.inputs import HEADS, Window, named, window
from meristem.config import preset_names
from meristem.errors import ConflictingKeys, WrongValue
from meristem.memory import Gates, run, scan
from meristem.memory import named as catalogue
from meristem.memory.bias import huber_switch, power, squared
from meristem.memory.features import identity
from meristem.memory.named import rules
from meristem.memory.retention import power_norm
from meristem.memory.rule import write
from meristem.memory.structure import matrix, two_slots
from meristem.memory.update import momentum

GOLDEN = {
    # memory.md 3.2, set 2: reads per token, then the rows of M (value x key) after the last.
    "hebbian": ([[0.5, 1], [2.55, 0.9], [1.795, 1.31]], [[1.215, 0.58], [0.81, 0.5]]),
    "delta": ([[0.5, 1], [2.34, 0.48], [1.066, 1.052]], [[1.134, -0.068], [0.648, 0.404]]),
    "gated_delta": ([[0.5, 1], [2.361, 0.522], [1.1335, 1.067]], [[1.1421, -0.0086], [0.6642, 0.4028]]),
    "titans": ([[0.5, 1], [2.59, 0.98], [2.361, 1.542]], [[1.889, 0.472], [1.258, 0.284]]),
    "titans, frozen": ([[0.5, 1], [2.8, 1.4], [3.195, 2.01]], [[2.015, 1.18], [1.51, 0.5]]),
    "delta, before": ([[0, 0], [0.5, 1], [2.34, 0.48]], [[1.134, -0.068], [0.648, 0.404]]),
}


def gates_of(n_time: int, *, retain: float, write_rate: float, momentum: float | None) -> Gates:
    def full(value: float) -> Tensor:
        return torch.full((1, n_time, 1), value, dtype=torch.float64)

    return Gates(full(retain), full(write_rate), None if momentum is None else full(momentum))


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_numbers(name: str) -> None:
    """The worked example of memory.md 3.2."""
    rule = named(name.split(",")[0])
    if name.endswith("before"):
        rule = replace(rule, reads="before")
    keys = torch.tensor([[1, 0], [0.6, 0.8], [0, 1]], dtype=torch.float64)[None, :, None]
    values = torch.tensor([[1, 2], [3, 0], [-1, 1]], dtype=torch.float64)[None, :, None]
    momentum = 0.5 if rule.update.has_momentum else None
    gates = gates_of(3, retain=0.9, write_rate=0.5, momentum=momentum)
    form = "frozen_chunk" if name.endswith("frozen") else "scan"
    memory = rule.init(1, 1, 2, 2, like=keys)
    read_bthv, memory = run(rule, memory, keys, values, torch.ones_like(keys), gates, form=form, chunk=3)
    reads, matrix = GOLDEN[name]
    torch.testing.assert_close(read_bthv[0, :, 0], torch.tensor(reads, dtype=torch.float64), rtol=0, atol=6e-5)
    torch.testing.assert_close(
        memory["matrix_bhkv"][0, 0].mT, torch.tensor(matrix, dtype=torch.float64), rtol=0, atol=6e-5
    )


@pytest.mark.parametrize(
    "form, momenta", [("scan", [[0.53, -0.5], [0.16, 0.5]]), ("frozen_chunk", [[0.575, 0.1], [0.25, 0.5]])]
)
def test_titans_momentum_is_that_of_the_golden_table(form: str, momenta: list[list[float]]) -> None:
    keys = torch.tensor([[1, 0], [0.6, 0.8], [0, 1]], dtype=torch.float64)[None, :, None]
    values = torch.tensor([[1, 2], [3, 0], [-1, 1]], dtype=torch.float64)[None, :, None]
    rule = named("titans")
    gates = gates_of(3, retain=0.9, write_rate=0.5, momentum=0.5)
    memory = rule.init(1, 1, 2, 2, like=keys)
    _, memory = run(rule, memory, keys, values, torch.ones_like(keys), gates, form=form, chunk=3)
    expected = torch.tensor(momenta, dtype=torch.float64)
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


@pytest.mark.parametrize("name", ["delta", "gated_delta"])
def test_a_unit_key_written_at_rate_one_is_recalled_exactly(name: str) -> None:
    """S1-M4: where nothing fades; and writing the pair again changes nothing."""
    rule = named(name)
    inputs = window(rule, 1)
    gates = Gates(torch.ones_like(inputs.gates.retain_bth), torch.ones_like(inputs.gates.write_bth))
    read_bthv, memory = scan(rule, inputs.memory, inputs.keys_bthk, inputs.values_bthv, inputs.keys_bthk, gates)
    torch.testing.assert_close(read_bthv, inputs.values_bthv)
    _, again = scan(rule, memory, inputs.keys_bthk, inputs.values_bthv, inputs.keys_bthk, gates)
    torch.testing.assert_close(again, memory)


FADING = [name for name in rules.names() if named(name).has_retain and named(name).retention.name == "decay"]


@pytest.mark.parametrize("name", FADING)
def test_a_memory_nobody_writes_halves_in_its_half_life(name: str) -> None:
    """Section 12, half-life: ``retain = 2^(-1/H)`` for H tokens."""
    rule = named(name)
    half_life = 17
    inputs = window(rule, half_life)
    memory = {key: x if "momentum" not in key else torch.zeros_like(x) for key, x in inputs.memory.items()}
    zero = torch.zeros_like(inputs.gates.write_bth)
    gates = replace(inputs.gates, retain_bth=torch.full_like(zero, 2 ** (-1 / half_life)), write_bth=zero)
    gates = replace(gates, momentum_bth=zero if rule.update.has_momentum else None)
    _, after = scan(rule, memory, inputs.keys_bthk, inputs.values_bthv, inputs.queries_bthk, gates)
    for weight in rule.structure.weights:
        torch.testing.assert_close(after[weight], memory[weight] / 2)


def test_without_momentum_titans_is_delta_to_the_bit() -> None:
    """S1-M5: momentum 0 is no momentum."""
    inputs = window(named("titans"), 19)
    gates = Gates(inputs.gates.retain_bth, inputs.gates.write_bth, torch.zeros_like(inputs.gates.write_bth))
    memory = {key: x if "momentum" not in key else torch.zeros_like(x) for key, x in inputs.memory.items()}
    rest = inputs.keys_bthk, inputs.values_bthv, inputs.queries_bthk
    read_bthv, _ = scan(named("titans"), memory, *rest, gates)
    matrix_only = {"matrix_bhkv": memory["matrix_bhkv"]}
    delta_bthv, _ = scan(named("delta"), matrix_only, *rest, Gates(gates.retain_bth, gates.write_bth))
    assert torch.equal(read_bthv, delta_bthv)


def test_cold_delta_is_warm_delta_in_other_letters() -> None:
    """S1-M4: cold(retain, write, v) = warm(retain, write / retain, retain v), memory.md 3.1."""
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
    """Section 12, stability: unit keys that come back after the momentum has died out, write / (1 - momentum) < 2."""
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
    """S1-M22."""
    with pytest.raises(WrongValue, match="titans"):
        named("titan")


def test_the_function_is_public_even_after_the_module_was_imported() -> None:
    import meristem.memory as memory

    assert callable(memory.named)


def test_every_rule_of_ours_has_a_preset() -> None:
    """S1-M22."""
    ours = {origin.name for origin in rules.origins() if origin.distribution == "meristem"}
    assert {f"lmm-{name}" for name in ours} <= set(preset_names())


def test_implicit_delta_is_stable_at_any_rate() -> None:
    """S3b-S4: at a rate of a million the key is overwritten exactly, and no more."""
    rule = named("implicit_delta")
    inputs = window(rule, 50)
    gates = replace(inputs.gates, write_bth=torch.full_like(inputs.gates.write_bth, 1e6), retain_bth=ones(inputs))
    read_bthv, _ = scan(rule, inputs.memory, inputs.keys_bthk, inputs.values_bthv, inputs.keys_bthk, gates)
    torch.testing.assert_close(read_bthv, inputs.values_bthv, rtol=0, atol=1e-4)


def test_delta_descent_with_a_dot_bias_is_delta_at_the_proximal_rate() -> None:
    """S3b-S1."""
    inputs = window(named("delta"), 17)
    rate_bth = inputs.gates.write_bth / (1 + inputs.gates.write_bth)
    rest = inputs.memory, inputs.keys_bthk, inputs.values_bthv, inputs.queries_bthk
    descent_bthv, _ = scan(replace(named("delta_descent"), reads="after"), *rest, inputs.gates)
    torch.testing.assert_close(descent_bthv, scan(named("delta"), *rest, replace(inputs.gates, write_bth=rate_bth))[0])


def test_delta_descent_erases_twice_with_a_squared_bias() -> None:
    """S3b-S1: ``W (retain I - 2 rate k k^T) + rate v k^T``."""
    rule = replace(named("delta_descent"), bias=squared())
    inputs = window(rule, 1)
    rate = (inputs.gates.write_bth / (1 + inputs.gates.write_bth))[:, 0, :, None]
    old_bhkv, key_bhk = inputs.memory["matrix_bhkv"], inputs.keys_bthk[:, 0]
    recalled_bhv = torch.einsum("bhk,bhkv->bhv", key_bhk, old_bhkv)
    written_bhv = rate * (inputs.values_bthv[:, 0] - 2 * recalled_bhv)
    expected = inputs.gates.retain_bth[:, 0, :, None, None] * old_bhkv
    expected = expected + torch.einsum("bhk,bhv->bhkv", key_bhk, written_bhv)
    _, after = scan(rule, *inputs.arguments())
    torch.testing.assert_close(after["matrix_bhkv"], expected)


def test_the_proximal_rate_is_the_minimiser() -> None:
    """S3b-S4: the gradient of ``1/2 |W k - v|^2 + |W - W_0|^2 / 2 write`` vanishes after an implicit write."""
    rule = named("implicit_delta")
    inputs = window(rule, 1)
    gates = replace(inputs.gates, retain_bth=ones(inputs))
    after = write(rule, inputs.memory, inputs.keys_bthk[:, 0], inputs.values_bthv[:, 0], gates.at(0))
    matrix_bhkv = after["matrix_bhkv"].clone().requires_grad_()
    recalled_bhv = torch.einsum("bhk,bhkv->bhv", inputs.keys_bthk[:, 0], matrix_bhkv)
    away = (matrix_bhkv - inputs.memory["matrix_bhkv"]).square().sum(dim=(-2, -1)) / (2 * gates.write_bth[:, 0])
    (0.5 * (recalled_bhv - inputs.values_bthv[:, 0]).square().sum() + away.sum()).backward()
    assert matrix_bhkv.grad.abs().max() < 1e-10


def test_memora_keeps_its_columns_on_the_simplex() -> None:
    """S1-M9: after 1,000 tokens every column sums to 1; without writes and decay nothing changes."""
    rule = named("memora")
    inputs = window(rule, 1000, batch=1)
    _, after = run(rule, *inputs.arguments(), form="frozen_chunk", chunk=50)
    for weight in rule.weights(after).values():
        torch.testing.assert_close(weight.sum(dim=-2), torch.ones_like(weight[..., 0, :]), rtol=0, atol=1e-6)
    still = inputs.cut(0, 5)
    gates = replace(still.gates, retain_bth=ones(still), write_bth=0 * still.gates.write_bth)
    _, same = scan(rule, still.memory, still.keys_bthk, still.values_bthv, still.queries_bthk, gates)
    torch.testing.assert_close(same, still.memory)


def test_memora_without_decay_is_the_exponentiated_gradient() -> None:
    """S1-M9: ``W`` in proportion to ``W exp(-write g)``."""
    rule = replace(named("memora"), structure=matrix())
    inputs = window(rule, 1)
    gates = replace(inputs.gates, retain_bth=ones(inputs))
    _, after = scan(rule, inputs.memory, inputs.keys_bthk, inputs.values_bthv, inputs.queries_bthk, gates)
    old = inputs.memory["matrix_bhkv"].exp()
    wrong_bhv = torch.einsum("bhk,bhkv->bhv", inputs.keys_bthk[:, 0], old) - inputs.values_bthv[:, 0]
    gradient = torch.einsum("bhk,bhv->bhkv", inputs.keys_bthk[:, 0], wrong_bhv)
    expected = old * (-gates.write_bth[:, 0, :, None, None] * gradient).exp()
    expected = expected / expected.sum(dim=-2, keepdim=True)
    torch.testing.assert_close(after["matrix_bhkv"].exp(), expected)


def test_yaad_with_a_high_threshold_is_the_squared_rule() -> None:
    """S1-M8; and an outlier of a million moves the memory no further than the threshold says."""
    rule = named("yaad")
    inputs = window(rule, 9)
    never = replace(inputs.gates, threshold_bth=torch.full_like(inputs.gates.write_bth, 1e6))
    rest = inputs.memory, inputs.keys_bthk, inputs.values_bthv, inputs.queries_bthk
    torch.testing.assert_close(
        scan(rule, *rest, never)[0], scan(replace(rule, bias=squared()), *rest, never)[0], rtol=0, atol=1e-10
    )
    plain = replace(named("delta"), bias=huber_switch())
    inputs = window(plain, 1)
    gates = replace(inputs.gates, retain_bth=ones(inputs))
    _, after = scan(plain, inputs.memory, inputs.keys_bthk, 1e6 * inputs.values_bthv, inputs.queries_bthk, gates)
    moved = (after["matrix_bhkv"] - inputs.memory["matrix_bhkv"]).flatten(2).norm(dim=-1)
    n_values = inputs.values_bthv.shape[-1]
    assert (moved <= gates.write_bth[:, 0] * gates.threshold_bth[:, 0] * math.sqrt(n_values) + 1e-9).all()


@pytest.mark.parametrize("name", ["lattice", "lattice_encode", "lattice_similarity"])
def test_slots_keep_their_length_and_their_order_means_nothing(name: str) -> None:
    """S1-M10: rows of length 1, steps beside the slots; slots and codes rotated together leave every read."""
    rule = named(name)
    inputs = window(rule, 21)
    read_bthv, after = scan(rule, *inputs.arguments())
    lengths = after["slots_bhgk"].norm(dim=-1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=0, atol=1e-6)
    rotated = {"slots_bhgk": inputs.memory["slots_bhgk"].roll(3, dims=2)}
    gates = replace(inputs.gates, code_bthg=inputs.gates.code_bthg.roll(3, dims=-1))
    turned_bthv, _ = scan(rule, rotated, inputs.keys_bthk, inputs.values_bthv, inputs.queries_bthk, gates)
    torch.testing.assert_close(turned_bthv, read_bthv)


def test_the_length_of_a_tangent_step_is_exact() -> None:
    """S1-M10: ``unit(s + step) = (s + step) / sqrt(1 + |step|^2)`` for a step beside s."""
    rule = named("lattice")
    inputs = window(rule, 1)
    old = inputs.memory["slots_bhgk"]
    code_bhg, rate = inputs.gates.code_bthg[:, 0], inputs.gates.write_bth[:, 0, :, None, None]
    wrong_bhv = inputs.values_bthv[:, 0] - torch.einsum("bhg,bhgk->bhk", code_bhg, old)
    step = rate * torch.einsum("bhg,bhk->bhgk", code_bhg, wrong_bhv)
    step = step - old * (old * step).sum(dim=-1, keepdim=True)
    expected = (old + step) / (1 + step.square().sum(dim=-1, keepdim=True)).sqrt()
    _, after = scan(rule, *inputs.arguments())
    torch.testing.assert_close(after["slots_bhgk"], expected)


def test_trellis_without_a_squash_is_the_delta_rule_on_codes() -> None:
    """S1-M11: each pass is cold delta from keys, or values, to codes."""
    rule = replace(named("trellis"), structure=two_slots(4, "identity"))
    inputs = window(rule, 13)
    _, after = scan(rule, *inputs.arguments())
    for written, slots in ((inputs.keys_bthk, "key_slots_bhgk"), (inputs.values_bthv, "value_slots_bhgv")):
        matrix_bhkv = {"matrix_bhkv": inputs.memory[slots].mT.contiguous()}
        _, expected = scan(named("delta"), matrix_bhkv, written, inputs.gates.code_bthg, written, inputs.gates)
        torch.testing.assert_close(after[slots].mT, expected["matrix_bhkv"])


def test_atlas_on_one_pair_without_newton_schulz_is_titans() -> None:
    """S3-M4, 3.8: span 1, identity features, plain momentum."""
    inputs = window(named("titans"), 15)
    rule = replace(named("atlas"), span=1, features=identity(), update=momentum())
    torch.testing.assert_close(scan(rule, *inputs.arguments())[0], scan(named("titans"), *inputs.arguments())[0])


def test_a_span_sums_the_losses_of_the_last_pairs() -> None:
    """S3-M4, S1-M21: against a loop that keeps all pairs and takes autograd of the written objective."""
    rule = replace(named("omega_net"), features=identity())
    inputs = window(rule, 8, batch=1)
    empty = rule.init(1, HEADS, inputs.keys_bthk.shape[-1], inputs.values_bthv.shape[-1], like=inputs.keys_bthk)
    matrix_bhkv, reads = empty["matrix_bhkv"], []
    for t in range(8):
        leaf = matrix_bhkv.clone().requires_grad_()
        near = range(max(0, t - rule.span + 1), t + 1)
        losses = [
            0.5 * (torch.einsum("bhk,bhkv->bhv", inputs.keys_bthk[:, i], leaf) - inputs.values_bthv[:, i]).square()
            for i in near
        ]
        sum(
            (inputs.gates.weight_bth[:, i, :, None] * loss).sum() for i, loss in zip(near, losses, strict=True)
        ).backward()
        retain, rate = (x[:, t, :, None, None] for x in (inputs.gates.retain_bth, inputs.gates.write_bth))
        matrix_bhkv = retain * matrix_bhkv - rate * leaf.grad
        reads.append(torch.einsum("bhk,bhkv->bhv", inputs.queries_bthk[:, t], matrix_bhkv))
    read_bthv, _ = scan(rule, empty, inputs.keys_bthk, inputs.values_bthv, inputs.queries_bthk, inputs.gates)
    torch.testing.assert_close(read_bthv, torch.stack(reads, dim=1))


def test_what_omega_writes_does_not_see_the_memory() -> None:
    """S3-M4: another memory moves every read by what it recalls itself, and changes nothing that is written."""
    rule = named("omega")
    inputs = window(rule, 11)
    _, after = scan(rule, *inputs.arguments())
    moved = {name: value + 1 for name, value in inputs.memory.items()}
    rest = inputs.keys_bthk, inputs.values_bthv, inputs.queries_bthk, inputs.gates
    _, moved_after = scan(rule, moved, *rest)
    zero, ones_memory = ({name: torch.full_like(x, value) for name, x in inputs.memory.items()} for value in (0.0, 1.0))
    nothing = replace(inputs.gates, write_bth=0 * inputs.gates.write_bth)
    _, faded = scan(rule, ones_memory, *rest[:-1], nothing)
    torch.testing.assert_close(moved_after["matrix_bhkv"] - after["matrix_bhkv"], faded["matrix_bhkv"])
    assert zero.keys() == faded.keys()


@pytest.mark.parametrize("by", ["write", "scan", "run", "auto"])
def test_omega_is_not_run_without_the_matrix_that_makes_its_values(by: str) -> None:
    """S3-M4: as given, ``v k^T`` would be written, which is another rule; its layer, or ``values='given'``, says so."""
    rule = catalogue("omega")
    inputs = window(rule, 3)
    calls: dict[str, Callable[[], object]] = {
        "write": lambda: write(
            rule, inputs.memory, inputs.keys_bthk[:, 0], inputs.values_bthv[:, 0], inputs.gates.at(0)
        ),
        "scan": lambda: scan(rule, *inputs.arguments()),
        "run": lambda: run(rule, *inputs.arguments(), form="associative"),
        "auto": lambda: run(rule, *inputs.arguments()),
    }
    with pytest.raises(ConflictingKeys, match="mixed of key and value.*its layer learns.*values='given'"):
        calls[by]()


def test_a_rule_may_be_spelled_with_choices() -> None:
    assert named("titans(n_layers=3)").structure.weights == ("in_bhkf", "hidden1_bhff", "out_bhfv")
    assert named("titans(n_layers=1)").structure.kind == "matrix"
    with pytest.raises(WrongValue, match=r"takes \(n_layers: int = 1\)"):
        named("titans(depth=3)")
    with pytest.raises(WrongValue, match="expected a name, or name"):
        named("titans(n_layers=__import__)")


def test_moneta_of_powers_two_is_delta_at_twice_the_rate() -> None:
    """S1-M7: p = 2, q = 2 on a matrix."""
    rule = replace(named("moneta"), structure=matrix(), bias=power(2), retention=power_norm(2))
    inputs = window(rule, 11)
    twice = replace(inputs.gates, write_bth=2 * inputs.gates.write_bth)
    rest = inputs.memory, inputs.keys_bthk, inputs.values_bthv, inputs.queries_bthk
    torch.testing.assert_close(scan(rule, *rest, inputs.gates)[0], scan(named("delta"), *rest, twice)[0])


def ones(inputs: Window) -> Tensor:
    return torch.ones_like(inputs.gates.retain_bth)
