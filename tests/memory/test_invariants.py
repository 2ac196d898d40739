"""The invariants that memory.md names for a rule, each by itself: sections 2.3, 3.1, 3.2 and 3.4-3.9."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from memory.inputs import Window, named, window
from meristem.memory import Gates, Rule, run, scan
from meristem.memory.bias import absolute, power
from meristem.memory.named import rules
from meristem.memory.retention import power_norm
from meristem.memory.rule import read, write
from meristem.memory.state import Memory
from meristem.memory.structure import Live, two_slots
from meristem.memory.update import plain

NAME, MOMENTUM = "matrix_bhkv", "matrix_momentum_bhkv"
LINEAR = [name for name in rules.names() if named(name).is_linear and named(name).has_retain]
CORRECTING = [name for name in LINEAR if named(name).slope]


def like(inputs: Window, value: float) -> Tensor:
    return torch.full_like(inputs.gates.write_bth, value)


def constant(inputs: Window, *, retain: float = 1.0, write_rate: float = 1.0, momentum: float = 0.0) -> Gates:
    """The same gates for all tokens; momentum where the window has it."""
    moving = None if inputs.gates.momentum_bth is None else like(inputs, momentum)
    return replace(
        inputs.gates,
        retain_bth=like(inputs, retain),
        write_bth=like(inputs, write_rate),
        momentum_bth=moving,
    )


def still(inputs: Window) -> Memory:
    """The memory of a window without its momentum."""
    return {name: torch.zeros_like(x) if "momentum" in name else x for name, x in inputs.memory.items()}


# The linear family.

FIRST_SET = {
    # memory.md 3.2, set 1: reads per token, then the rows of M (value x key) after the last.
    "titans": ([[0.5, 1], [2.2, 1.4]], [[0.7, 1.5], [1.4, 0]]),
    "delta": ([[0.5, 1], [1.95, 0.9]], [[0.45, 1.5], [0.9, 0]]),
    "hebbian": ([[0.5, 1], [1.95, 0.9]], [[0.45, 1.5], [0.9, 0]]),
}


@pytest.mark.parametrize("form", ["scan", "exact_chunk"])
@pytest.mark.parametrize("name", FIRST_SET)
def test_golden_numbers_of_orthogonal_keys(name: str, form: str) -> None:
    """Section 12, golden: set 1 of memory.md 3.2."""
    keys_bthk = torch.tensor([[1, 0], [0, 1]], dtype=torch.float64)[None, :, None]
    values_bthv = torch.tensor([[1, 2], [3, 0]], dtype=torch.float64)[None, :, None]
    rule, full_bth = named(name), torch.ones(1, 2, 1, dtype=torch.float64)
    gates = Gates(0.9 * full_bth, 0.5 * full_bth, 0.5 * full_bth if rule.update.has_momentum else None)
    memory = rule.init(1, 1, 2, 2, like=keys_bthk)
    read_bthv, after = run(rule, memory, keys_bthk, values_bthv, torch.ones_like(keys_bthk), gates, form=form)
    reads, held = (torch.tensor(x, dtype=torch.float64) for x in FIRST_SET[name])
    torch.testing.assert_close(read_bthv[0, :, 0], reads)
    torch.testing.assert_close(after[NAME][0, 0].mT, held)


@pytest.mark.parametrize("name", LINEAR)
def test_what_nobody_writes_only_fades(name: str) -> None:
    """3.1: at a write rate of 0, ``M_t = A_t M_0 + c_t S_0``."""
    rule, inputs = named(name), window(named(name), 9)
    gates = replace(inputs.gates, write_bth=like(inputs, 0.0))
    _, after = scan(rule, *inputs.arguments()[:4], gates)
    moving_bth = like(inputs, 0.0) if gates.momentum_bth is None else gates.momentum_bth
    kept_bh, reached_bh, moved_bh = gates.retain_bth.prod(dim=1), torch.zeros(2, 3), moving_bth.prod(dim=1)
    for t in range(9):
        # S_t reaches M_9 through the retain gates after token t.
        reached_bh = reached_bh + moving_bth[:, : t + 1].prod(dim=1) * gates.retain_bth[:, t + 1 :].prod(dim=1)
    expected = kept_bh[..., None, None] * inputs.memory[NAME]
    if rule.update.has_momentum:
        expected = expected + reached_bh[..., None, None] * inputs.memory[MOMENTUM]
        torch.testing.assert_close(after[MOMENTUM], moved_bh[..., None, None] * inputs.memory[MOMENTUM])
    torch.testing.assert_close(after[NAME], expected)


@pytest.mark.parametrize("name", LINEAR)
def test_a_token_changes_a_memory_by_rank_one(name: str) -> None:
    """3.1: less what fades and what momentum brings."""
    rule, inputs = named(name), window(named(name), 1)
    _, after = scan(rule, *inputs.arguments())
    changed = after[NAME] - inputs.gates.retain_bth[:, 0, :, None, None] * inputs.memory[NAME]
    if rule.update.has_momentum:
        moving_bth = inputs.gates.momentum_bth
        assert moving_bth is not None
        changed = changed - moving_bth[:, 0, :, None, None] * inputs.memory[MOMENTUM]
    lengths = torch.linalg.svdvals(changed)
    assert (lengths[..., 0] > 1e-3).all() and (lengths[..., 1] < 1e-12).all()


@pytest.mark.parametrize("name", CORRECTING)
def test_an_orthogonal_key_disturbs_nothing(name: str) -> None:
    """3.1: where nothing fades, what is recalled for keys at a right angle to all that are written stays."""
    rule, inputs = named(name), window(named(name), 6)
    asked_bhk = inputs.keys_bthk[:, 0]
    away_bth1 = torch.einsum("bthk,bhk->bth", inputs.keys_bthk, asked_bhk)[..., None]
    keys_bthk = functional.normalize(inputs.keys_bthk - away_bth1 * asked_bhk[:, None], dim=-1)[:, 1:]
    rest = inputs.cut(1, 6, still(inputs))
    gates = constant(rest, write_rate=0.7, momentum=0.5)
    _, after = scan(rule, rest.memory, keys_bthk, rest.values_bthv, rest.queries_bthk, gates)
    torch.testing.assert_close(read(rule, after, asked_bhk), read(rule, rest.memory, asked_bhk))
    assert (after[NAME] - rest.memory[NAME]).abs().max() > 0.1


@pytest.mark.parametrize("name", ["delta", "gated_delta", "titans", "momentum_delta"])
def test_orthonormal_keys_are_recalled_exactly(name: str) -> None:
    """3.1: all of them, after the last was written."""
    rule, inputs = named(name), window(named(name), 5)
    keys_bthk = torch.linalg.qr(inputs.keys_bthk.movedim(1, 2)).Q.movedim(2, 1)
    rest = still(inputs), keys_bthk, inputs.values_bthv, inputs.queries_bthk
    _, after = scan(rule, *rest, constant(inputs))
    for t in range(5):
        torch.testing.assert_close(read(rule, after, keys_bthk[:, t]), inputs.values_bthv[:, t])


def test_hebbian_is_gated_linear_attention() -> None:
    """S1-M6: ``y_t = sum (q_t k_j) write_j v_j`` times the retain gates between, beside what is left of the first M."""
    inputs = window(named("hebbian"), 29)
    read_bthv, _ = scan(named("hebbian"), *inputs.arguments())
    total_bth = inputs.gates.retain_bth.log().cumsum(dim=1)
    between_bhts = (total_bth[:, :, None] - total_bth[:, None]).permute(0, 3, 1, 2)
    score_bhts = torch.einsum("bthk,bshk->bhts", inputs.queries_bthk, inputs.keys_bthk) * between_bhts.exp()
    score_bhts = (score_bhts * inputs.gates.write_bth.movedim(1, 2)[:, :, None]).tril()
    expected = torch.einsum("bhts,bshv->bthv", score_bhts, inputs.values_bthv)
    first = torch.einsum("bthk,bhkv->bthv", inputs.queries_bthk, inputs.memory[NAME])
    torch.testing.assert_close(read_bthv, expected + total_bth.exp()[..., None] * first)


@pytest.mark.parametrize("name, factor", [("delta", 0.9 - 0.4), ("gated_delta", 0.9 * (1 - 0.4))])
def test_the_factor_along_a_key_that_comes_again(name: str, factor: float) -> None:
    """2.3: cold ``retain - write``, warm ``retain (1 - write)``; the residual of a value of 0 is the recall itself."""
    rule, inputs = named(name), window(named(name), 4)
    same = replace(inputs, keys_bthk=inputs.keys_bthk[:, :1].expand_as(inputs.keys_bthk))
    nothing = torch.zeros_like(same.values_bthv)
    gates = constant(same, retain=0.9, write_rate=0.4)
    read_bthv, _ = scan(rule, same.memory, same.keys_bthk, nothing, same.keys_bthk, gates)
    first_bhv = read(rule, same.memory, same.keys_bthk[:, 0])
    powers_t = factor ** torch.arange(1, 5, dtype=torch.float64)
    torch.testing.assert_close(read_bthv, powers_t[None, :, None, None] * first_bhv[:, None])


@pytest.mark.parametrize("share, grows", [(0.98, False), (1.02, True)])
@pytest.mark.parametrize("retain, moving", [(1.0, 0.5), (0.9, 0.8)])
def test_momentum_is_stable_up_to_its_limit_for_a_key_that_stays(
    share: float, grows: bool, retain: float, moving: float
) -> None:
    """2.3: ``write < (1 + retain)(1 + momentum)``."""
    rule, inputs = named("titans"), window(named("titans"), 900)
    same_bthk = inputs.keys_bthk[:, :1].expand_as(inputs.keys_bthk)
    gates = constant(inputs, retain=retain, write_rate=share * (1 + retain) * (1 + moving), momentum=moving)
    nothing = torch.zeros_like(inputs.values_bthv)
    read_bthv, _ = run(rule, still(inputs), same_bthk, nothing, same_bthk, gates)
    assert (read_bthv[:, -1].abs().max() > read_bthv[:, 0].abs().max()) == grows


def test_omega_fed_with_what_titans_got_wrong_is_titans() -> None:
    """S3-M4: the surrogate of Atlas writes ``- omega``; with ``omega = M k - v`` it is the rule that it stands for."""
    titans, omega, inputs = named("titans"), named("omega"), window(named("titans"), 11)
    expected_bthv, expected = scan(titans, *inputs.arguments())
    memory, reads = inputs.memory, []
    for t in range(11):
        wrong_bhv = read(omega, memory, inputs.keys_bthk[:, t]) - inputs.values_bthv[:, t]
        memory = write(omega, memory, inputs.keys_bthk[:, t], -wrong_bhv, inputs.gates.at(t))
        reads.append(read(omega, memory, inputs.queries_bthk[:, t]))
    torch.testing.assert_close(torch.stack(reads, dim=1), expected_bthv)
    torch.testing.assert_close(memory, expected)


# MONETA, YAAD, MEMORA.


def test_moneta_of_power_one_sees_the_sign_alone() -> None:
    """S1-M7: a residual ten times as large, and in another proportion, writes the same; so no outlier moves it more."""
    rule = replace(named("moneta"), bias=power(1))
    inputs = window(rule, 1)
    recalled_bhv = read(rule, inputs.memory, inputs.keys_bthk[:, 0])
    sign_bhv = inputs.values_bthv[:, 0].sign()

    def after(size: Tensor) -> Memory:
        value_bhv = recalled_bhv - size * sign_bhv
        return write(rule, inputs.memory, inputs.keys_bthk[:, 0], value_bhv, inputs.gates.at(0))

    one, million = after(2 + inputs.values_bthv[:, 0].abs()), after(1e6 * (1 + recalled_bhv.abs()))
    torch.testing.assert_close(million, one, rtol=0, atol=1e-12)
    assert any((one[name] - inputs.memory[name]).abs().max() > 1e-3 for name in one)


def test_a_power_norm_of_two_is_moneta_without_a_map() -> None:
    """S1-M7, 3.5: q = 2 is ``off``, whatever the map."""
    rule = named("moneta")
    inputs = window(replace(rule, retention=power_norm(2)), 7)
    maps = [power_norm(2, "paper"), power_norm(2, "mirror"), power_norm(4, "off")]
    reads = [scan(replace(rule, retention=retention), *inputs.arguments())[0] for retention in maps]
    assert torch.equal(reads[0], reads[1]) and torch.equal(reads[0], reads[2])


def test_yaad_with_a_low_threshold_is_the_absolute_rule() -> None:
    """S1-M8: threshold to 0 at a fixed ``write * threshold``."""
    rule = named("yaad")
    inputs = window(rule, 7)
    least = 1e-6
    tiny = replace(inputs.gates, threshold_bth=like(inputs, least), write_bth=inputs.gates.write_bth / least)
    expected, after = scan(replace(rule, bias=absolute()), *inputs.arguments())
    found, found_after = scan(rule, *inputs.arguments()[:4], tiny)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(found_after, after, rtol=0, atol=1e-9)


def test_an_outlier_moves_yaad_no_further_than_its_threshold() -> None:
    """S1-M8: by at most ``write * threshold * |df|``, df the slope of the network in all of its weights."""
    rule = named("yaad")
    inputs = window(rule, 1)
    gates = replace(inputs.gates, retain_bth=like(inputs, 1.0))
    _, after = scan(rule, inputs.memory, inputs.keys_bthk, 1e6 * inputs.values_bthv, inputs.queries_bthk, gates)
    names, n_values = rule.structure.weights, inputs.values_bthv.shape[-1]
    assert gates.threshold_bth is not None
    for row in range(2):
        for head in range(3):
            weights = {name: inputs.memory[name][row, head] for name in names}

            def answer(weights: Memory, row: int = row, head: int = head) -> Tensor:
                live = Live({name: weight[None, None] for name, weight in weights.items()})
                return rule.structure.recall(live, inputs.keys_bthk[row, 0, head].view(1, 1, 1, -1)).flatten()

            slopes = torch.func.jacrev(answer)(weights)
            steepest = torch.cat([slope.flatten(1) for slope in slopes.values()], dim=1).norm()
            moved = torch.cat([(after[name] - inputs.memory[name])[row, head].flatten() for name in names]).norm()
            limit = gates.write_bth[row, 0, head] * gates.threshold_bth[row, 0, head] * math.sqrt(n_values)
            assert 0 < moved <= limit * steepest


def test_the_threshold_of_yaad_learns_where_it_is_passed() -> None:
    """S1-M8: its gate has a gradient exactly at the tokens whose residual is longer."""
    rule, inputs = named("yaad"), window(named("yaad"), 2)
    recalled_bhv = read(rule, inputs.memory, inputs.keys_bthk[:, 0])
    length_bh = (recalled_bhv - inputs.values_bthv[:, 0]).norm(dim=-1)
    share_bh = torch.tensor([[0.5, 2.0, 0.5], [2.0, 0.5, 2.0]], dtype=torch.float64)
    threshold_bth = like(inputs, 1e6)
    threshold_bth[:, 0] = share_bh * length_bh
    threshold_bth.requires_grad_()
    read_bthv, _ = scan(rule, *inputs.arguments()[:4], replace(inputs.gates, threshold_bth=threshold_bth))
    read_bthv.square().sum().backward()
    assert threshold_bth.grad is not None
    assert torch.equal(threshold_bth.grad[:, 0] != 0, share_bh < 1)
    assert not threshold_bth.grad[:, 1].any()


def test_memora_that_keeps_nothing_is_uniform_and_entropy_never_falls() -> None:
    """S1-M9, 3.6: retain 0 and no writes give every place the same; below 1 the entropy of a column never falls."""
    rule = named("memora")
    inputs = window(rule, 12)
    memory, entropies = inputs.memory, []
    fading = constant(inputs, retain=0.8, write_rate=0.0)
    for t in range(12):
        memory = write(rule, memory, inputs.keys_bthk[:, t], inputs.values_bthv[:, t], fading.at(t))
        weights = rule.weights(memory)
        entropies.append([-(weight * weight.log()).sum(dim=-2) for weight in weights.values()])
    for before, after in zip(entropies, entropies[1:], strict=False):
        assert all((new >= old).all() for old, new in zip(before, after, strict=True))
    nothing = constant(inputs, retain=0.0, write_rate=0.0).at(0)
    emptied = rule.weights(write(rule, inputs.memory, inputs.keys_bthk[:, 0], inputs.values_bthv[:, 0], nothing))
    for weight in emptied.values():
        torch.testing.assert_close(weight, torch.full_like(weight, 1 / weight.shape[-2]))


# Slots.

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
SLOT_LOSSES: dict[str, Loss] = {
    # From slots, code, key and value to the written loss.
    "lattice": lambda s, c, k, v: 0.5 * (v - torch.einsum("bhg,bhgk->bhk", c, s)).square().sum(),
    "lattice_encode": lambda s, c, k, v: 0.5 * (c - torch.einsum("bhgk,bhk->bhg", s, k)).square().sum(),
    "lattice_similarity": lambda s, c, k, v: -torch.einsum("bhg,bhgk,bhk->", c, s, k),
}


@pytest.mark.parametrize("name", SLOT_LOSSES)
def test_a_step_of_slots_is_autograd_through_their_length(name: str) -> None:
    """S1-M10: ``- write`` times the gradient of the loss of normalised rows, at a right angle to each row."""
    rule, inputs = named(name), window(named(name), 1)
    code_bthg = inputs.gates.code_bthg
    assert code_bthg is not None
    leaf_bhgk = inputs.memory["slots_bhgk"].clone().requires_grad_()
    vectors = inputs.keys_bthk[:, 0], inputs.values_bthv[:, 0]
    loss = SLOT_LOSSES[name](functional.normalize(leaf_bhgk, dim=-1), code_bthg[:, 0], *vectors)
    step_bhgk = -inputs.gates.write_bth[:, 0, :, None, None] * torch.autograd.grad(loss, leaf_bhgk)[0]
    beside_bhg = (step_bhgk * inputs.memory["slots_bhgk"]).sum(dim=-1)
    torch.testing.assert_close(beside_bhg, torch.zeros_like(beside_bhg), rtol=0, atol=1e-12)
    _, after = scan(rule, *inputs.arguments())
    expected = functional.normalize(inputs.memory["slots_bhgk"] + step_bhgk, dim=-1)
    torch.testing.assert_close(after["slots_bhgk"], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", SLOT_LOSSES)
def test_a_slot_that_is_told_what_it_is_stays(name: str) -> None:
    """S1-M10: an input along ``s_i`` leaves it, and a write rate of 0 leaves all."""
    rule, inputs = named(name), window(named(name), 1)
    code_bthg = inputs.gates.code_bthg
    assert code_bthg is not None
    slots_bhgk = inputs.memory["slots_bhgk"]
    known_bhk = torch.einsum("bhg,bhgk->bhk", code_bthg[:, 0], slots_bhgk)
    vectors = slots_bhgk[:, :, 3], known_bhk + 2 * slots_bhgk[:, :, 3]
    after = write(rule, inputs.memory, *vectors, inputs.gates.at(0))["slots_bhgk"]
    torch.testing.assert_close(after[:, :, 3], slots_bhgk[:, :, 3], rtol=0, atol=1e-10)
    assert (after - slots_bhgk).abs().amax(dim=(0, 1, 3))[:3].min() > 1e-4
    never = replace(inputs.gates, write_bth=like(inputs, 0.0)).at(0)
    same = write(rule, inputs.memory, inputs.keys_bthk[:, 0], inputs.values_bthv[:, 0], never)
    torch.testing.assert_close(same, inputs.memory, rtol=0, atol=1e-10)


def unit(rows: Tensor) -> Tensor:
    """Guarded as the rule is."""
    return rows / (rows.square().sum(dim=-1, keepdim=True) + 1e-12).sqrt()


SQUASHES: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    # phi, and how near: where its variance is 0 a LayerNorm is all guard.
    "identity": (lambda z: z, 1e-11),
    "silu": (functional.silu, 1e-11),
    "l2_silu": (
        lambda z: functional.silu(z) / (functional.silu(z).square().sum(-1, keepdim=True) + 1e-12).sqrt(),
        1e-11,
    ),
    "ln_silu": (lambda z: functional.layer_norm(functional.silu(z), z.shape[-1:]), 1e-6),
}


@pytest.mark.parametrize("squash", SQUASHES)
def test_trellis_is_a_loop_with_autograd_inside(squash: str) -> None:
    """S1-M11: two passes per token, ``N <- retain N - write grad 1/2 |phi(N k) - code|^2``, and then the read."""
    (squashed, tolerance), rule = SQUASHES[squash], replace(named("trellis"), structure=two_slots(4, squash))
    inputs = window(rule, 7)
    code_bthg = inputs.gates.code_bthg
    assert code_bthg is not None
    memory, reads = inputs.memory, []
    for t in range(7):
        retain, rate = (x[:, t, :, None, None] for x in (inputs.gates.retain_bth, inputs.gates.write_bth))
        written = {"key_slots_bhgk": inputs.keys_bthk[:, t], "value_slots_bhgv": inputs.values_bthv[:, t]}
        for name, vector_bhk in written.items():
            leaf_bhgk = memory[name].clone().requires_grad_()
            reached_bhg = torch.einsum("bhgk,bhk->bhg", leaf_bhgk, vector_bhk)
            loss = 0.5 * (squashed(reached_bhg) - code_bthg[:, t]).square().sum()
            memory = memory | {name: retain * memory[name] - rate * torch.autograd.grad(loss, leaf_bhgk)[0]}
        asked_bhg = torch.einsum("bhgk,bhk->bhg", memory["key_slots_bhgk"], inputs.queries_bthk[:, t])
        found_bhg = functional.layer_norm(functional.silu(asked_bhg), (4,))
        reads.append(squashed(torch.einsum("bhg,bhgv->bhv", found_bhg, memory["value_slots_bhgv"])))
    read_bthv, after = scan(rule, *inputs.arguments())
    torch.testing.assert_close(read_bthv, torch.stack(reads, dim=1), rtol=0, atol=tolerance)
    torch.testing.assert_close(after, memory, rtol=0, atol=tolerance)


def test_trellis_writes_before_it_reads() -> None:
    """S1-M11: another value at a token is another read at that token."""
    rule, inputs = named("trellis"), window(named("trellis"), 5)
    values_bthv = inputs.values_bthv.clone()
    values_bthv[:, 3] += 1
    read_bthv, _ = scan(rule, *inputs.arguments())
    other_bthv, _ = scan(rule, inputs.memory, inputs.keys_bthk, values_bthv, inputs.queries_bthk, inputs.gates)
    assert torch.equal(other_bthv[:, :3], read_bthv[:, :3])
    assert (other_bthv[:, 3] - read_bthv[:, 3]).abs().amax(dim=-1).min() > 1e-4


def test_a_rule_is_a_value() -> None:
    """S1-M22: the same parts make the same rule, and another part another."""
    rule = named("titans")
    assert rule.structure == named("titans(n_layers=1)").structure
    assert isinstance(replace(rule, update=plain()), Rule)
    with pytest.raises(AttributeError, match="cannot assign"):
        rule.reads = "before"  # type: ignore[misc]
