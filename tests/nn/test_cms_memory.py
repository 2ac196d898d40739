"""Memories at several speeds: schedule, pooling, late reading, resets, learned frequencies."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meristem.errors import ConflictingKeys, DeadKey
from meristem.memory.forms import run_trusted
from meristem.memory.state import flatten, map_tensors
from meristem.nn.auxiliary import AUXILIARY, auxiliary
from meristem.nn.cms_memory import CMSMemory
from meristem.nn.config import LevelsConfig, MemoryConfig
from meristem.nn.frequency import BLOCK, running_mean
from meristem.nn.memory import build_memory
from meristem.nn.neural_memory import NeuralMemory
from meristem.optim.period_clock import Clock

WIDTH = 12
KINDS = ("pooled", "each")


def part_of(rule: str = "titans", *, form: str = "auto", conv: int = 4, **levels: object) -> MemoryConfig:
    values = {"rule": rule, "form": form, "conv": conv, "head_dim": 4, "chunk": 3, "levels": levels}
    return MemoryConfig.model_validate(values)


def module_of(config: MemoryConfig, noise: float = 0.1, **options: bool) -> CMSMemory:
    """Weights off their first values, so that no zero hides what it multiplies."""
    torch.manual_seed(0)
    module = CMSMemory(WIDTH, config, **options).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return module


def text(n_time: int, batch: int = 2, random_seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(random_seed)
    return torch.randn(batch, n_time, WIDTH, generator=generator, dtype=torch.float64)


def one_by_one(module: CMSMemory, hidden_btd: torch.Tensor):
    """The states before each token and after the last."""
    states = [module.init_state(hidden_btd)]
    for t in range(hidden_btd.shape[1]):
        states.append(module(hidden_btd[:, t : t + 1], states[-1])[1])
    return states


def held(state, level: int, name: str = "memory") -> torch.Tensor:
    return torch.cat([leaf.flatten() for leaf in flatten(state["level"][str(level)][name]).values()])


# The schedule


@pytest.mark.parametrize("tokens, name, offset", [("each", "read", 1), ("pooled", "memory", 0)])
def test_a_slow_level_is_constant_between_its_fires(tokens, name, offset):
    """S1-M1, 6.10: of (1, 8) over 24 tokens, level 1 fires at {0, 8, 16}, and what is read of it is bitwise the same
    between; level 0 moves at every token.

    A copy is replaced by the first token of a period. A pooled group is written by its last token, and heard from the
    first token of the next.
    """
    module, clock = module_of(part_of(count=2, periods=(1, 8), tokens=tokens)), Clock(0, (1, 8), "tokens")
    fires = [count for count in range(24) if clock.advanced(count).pulse()[1]]
    assert fires == [0, 8, 16]
    states = one_by_one(module, text(24))
    moved = [
        count for count in range(24) if not torch.equal(held(states[count], 1, name), held(states[count + 1], 1, name))
    ]
    assert moved == [count - 1 + offset for count in (8, 16, 24) if count - 1 + offset < 24]
    assert all(not torch.equal(held(states[count], 0), held(states[count + 1], 0)) for count in range(24))


@pytest.mark.parametrize("tokens", KINDS)
def test_what_a_level_learned_is_heard_at_its_fires_alone(tokens):
    """6.10: a change of the tokens of one period is heard from level 1 in no token before the next period, and then
    in all."""
    module, hidden_btd = module_of(part_of(count=2, periods=(1, 5), tokens=tokens, conv=1)), text(17)
    others_btd = hidden_btd.clone()
    others_btd[:, 6] += 1

    def answer(input_btd):
        level = module.level[1]
        return level(input_btd, level.init_state(input_btd), 0)[0]

    differs = (answer(hidden_btd) != answer(others_btd)).any(-1).all(0)
    own = [6] if tokens == "each" else []
    assert differs.nonzero().flatten().tolist() == [*own, *range(10, 17)], "its own query asks an old memory"


@pytest.mark.parametrize("tokens", KINDS)
def test_a_level_that_does_not_fire_is_still_read(tokens):
    """6.10, law 6: frozen is not absent."""
    module, hidden_btd = module_of(part_of(count=2, periods=(1, 8), tokens=tokens)), text(12)
    _, state = module(hidden_btd[:, :9])
    read_btd, _ = module(hidden_btd[:, 9:], state)
    silent = {**state, "level": {**state["level"], "1": map_tensors(torch.zeros_like, state["level"]["1"])}}
    assert not torch.isclose(module(hidden_btd[:, 9:], silent)[0], read_btd).all(-1).any()


@pytest.mark.parametrize("tokens", KINDS)
def test_a_state_restored_at_any_count_reproduces_the_pulses(tokens):
    """6.10: the same fires follow, for the count is in the state and nowhere else; two readers of it see one pulse."""
    module, hidden_btd = module_of(part_of(count=3, periods=(1, 3, 7), tokens=tokens)), text(22)
    states = one_by_one(module, hidden_btd)
    for count in range(22):
        clocks = [Clock(states[count]["count"], module.config.levels.all_periods, "tokens") for _ in range(2)]
        assert clocks[0].pulse() == clocks[1].pulse() == (True, count % 3 == 0, count % 7 == 0)
        again = module_of(module.config)
        _, after = again(hidden_btd[:, count:], states[count])
        torch.testing.assert_close(flatten(after), flatten(states[-1]), rtol=0, atol=1e-10)


def test_four_levels_fire_as_often_as_their_periods_say():
    """S1-M3: (1, 8, 64, 512) over 512 tokens fire (512, 64, 8, 1) times; in a text of 520 every parameter learns."""
    module = module_of(part_of(count=4), noise=0.0)
    clock = Clock(0, module.config.levels.all_periods, "tokens")
    pulses = [clock.advanced(count).pulse() for count in range(512)]
    assert [sum(fired) for fired in zip(*pulses, strict=True)] == [512, 64, 8, 1]
    n_written = []
    for level in module.level:
        level.recall.gates.register_forward_hook(lambda _, given, gates: n_written.append(gates.write_bth.shape[1]))
    module(text(512, batch=1))
    assert n_written == [512, 64, 8, 1]
    module(text(520, batch=1))[0].square().sum().backward()
    assert [path for path, p in module.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("tokens", KINDS)
def test_four_levels_speak_as_loudly_as_one(tokens):
    """S1-M3: under inv_sqrt within a factor of 2, once all levels have been heard."""
    torch.manual_seed(0)
    module = CMSMemory(WIDTH, part_of(count=4, periods=(1, 4, 16, 64), tokens=tokens))
    hidden_btd = text(256).float()
    one_btd, _ = module.level[0].recall(hidden_btd)
    all_btd, _ = module(hidden_btd)
    scale = all_btd[:, 64:].square().mean().sqrt() / one_btd[:, 64:].square().mean().sqrt()
    assert 0.5 < scale < 2


def test_a_softmax_mix_is_uniform_at_first_and_sums_to_one():
    """S1-M3, 6.10."""
    part = part_of(count=4, mix="softmax")
    torch.testing.assert_close(CMSMemory(WIDTH, part).shares().detach(), torch.full((4,), 0.25))
    shares_l = module_of(part, noise=2.0).shares().detach()
    assert shares_l.std() > 0.1 and abs(float(shares_l.sum()) - 1) < 1e-12


@pytest.mark.parametrize("mix, factor", [("sum", 1.0), ("inv_sqrt", 2**-0.5), ("softmax", 0.5)])
def test_what_is_heard_is_the_weighted_sum_of_what_levels_answer(mix, factor):
    module, hidden_btd = module_of(part_of(count=2, periods=(1, 3), mix=mix), noise=0.0), text(11)
    outputs = [level(hidden_btd, level.init_state(hidden_btd), 0)[0] for level in module.level]
    torch.testing.assert_close(module(hidden_btd)[0], factor * sum(outputs), rtol=0, atol=1e-12)


def test_one_level_is_the_plain_memory():
    """Bitwise, and where settings say one level, it is made."""
    part = part_of()
    assert isinstance(build_memory(WIDTH, part), NeuralMemory)
    assert isinstance(build_memory(WIDTH, part_of(count=2)), CMSMemory)
    module, hidden_btd = module_of(part), text(13)
    plain_btd, _ = module.level[0].recall(hidden_btd)
    assert torch.equal(module(hidden_btd)[0], plain_btd)


@pytest.mark.parametrize("tokens", KINDS)
def test_a_fast_level_follows_a_change_of_text_more_than_a_slow_one(tokens):
    """6.10: 100 tokens of one kind, then 50 of another; with the same weights memory 0 has moved further."""
    torch.manual_seed(0)
    module = CMSMemory(WIDTH, part_of("gated_delta", count=2, periods=(1, 8), tokens=tokens)).double()
    module.level[1].recall.qkv.load_state_dict(module.level[0].recall.qkv.state_dict())
    first_btd, second_btd = (
        kind + 0.3 * text(n, random_seed=n) for kind, n in zip(text(1, 2).split(1), (100, 50), strict=True)
    )
    _, before = module(first_btd)
    _, after = module(second_btd, before)
    memories = [[held(state, at).detach() for state in (before, after)] for at in (0, 1)]
    far = [float((now - then).norm() / then.norm()) for then, now in memories]
    assert far[0] > far[1] > 1e-3


# What a level hears and says, written plainly


@pytest.mark.parametrize("rule", ["titans", "titans_mlp", "yaad"])
def test_a_pooled_level_answers_the_mean_of_the_period_before(rule):
    """6.5: position t hears ``out[floor(t / C) - 1]``, and 0 where there is none."""
    period, n_time = 4, 15
    module, hidden_btd = module_of(part_of(rule, count=2, periods=(1, period))), text(n_time)
    level = module.level[1]
    means_bnd = torch.stack(
        [hidden_btd[:, at : at + period].mean(1) for at in range(0, n_time - period + 1, period)], 1
    )
    out_bnd, _ = level.recall(level.norm(means_bnd))
    heard = [out_bnd[:, t // period - 1] if t >= period else torch.zeros_like(out_bnd[:, 0]) for t in range(n_time)]
    output_btd, _ = level(hidden_btd, level.init_state(hidden_btd), 0)
    torch.testing.assert_close(output_btd, torch.stack(heard, dim=1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ["scan", "exact_chunk", "frozen_chunk"])
def test_a_delayed_level_answers_by_its_memory_at_the_last_boundary(form):
    """6.1: the memory that token t asks is the one after the first ``C floor(t / C)`` tokens."""
    period, n_time = 4, 15
    module, hidden_btd = module_of(part_of(form=form, count=2, periods=(1, period), tokens="each")), text(n_time)
    recall = module.level[1].recall
    query_bthk, key_bthk, value_bthv, _ = recall.project(hidden_btd, None)
    gates, heard = recall.gates(hidden_btd), []
    for t in range(n_time):
        memory, n_seen = recall.initial(2), t // period * period
        if n_seen:
            window = tuple(x[:, :n_seen] for x in (key_bthk, value_bthv, query_bthk))
            _, memory = run_trusted(
                recall.rule, memory, window, gates.slice_time(0, n_seen), form=form, chunk=recall.chunk
            )
        heard.append(torch.einsum("bhkv,bhk->bhv", memory["matrix_bhkv"], query_bthk[:, t]))
    output_btd, _ = module.level[1](hidden_btd, module.level[1].init_state(hidden_btd), 0)
    torch.testing.assert_close(output_btd, torch.stack(heard, dim=1).flatten(2), rtol=0, atol=1e-10)


CASES = [
    (rule, form, levels)
    for rule, form in (("titans", "auto"), ("gated_delta", "auto"), ("titans_mlp", "frozen_chunk"), ("yaad", "scan"))
    for levels in (
        {"tokens": "pooled", "frequency": "output", "mix": "softmax"},
        {"tokens": "pooled", "reset_after": (5, 2, 1)},
        {"tokens": "each", "frequency": "output"},
        {"tokens": "each", "reset_after": (5, 2, 1), "mix": "softmax"},
        {"tokens": "each", "frequency": "write"},
    )
    if levels.get("frequency") != "write" or rule == "gated_delta"
]


@pytest.mark.parametrize("rule, form, levels", CASES, ids=str)
def test_a_text_may_be_cut_anywhere(rule, form, levels):
    """Answers, state and gradients; groups, copies, resets and learned frequencies all cross the cut."""
    module, hidden_btd = module_of(part_of(rule, form=form, count=3, periods=(1, 2, 5), **levels)), text(23)
    whole_btd, last = module(hidden_btd)
    parameters = list(module.parameters())
    whole = torch.autograd.grad(whole_btd.square().sum(), parameters)
    for cuts in ([1] * 23, [5, 1, 17], [4, 19], [9, 3, 11]):
        state, parts = None, []
        for part_btd in hidden_btd.split(cuts, dim=1):
            output_btd, state = module(part_btd, state)
            parts.append(output_btd)
        torch.testing.assert_close(torch.cat(parts, dim=1), whole_btd, rtol=0, atol=1e-10)
        torch.testing.assert_close(flatten(state), flatten(last), rtol=0, atol=1e-10)
        cut = torch.autograd.grad(torch.cat(parts, dim=1).square().sum(), parameters)
        torch.testing.assert_close(cut, whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rule, form, levels", CASES, ids=str)
@pytest.mark.parametrize("now", [4, 9, 14])
def test_no_answer_knows_a_later_token(rule, form, levels, now):
    """By value and by gradient, at the end of a group and inside it (pitfall 2)."""
    module, hidden_btd = module_of(part_of(rule, form=form, count=3, periods=(1, 2, 5), **levels)), text(17)
    leaf_btd = hidden_btd.clone().requires_grad_()
    output_btd, _ = module(leaf_btd)
    (upstream_btd,) = torch.autograd.grad(output_btd[:, now].square().sum(), leaf_btd)
    assert not upstream_btd[:, now + 1 :].any() and upstream_btd[:, now].any()
    others_btd = hidden_btd.clone()
    others_btd[:, now + 1] += 1
    assert torch.equal(module(others_btd)[0][:, : now + 1], output_btd[:, : now + 1])


@pytest.mark.parametrize("levels", [{}, {"mix": "softmax"}, {"reset_after": (9, 3, 1)}], ids=str)
def test_slow_levels_may_pass_over_a_window_together(levels):
    """Where periods nest and a window holds whole ones, they read its means; answers, state and gradients are those of
    a window that is cut where nothing is whole."""
    module, hidden_btd = module_of(part_of(count=3, periods=(1, 2, 6), **levels)), text(24)
    assert module._stride(0, 24) == 2 and module._stride(3, 24) == module._stride(2, 23) == 1
    outcomes = []
    for cuts in ([24], [8, 2, 14], [5, 1, 3, 15]):
        state, parts = None, []
        for part_btd in hidden_btd.split(cuts, dim=1):
            output_btd, state = module(part_btd, state)
            parts.append(output_btd)
        read_btd = torch.cat(parts, dim=1)
        outcomes.append(
            (read_btd, flatten(state), torch.autograd.grad(read_btd.square().sum(), list(module.parameters())))
        )
    for other in outcomes[1:]:
        torch.testing.assert_close(other, outcomes[0], rtol=1e-9, atol=1e-10)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.sampled_from(KINDS))
@settings(max_examples=25, deadline=None)
def test_any_cut_at_all(cuts, tokens):
    """Hypothesis over lengths of parts."""
    module, hidden_btd = module_of(part_of(count=3, periods=(1, 3, 4), tokens=tokens)), text(sum(cuts), batch=1)
    whole_btd, last = module(hidden_btd)
    state, parts = None, []
    for part_btd in hidden_btd.split(cuts, dim=1):
        output_btd, state = module(part_btd, state)
        parts.append(output_btd)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole_btd, rtol=0, atol=1e-10)
    torch.testing.assert_close(flatten(state), flatten(last), rtol=0, atol=1e-10)


@pytest.mark.parametrize("tokens", KINDS)
def test_looking_asks_what_the_next_token_would_hear(tokens):
    """``look`` writes nothing, sees a boundary that the count has reached, and mixes by logits of its own."""
    part = part_of(count=2, periods=(1, 4), tokens=tokens, mix="softmax")
    module, hidden_btd = module_of(part, is_queried=True), text(8)
    _, state = module(hidden_btd)
    query_btd = text(3, random_seed=5)
    outputs = [
        level.recall.read(query_btd, {"memory": state["level"][str(index)]["memory"]})
        for index, level in enumerate(module.level)
    ]
    share_l = module.look_mix_l.softmax(0)
    torch.testing.assert_close(module.read(query_btd, state), share_l[0] * outputs[0] + share_l[1] * outputs[1])
    module.read(query_btd, state).sum().backward()
    assert module.look_mix_l.grad.any() and module.mix_l.grad is None


# Resets


@pytest.mark.parametrize("tokens", KINDS)
def test_a_reset_forgets_what_was_before_it(tokens):
    """6.8: after R fires the memory is the learned start, whatever was read; the count goes on."""
    levels = {"count": 2, "periods": (1, 4), "tokens": tokens, "reset_after": (6, 2)}
    module = module_of(part_of(conv=1, **levels))
    before = [text(8, random_seed=seed) for seed in (1, 2)]
    after_btd = text(7, random_seed=3)
    states = [module(torch.cat([part_btd, after_btd], dim=1))[1] for part_btd in before]
    assert torch.equal(held(states[0], 1), held(states[1], 1)), "8 tokens are 2 fires of level 1"
    assert torch.equal(held(states[0], 0), held(states[1], 0)), "level 0 began afresh after 12 tokens"
    assert states[0]["count"] == 15
    carried = module_of(part_of(conv=1, **(levels | {"reset_after": None})))
    last = [carried(torch.cat([part_btd, after_btd], dim=1))[1] for part_btd in before]
    assert not torch.isclose(held(last[0], 1), held(last[1], 1)).any()


def test_a_single_level_may_be_reset():
    module = build_memory(WIDTH, part_of(reset_after=(5,)))
    hidden_btd = text(5).float()
    _, state = module(torch.cat([hidden_btd, hidden_btd], dim=1))
    _, first = module(hidden_btd)
    assert isinstance(module, CMSMemory) and not torch.equal(held(state, 0), held(first, 0)), "the tail goes on"


# Learned frequency


@pytest.mark.parametrize("n_time", [1, BLOCK - 1, BLOCK, 2 * BLOCK + 3])
def test_a_running_mean_is_the_recurrence(n_time):
    raw_btl = torch.randn(2, n_time, 3, dtype=torch.float64)
    start_bl, rate_l = torch.randn(2, 3, dtype=torch.float64), torch.tensor([0.5, 0.1, 0.002], dtype=torch.float64)
    mean_bl, means = start_bl, []
    for raw_bl in raw_btl.unbind(1):
        mean_bl = mean_bl + rate_l * (raw_bl - mean_bl)
        means.append(mean_bl)
    torch.testing.assert_close(running_mean(raw_btl, start_bl, rate_l), torch.stack(means, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("frequency", ["output", "write"])
def test_a_level_that_helps_is_turned_on_more_often(frequency):
    """S3-M5, sign test: with y_l = -dL/dy, a step against the gradient raises p_l; with the sign turned it falls."""
    module = module_of(part_of("gated_delta", count=2, periods=(1, 3), tokens="each", frequency=frequency), noise=0.0)
    hidden_btd = text(24)
    output_btd = module.level[1](hidden_btd, module.level[1].init_state(hidden_btd), 0)[0].detach()
    for sign in (1, -1):
        module.zero_grad()
        module(hidden_btd)[0].backward(-sign * output_btd)
        assert sign * float(module.frequency.bias_l.grad) < 0


def test_a_gradient_of_p_is_what_the_level_would_have_said():
    """S3-M5: dL/dp_lt = <dL/dy_t, y_lt>, on or off."""
    module, hidden_btd = module_of(part_of(count=2, periods=(1, 3), frequency="output", mix="sum")), text(17)
    caught = []
    hook = module.frequency.register_forward_hook(
        lambda _, given, out: (caught.append(out[0].detach().requires_grad_()), (caught[-1], out[1]))[1]
    )
    joined_btd, _ = module(hidden_btd)
    hook.remove()
    output_btd, _ = module.level[1](hidden_btd, module.level[1].init_state(hidden_btd), 0)
    (d_on_btl,) = torch.autograd.grad(joined_btd.square().sum() / 2, caught[0])
    assert 0 < float(caught[0].detach().mean()) < 1
    torch.testing.assert_close(d_on_btl[..., 0], (joined_btd * output_btd).sum(-1), rtol=0, atol=1e-10)


def test_off_is_the_fixed_schedule():
    """S3-M5: bitwise; and level 0 is always on, for it has no gate at all."""
    fixed, hidden_btd = module_of(part_of(count=2, periods=(1, 3))), text(17)
    assert fixed.frequency is None
    part = part_of(count=2, periods=(1, 3), frequency="output", anneal=100)
    gated = module_of(part)
    gated.load_state_dict(fixed.state_dict(), strict=False)
    assert torch.equal(gated(hidden_btd)[0], fixed(hidden_btd)[0]), "while it is annealed"
    assert gated.frequency.weight_ld.shape[0] == 1
    with torch.no_grad():
        gated.frequency.bias_l.fill_(-100)
    gated.frequency.anneal = 0
    level_0_btd = gated.level[0].recall(hidden_btd)[0]
    torch.testing.assert_close(gated(hidden_btd)[0], level_0_btd, rtol=0, atol=1e-12)


def test_learned_gates_begin_after_the_annealed_tokens():
    """S3-M5: the boundary is one token, wherever windows are cut."""
    fixed = module_of(part_of(count=2, periods=(1, 3)))
    gated, hidden_btd = module_of(part_of(count=2, periods=(1, 3), frequency="output", anneal=11)), text(17)
    gated.load_state_dict(fixed.state_dict(), strict=False)
    with torch.no_grad():
        gated.frequency.bias_l.fill_(-100)
    _, state = gated(hidden_btd[:, :6])
    _, fixed_state = fixed(hidden_btd[:, :6])
    differs_t = (gated(hidden_btd[:, 6:], state)[0] != fixed(hidden_btd[:, 6:], fixed_state)[0]).any(-1).any(0)
    assert differs_t.tolist() == [6 + t >= 11 for t in range(11)]


@pytest.mark.parametrize("gate, moves", [(-100.0, False), (100.0, True)])
def test_a_memory_that_may_not_be_written_stays(gate, moves):
    """``M + a (M' - M)``: with a = 0 neither faded nor written, with a = 1 as without a gate."""
    levels = {"count": 2, "periods": (1, 3), "tokens": "each"}
    module, hidden_btd = module_of(part_of("gated_delta", frequency="write", **levels)), text(17)
    plain = module_of(part_of("gated_delta", **levels))
    plain.load_state_dict({name: x for name, x in module.state_dict().items() if "frequency" not in name})
    with torch.no_grad():
        module.frequency.bias_l.fill_(gate)
    _, state = module(hidden_btd)
    wanted = held(plain(hidden_btd)[1], 1) if moves else held(module.init_state(hidden_btd), 1)
    torch.testing.assert_close(held(state, 1), wanted, rtol=0, atol=1e-12)


def test_rates_are_near_their_budget_at_the_start():
    """S3-M5: levels are on at a share 1 / period of all tokens, in every row."""
    torch.manual_seed(0)
    module, shares = CMSMemory(WIDTH, part_of(count=3, periods=(1, 4, 16), frequency="output")).double(), []
    module.frequency.register_forward_hook(lambda _, given, out: shares.append(out[0].mean(1)))
    module(text(320))
    torch.testing.assert_close(shares[0], torch.tensor([[1 / 4, 1 / 16]] * 2).double(), rtol=0.1, atol=0)


def test_the_budget_loss_brings_rates_back():
    """S3-M5: gates that had drifted far from the budget return to it by the loss in the state alone."""
    torch.manual_seed(0)
    module = CMSMemory(WIDTH, part_of(count=3, periods=(1, 4, 16), frequency="output", budget=1.0)).double()
    with torch.no_grad():
        module.frequency.bias_l.copy_(torch.tensor([1.5, 0.5]))
    optimizer = torch.optim.Adam(module.frequency.parameters(), lr=0.1)
    for step in range(120):
        optimizer.zero_grad()
        _, state = module(text(64, random_seed=step))
        auxiliary(state).backward()
        optimizer.step()
    rate_l = state["frequency"]["rate_bl"].mean(0)
    torch.testing.assert_close(rate_l, torch.tensor([1 / 4, 1 / 16]).double(), rtol=0.35, atol=0.02)


def test_auxiliary_losses_of_a_state_are_one_number():
    """Summed over layers, averaged over rows, weighted by the settings; none where no layer has one."""
    module = module_of(part_of(count=2, periods=(1, 4), frequency="output", budget=3.0))
    _, state = module(text(9))
    loss_b = 3 * (state["frequency"]["rate_bl"][:, 0] - 0.25) ** 2
    torch.testing.assert_close(state["frequency"][AUXILIARY], loss_b, rtol=0, atol=1e-12)
    nested = {"layer": {"0": {"recall": state}, "1": {"recall": state}}}
    torch.testing.assert_close(auxiliary(nested), 2 * loss_b.mean(), rtol=0, atol=1e-12)
    assert auxiliary(module_of(part_of(count=2))(text(9))[1]) is None


def test_two_modules_count_for_themselves():
    """S4-M9, own clocks: side by side, each by its own periods and its own count."""
    first, second = (module_of(part_of(count=2, periods=(1, period), tokens="each")) for period in (3, 5))
    moved = []
    for module in (first, second):
        states = one_by_one(module, text(16))
        reads = [held(state, 1, "read") for state in states]
        moved.append([t for t, (a, b) in enumerate(itertools.pairwise(reads)) if not torch.equal(a, b)])
    assert moved == [[3, 6, 9, 12, 15], [5, 10, 15]]


# Settings


@pytest.mark.parametrize(
    "levels, reasons",
    [
        ({"count": 3, "periods": (1, 8)}, ["there are 2 periods for a count of 3"]),
        ({"count": 3, "periods": (2, 8, 8)}, ["the first period is 2", "not greater than the one before"]),
        ({"count": 3, "mix": "sum"}, ["'sum' is for at most 2 levels"]),
        ({"count": 2, "reset_after": (1,)}, ["reset_after has 1 numbers for a count of 2"]),
        ({"count": 2, "reset_after": (0, 1)}, ["a number below 1"]),
        ({"count": 2, "frequency": "write"}, ["'write' needs tokens 'each'"]),
    ],
)
def test_levels_that_make_no_sense_are_refused_with_every_reason(levels, reasons):
    with pytest.raises(ConflictingKeys, match="memory.levels cannot be used") as caught:
        LevelsConfig.model_validate(levels)
    assert all(reason in str(caught.value) for reason in reasons)


@pytest.mark.parametrize("levels", [{"tokens": "each"}, {"count": 2, "anneal": 5}, {"count": 2, "budget": 1.0}])
def test_a_key_that_nothing_reads_is_refused(levels):
    with pytest.raises(DeadKey, match=r"memory\.levels\.\w+ is .*nothing reads it"):
        LevelsConfig.model_validate(levels)


def test_writes_are_gated_where_the_rule_allows_it():
    with pytest.raises(ConflictingKeys, match="update 'momentum' changes the memory also where nothing is written"):
        CMSMemory(WIDTH, part_of(count=2, tokens="each", frequency="write"))
    with pytest.raises(ConflictingKeys) as caught:
        CMSMemory(WIDTH, part_of("moneta", form="scan", count=2, tokens="each", frequency="write"))
    assert "the retention 'power_norm'" in str(caught.value)
    with pytest.raises(ConflictingKeys, match="the form 'tnt' reads local memories"):
        CMSMemory(WIDTH, part_of("titans", form="tnt", count=2, tokens="each"))
