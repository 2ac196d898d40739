"""Each part of a rule by itself: what it computes is what is written of it (memory.md 2.4-2.9).

Oracles are autograd of the written loss, conditions of optimality, closed forms and torch's own losses and optimizers.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from memory.inputs import HEADS, window
from meristem.errors import WrongValue
from meristem.linalg import newton_schulz
from meristem.memory import Rule, named, scan
from meristem.memory.bias import (
    SHARPNESS,
    Bias,
    absolute,
    biases,
    dot,
    huber_coordinate,
    huber_norm,
    huber_switch,
    kl,
    power,
    shift_robust,
    squared,
)
from meristem.memory.features import elu1, exponential, features, fourier, identity, polynomial
from meristem.memory.gates import RowGates
from meristem.memory.retention import (
    Retention,
    bounded,
    bregman,
    decay,
    elastic,
    elastic_leader,
    entropy,
    f_divergence,
    local,
    power_norm,
    quadratic,
    retentions,
    simplex,
    sphere,
)
from meristem.memory.rule import write
from meristem.memory.state import Memory, flatten, unflatten
from meristem.memory.structure import (
    Live,
    Pairs,
    Structure,
    matrix,
    mlp,
    outer,
    slots,
    structures,
    two_slots,
    vector,
)
from meristem.memory.update import (
    Update,
    deep_momentum,
    delta_descent,
    delta_momentum,
    implicit,
    leader,
    momentum,
    orthogonal_momentum,
    plain,
    updates,
)

ROWS, WIDTH = 11, 6
NAME, MOMENTUM = "matrix_bhkv", "matrix_momentum_bhkv"
Loss = Callable[[Tensor, Tensor], Tensor]
"""From recalled and target rows to one number."""


def drawn(*sizes: int, random_seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(random_seed)
    return torch.randn(*sizes, generator=generator, dtype=torch.float64)


def slope_of(loss: Loss, recalled: Tensor, target: Tensor) -> Tensor:
    leaf = recalled.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(leaf, target).sum(), leaf)[0]


# Biases.


def smooth_length(residual: Tensor) -> Tensor:
    """``log cosh(a e) / a``, whose derivative is ``tanh(a e)``."""
    return (torch.logaddexp(SHARPNESS * residual, -SHARPNESS * residual) - math.log(2)) / SHARPNESS


def smooth_power(p: float) -> Loss:
    """``int_0^e p tanh(a u) (u^2 + 1e-6)^((p-1)/2) du`` by a midpoint rule, its points crowded where u is small."""
    edges = torch.linspace(0, 1, 4001, dtype=torch.float64) ** 3
    middles, widths = (edges[1:] + edges[:-1]) / 2, edges.diff()

    def loss(recalled: Tensor, target: Tensor) -> Tensor:
        residual = (recalled - target)[..., None]
        along = residual * middles
        return (p * torch.tanh(SHARPNESS * along) * (along**2 + 1e-6) ** ((p - 1) / 2) * residual * widths).sum(-1)

    return loss


LIMIT = torch.linspace(0.5, 4.0, ROWS, dtype=torch.float64)
"""A threshold per row, some below and some above the length of the residual."""


def switched(recalled: Tensor, target: Tensor) -> Tensor:
    """YAAD: square inside the threshold of the row, outside it the smooth length times the threshold."""
    residual = recalled - target
    straight = LIMIT * smooth_length(residual).sum(dim=-1)
    return torch.where(residual.norm(dim=-1) <= LIMIT, 0.5 * residual.square().sum(dim=-1), straight)


def divergence(p: Callable[[Tensor], Tensor]) -> Loss:
    """torch's KL of the softmax of what is recalled from the distribution of the target."""

    def loss(recalled: Tensor, target: Tensor) -> Tensor:
        return functional.kl_div(recalled.log_softmax(dim=-1), p(target), reduction="sum")

    return loss


def greatest(value: Tensor) -> Tensor:
    return functional.one_hot(value.argmax(dim=-1), value.shape[-1]).double()


def huber(recalled: Tensor, target: Tensor) -> Tensor:
    return torch.nn.HuberLoss(reduction="sum", delta=0.7)(recalled, target)


def huber_of_length(recalled: Tensor, target: Tensor) -> Tensor:
    length = (recalled - target).norm(dim=-1)
    return functional.huber_loss(length, torch.zeros_like(length), reduction="sum", delta=0.7)


LOSSES: dict[str, tuple[Bias, Loss]] = {
    "dot": (dot(), lambda o, v: -(o * v)),
    "squared": (squared(), lambda o, v: 0.5 * (o - v).square()),
    "absolute": (absolute(), lambda o, v: smooth_length(o - v)),
    "power(1)": (power(1), lambda o, v: smooth_length(o - v)),
    "power(1.5)": (power(1.5), smooth_power(1.5)),
    "power(2)": (power(2), lambda o, v: (o - v).square()),
    "power(3)": (power(3), smooth_power(3)),
    "power(4)": (power(4), smooth_power(4)),
    "huber_coordinate": (huber_coordinate(0.7), huber),
    "huber_norm": (huber_norm(0.7), huber_of_length),
    "huber_switch": (huber_switch(), switched),
    # The worst value within a distance lies straight away from what is recalled.
    "shift_robust": (shift_robust(0.3), lambda o, v: 0.5 * ((o - v).norm(dim=-1) + 0.3).square()),
    "kl(simplex)": (kl("simplex"), divergence(lambda v: v)),
    "kl(softmax)": (kl("softmax", 2.5), divergence(lambda v: (v / 2.5).softmax(dim=-1))),
    "kl(one_hot)": (kl("one_hot"), divergence(greatest)),
    "kl(smoothed)": (kl("smoothed"), divergence(lambda v: 0.9 * greatest(v) + 0.1 / v.shape[-1])),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_bias_is_the_gradient_of_its_written_loss(name: str) -> None:
    """S3b-S9, S3b-S10, S3b-S11: autograd of the loss, of the smoothed one where the sign is smoothed."""
    bias, loss = LOSSES[name]
    recalled, target = drawn(ROWS, WIDTH), drawn(ROWS, WIDTH, random_seed=1)
    target = target.softmax(dim=-1) if name == "kl(simplex)" else target
    # The midpoint rule of the smoothed powers is right to 1e-6; the guards of lengths are 1e-12.
    tolerance = 2e-6 if name in ("power(1.5)", "power(3)", "power(4)") else 1e-11
    found = bias.gradient(recalled, target, LIMIT)
    torch.testing.assert_close(found, slope_of(loss, recalled, target), rtol=tolerance, atol=tolerance)


def test_every_bias_is_compared_with_its_loss() -> None:
    assert {name.split("(")[0] for name in LOSSES} == set(biases.names())


@pytest.mark.parametrize("name", LOSSES)
def test_an_affine_bias_says_its_slope(name: str) -> None:
    """2.5: ``slope`` is a exactly where the gradient is ``a o - v``."""
    bias, _ = LOSSES[name]
    recalled, target = drawn(ROWS, WIDTH), drawn(ROWS, WIDTH, random_seed=1)
    if bias.slope is not None:
        torch.testing.assert_close(bias.gradient(recalled, target, LIMIT), bias.slope * recalled - target)
    else:
        assert name.startswith(("absolute", "power", "huber", "shift", "kl"))


@pytest.mark.parametrize("p", [1, 1.5, 3, 4])
def test_far_from_zero_a_smooth_power_is_the_power(p: float) -> None:
    """S3b-S11: ``p sign(e) |e|^(p-1)`` where |e| is many times 1 / a."""
    residual = torch.tensor([-30.0, -5.0, -2.0, 2.0, 5.0, 30.0], dtype=torch.float64)
    expected = p * residual.sign() * residual.abs() ** (p - 1)
    torch.testing.assert_close(power(p).gradient(residual, 0 * residual, None), expected, rtol=1e-6, atol=0)


def test_the_square_is_a_power_and_twice_the_squared_bias() -> None:
    """S3b-S11: the shorter way to p = 2 leads where the general one does; it is exactly ``2 e`` everywhere."""
    recalled, target = 3 * drawn(ROWS, WIDTH), drawn(ROWS, WIDTH, random_seed=1)
    recalled = torch.where((recalled - target).abs() < 1, target + 2, recalled)
    found = power(2).gradient(recalled, target, None)
    assert torch.equal(found, 2 * squared().gradient(recalled, target, None))
    # 1 - tanh(10) is 4e-9, and the guard under the root adds 5e-7.
    torch.testing.assert_close(power(2 + 1e-12).gradient(recalled, target, None), found, rtol=1e-6, atol=0)


@pytest.mark.parametrize("p", [0.5, -1])
def test_a_power_below_one_is_refused(p: float) -> None:
    with pytest.raises(WrongValue, match=f"the power of a bias is {p}; expected 1 or more"):
        power(p)


def test_huber_without_a_limit_is_squared() -> None:
    recalled, target = 1e3 * drawn(ROWS, WIDTH), drawn(ROWS, WIDTH, random_seed=1)
    expected = squared().gradient(recalled, target, None)
    assert torch.equal(huber_coordinate(math.inf).gradient(recalled, target, None), expected)
    torch.testing.assert_close(huber_norm(math.inf).gradient(recalled, target, None), expected, rtol=0, atol=0)


def test_huber_norm_is_continuous_where_it_turns() -> None:
    """2.5: and it never is longer than the threshold."""
    direction = functional.normalize(drawn(ROWS, WIDTH), dim=-1)
    inside, outside = (huber_norm(0.7).gradient(x * direction, 0 * direction, None) for x in (0.7 - 1e-9, 0.7 + 1e-9))
    torch.testing.assert_close(inside, outside, rtol=0, atol=1e-8)
    assert huber_norm(0.7).gradient(1e6 * direction, 0 * direction, None).norm(dim=-1).max() <= 0.7 + 1e-9


def test_the_absolute_bias_knows_direction_without_size() -> None:
    """S3b-S9: a residual ten times as large makes the same step, once it is many times 1 / a."""
    residual = drawn(ROWS, WIDTH)
    residual = residual.sign() * (1 + residual.abs())
    one, ten = (absolute().gradient(scale * residual, 0 * residual, None) for scale in (1, 10))
    torch.testing.assert_close(ten, one, rtol=0, atol=1e-8)


@pytest.mark.parametrize("target", ["simplex", "softmax", "one_hot", "smoothed"])
def test_the_gradient_of_kl_sums_to_zero(target: str) -> None:
    """S3b-S10."""
    recalled, value = 5 * drawn(ROWS, WIDTH), drawn(ROWS, WIDTH, random_seed=1)
    value = value.softmax(dim=-1) if target == "simplex" else value
    sums = kl(target).gradient(recalled, value, None).sum(dim=-1)
    torch.testing.assert_close(sums, torch.zeros_like(sums), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in LOSSES if not name.startswith(("dot", "kl"))])
def test_a_pair_that_is_known_is_not_written_again(name: str) -> None:
    """Where nothing is wrong the surprise is 0, and finite with its gradient in spite of lengths of 0."""
    value = drawn(ROWS, WIDTH).requires_grad_()
    found = LOSSES[name][0].gradient(value, value.detach(), LIMIT)
    assert not found.any()
    found.sum().backward()
    assert value.grad is not None and value.grad.isfinite().all()


# Structures.


def squashed(kind: str) -> Callable[[Tensor], Tensor]:
    def squash(rows: Tensor) -> Tensor:
        curved = functional.silu(rows)
        if kind == "identity":
            return rows
        if kind == "ln_silu":
            return functional.layer_norm(curved, curved.shape[-1:])
        return functional.normalize(curved, dim=-1) if kind == "l2_silu" else curved

    return squash


Answer = Callable[[Memory, Pairs], Tensor]
"""What a memory makes of pairs, written out again."""


def of_network(memory: Memory, pairs: Pairs, *, is_normed: bool = False) -> Tensor:
    """``f(k) = k + W_n gelu(... gelu(W_1 k))``, k only where widths agree; gated: times ``W_3 k``."""
    hidden = [name for name in memory if name not in ("out_bhfv", "gate_bhkf")]
    rows = pairs.key_bhck
    for name in hidden:
        rows = functional.gelu(torch.einsum("bhck,bhkf->bhcf", rows, memory[name]))
    if "gate_bhkf" in memory:
        rows = rows * torch.einsum("bhck,bhkf->bhcf", pairs.key_bhck, memory["gate_bhkf"])
    added = torch.einsum("bhcf,bhfv->bhcv", rows, memory["out_bhfv"])
    added = functional.layer_norm(added, added.shape[-1:]) if is_normed else added
    return added + pairs.key_bhck if added.shape == pairs.key_bhck.shape else added


def of_two_slots(kind: str) -> Answer:
    def answer(memory: Memory, pairs: Pairs) -> Tensor:
        reached_key = torch.einsum("bhck,bhgk->bhcg", pairs.key_bhck, memory["key_slots_bhgk"])
        reached_value = torch.einsum("bhcv,bhgv->bhcg", pairs.value_bhcv, memory["value_slots_bhgv"])
        return torch.cat([squashed(kind)(reached_key), squashed(kind)(reached_value)], dim=-1)

    return answer


STRUCTURES: dict[str, tuple[Structure, int, int, Answer]] = {
    # Structure, key width, value width, and what is compared with the target.
    "matrix": (matrix(), 5, 7, lambda m, p: torch.einsum("bhck,bhkv->bhcv", p.key_bhck, m[NAME])),
    "vector": (vector(), 5, 7, lambda m, p: m["vector_bhkv"].expand(*p.key_bhck.shape[:3], 7)),
    "mlp": (mlp(2, 3), 5, 7, of_network),
    "mlp, one width": (mlp(2, 3), 7, 7, of_network),
    "mlp of three": (mlp(3, 2), 5, 7, of_network),
    "mlp of three, one width": (mlp(3, 2), 7, 7, of_network),
    "mlp, normed": (mlp(2, 3, is_normed=True), 5, 7, lambda m, p: of_network(m, p, is_normed=True)),
    "mlp, normed, one width": (mlp(2, 3, is_normed=True), 7, 7, lambda m, p: of_network(m, p, is_normed=True)),
    "mlp, gated": (mlp(2, 3, is_gated=True), 5, 7, of_network),
    "mlp, gated and normed": (
        mlp(2, 3, is_normed=True, is_gated=True),
        7,
        7,
        lambda m, p: of_network(m, p, is_normed=True),
    ),
    "slots, decode": (
        slots(4),
        7,
        7,
        lambda m, p: torch.einsum("bhcg,bhgk->bhck", p.code_bhcg, m["slots_bhgk"]),
    ),
    "slots, encode": (
        slots(4, "encode"),
        7,
        7,
        lambda m, p: torch.einsum("bhck,bhgk->bhcg", p.key_bhck, m["slots_bhgk"]),
    ),
    "two_slots, silu": (two_slots(4, "silu"), 5, 7, of_two_slots("silu")),
    "two_slots, l2_silu": (two_slots(4, "l2_silu"), 5, 7, of_two_slots("l2_silu")),
    "two_slots, ln_silu": (two_slots(4, "ln_silu"), 5, 7, of_two_slots("ln_silu")),
    "two_slots, identity": (two_slots(4, "identity"), 5, 7, of_two_slots("identity")),
}


def held(structure: Structure, key_width: int, value_width: int) -> Memory:
    """Weights of two rows of a batch that differ."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        empty = structure.init(2, HEADS, key_width, value_width, torch.empty(0, dtype=torch.float64))
    return {name: x + 0.3 * drawn(*x.shape, random_seed=place) for place, (name, x) in enumerate(empty.items())}


def pairs_of(structure: Structure, key_width: int, value_width: int) -> Pairs:
    code = drawn(2, HEADS, ROWS, structure.n_codes, random_seed=5) if structure.n_codes else None
    sizes = 2, HEADS, ROWS
    return Pairs(drawn(*sizes, key_width, random_seed=3), drawn(*sizes, value_width, random_seed=4), code)


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_surprise_is_autograd_of_the_loss(name: str) -> None:
    """2.4: of any loss: what comes back from the pullback is what autograd gives for a random gradient."""
    structure, key_width, value_width, answer = STRUCTURES[name]
    memory = {key: x.requires_grad_() for key, x in held(structure, key_width, value_width).items()}
    pairs = pairs_of(structure, key_width, value_width)
    recalled, _, pull = structure.vjp(Live(memory), pairs)
    expected = answer(memory, pairs)
    # The guard of the unit length in l2_silu is 1e-12.
    torch.testing.assert_close(recalled, expected, rtol=0, atol=1e-10)
    gradient = drawn(*recalled.shape, random_seed=6)
    slopes = torch.autograd.grad((expected * gradient).sum(), list(memory.values()))
    surprise = {key: outer(factor) for key, factor in pull(gradient).items()}
    assert tuple(surprise) == structure.weights == tuple(memory)
    torch.testing.assert_close(surprise, dict(zip(memory, slopes, strict=True)), rtol=0, atol=1e-8)


def test_every_structure_is_compared_with_autograd() -> None:
    assert {structure.kind for structure, *_ in STRUCTURES.values()} == set(structures.names())


@pytest.mark.parametrize("name", [name for name in STRUCTURES if "slots" not in name])
def test_what_is_recalled_for_a_pair_is_what_a_query_gets(name: str) -> None:
    structure, key_width, value_width, answer = STRUCTURES[name]
    memory, pairs = held(structure, key_width, value_width), pairs_of(structure, key_width, value_width)
    recalled, target, _ = structure.vjp(Live(memory), pairs)
    torch.testing.assert_close(structure.recall(Live(memory), pairs.key_bhck), recalled, rtol=0, atol=0)
    assert target is pairs.value_bhcv


@pytest.mark.parametrize("squash", ["silu", "l2_silu", "ln_silu", "identity"])
def test_two_slots_read_through_codes(squash: str) -> None:
    """3.9: ``r = LayerNorm(silu(N q))``, ``phi(U^T r)``."""
    structure = two_slots(4, squash)
    memory, query_bhck = held(structure, 5, 7), drawn(2, HEADS, ROWS, 5, random_seed=3)
    reached = functional.silu(torch.einsum("bhck,bhgk->bhcg", query_bhck, memory["key_slots_bhgk"]))
    code = functional.layer_norm(reached, reached.shape[-1:])
    expected = squashed(squash)(torch.einsum("bhcg,bhgv->bhcv", code, memory["value_slots_bhgv"]))
    torch.testing.assert_close(structure.recall(Live(memory), query_bhck), expected, rtol=0, atol=1e-10)


def test_slots_read_the_mean_that_a_query_weighs() -> None:
    """3.7: ``sum_i softmax(S q)_i s_i``."""
    memory, query_bhck = held(slots(4), 7, 7), drawn(2, HEADS, ROWS, 7, random_seed=3)
    weight = torch.einsum("bhck,bhgk->bhcg", query_bhck, memory["slots_bhgk"]).softmax(dim=-1)
    expected = torch.einsum("bhcg,bhgk->bhck", weight, memory["slots_bhgk"])
    torch.testing.assert_close(slots(4).recall(Live(memory), query_bhck), expected)


@pytest.mark.parametrize("n_slots", [4, 7, 11])
def test_slots_begin_spread_out(n_slots: int) -> None:
    """2.1: orthonormal where there is room, else of unit length; and in all rows of a batch the same."""
    first = slots(n_slots).init(2, HEADS, 7, 7, torch.empty(0, dtype=torch.float64))["slots_bhgk"]
    products = first @ first.mT
    identity_gg = torch.eye(n_slots, dtype=torch.float64).expand_as(products)
    products = products if n_slots <= 7 else products * identity_gg
    torch.testing.assert_close(products, identity_gg, rtol=0, atol=1e-6)
    assert torch.equal(first[0], first[1])


def test_structures_that_cannot_be_are_refused() -> None:
    with pytest.raises(WrongValue, match="keys of width 5 and the values have width 7; expected one width"):
        slots(4).init(2, HEADS, 5, 7, torch.empty(0))
    with pytest.raises(WrongValue, match="n_layers 3 and expand 4; expected 2 or more layers, two where it is gated"):
        mlp(3, is_gated=True)
    with pytest.raises(WrongValue, match="expand 0"):
        mlp(2, expand=0)


def test_an_mlp_of_one_layer_is_the_matrix() -> None:
    """3.3: depth 1 runs the matrix path."""
    assert mlp(1) == matrix()


# Retentions.


def row_gates(retain: float = 1.0, rate: float = 0.2, keep: float | None = None) -> RowGates:
    full = torch.ones(2, HEADS, 1, dtype=torch.float64)
    return RowGates(retain * full, rate * full, None if keep is None else keep * full)


def begun(retention: Retention, drawn_weight: Tensor) -> Memory:
    """What is stored for first weights, with all that is carried beside them."""
    stored = {NAME: retention.first(drawn_weight)}
    return stored | retention.carry(stored)


def weight() -> Tensor:
    return drawn(2, HEADS, 5, 7)


def change(scale: float = 0.5) -> Memory:
    return {NAME: scale * drawn(2, HEADS, 5, 7, random_seed=1)}


def nothing() -> Memory:
    return {NAME: torch.zeros(2, HEADS, 5, 7, dtype=torch.float64)}


ON_SIMPLEX = {"simplex": simplex()} | {kind: f_divergence(kind) for kind in ("kl", "pearson", "hellinger")}


@pytest.mark.parametrize("name", retentions.names())
def test_nothing_written_and_nothing_forgotten_changes_nothing(name: str) -> None:
    """2.6: retain 1, surprise 0."""
    retention = retentions.get(name)()
    memory = begun(retention, weight())
    # The elastic net pulls weights to 0 at the write rate, whether or not something is to be written.
    gates = row_gates(rate=0.0) if name == "elastic" else row_gates()
    after = retention.apply(memory, nothing(), gates)
    torch.testing.assert_close(after[NAME], memory[NAME], rtol=0, atol=1e-8)


def test_decay_keeps_what_retain_says() -> None:
    """S3-M1: the default retention is the fused formula, to the bit."""
    after = decay().apply({NAME: weight()}, change(), row_gates(0.7))
    torch.testing.assert_close(after[NAME], 0.7 * weight() + change()[NAME], rtol=0, atol=0)


def test_local_memory_returns_to_its_anchor() -> None:
    """2.6: without surprises the distance to the anchor shrinks by ``1 - strength`` with every token."""
    retention = local(0.1, period=1000)
    memory = begun(retention, weight())
    anchor = weight() + 1
    memory |= {"matrix_anchor_bhkv": anchor, "anchor_age_b": torch.ones_like(memory["anchor_age_b"])}
    for _ in range(300):
        before = memory
        memory = retention.apply(memory, nothing(), row_gates())
        torch.testing.assert_close(memory[NAME] - anchor, 0.9 * (before[NAME] - anchor))
    torch.testing.assert_close(memory[NAME], anchor, rtol=0, atol=1e-12)


def test_local_memory_takes_a_new_anchor_every_period() -> None:
    """2.6: W_ref is the memory at the start of the period."""
    retention = local(0.1, period=4)
    memory, held_before = begun(retention, weight()), []
    for token in range(11):
        held_before.append(memory[NAME])
        anchor = held_before[token // 4 * 4]
        part = {NAME: 0.1 * drawn(2, HEADS, 5, 7, random_seed=token)}
        expected = 0.9 * memory[NAME] + part[NAME] - 0.1 * (memory[NAME] - anchor)
        memory = retention.apply(memory, part, row_gates(0.9))
        torch.testing.assert_close(memory[NAME], expected)
        assert torch.equal(memory["matrix_anchor_bhkv"], anchor)


@pytest.mark.parametrize("name", ON_SIMPLEX)
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-6)], ids=["64", "32"])
def test_columns_on_the_simplex_stay_there(name: str, scale: float, dtype: torch.dtype, tolerance: float) -> None:
    """2.6: not negative, and of sum 1 to 1e-6 in the precision of a run, however large the surprises."""
    retention = ON_SIMPLEX[name]
    memory = {NAME: retention.settle(weight().abs().to(dtype))}
    for token in range(30):
        part = scale * drawn(2, HEADS, 5, 7, random_seed=token).to(dtype)
        memory = retention.apply(memory, {NAME: part}, row_gates())
        memory = {NAME: memory[NAME].to(dtype)}
        read = retention.weights(memory[NAME])
        assert (read >= 0).all()
        torch.testing.assert_close(read.sum(dim=-2), torch.ones_like(read[..., 0, :]), rtol=0, atol=tolerance)


def test_the_kl_divergence_is_the_simplex_without_decay() -> None:
    """2.6: f(u) = u log u."""
    stored = simplex().first(weight())
    logs = simplex().apply({NAME: stored}, change(), row_gates())[NAME]
    found = f_divergence("kl").apply({NAME: stored.exp()}, change(), row_gates(0.3))[NAME]
    torch.testing.assert_close(found, logs.exp(), rtol=0, atol=1e-12)


F_SLOPES: dict[str, Callable[[Tensor], Tensor]] = {
    "kl": lambda u: u.log() + 1,
    "pearson": lambda u: 2 * (u - 1),
    "hellinger": lambda u: 1 - u.rsqrt(),
}


@pytest.mark.parametrize("kind", F_SLOPES)
def test_an_f_divergence_is_minimised(kind: str) -> None:
    """2.6: ``f'(W / W_0) - change`` is one number per column, the multiplier of the sum, wherever W is above 0."""
    old = f_divergence(kind).settle(weight().abs() + 0.1)
    new = f_divergence(kind).apply({NAME: old}, change(), row_gates())[NAME]
    levels = F_SLOPES[kind]((new / old).clamp_min(1e-30)) - change()[NAME]
    levels = torch.where(new > 1e-12, levels, torch.nan)
    expected = levels.nanmean(dim=-2, keepdim=True)
    torch.testing.assert_close(levels, torch.where(levels.isnan(), levels, expected), equal_nan=True, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", F_SLOPES)
@pytest.mark.parametrize("scale", [0.5, 8.0])
def test_the_gradient_of_an_f_divergence_is_that_of_differences(kind: str, scale: float) -> None:
    """2.6: through the search for the level as well."""
    old = f_divergence(kind).settle(weight()[:1, :1].abs() + 0.1).requires_grad_()
    part = change(scale)[NAME][:1, :1].requires_grad_()

    def applied(old: Tensor, part: Tensor) -> Tensor:
        return f_divergence(kind).apply({NAME: old}, {NAME: part}, row_gates())[NAME]

    assert torch.autograd.gradcheck(applied, (old, part), atol=1e-6, rtol=1e-5, eps=1e-7)


@pytest.mark.parametrize("kind", F_SLOPES)
def test_the_gradient_of_an_f_divergence_holds_in_single_precision(kind: str) -> None:
    """2.6: a run is in float32; its gradient is that of float64 to a thousandth."""
    found = []
    for dtype in (torch.float64, torch.float32):
        part = change(20.0)[NAME].to(dtype).requires_grad_()
        old = f_divergence(kind).settle(weight().abs().to(dtype) + 0.1)
        after = f_divergence(kind).apply({NAME: old}, {NAME: part}, row_gates())[NAME]
        found.append(torch.autograd.grad((after * drawn(*after.shape, random_seed=2)).sum(), part)[0].double())
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)


def test_an_unknown_divergence_is_refused() -> None:
    with pytest.raises(WrongValue, match="the kind of an f-divergence is 'tsallis'; expected one of kl, pearson"):
        f_divergence("tsallis")  # type: ignore[arg-type]


@pytest.mark.parametrize("alpha, beta", [(10.0, 10.0), (2.0, 0.5), (1.0, 100.0)])
def test_the_elastic_net_is_the_exact_minimiser(alpha: float, beta: float) -> None:
    """S3-M1, 2.6: 0 is in the subgradient of ``<g, W> + |W - W_0|^2 / 2 rate + |W|_1 / alpha + |W|^2 / 2 beta``."""
    rate, old = 0.4, weight()
    surprise = drawn(2, HEADS, 5, 7, random_seed=1)
    new = elastic(alpha, beta).apply({NAME: old}, {NAME: -rate * surprise}, row_gates(rate=rate))[NAME]
    smooth = surprise + (new - old) / rate + new / beta
    is_zero = new == 0
    assert is_zero.any() and not is_zero.all(), "exact zeros are what this retention is for"
    assert (smooth[is_zero].abs() <= 1 / alpha + 1e-12).all()
    torch.testing.assert_close(smooth[~is_zero], -new[~is_zero].sign() / alpha)


def test_without_its_square_the_elastic_net_is_a_soft_threshold() -> None:
    """2.6: beta without end: lambda is 1, zeta the rate; torch's own soft shrinkage."""
    found = elastic(5.0, 1e15).apply({NAME: weight()}, change(), row_gates(rate=0.4))[NAME]
    torch.testing.assert_close(found, functional.softshrink(weight() + change()[NAME], 0.4 / 5.0))
    neither = elastic(1e15, 1e15).apply({NAME: weight()}, change(), row_gates(rate=0.4))[NAME]
    torch.testing.assert_close(neither, weight() + change()[NAME])


def test_the_smooth_elastic_net_is_the_sharp_one_far_from_zero() -> None:
    """2.6: ``|z| arctan(z / gamma) 2 / pi``: odd, not larger than z, its slope finite at 0."""
    spread = torch.linspace(-40, 40, 35, dtype=torch.float64).view(5, 7).expand(2, HEADS, 5, 7).clone().requires_grad_()
    gates = row_gates(rate=0.01)
    smooth, sharp = (elastic(10, 10, is_smooth=way).apply({NAME: spread}, nothing(), gates)[NAME] for way in (1, 0))
    torch.testing.assert_close(smooth, sharp, rtol=1e-2, atol=2e-3)
    torch.testing.assert_close(smooth.flip(-1, -2), -smooth)
    assert (smooth.abs() <= spread.abs()).all()
    smooth.sum().backward()
    assert spread.grad is not None and spread.grad.isfinite().all()


def test_the_leader_is_sparser_the_larger_its_limit() -> None:
    """S3b-S3."""
    counts = [int((elastic_leader(limit).weights(weight()) == 0).sum()) for limit in (0.0, 0.1, 0.5, 2.0, 10.0)]
    assert counts == sorted(set(counts)) and counts[0] == 0 and counts[-1] == weight().numel()
    torch.testing.assert_close(elastic_leader(0.5).weights(weight()), functional.softshrink(weight(), 0.5))


def test_the_threshold_of_the_leader_is_passed_straight_through() -> None:
    """S3b-S3: a weight that is read as 0 gets the whole gradient."""
    stored = weight().requires_grad_()
    elastic_leader(0.5).weights(stored).backward(change()[NAME])
    assert torch.equal(stored.grad, change()[NAME])


@pytest.mark.parametrize("q", [1.5, 2.0, 3.0, 4.0])
def test_the_mirror_map_inverts_the_gradient_of_its_norm(q: float) -> None:
    """S3b-S7: ``W = map(grad 1/2 |W|_q^2)``, the norm per matrix."""
    retention, leaf = power_norm(q, "mirror"), weight().requires_grad_()
    norms = leaf.abs().pow(q).sum(dim=(-2, -1)) ** (1 / q)
    (there,) = torch.autograd.grad(0.5 * norms.square().sum(), leaf)
    # The guards inside norms are 1e-12.
    torch.testing.assert_close(retention.weights(there), weight(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(retention.first(weight()), there, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("q", [2.5, 4.0, 5.0])
def test_the_first_value_of_the_paper_map_reads_as_drawn(q: float) -> None:
    """3.5: ``A_0 = W_0 |W_0|_q^((q-2)/(3-q))``; the map is homogeneous of degree ``3 - q``."""
    retention = power_norm(q)
    torch.testing.assert_close(retention.weights(retention.first(weight())), weight(), rtol=1e-8, atol=1e-8)
    twice = retention.weights(2 * weight())
    torch.testing.assert_close(twice, 2 ** (3 - q) * retention.weights(weight()), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("mapped", ["paper", "mirror", "off"])
def test_a_power_norm_of_two_maps_nothing(mapped: str) -> None:
    """S3b-S7: q = 2 is the identity, and a rule with it runs in the forms of decay."""
    retention = power_norm(2, mapped)
    assert not retention.is_mapped
    assert torch.equal(retention.weights(weight()), weight())


@pytest.mark.parametrize("q, mapped", [(1.5, "mirror"), (3.0, "mirror"), (4.0, "mirror"), (4.0, "paper")])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-8])
def test_a_power_norm_is_finite_at_nothing(q: float, mapped: str, scale: float) -> None:
    """S1-M7, S3b-S7: values and gradients, as A goes to 0."""
    stored = (scale * weight()).float().requires_grad_()
    read = power_norm(q, mapped).weights(stored)
    read.sum().backward()
    assert read.isfinite().all() and stored.grad is not None and stored.grad.isfinite().all()


def test_norms_that_have_no_map_are_refused() -> None:
    with pytest.raises(WrongValue, match="q 3 with the map 'paper'; expected q above 1, and not 3 with 'paper'"):
        power_norm(3)
    with pytest.raises(WrongValue, match="q 1 with the map 'mirror'"):
        power_norm(1, "mirror")


def test_a_bregman_pair_is_a_round_trip() -> None:
    """S3b-S6: and the change is added where F' leads."""
    retention = bregman(torch.sinh, torch.asinh)
    memory = begun(retention, weight())
    torch.testing.assert_close(retention.weights(memory[NAME]), weight())
    after = retention.apply(memory, change(), row_gates(0.8))
    expected = (0.8 * weight().sinh() + change()[NAME]).asinh()
    torch.testing.assert_close(retention.weights(after[NAME]), expected)


@pytest.mark.parametrize(
    "forward, inverse, found",
    [
        (torch.sinh, torch.atan, r"forward\(inverse\(4\)\) is 1.75"),
        (torch.exp, torch.exp, r"forward\(inverse\(4\)\) is 5"),
        (torch.log, torch.negative, r"forward\(inverse\(0.25\)\) is nan"),
        (lambda x: x + (x > 3.9) * 1e-3, lambda x: x, r"forward\(inverse\(4\)\) is 4.001"),
    ],
    ids=["another inverse", "no inverse", "undefined", "slightly off"],
)
def test_maps_that_are_no_pair_are_refused(
    forward: Callable[[Tensor], Tensor], inverse: Callable[[Tensor], Tensor], found: str
) -> None:
    """S3b-S6: the message names a point where they are not."""
    with pytest.raises(WrongValue, match=f"the maps of a bregman retention are no pair: {found}"):
        bregman(forward, inverse)


def test_the_quadratic_mirror_is_plain_descent() -> None:
    """S3b-S6: F = W^2 / 2, to the bit."""
    rule = named("delta")
    inputs = window(rule, 9)
    found, after = scan(replace(rule, retention=quadratic()), *inputs.arguments())
    expected, expected_after = scan(rule, *inputs.arguments())
    assert torch.equal(found, expected) and torch.equal(after[NAME], expected_after[NAME])


def test_the_entropy_mirror_is_the_exponentiated_gradient() -> None:
    """S3b-S6: ``W <- W exp(change)`` where nothing fades; weights stay positive."""
    memory = begun(entropy(), weight())
    old = entropy().weights(memory[NAME])
    after = entropy().weights(entropy().apply(memory, change(), row_gates())[NAME])
    torch.testing.assert_close(after, old * change()[NAME].exp())
    assert (after > 0).all()


def test_bounded_weights_stay_between_zero_and_one() -> None:
    """S3b-S8: 1,000 surprises that all push one way, up in half of the weights and down in the other half.

    Together they stay below 35, where the sigmoid of float64 still differs from 1; a larger sum is read as 1 itself.
    """
    retention = bounded()
    memory = begun(retention, weight())
    push = 0.03 * weight().sign()
    for token in range(1000):
        memory = retention.apply(memory, {NAME: push * (1 + token % 2) / 2}, row_gates())
        read = retention.weights(memory[NAME])
        assert ((read > 0) & (read < 1)).all()
    torch.testing.assert_close(memory[NAME], weight() + 750 * push)


def test_a_rule_of_bounded_weights_survives_values_out_of_reach() -> None:
    """S3b-S8: 1,000 tokens of values that no weight between 0 and 1 recalls."""
    rule = Rule(matrix(), squared(), bounded(), plain())
    inputs = window(rule, 1000, batch=1)
    far = 50 * inputs.values_bthv.sign()
    read_bthv, after = scan(rule, inputs.memory, inputs.keys_bthk, far, inputs.queries_bthk, inputs.gates)
    weights = rule.weights(after)[NAME]
    assert read_bthv.isfinite().all() and ((weights >= 0) & (weights <= 1)).all()


def test_the_logits_of_bounded_weights_are_additive() -> None:
    """S3b-S8: they are moved by what is written and by nothing else, in any order, whatever the retain gate."""
    rule = Rule(matrix(), dot(), bounded(), plain())
    inputs = window(rule, 17)
    _, after = scan(rule, *inputs.arguments())
    rated_bthk = inputs.gates.write_bth[..., None] * inputs.keys_bthk
    written = torch.einsum("bthk,bthv->bhkv", rated_bthk, inputs.values_bthv)
    torch.testing.assert_close(after[NAME], inputs.memory[NAME] + written)


@pytest.mark.parametrize("scope, axes", [("row", (-1,)), ("matrix", (-2, -1))])
@pytest.mark.parametrize("is_tangent", [True, False])
def test_what_lies_on_the_sphere_stays_there(scope: str, axes: tuple[int, ...], is_tangent: bool) -> None:
    """2.6: unit norms per stored row, or per matrix; from zeros as well."""
    retention = sphere(scope, is_tangent=is_tangent)
    for first in (weight(), torch.zeros_like(weight())):
        memory = begun(retention, first)
        for token in range(20):
            norms = memory[NAME].square().sum(dim=axes).sqrt()
            torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=1e-6)
            part = drawn(2, HEADS, 5, 7, random_seed=token)
            memory = retention.apply(memory, {NAME: part}, row_gates(0.3))


@pytest.mark.parametrize("scope, axes", [("row", (-1,)), ("matrix", (-2, -1))])
def test_a_step_on_the_sphere_only_counts_beside_it(scope: str, axes: tuple[int, ...]) -> None:
    """3.7: ``(W + D) / sqrt(1 + |D|^2)``, D what is left of the change without its part along W."""
    old = begun(sphere(scope), weight())[NAME]
    step = change()[NAME]
    step = step - old * (old * step).sum(dim=axes, keepdim=True)
    expected = (old + step) / (1 + step.square().sum(dim=axes, keepdim=True)).sqrt()
    after = sphere(scope).apply({NAME: old}, {NAME: change()[NAME] + 3 * old}, row_gates())
    torch.testing.assert_close(after[NAME], expected, rtol=0, atol=1e-10)


# Updates.


def surprise_rows(n_rows: int = 1) -> tuple[Tensor, Tensor]:
    """Rows a and d of a surprise; keys of any length."""
    sizes = 2, HEADS, n_rows
    return drawn(*sizes, 5, random_seed=2), drawn(*sizes, 7, random_seed=3)


def moved_by(update: Update, gates: RowGates, stored: Tensor | None = None) -> tuple[Tensor, Memory]:
    """The change that one surprise makes of a memory that holds something, and what is carried."""
    memory = {NAME: weight() if stored is None else stored}
    memory |= {name: x + 0.3 * drawn(*x.shape, random_seed=7) for name, x in update.carry(memory).items()}
    changed, carried = update.change(memory, {NAME: memory[NAME]}, {NAME: surprise_rows()}, gates)
    return changed[NAME], memory | carried


def test_plain_descends() -> None:
    found, _ = moved_by(plain(), row_gates(rate=0.3))
    torch.testing.assert_close(found, -0.3 * torch.einsum("bhck,bhcv->bhkv", *surprise_rows()))


@pytest.mark.parametrize("structure", [mlp(2, 2), mlp(3, 2, is_normed=True), matrix()], ids=["mlp", "normed", "matrix"])
def test_momentum_is_that_of_sgd(structure: Structure) -> None:
    """2.7: torch.optim.SGD on the squared loss of a network, weight by weight, where nothing is forgotten."""
    rule = Rule(structure, squared(), decay(), momentum())
    inputs = window(rule, 9, batch=1)
    full = torch.ones_like(inputs.gates.retain_bth)
    gates = replace(inputs.gates, retain_bth=full, write_bth=0.1 * full, momentum_bth=0.7 * full)
    memory = {name: x if name in structure.weights else torch.zeros_like(x) for name, x in inputs.memory.items()}
    _, after = scan(rule, memory, inputs.keys_bthk, inputs.values_bthv, inputs.queries_bthk, gates)
    leaves = {name: memory[name].clone().requires_grad_() for name in structure.weights}
    optimizer = torch.optim.SGD(list(leaves.values()), lr=0.1, momentum=0.7)
    for t in range(9):
        optimizer.zero_grad()
        key_bhck, value_bhcv = inputs.keys_bthk[:, t, :, None], inputs.values_bthv[:, t, :, None]
        (0.5 * (structure.recall(Live(leaves), key_bhck) - value_bhcv).square()).sum().backward()
        optimizer.step()
    for name, leaf in leaves.items():
        torch.testing.assert_close(after[name], leaf.detach())


def test_momentum_is_a_layer_trained_to_agree_with_surprises() -> None:
    """S3b-S2: a linear layer D that fades and steps on ``-<D, surprise>`` is what momentum carries, turned round."""
    layer = torch.zeros(2, HEADS, 5, 7, dtype=torch.float64, requires_grad=True)
    memory: Memory = {NAME: weight()} | momentum().carry({NAME: weight()})
    for token in range(7):
        rows, gradient = (x * (1 + token) for x in surprise_rows())
        (slope,) = torch.autograd.grad(-(layer * outer((rows, gradient))).sum(), layer)
        layer = (0.6 * layer - 0.3 * slope).detach().requires_grad_()
        changed, carried = momentum().change(memory, {}, {NAME: (rows, gradient)}, row_gates(rate=0.3, keep=0.6))
        memory |= carried
        torch.testing.assert_close(changed[NAME], -layer.detach())


@pytest.mark.parametrize("bias", [dot(), squared(), huber_norm(0.5)], ids=lambda bias: bias.name)
def test_delta_descent_is_the_proximal_minimiser(bias: Bias) -> None:
    """S3b-S1: of ``1/2 |W k - u|^2 + |W - W_0|^2 / 2 rate``, u the descent direction of the loss."""
    rule = Rule(matrix(), bias, decay(), delta_descent())
    key_bhk, value_bhv = 2 * drawn(2, HEADS, 5, random_seed=2), drawn(2, HEADS, 7, random_seed=3)
    old, rate = weight(), 0.4
    after = write(rule, {NAME: old}, key_bhk, value_bhv, row_gates(rate=rate))[NAME].clone().requires_grad_()
    wanted = -bias.gradient(torch.einsum("bhk,bhkv->bhv", key_bhk, old), value_bhv, None)
    recalled = torch.einsum("bhk,bhkv->bhv", key_bhk, after)
    objective = 0.5 * (recalled - wanted).square().sum() + (after - old).square().sum() / (2 * rate)
    assert torch.autograd.grad(objective, after)[0].abs().max() < 1e-10


def test_implicit_is_plain_where_rates_are_small() -> None:
    """S3b-S4: they differ by ``rate |k|^2`` of the change, and by nothing else."""
    for rate in (1e-2, 1e-5, 1e-8):
        gates = row_gates(rate=rate)
        found, expected = moved_by(implicit(), gates)[0], moved_by(plain(), gates)[0]
        shrunk = 1 + rate * surprise_rows()[0].square().sum(dim=(-2, -1), keepdim=True)
        torch.testing.assert_close(found * shrunk, expected, rtol=1e-12, atol=0)


def test_delta_momentum_is_as_written() -> None:
    """2.7: ``S <- S (momentum I - g^T g) - rate g``, with g and S as wide as the paper has them: value by key."""
    found, after = moved_by(delta_momentum(), row_gates(rate=0.3, keep=0.6))
    before = (0.3 * drawn(2, HEADS, 5, 7, random_seed=7)).mT
    surprise_bhvk = torch.einsum("bhck,bhcv->bhvk", *surprise_rows())
    kept_kk = 0.6 * torch.eye(5, dtype=torch.float64) - surprise_bhvk.mT @ surprise_bhvk
    torch.testing.assert_close(found.mT, before @ kept_kk - 0.3 * surprise_bhvk)
    assert torch.equal(after[MOMENTUM], found)


def deep_steps(n_steps: int, memory: Memory, gates: RowGates) -> tuple[list[float], Memory]:
    """How far a deep momentum is from a surprise that comes again and again, and what it carries in the end."""
    errors = []
    for _ in range(n_steps):
        changed, carried = deep_momentum(8).change(memory, {}, {NAME: surprise_rows()}, gates)
        memory = memory | carried
        errors.append(float((changed[NAME] + outer(surprise_rows())).norm()))
    return errors, memory


def test_a_deep_momentum_learns_to_give_the_surprise_back() -> None:
    """S3b-S2: the error falls over 50 steps; what it carries goes on after saving as if it had not been saved."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        memory: Memory = {NAME: weight()} | deep_momentum(8).carry({NAME: weight()})
    errors, after = deep_steps(50, memory, row_gates(rate=2.0, keep=1.0))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1 * errors[0]
    _, halfway = deep_steps(23, memory, row_gates(rate=2.0, keep=1.0))
    restored = unflatten(flatten({"memory": {name: x.clone() for name, x in halfway.items()}}))["memory"]
    rest, again = deep_steps(27, restored, row_gates(rate=2.0, keep=1.0))
    assert rest == errors[23:]
    torch.testing.assert_close(again, after, rtol=0, atol=0)


def test_a_deep_momentum_takes_the_step_of_its_objective() -> None:
    """2.7: one step of gradient descent on ``1/2 |m - surprise|^2``, the last layer fading by momentum."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        carried = deep_momentum(8).carry({NAME: weight()})
    first, last = (x + 0.1 * drawn(*x.shape) for x in carried.values())
    names = list(carried)
    leaves = first.clone().requires_grad_(), last.clone().requires_grad_()
    reached = functional.silu(leaves[0]) / math.sqrt(0.36 * 8)
    loss = 0.5 * (reached @ leaves[1] - outer(surprise_rows())).square().sum()
    slopes = torch.autograd.grad(loss, leaves)
    rate = 0.3 / (1 + 0.3 * reached.detach().square().sum(dim=(-2, -1), keepdim=True))
    memory = {NAME: weight(), names[0]: first, names[1]: last}
    _, after = deep_momentum(8).change(memory, {}, {NAME: surprise_rows()}, row_gates(rate=0.3, keep=0.9))
    expected = {names[0]: first - rate * slopes[0], names[1]: 0.9 * last - rate * slopes[1]}
    torch.testing.assert_close(after, expected)


def test_the_leader_is_plain_descent_that_forgets_nothing() -> None:
    """S3b-S3: R = 1/2 |W|^2, whatever the retain gate says."""
    rule = Rule(matrix(), squared(), decay(), leader())
    inputs = window(rule, 17)
    whole = replace(inputs.gates, retain_bth=torch.ones_like(inputs.gates.retain_bth))
    rest = inputs.memory, inputs.keys_bthk, inputs.values_bthv, inputs.queries_bthk
    found, after = scan(rule, *rest, inputs.gates)
    expected, expected_after = scan(replace(rule, update=plain()), *rest, whole)
    assert torch.equal(found, expected) and torch.equal(after[NAME], expected_after[NAME])


def test_orthogonal_momentum_keeps_directions_and_levels_lengths() -> None:
    """2.7: ``S <- momentum S + surprise``; the step has the singular vectors of S, their lengths near the rate."""
    found, after = moved_by(orthogonal_momentum(), row_gates(rate=0.2, keep=0.6))
    before = 0.3 * drawn(2, HEADS, 5, 7, random_seed=7)
    torch.testing.assert_close(after[MOMENTUM], 0.6 * before + outer(surprise_rows()))
    rotated, lengths, directions = torch.linalg.svd(after[MOMENTUM], full_matrices=False)
    assert (lengths[..., -1] / lengths.norm(dim=-1)).min() > 0.01
    levelled = rotated.mT @ (-found / 0.2) @ directions.mT
    level = levelled.diagonal(dim1=-2, dim2=-1)
    assert 0.65 < level.min() and level.max() < 1.2
    torch.testing.assert_close(levelled, torch.diag_embed(level), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", updates.names())
def test_a_rate_of_zero_writes_nothing(name: str) -> None:
    """2.7: into a memory that was given nothing before."""
    update = updates.get(name)()
    memory: Memory = {NAME: weight()} | update.carry({NAME: weight()})
    gates = row_gates(rate=0.0, keep=0.5)
    changed, _ = update.change(memory, {NAME: weight()}, {NAME: surprise_rows()}, gates)
    assert not changed[NAME].any()


@pytest.mark.parametrize("name", [name for name in updates.names() if updates.get(name)().has_momentum])
def test_an_update_with_momentum_asks_for_its_gate(name: str) -> None:
    update = updates.get(name)()
    memory: Memory = {NAME: weight()} | update.carry({NAME: weight()})
    with pytest.raises(ValueError, match="needs momentum gates; they are None"):
        update.change(memory, {NAME: weight()}, {NAME: surprise_rows()}, row_gates())


# Newton-Schulz.


def of_spectrum(lengths: Tensor, n_rows: int, n_columns: int) -> Tensor:
    """A matrix with these singular values and random directions."""
    rotated = torch.linalg.qr(drawn(n_rows, len(lengths))).Q
    directions = torch.linalg.qr(drawn(n_columns, len(lengths), random_seed=1)).Q
    return rotated @ torch.diag(lengths) @ directions.mT


SHAPES = [(32, 32), (16, 48), (48, 16)]


def spread_out(n_rows: int, n_columns: int) -> Tensor:
    """Singular values from 1 down to where the least is a little above 0.01 of the norm of all."""
    n_values = min(n_rows, n_columns)
    lengths = torch.logspace(0, -1.5, n_values, dtype=torch.float64)
    assert 0.01 < lengths[-1] / lengths.norm() < 0.02
    return of_spectrum(lengths, n_rows, n_columns)


@pytest.mark.parametrize("n_rows, n_columns", SHAPES)
def test_newton_schulz_levels_the_spectrum(n_rows: int, n_columns: int) -> None:
    """S3b-S5: singular values between 0.65 and 1.2 after 5 steps, around the polar factor."""
    given = spread_out(n_rows, n_columns)
    found = newton_schulz(given)
    lengths = torch.linalg.svdvals(found)
    assert 0.65 < lengths.min() and lengths.max() < 1.2
    rotated, _, directions = torch.linalg.svd(given, full_matrices=False)
    away = rotated.mT @ found @ directions.mT
    torch.testing.assert_close(away, torch.diag(away.diagonal()), rtol=0, atol=1e-9)


@pytest.mark.parametrize("n_rows, n_columns", SHAPES)
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_newton_schulz_does_not_see_scale_or_turning(n_rows: int, n_columns: int, scale: float) -> None:
    """S3b-S5."""
    given = spread_out(n_rows, n_columns)
    torch.testing.assert_close(newton_schulz(scale * given), newton_schulz(given), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(newton_schulz(given.mT), newton_schulz(given).mT, rtol=1e-9, atol=1e-9)


def test_newton_schulz_takes_matrices_one_by_one() -> None:
    """S3b-S5: batched is the loop; a matrix of zeros among others stays zero and spoils no gradient."""
    batch = drawn(2, 3, 5, 7)
    batch[1, 2] = 0
    leaf = batch.clone().requires_grad_()
    found = newton_schulz(leaf)
    for row in range(2):
        for head in range(3):
            torch.testing.assert_close(found[row, head], newton_schulz(batch[row, head]))
    assert not found[1, 2].any()
    found.square().sum().backward()
    assert leaf.grad is not None and leaf.grad.isfinite().all()


def test_newton_schulz_takes_the_step_of_muon() -> None:
    """S3b-S5: torch.optim.Muon, which computes it in bfloat16: 15 products of numbers of 8 bits."""
    given = spread_out(16, 48).float()
    leaf = torch.nn.Parameter(torch.zeros_like(given))
    leaf.grad = given.clone()
    torch.optim.Muon([leaf], lr=1.0, momentum=0.0, nesterov=False, weight_decay=0.0).step()
    torch.testing.assert_close(-leaf.detach(), newton_schulz(given), rtol=0, atol=0.02)
    low = newton_schulz(given.bfloat16()).float()
    assert (-leaf.detach() - newton_schulz(given)).norm() < 2 * (low - newton_schulz(given)).norm()


# Features.


def test_fourier_features_are_near_the_gaussian_kernel() -> None:
    """S3b-S14: ``exp(-deviation^2 |x - y|^2 / 2)`` within 0.05 in the mean at 2048 features; squared length below 2."""
    left, right = drawn(40, WIDTH), drawn(50, WIDTH, random_seed=1)
    for deviation in (0.5, 1.0):
        made = fourier(2048, deviation)
        kernel = torch.exp(-(deviation**2) * torch.cdist(left, right).square() / 2)
        assert (made.apply(left) @ made.apply(right).mT - kernel).abs().mean() < 0.05
        assert made.apply(left).square().sum(dim=-1).max() <= 2


def test_polynomial_features_are_two_terms_of_the_exponential() -> None:
    """2.9: ``<x, y> + <x, y>^2 / 2``."""
    left, right = drawn(ROWS, WIDTH), drawn(13, WIDTH, random_seed=1)
    product = left @ right.mT
    found = polynomial().apply(left) @ polynomial().apply(right).mT
    torch.testing.assert_close(found, product + product.square() / 2)


def test_exponential_features_are_near_the_exponential_kernel() -> None:
    """2.9: ``exp(<x, y>)`` in the mean of many positive features."""
    left, right = 0.4 * drawn(40, WIDTH), 0.4 * drawn(50, WIDTH, random_seed=1)
    made = exponential(8192)
    kernel = torch.exp(left @ right.mT)
    assert (made.apply(left) > 0).all()
    assert ((made.apply(left) @ made.apply(right).mT - kernel).abs() / kernel).mean() < 0.05


def test_elu_features_are_positive() -> None:
    rows = 3 * drawn(ROWS, WIDTH)
    expected = torch.where(rows > 0, rows + 1, rows.exp())
    torch.testing.assert_close(elu1().apply(rows), expected)
    assert (elu1().apply(rows) > 0).all()


def test_identity_features_are_none() -> None:
    """S3b-S14: the vectors themselves, not a copy."""
    rows = drawn(ROWS, WIDTH)
    assert identity().apply(rows) is rows


@pytest.mark.parametrize("name", features.names())
def test_features_are_as_wide_as_they_say_and_never_change(name: str) -> None:
    """S3b-S14: frozen: the same after any number of uses and draws, and no draw of anyone else is disturbed."""
    made, rows = features.get(name)(), drawn(ROWS, WIDTH)
    before = torch.random.get_rng_state()
    first = made.apply(rows)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.shape == (ROWS, made.width(WIDTH))
    torch.manual_seed(99)
    assert torch.equal(features.get(name)().apply(rows), first)
    torch.testing.assert_close(made.apply(rows.float()).double(), first, rtol=1e-4, atol=1e-4)
