"""No memory can run away: adversarial gates, keys and values, with the gates kept to the region of ``memory.region``.

The sequences are of the worst kinds that are known: gates that jump between their ends at random; a write at no
momentum, then coasting at the greatest one, in step with the sign of what is held; keys at a right angle to it. Tokens
of the linear rules run in their exact form, all adversaries side by side as heads.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from memory.inputs import KEY_WIDTH, VALUE_WIDTH, named, window
from meristem.memory import Gates, Rule, run
from meristem.memory.gates import RowGates
from meristem.memory.named import rules
from meristem.memory.region import FADE, MOMENTA, OVERSHOOT, curvature, most_momentum
from meristem.memory.region import within as gates_within
from meristem.memory.rule import LONGEST, limited, write
from meristem.memory.state import Memory, beside
from meristem.memory.update import momentum_name

USUAL = (0.1, 0.5, 0.9)
"""The momentum that the heads of an adversary usually have."""

EXCESS = max(1.0, OVERSHOOT / (1 - OVERSHOOT))


def within(rule: Rule, wanted: dict[str, Tensor], usual_h: Tensor) -> Gates:
    """The gates nearest to these that the gate layer may give."""
    most_h = most_momentum(rule, usual_h) if rule.update.has_momentum else None
    log_momentum_bth = wanted["momentum"].log() if rule.update.has_momentum else None
    kept = gates_within(rule, wanted["retain"].log(), wanted["write"], log_momentum_bth, most_h)
    return Gates(*kept[:3], log_retain_bth=kept.log_retain, log_momentum_bth=kept.log_momentum)


def bound(rule: Rule, usual_h: Tensor) -> Tensor:
    """The proven bound of the norm of a head for values of length one, from a memory of zeros."""
    room_h = 1 - most_momentum(rule, usual_h) if rule.update.has_momentum else torch.ones_like(usual_h)
    most_h = (1 + FADE) / (FADE * room_h)
    return (EXCESS * most_h).sqrt() if rule.slope else most_h


@dataclass(frozen=True)
class Attack:
    """Gates, unit keys and values of length one of every head, ``1 t h``."""

    wanted: dict[str, Tensor]
    keys_bthk: Tensor
    values_bthv: Tensor


def jumping(n_time: int, heads: int, generator: torch.Generator) -> Attack:
    """Every gate at one of its ends or anywhere between, keys few or new, values of one sign for a random while."""

    def ends() -> Tensor:
        anywhere = torch.rand(1, n_time, heads, generator=generator, dtype=torch.float64)
        side = torch.randint(0, 3, (1, n_time, heads), generator=generator)
        return torch.where(side == 0, 0.0, torch.where(side == 1, 1.0, anywhere))

    few = functional.normalize(torch.randn(3, KEY_WIDTH, generator=generator, dtype=torch.float64), dim=-1)
    chosen = few[torch.randint(0, 3, (1, n_time, heads), generator=generator)]
    new = torch.randn(1, n_time, heads, KEY_WIDTH, generator=generator, dtype=torch.float64)
    is_new = torch.rand(1, n_time, heads, 1, generator=generator) < 0.3
    sign = torch.where(torch.rand(1, n_time, heads, 1, generator=generator) < 0.05, -1.0, 1.0).cumprod(dim=1)
    value = functional.normalize(torch.randn(VALUE_WIDTH, generator=generator, dtype=torch.float64), dim=-1)
    # Retain mostly at 1: what fades cannot grow.
    retain = torch.where(torch.rand(1, n_time, heads, generator=generator) < 0.001, ends(), 1.0)
    wanted = {"retain": retain, "write": ends(), "momentum": ends()}
    return Attack(wanted, functional.normalize(torch.where(is_new, new, chosen), dim=-1), sign * value)


def coasting(n_time: int, heads: int, generator: torch.Generator) -> Attack:
    """Write hard at no momentum, then coast at the greatest for a while, along one key; the value changes sides."""
    length_h = 2 + torch.arange(heads) % 40
    place_th = torch.arange(n_time)[:, None] % length_h
    is_written_bth = (place_th == 0)[None].double()
    key = functional.normalize(torch.randn(KEY_WIDTH, generator=generator, dtype=torch.float64), dim=-1)
    value = functional.normalize(torch.randn(VALUE_WIDTH, generator=generator, dtype=torch.float64), dim=-1)
    sign_bth1 = 1.0 - 2.0 * ((torch.arange(n_time)[:, None] // length_h) % 2)[None, ..., None]
    wanted = {"retain": torch.ones(1, n_time, heads, dtype=torch.float64), "write": is_written_bth}
    wanted["momentum"] = 1 - is_written_bth
    return Attack(wanted, key.expand(1, n_time, heads, -1), sign_bth1 * value)


def spiral(n_time: int, heads: int, generator: torch.Generator) -> Attack:
    """A key at a right angle to what the delta rule holds in two dimensions, each time: it grows as a root of time."""
    # After t tokens the memory is as long as the root of t, and the next key turns it by atan(1 / sqrt(t)).
    turned_t = torch.atan(1 / torch.arange(1, n_time - 1, dtype=torch.float64).sqrt()).cumsum(dim=0)
    angle_t = functional.pad(functional.pad(turned_t, (1, 0)) + math.pi / 2, (1, 0))
    keys_tk = functional.pad(torch.stack([angle_t.cos(), angle_t.sin()], dim=-1), (0, KEY_WIDTH - 2))
    value = functional.normalize(torch.ones(VALUE_WIDTH, dtype=torch.float64), dim=-1)
    ones = torch.ones(1, n_time, heads, dtype=torch.float64)
    wanted = {"retain": ones, "write": ones, "momentum": 0 * ones}
    return Attack(wanted, keys_tk[None, :, None].expand(1, -1, heads, -1), value.expand(1, n_time, heads, -1))


LINEAR = [name for name in rules.names() if named(name).is_linear]
ATTACKS = {"jumping": jumping, "coasting": coasting, "spiral": spiral}


def greatest(rule: Rule, attack: Attack, gates: Gates, *, piece: int = 1000, chunk: int = 50) -> Tensor:
    """The greatest norm of the memory of every head at the ends of many pieces of the window."""
    heads = attack.keys_bthk.shape[2]
    memory = rule.init(1, heads, KEY_WIDTH, VALUE_WIDTH, like=attack.keys_bthk)
    (name,), norms = rule.structure.weights, []
    for start in range(0, attack.keys_bthk.shape[1], piece):
        part = slice(start, start + piece)
        window = attack.keys_bthk[:, part], attack.values_bthv[:, part]
        _, memory = run(rule, memory, *window, window[0], gates.slice_time(start, start + piece), chunk=chunk)
        norms.append(memory[name].flatten(2).norm(dim=-1)[0])
    return torch.stack(norms).amax(dim=0)


@pytest.mark.parametrize("n_time", [10_000, pytest.param(100_000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
@pytest.mark.parametrize("kind", ATTACKS)
@pytest.mark.parametrize("name", LINEAR)
def test_a_linear_memory_stays_below_its_bound(name: str, kind: str, n_time: int) -> None:
    """For any gates that the gate layer may give; the proof is in ``memory.region``."""
    rule, heads = named(name), 6
    usual_h = torch.tensor(USUAL, dtype=torch.float64).repeat(heads // len(USUAL))
    attack = ATTACKS[kind](n_time, heads, torch.Generator().manual_seed(3))
    found_h = greatest(rule, attack, within(rule, attack.wanted, usual_h))
    assert (found_h <= bound(rule, usual_h)).all(), found_h / bound(rule, usual_h)


def test_the_attacks_are_real() -> None:
    """With the gates as they were, coasting ends at no number, and at retain 1 the spiral is a root of time."""
    rule = named("titans")
    attack = coasting(2000, 6, torch.Generator().manual_seed(3))
    free = Gates(*(attack.wanted[name] for name in ("retain", "write", "momentum")))
    free = replace(free, momentum_bth=0.9 * attack.wanted["momentum"])
    assert greatest(rule, attack, free).max() > 1e100
    attack = spiral(2000, 1, torch.Generator())
    free = Gates(attack.wanted["retain"], attack.wanted["write"])
    torch.testing.assert_close(greatest(named("delta"), attack, free), torch.tensor([2000.0**0.5]).double())


# One write, from any memory: what holds of every write holds of every sequence of them.

N_STATES = 20_000


def any_write(rule: Rule, random_seed: int) -> tuple[Memory, Tensor, Tensor, Gates, Tensor]:
    """Memories small and large with any momentum, keys along them or across, values to either side; m of each."""
    generator = torch.Generator().manual_seed(random_seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def ends() -> Tensor:
        side, anywhere = torch.randint(0, 3, (1, 1, N_STATES), generator=generator), draw(1, 1, N_STATES).sigmoid()
        return torch.where(side == 0, 0.0, torch.where(side == 1, 1.0, anywhere))

    usual_h = torch.rand(N_STATES, generator=generator, dtype=torch.float64)
    memory = rule.init(1, N_STATES, 2, 1, like=draw(1))
    for name, held in memory.items():
        if held.is_floating_point() and "span" not in name:
            memory[name] = draw(*held.shape) * 10 ** draw(*held.shape[:2], 1, 1).mul(2).clamp(-6, 3)
    keys_bthk, values_bthv = functional.normalize(draw(1, 1, N_STATES, 2), dim=-1), draw(1, 1, N_STATES, 1).sign()
    gates = within(rule, {"retain": ends(), "write": ends(), "momentum": ends()}, usual_h)
    return memory, keys_bthk, values_bthv, gates, most_momentum(named("titans"), usual_h)


def size(memory: Memory, most_h: Tensor) -> Tensor:
    """The larger norm of the memory and of where it comes to rest if momentum stays at m."""
    (name, held), *moving = ((name, x) for name, x in memory.items())
    norms = [held.flatten(2).norm(dim=-1)[0]]
    if moving:
        ahead_h11 = (most_h / (1 - most_h))[:, None, None]
        norms.append((held + ahead_h11 * memory[momentum_name(name)]).flatten(2).norm(dim=-1)[0])
    return torch.stack(norms).amax(dim=0)


@pytest.mark.parametrize("name", LINEAR)
def test_one_write_of_a_linear_rule_grows_by_what_it_writes_and_fades_as_much(name: str) -> None:
    """``V'^2 <= exp(-e w) V^2 + C w / (1 - m)``; without a look at the memory ``V' <= exp(-e w) V + w / (1 - m)``."""
    rule = named(name)
    memory, keys_bthk, values_bthv, gates, most_h = any_write(rule, 7)
    after = write(rule, memory, keys_bthk[:, 0], values_bthv[:, 0], gates.at(0))
    before_h, after_h = size(memory, most_h), size(after, most_h)
    written_h = gates.write_bth[0, 0]
    room_h = 1 - most_h if rule.update.has_momentum else torch.ones_like(most_h)
    kept_h = (-FADE * written_h).exp()
    if rule.slope:
        limit_h = (kept_h * before_h.square() + EXCESS * written_h / room_h).sqrt()
    else:
        limit_h = kept_h * before_h + written_h / room_h
    assert (after_h <= limit_h * (1 + 1e-12)).all(), (after_h / limit_h).max()


def test_a_span_of_pairs_is_bounded_as_one_is() -> None:
    """``|M'|^2 <= exp(-e w) |M|^2 + C w span`` for values of length one."""
    rule, n_states = named("omega_net"), 2000
    inputs = window(rule, 1, batch=n_states)
    size_b = 10 ** torch.linspace(-3, 3, n_states, dtype=torch.float64)
    memory = {
        name: x * (size_b[:, None, None, None] if name == "matrix_bhkv" else 1) for name, x in inputs.memory.items()
    }
    memory |= {name: functional.normalize(memory[name], dim=-1) for name in ("span_keys_bhck", "span_values_bhcv")}
    # What is remembered are mapped keys, here all alike, which is the steepest that they can be.
    key_bhk = rule.features.apply(inputs.keys_bthk[:, 0])
    memory["span_keys_bhck"] = key_bhk[:, :, None].expand_as(memory["span_keys_bhck"])
    memory["span_weights_bhc"] = torch.ones_like(memory["span_weights_bhc"])
    along_bhv = functional.normalize(inputs.values_bthv[:, 0], dim=-1)
    memory["matrix_bhkv"][::2] = (size_b[:, None, None, None] * key_bhk[..., None] * along_bhv[:, :, None])[::2]
    ones = torch.ones_like(inputs.gates.write_bth)
    gates = replace(within(rule, {"retain": ones, "write": ones}, torch.zeros(1)), weight_bth=ones)
    after = write(rule, memory, inputs.keys_bthk[:, 0], -along_bhv, gates.at(0))["matrix_bhkv"]
    before_bh, after_bh = (x.flatten(2).square().sum(dim=-1) for x in (memory["matrix_bhkv"], after))
    written_bh = gates.write_bth[:, 0]
    assert (after_bh <= (-FADE * written_bh).exp() * before_bh + EXCESS * written_bh * rule.span).all()


ORTHOGONAL = 1.21
"""The greatest singular value that Newton-Schulz leaves."""

N_TOKENS = 300


def driven(name: str, n_time: int = N_TOKENS) -> Iterator[Memory]:
    """The memories of a rule, beginning with the first, under gates that jump between their ends, and gates that coast.

    Keys, values and codes are greedy: of those of four rows, each head goes on with what makes its memory longest.
    """
    rule, generator, n_drawn = named(name), torch.Generator().manual_seed(1), min(n_time, 1000)
    attacks = [make(n_time, 2, generator).wanted for make in (jumping, coasting)]
    wanted = {each: torch.cat([gates[each] for gates in attacks], dim=-1) for each in attacks[0]}
    gates = within(rule, wanted, torch.tensor([0.5, 0.9, 0.5, 0.9], dtype=torch.float64))
    drawn = window(rule, n_drawn, batch=4, heads=4)
    values_bthv = functional.normalize(drawn.values_bthv, dim=-1)
    first = rule.init(1, 4, drawn.keys_bthk.shape[-1], values_bthv.shape[-1], like=values_bthv)
    memory = {each: x.expand(4, *x.shape[1:]) for each, x in first.items()}
    yield memory
    for t in range(n_time):
        key_bhk, value_bhv, others = (
            drawn.keys_bthk[:, t % n_drawn],
            values_bthv[:, t % n_drawn],
            drawn.gates.at(t % n_drawn),
        )
        told = {each: None if x is None else x.expand(4, *x.shape[1:]) for each, x in vars(gates.at(t)).items()}
        told |= {each: getattr(others, each) for each in ("threshold_bhc", "weight_bhc", "code_bhcg")}
        after = write(rule, memory, key_bhk, value_bhv, RowGates(**told))
        best_h = length([after[each] for each in rule.structure.weights]).argmax(dim=0)
        chosen = {each: x[best_h, torch.arange(4)] if x.dim() > 1 else x[0] for each, x in after.items()}
        memory = {each: x.expand(4, *x.shape) for each, x in chosen.items()}
        yield memory


@pytest.mark.parametrize("name", ["lattice", "lattice_encode", "lattice_similarity"])
def test_slots_have_length_one(name: str) -> None:
    for memory in driven(name):
        length_bhg = memory["slots_bhgk"].norm(dim=-1)
        torch.testing.assert_close(length_bhg, torch.ones_like(length_bhg), rtol=0, atol=1e-9)


def test_memora_stays_on_the_simplex() -> None:
    rule = named("memora")
    for memory in driven("memora"):
        for weight in rule.weights(memory).values():
            assert (weight >= 0).all()
            torch.testing.assert_close(weight.sum(dim=-2), torch.ones_like(weight.sum(dim=-2)), rtol=0, atol=1e-9)


def test_the_weights_of_moneta_are_bounded_whatever_is_stored() -> None:
    """``W = A / sqrt(|A|_4^4 + 1e-12)``: at most ``n^(1/4) 707`` for n numbers, and it falls where A is large."""
    rule = named("moneta")
    for exponent in range(-12, 13):
        stored = 10.0**exponent * torch.randn(1, 1, 20, 28, dtype=torch.float64)
        assert rule.retention.weights(stored).norm() <= (20 * 28) ** 0.25 * 708


def test_a_step_of_atlas_has_a_length() -> None:
    """``|M'| <= exp(-e w) |M| + w 1.21 sqrt(rank)``."""
    rank = VALUE_WIDTH
    for before, after in pairwise(driven("atlas")):
        moved = after["matrix_bhkv"].flatten(2).norm(dim=-1) - before["matrix_bhkv"].flatten(2).norm(dim=-1)
        assert (moved <= ORTHOGONAL * math.sqrt(rank)).all()
    assert curvature(named("atlas")) is None and named("atlas").has_retain


def test_a_slot_of_trellis_grows_by_what_it_writes() -> None:
    """``|n'| <= exp(-e w) |n| + w (1.1 |c| + 0.15)`` per slot, from slots of any size along the key and across."""
    rule, n_states = named("trellis"), 4000
    inputs = window(rule, 1, batch=n_states)
    size_b = 10 ** torch.linspace(-3, 4, n_states, dtype=torch.float64)
    memory = {name: x * size_b[:, None, None, None] for name, x in inputs.memory.items()}
    ones = torch.ones_like(inputs.gates.write_bth)
    gates = within(rule, {"retain": ones, "write": ones}, torch.zeros(1))
    gates = replace(gates, code_bthg=inputs.gates.code_bthg)
    values_bhv = functional.normalize(inputs.values_bthv[:, 0], dim=-1)
    after = write(rule, memory, inputs.keys_bthk[:, 0], values_bhv, gates.at(0))
    assert inputs.gates.code_bthg is not None
    written_bh1, code_bhg = gates.write_bth[:, 0, :, None], inputs.gates.code_bthg[:, 0].abs()
    for name, held in memory.items():
        limit_bhg = (-FADE * written_bh1).exp() * held.norm(dim=-1) + written_bh1 * (1.1 * code_bhg + 0.15)
        assert (after[name].norm(dim=-1) <= limit_bhg * (1 + 1e-12)).all()


def test_one_write_of_ftrl_grows_by_what_it_writes_and_fades_as_much() -> None:
    """``|A'|^2 <= exp(-e w) |A|^2 + C w (|v| + 0.05 sqrt(n))^2`` for matrices of n numbers."""
    memory, keys_bthk, values_bthv, gates, _ = any_write(named("ftrl"), 7)
    after = write(named("ftrl"), memory, keys_bthk[:, 0], values_bthv[:, 0], gates.at(0))
    written_h = gates.write_bth[0, 0]
    off = (1 + 0.05 * math.sqrt(memory["matrix_bhkv"][0, 0].numel())) ** 2
    limit_h = (-FADE * written_h).exp() * length(list(memory.values()))[0].square() + EXCESS * written_h * off
    assert (length(list(after.values()))[0].square() <= limit_h * (1 + 1e-12)).all()


def test_the_sum_of_ftrl_grows_as_a_root_without_its_fade() -> None:
    rule, n_time = named("ftrl"), 4000
    attack = spiral(n_time, 1, torch.Generator())
    kept = within(rule, attack.wanted, torch.zeros(1))
    free = replace(kept, retain_bth=attack.wanted["retain"], log_retain_bth=None)
    grown, held = (greatest(rule, attack, gates, chunk=1).item() for gates in (free, kept))
    assert 0.9 * n_time**0.5 < grown and held < 0.99 * grown


NETWORKS = [name for name in rules.names() if named(name).is_limited and named(name).structure.kind == "mlp"]
"""Rules of which no more is known than that a surprise is at most LONGEST long."""


def length(tensors: list[Tensor]) -> Tensor:
    """The norm of all of these together, per row and head."""
    return torch.stack([x.flatten(2).square().sum(-1) for x in tensors]).sum(dim=0).sqrt()


def steep(rule: Rule, n_states: int) -> Memory:
    """Weights of every size whose rows before the LayerNorm are nearly equal, and a moving momentum."""
    memory = window(rule, 1, batch=n_states).memory
    size_b111 = 10 ** torch.linspace(-3, 5, n_states, dtype=torch.float64)[:, None, None, None]
    memory = {name: size_b111 * x if x.dim() == 4 else x for name, x in memory.items()}
    out_bhfv = memory["out_bhfv"]
    return memory | {"out_bhfv": out_bhfv.mean(dim=-1, keepdim=True) + 1e-6 * out_bhfv}


@pytest.mark.parametrize("name", NETWORKS)
def test_one_write_of_a_network_is_no_longer_than_its_limit(name: str) -> None:
    """``max(|M'|, |Z'|) <= exp(-e w) max(|M|, |Z|) + w LONGEST / (1 - m)``, Z where M comes to rest at m; where the old
    memory is pulled to an anchor, that one counts as M does."""
    rule, n_states = named(name), 2000
    inputs, memory = window(rule, 1, batch=n_states), steep(named(name), n_states)
    names, heads = rule.structure.weights, inputs.keys_bthk.shape[2]
    usual_h = torch.tensor(USUAL, dtype=torch.float64)[:heads]
    ones = torch.ones_like(inputs.gates.write_bth)
    gates = within(rule, {"retain": ones, "write": ones, "momentum": ones}, usual_h)
    gates = replace(gates, threshold_bth=inputs.gates.threshold_bth)
    values_bhv = functional.normalize(inputs.values_bthv[:, 0], dim=-1)
    after = write(rule, memory, inputs.keys_bthk[:, 0], values_bhv, gates.at(0))
    most_h = most_momentum(rule, usual_h) if rule.update.has_momentum else torch.zeros(heads, dtype=torch.float64)
    ahead_h = most_h / (1 - most_h)

    def size_of(memory: Memory) -> Tensor:
        norms = [length([memory[name] for name in names])]
        if rule.update.has_momentum:
            rest = [memory[name] + ahead_h[:, None, None] * memory[momentum_name(name)] for name in names]
            norms.append(length(rest))
        if rule.retention.name == "local":
            norms.append(length([memory[beside(name, "anchor")] for name in names]))
        return torch.stack(norms).amax(dim=0)

    written_bh = gates.write_bth[:, 0]
    faded_bh = (-FADE * written_bh).exp() if rule.retention.name == "decay" else torch.ones_like(written_bh)
    limit_bh = faded_bh * size_of(memory) + written_bh * LONGEST / (1 - most_h)
    assert (size_of(after) <= limit_bh * (1 + 1e-12)).all(), (size_of(after) / limit_bh).max()


def test_a_short_surprise_keeps_its_bits() -> None:
    """What ordinary training writes is what it was; a long one is LONGEST long and points where it did."""
    rule = named("titans_mlp")
    generator = torch.Generator().manual_seed(0)
    surprise = {
        name: (torch.randn(2, 3, 5, 4, generator=generator), torch.randn(2, 3, 5, 6, generator=generator))
        for name in rule.structure.weights
    }
    for name, (_, kept) in limited(rule, surprise).items():
        assert torch.equal(kept, surprise[name][1])
    for scale in (1e4, 1e18, 1e30):
        longer = {name: (a, scale * d) for name, (a, d) in surprise.items()}
        found = limited(rule, longer)
        squares = [a.square().sum(-1) * d.square().sum(-1) for a, d in found.values()]
        expected = torch.full((2, 3, 5), LONGEST if scale < 1e30 else 0.0)
        torch.testing.assert_close(sum(squares[1:], squares[0]).sqrt(), expected)


@pytest.mark.parametrize("n_time", [5_000, pytest.param(100_000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
@pytest.mark.parametrize("name", [name for name in rules.names() if name not in LINEAR])
def test_a_rule_that_is_not_linear_stays_finite(name: str, n_time: int) -> None:
    """Under gates that jump, the keys and values of the attack chosen token by token: of a few, the pair that makes the
    memory longest."""
    rule = named(name)
    names = [each for each in rule.init(1, 1, 5, 5) if "anchor" not in each and "span" not in each]
    *_, last = driven(name, n_time)
    found = length([last[each] for each in names])
    assert (found <= 1.2 * LONGEST / (FADE * (1 - MOMENTA[1]))).all()


@pytest.mark.parametrize("n_time", [5_000, pytest.param(100_000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
@pytest.mark.parametrize("name", [name for name in rules.names() if name not in LINEAR])
def test_no_memory_runs_away_in_the_form_that_its_rule_declares(name: str, n_time: int) -> None:
    """One key, written at the greatest rate in every token of chunks whose surprises are taken at their start: a
    residual is multiplied by ``1 - 50 w`` a chunk, until the limit of a surprise holds it."""
    rule, piece = named(name), 500
    drawn = window(rule, piece, batch=1, heads=2)
    ones = torch.ones_like(drawn.gates.write_bth)
    gates = within(rule, {"retain": ones, "write": ones, "momentum": 0.5 * ones}, torch.full((2,), 0.5).double())
    others = {each: getattr(drawn.gates, each) for each in ("threshold_bth", "weight_bth", "code_bthg")}
    gates = replace(gates, **{each: None if x is None else x.abs() for each, x in others.items()})
    keys_bthk = drawn.keys_bthk[:, :1].expand_as(drawn.keys_bthk)
    values_bthv = functional.normalize(drawn.values_bthv[:, :1], dim=-1).expand_as(drawn.values_bthv)
    memory = rule.init(1, 2, keys_bthk.shape[-1], values_bthv.shape[-1], like=values_bthv)
    for index in range(n_time // piece):
        sign = 1 - 2 * (index % 2)
        read_bthv, memory = run(rule, memory, keys_bthk, sign * values_bthv, keys_bthk, gates, chunk=50)
    assert read_bthv.isfinite().all()
    names = [each for each in memory if each.split("_")[0] in {w.split("_")[0] for w in rule.structure.weights}]
    found = length([memory[each] for each in names if "anchor" not in each])
    assert (found <= 1.3 * rule.span * LONGEST / (FADE * (1 - MOMENTA[1]))).all()


def test_every_rule_is_spoken_for() -> None:
    """Each is linear, in a test of its own above, or a network whose surprise has a limit."""
    proven = {
        "lattice",
        "lattice_encode",
        "lattice_similarity",
        "memora",
        "moneta",
        "atlas",
        "trellis",
        "omega_net",
        "ftrl",
    }
    assert {
        *LINEAR,
        *NETWORKS,
        *proven,
    } == set(rules.names())
