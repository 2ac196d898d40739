"""Memories that make their own keys, values, rates and retain factors (memory.md 7)."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn import functional

from meristem.errors import ConflictingKeys
from meristem.linalg import unit
from meristem.memory import Gates, named
from meristem.memory import scan as scan_rule
from meristem.memory.state import clone, flatten
from meristem.memory.structure import Live, Matrix, Mlp, Pairs, outer
from meristem.models.build import build
from meristem.nn.config import MemoryConfig, SelfReferenceConfig
from meristem.nn.self_chunk import GATES
from meristem.nn.self_reference import SelfReference, can_decode
from meristem.nn.self_scan import Meaning, descended, scan
from meristem.runs.config import load_config

WIDTH, HEAD = 12, 4
CLOSE = {"rtol": 0, "atol": 1e-10}
FIXTURE = Path(__file__).with_name("oracles") / "nested_learning.safetensors"
SETTINGS = [
    {"structure": structure, "setting": setting, "loss": loss, "adaptive_query": adaptive_query}
    | ({"unit_value": False} if loss == "squared" else {})
    for structure in ("matrix", "mlp")
    for setting in ("static", "adaptive", "self_generated")
    for loss in ("dot", "squared")
    for adaptive_query in (False, True)
    if not (adaptive_query and setting == "static")
]
every_setting = pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
every_structure = pytest.mark.parametrize("structure", ["matrix", "mlp"])


def layer(width=WIDTH, head_width=HEAD, is_grown=True, **settings):
    """A small layer that writes strongly, its weights moved off their first values.

    Not as strongly as others: what generates its own values grows by about ``1 + eta v k`` with every token.
    """
    torch.manual_seed(0)
    chosen = {"eta_scale": 0.05, "half_life": 8, "chunk_memory": 2, "chunk_other": 4} | settings
    part = MemoryConfig.model_validate({"head_dim": head_width, "self_reference": chosen})
    module = SelfReference(width, part).double()
    if is_grown:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def drawn(n_time, batch=2, width=WIDTH, random_seed=1):
    generator = torch.Generator().manual_seed(random_seed)
    return torch.randn(batch, n_time, width, generator=generator, dtype=torch.float64)


def rows_of(module, hidden_btd):
    """What the memories are given: rows and queries of every head, ``b h t k``."""
    mixed_btd, _ = module.conv(hidden_btd)
    folded = module._heads(mixed_btd)
    query = None if module.query is None else unit(module._heads(module.query(mixed_btd)))
    return folded, query


def meaning_of(module):
    """The same self-reference in the words of its scan."""
    structure = Matrix() if module.is_matrix else Mlp(2, expand=1)
    rate_bias_h, retain_bias_h = module.bias_hl.unbind(-1)
    return Meaning(
        structures=dict.fromkeys((*module.makers.names, "memory"), structure),
        is_static=module.is_static,
        is_generated=module.memory.is_generated,
        is_squared=module.memory.is_squared,
        eta_scale=module.eta_scale,
        unit_value=module.unit_value,
        rate_bias_h=rate_bias_h,
        retain_bias_h=retain_bias_h,
    )


def memories_of(module, batch):
    """The first memories by name, for the scan."""
    memories = {}
    for name in (*module.makers.names, "memory"):
        layers = {"matrix_bhkv": "hkv"} if module.is_matrix else {"in_bhkf": "in_hkf", "out_bhfv": "out_hfv"}
        memories[name] = {
            ours: module.initial[f"{name}_{its}"].expand(batch, -1, -1, -1) for ours, its in layers.items()
        }
    return memories


def by_name(module, memory, at="live"):
    """The memories of a state, taken apart."""
    found = {}
    groups = [("asked", module.memory.names)] + ([] if module.is_static else [("makers", module.makers.names)])
    for group, names in groups:
        weights = memory[group][at]
        if module.is_matrix:
            pieces = weights["matrix_bhkv"].chunk(len(names), dim=-1)
            found |= {name: {"matrix_bhkv": x} for name, x in zip(names, pieces, strict=True)}
            continue
        ins = dict(zip(names, weights["in_bhkf"].chunk(len(names), dim=-1), strict=True))
        for out, kin in (
            ("out_bhfv", [n for n in names if n not in GATES]),
            ("gate_bhfv", [n for n in names if n in GATES]),
        ):
            apart = weights[out].unflatten(1, (-1, len(kin))).unbind(2) if kin else ()
            found |= {name: {"in_bhkf": ins[name], "out_bhfv": x} for name, x in zip(kin, apart, strict=True)}
    return found


def asked(module, hidden_btd, state=None):
    """What the memory answers, ``b h t k``, and the state after."""
    rows, queries = rows_of(module, hidden_btd)
    read, memory = module.recall(rows, queries, module.fresh(len(hidden_btd)) if state is None else state)
    return read.unflatten(0, (len(hidden_btd), -1)), memory


def inner_loop(module, hidden_btd):
    """The chunked form as a plain loop: what writes a chunk comes from the memories that began it, what is erased does
    not (memory.md 7.2)."""
    meaning, batch = meaning_of(module), len(hidden_btd)
    rows, queries = (x if x is None else x.unflatten(0, (batch, -1)) for x in rows_of(module, hidden_btd))
    live = memories_of(module, batch)
    start, reads = dict(live), []
    for t in range(rows.shape[2]):
        for name in live:
            if t % (module.chunk_memory if name == "memory" else module.chunk_other) == 0:
                start[name] = live[name]
        row = rows[:, :, t : t + 1]
        query = meaning.recall(start, "query", row) if queries is None else queries[:, :, t : t + 1]
        key, value = unit(meaning.recall(start, "key", row)), meaning.recall(start, "value", row)
        value = unit(value) if meaning.unit_value else value
        rate = meaning.recall(start, "rate", row) + meaning.rate_bias_h[:, None, None]
        retain = (meaning.recall(start, "retain", row) + meaning.retain_bias_h[:, None, None]).sigmoid()
        rate = meaning.eta_scale * functional.softplus(rate)
        reads.append(meaning.recall(live, "memory", unit(query)))
        for name in ("memory",) if meaning.is_static else tuple(live):
            structure, goal = meaning.structures[name], meaning.goal(start, name, value)
            recalled, goal, pull = structure.vjp(Live(start[name]), Pairs(key, goal))
            surprise = pull(recalled - goal if meaning.is_squared else -goal)
            weights = dict(live[name])
            for part, weight in live[name].items():
                weights[part] = retain * weight - rate * outer(surprise[part])
            first = structure.weights[0]
            weights[first] = weights[first] - rate * outer((key, key @ live[name][first]))
            live = live | {name: weights}
    return torch.cat(reads, dim=2), live


def require_equal(module, found, expected):
    """Reads, memories, and the gradient of every parameter that they depend on."""
    read, memory = found
    true_read, memories = expected
    torch.testing.assert_close(read, true_read, **CLOSE)
    ours = by_name(module, memory)
    torch.testing.assert_close(flatten(ours), flatten({name: memories[name] for name in ours}), **CLOSE)
    parameters = dict(module.named_parameters())
    weight = torch.linspace(0.5, 1.5, read.shape[2], dtype=read.dtype)[:, None]
    gradients = []
    for reads, left in ((read, ours), (true_read, memories)):
        total = (reads * weight).square().sum() + sum(x.square().sum() for n in ours for x in left[n].values())
        gradients.append(
            torch.autograd.grad(total, list(parameters.values()), materialize_grads=True, allow_unused=True)
        )
    for name, gradient, true_gradient in zip(parameters, *gradients, strict=True):
        torch.testing.assert_close(gradient, true_gradient, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@every_setting
@pytest.mark.parametrize("n_time", [1, 9])
def test_chunks_of_one_token_are_the_scan(settings, n_time):
    """S3b-S15, S3b-S12: reads, memories and gradients of the equations, token by token."""
    module, hidden_btd = layer(chunk_memory=1, chunk_other=1, **settings), drawn(n_time)
    rows, queries = (x if x is None else x.unflatten(0, (2, -1)) for x in rows_of(module, hidden_btd))
    expected = scan(meaning_of(module), memories_of(module, 2), rows, queries)
    require_equal(module, asked(module, hidden_btd), expected)


@every_setting
@pytest.mark.parametrize("chunks", [(2, 4), (6, 2), (7, 1), (8, 64)], ids=str)
def test_chunks_are_the_loop_over_their_tokens(settings, chunks):
    """S3b-S15, S4-M11: the solve is exact at any two sizes, and no gradient is blocked on the way."""
    module, hidden_btd = layer(chunk_memory=chunks[0], chunk_other=chunks[1], **settings), drawn(13)
    require_equal(module, asked(module, hidden_btd), inner_loop(module, hidden_btd))


@every_structure
@pytest.mark.parametrize("is_squared", [False, True])
def test_a_step_of_the_scan_is_delta_descent_on_the_written_loss(structure, is_squared):
    """S3b-S12: the scan's closed gradients are autograd's of ``-<M k, w>`` and ``1/2 |M k - w|^2``, w held still."""
    module = layer(structure=structure, loss="squared" if is_squared else "dot")
    meaning, memories = meaning_of(module), memories_of(module, 2)
    token = drawn(1, width=HEAD)[:, None].expand(-1, 3, -1, -1)
    key, value = unit(token), token + 0.3
    rate, retain = (
        torch.full((2, 3, 1, 1), 0.2, dtype=torch.float64),
        torch.full((1, 3, 1, 1), 0.9, dtype=torch.float64),
    )
    for name in memories:
        weights = {part: x.detach().clone().requires_grad_() for part, x in memories[name].items()}
        recalled = meaning.structures[name].recall(Live(weights), key)
        goal = meaning.goal(memories, name, value).detach()
        loss = 0.5 * (recalled - goal).square().sum() if is_squared else -(recalled * goal).sum()
        gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
        first = meaning.structures[name].weights[0]
        expected = {part: retain * x - rate * gradients[part] for part, x in weights.items()}
        expected[first] = expected[first] - rate * (key.mT @ key) @ weights[first]
        found = descended(meaning, name, memories, (key, value, rate, retain))
        torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("case", ["tokens", "query", "chunks", "turned"])
def test_memories_are_those_of_nested_learning(case):
    """S3b-S12, S3b-S15: the public package nested-learning, whose ``M`` have two layers and no biases.

    It reads a whole chunk at the memory that begins it; we read just before each token is written, so of a longer chunk
    only the first read is the same. Its squared loss lacks the half, and so does not map to ours.
    """
    with safe_open(FIXTURE, "pt") as opened:
        assert opened.metadata()["version"] == "0.2.0"
    oracle = {key.removeprefix(f"{case}."): x for key, x in load_file(FIXTURE).items() if key.startswith(f"{case}.")}
    chunks = {"tokens": (1, 1), "query": (1, 1), "chunks": (2, 4), "turned": (6, 3)}[case]
    is_adaptive = case in ("query", "turned")
    settings = {"chunk_memory": chunks[0], "chunk_other": chunks[1], "adaptive_query": is_adaptive, "eta_scale": 0.3}
    settings["unit_value"] = False
    module = layer(6, 6, is_grown=False, structure="mlp", **settings)
    with torch.no_grad():
        module.bias_hl.zero_()
        for name in (*module.makers.names, "memory"):
            module.initial[f"{name}_in_hkf"].copy_(oracle[f"first.{name}_in"].mT)
            module.initial[f"{name}_out_hfv"].copy_(oracle[f"first.{name}_out"].mT)
        hidden_btd = oracle["hidden_btd"]
        query = None if is_adaptive else unit(hidden_btd @ oracle["query_weight"].mT)
        read_btd, memory = module.recall(hidden_btd, query, module.fresh(len(hidden_btd)))
    torch.testing.assert_close(read_btd[:, :: chunks[0]], oracle["read_btd"][:, :: chunks[0]], **CLOSE)
    for name, weights in by_name(module, memory).items():
        torch.testing.assert_close(weights["in_bhkf"][:, 0].mT, oracle[f"after.{name}_in"], **CLOSE)
        torch.testing.assert_close(weights["out_bhfv"][:, 0].mT, oracle[f"after.{name}_out"], **CLOSE)


def silence(module):
    """Write rates of 0 and retain factors of 1."""
    with torch.no_grad():
        module.bias_hl.copy_(torch.tensor([-1e4, 1e4]).expand_as(module.bias_hl))


@every_setting
def test_a_layer_that_writes_nothing_is_a_static_network(settings):
    """S3b-S12, memory.md 7.4: eta = 0 and alpha = 1 leave every memory as it was; the answer is ``M_mem q``."""
    module, hidden_btd = layer(**settings), drawn(13)
    silence(module)
    read, memory = asked(module, hidden_btd)
    torch.testing.assert_close(flatten(by_name(module, memory)), flatten(by_name(module, module.fresh(2))), **CLOSE)
    meaning, memories = meaning_of(module), memories_of(module, 2)
    rows, queries = (x if x is None else x.unflatten(0, (2, -1)) for x in rows_of(module, hidden_btd))
    queries = unit(meaning.recall(memories, "query", rows)) if queries is None else queries
    torch.testing.assert_close(read, meaning.recall(memories, "memory", queries), **CLOSE)


@pytest.mark.parametrize("setting", ["static", "adaptive"])
def test_with_frozen_makers_it_is_delta_descent(setting):
    """S3b-S12, memory.md 7.4: the rule ``delta_descent`` on what the first makers make, their chunk never ending.

    That rule writes at ``w / (1 + w |k|^2)``, which for unit keys is eta where w is ``eta / (1 - eta)``.
    """
    module, hidden_btd = layer(setting=setting, chunk_memory=4, chunk_other=64, eta_scale=0.2), drawn(33)
    read, memory = asked(module, hidden_btd)
    meaning, memories = meaning_of(module), memories_of(module, 2)
    rows, queries = (x.unflatten(0, (2, -1)) for x in rows_of(module, hidden_btd))
    key, value = (unit(meaning.recall(memories, name, rows)) for name in ("key", "value"))
    rate = meaning.recall(memories, "rate", rows) + meaning.rate_bias_h[:, None, None]
    rate_bth = (meaning.eta_scale * functional.softplus(rate))[..., 0].movedim(1, 2)
    retain = meaning.recall(memories, "retain", rows) + meaning.retain_bias_h[:, None, None]
    gates = Gates(retain[..., 0].movedim(1, 2).sigmoid(), rate_bth / (1 - rate_bth))
    window = (x.movedim(1, 2) for x in (key, value, queries))
    true_read_bthv, true_memory = scan_rule(named("delta_descent"), memories["memory"], *window, gates)
    torch.testing.assert_close(read.movedim(1, 2), true_read_bthv, **CLOSE)
    torch.testing.assert_close(memory["asked"]["live"], true_memory, **CLOSE)


def test_a_memory_that_is_identity_generates_the_value_itself():
    """S3b-S13: ``w = M v``, which is v where M is the identity; within one chunk that is the adaptive setting.

    The memories of gates are no identity: what their own chunk teaches them differs, and nothing else.
    """
    found = {}
    for setting in ("self_generated", "adaptive"):
        module, hidden_btd = layer(setting=setting, chunk_memory=16, chunk_other=16), drawn(16)
        with torch.no_grad():
            for name in ("key", "value", "memory"):
                module.initial[f"{name}_hkv"].copy_(torch.eye(HEAD))
        read, memory = asked(module, hidden_btd)
        found[setting] = {"read": read} | {name: by_name(module, memory)[name] for name in ("key", "value", "memory")}
    torch.testing.assert_close(flatten(found["self_generated"]), flatten(found["adaptive"]), **CLOSE)


@every_structure
def test_generated_values_are_what_each_memory_makes_of_the_value(structure):
    """S3b-S13: with values of its own a memory goes another way than in the adaptive setting."""
    reads = [
        asked(layer(structure=structure, setting=setting), drawn(13))[0] for setting in ("self_generated", "adaptive")
    ]
    torch.testing.assert_close(reads[0][:, :, 0], reads[1][:, :, 0], **CLOSE)
    assert not torch.isclose(reads[0][:, :, 1:], reads[1][:, :, 1:], atol=1e-4).all()


def test_memories_that_are_all_zero_stay_so():
    """Pitfall 10: keys, values and queries are then zero, and nothing ever moves; first values are no such point."""
    module = layer(is_grown=False)
    with torch.no_grad():
        for value in module.initial.values():
            value.zero_()
    read, memory = asked(module, drawn(13))
    assert not read.any() and not any(x.any() for x in flatten(memory).values() if isinstance(x, torch.Tensor))
    module = layer(is_grown=False)
    _, memory = asked(module, drawn(13))
    before, after = (by_name(module, x) for x in (module.fresh(2), memory))
    for name in ("key", "value", "memory"):
        assert (before[name]["matrix_bhkv"] - torch.eye(HEAD)).abs().max() < 0.1, "identity-like"
        assert not torch.isclose(after[name]["matrix_bhkv"], before[name]["matrix_bhkv"], atol=1e-4).all()


@every_setting
def test_every_first_memory_learns(settings):
    """S3b-S12, memory.md 7.4: one backward pass at the first weights, with the write rate as published."""
    module = layer(is_grown=False, **settings | {"eta_scale": 1e-3})
    mixed_btd, _ = module(drawn(13))
    mixed_btd.square().sum().backward()
    assert [path for path, p in module.named_parameters() if p.grad is None or not p.grad.any()] == []


@every_structure
@pytest.mark.parametrize("chunks", [(2, 4), (6, 3)], ids=str)
def test_both_chunk_sizes_keep_their_boundaries(structure, chunks):
    """S3b-S15: counted in tokens of the text, wherever it is cut: what begins a chunk changes there and only there."""
    module, hidden_btd = layer(structure=structure, chunk_memory=chunks[0], chunk_other=chunks[1]), drawn(13)
    state, before = None, by_name(module, module.fresh(2), "start")
    for t in range(13):
        _, state = module(hidden_btd[:, t : t + 1], state)
        after = by_name(module, state["memory"], "start")
        for name in after:
            chunk = module.chunk_memory if name == "memory" else module.chunk_other
            is_same = all(torch.equal(after[name][part], before[name][part]) for part in after[name])
            assert is_same == ((t + 1) % chunk != 0), (name, t)
        before = after
    assert state["memory"]["n_tokens"] == 13


@every_setting
@pytest.mark.parametrize("cuts", [[5, 1, 7, 14], [3, 24], [1] * 27], ids=str)
def test_a_text_may_be_cut_anywhere(settings, cuts):
    """Where both chunks are unfinished, where one is, and token by token: reads and memories are those of one call."""
    module, hidden_btd = layer(chunk_memory=3, chunk_other=6, **settings), drawn(27)
    whole_btd, whole = module(hidden_btd)
    parts, state = [], None
    for part_btd in hidden_btd.split(cuts, dim=1):
        mixed_btd, state = module(part_btd, state)
        parts.append(mixed_btd)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole_btd, **CLOSE)
    torch.testing.assert_close(flatten(state), flatten(whole), **CLOSE)


@every_structure
def test_rows_know_nothing_of_each_other(structure):
    """memory.md 7.4: what one row reads and leaves does not depend on the others."""
    module, hidden_btd = layer(structure=structure), drawn(13, batch=3)
    whole_btd, whole = module(hidden_btd)
    alone_btd, alone = module(hidden_btd[1:2])
    torch.testing.assert_close(alone_btd, whole_btd[1:2], **CLOSE)
    picked = {path: x[1:2] if isinstance(x, torch.Tensor) else x for path, x in flatten(whole).items()}
    torch.testing.assert_close(flatten(alone), picked, **CLOSE)


@every_structure
def test_reading_changes_memory_and_no_weight(structure):
    """memory.md 7.4: the memory of a session moves, the parameters do not, nor the state that was handed in."""
    module, hidden_btd = layer(structure=structure), drawn(9)
    _, state = module(hidden_btd)
    weights, kept = clone(module.state_dict()), clone(state)
    for _ in range(2):
        module(hidden_btd, state)
    torch.testing.assert_close(dict(module.state_dict()), flatten(weights), rtol=0, atol=0)
    torch.testing.assert_close(flatten(state), flatten(kept), rtol=0, atol=0)


@pytest.mark.parametrize("setting", ["adaptive", "self_generated"])
@pytest.mark.parametrize("loss", ["dot", "squared"])
def test_one_token_outside_training_is_the_same_token(setting, loss):
    """The short way of a session gives what the window gives: reads, memories, boundaries and the tail."""
    module, hidden_btd = layer(setting=setting, loss=loss), drawn(19, batch=3)
    whole_btd, whole = module(hidden_btd)
    state, reads = module(hidden_btd[:, :5])[1], []
    with torch.no_grad():
        for t in range(5, 19):
            assert can_decode(module, hidden_btd[:, t : t + 1], state)
            read_btd, state = module(hidden_btd[:, t : t + 1], state)
            reads.append(read_btd)
    torch.testing.assert_close(torch.cat(reads, dim=1), whole_btd[:, 5:], **CLOSE)
    torch.testing.assert_close(flatten(state), flatten(whole), **CLOSE)


def test_what_has_no_short_way_goes_as_windows_do():
    hidden_btd = drawn(1)
    for settings in ({"structure": "mlp"}, {"setting": "static"}, {"adaptive_query": True}):
        module = layer(**settings)
        with torch.no_grad():
            assert not can_decode(module, hidden_btd, module(hidden_btd)[1])
    module = layer()
    assert not can_decode(module, hidden_btd, module(hidden_btd)[1]), "training goes through autograd"


@every_setting
def test_inputs_ten_times_as_large_stay_finite(settings):
    """With the gates that a layer begins with, forwards and backwards, over many chunks."""
    module = layer(is_grown=False, **settings | {"chunk_memory": 8, "chunk_other": 64, "eta_scale": 1e-3}).float()
    mixed_btd, _ = module(10 * drawn(200).float())
    mixed_btd.square().sum().backward()
    assert mixed_btd.isfinite().all()
    assert all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("loss", ["dot", "squared"])
def test_one_token_said_often_stays_finite(loss):
    """As it begins, a wide memory that hears one token 2000 times stays what it is; as printed it overflows."""
    norms = {}
    for unit_value in (True, False):
        module = layer(
            64,
            64,
            False,
            loss=loss,
            unit_value=unit_value,
            eta_scale=0.01,
            half_life=32768,
            chunk_memory=8,
            chunk_other=64,
        )
        with torch.no_grad():
            _, state = module(drawn(1, width=64).expand(-1, 2000, -1))
        norms[unit_value] = state["memory"]["asked"]["live"]["matrix_bhkv"].norm(dim=(-2, -1))
    assert ((norms[True] > 4) & (norms[True] < 16)).all(), "the identity has the norm 8"
    assert not (norms[False] < 1e6).any()


def scanned(module, rows, queries, memory):
    """``SelfReference.recall`` by the scan, from the first memories."""
    batch = len(rows) // module.heads
    rows_bhtk, queries_bhtk = (x if x is None else x.unflatten(0, (batch, -1)) for x in (rows, queries))
    read_bhtk, _ = scan(meaning_of(module), memories_of(module, batch), rows_bhtk, queries_bhtk)
    return read_bhtk.flatten(0, 1), {}


@pytest.mark.parametrize(
    "chosen",
    [
        {"setting": "self_generated", "loss": "dot"},
        {"setting": "self_generated", "loss": "squared", "adaptive_query": "true"},
        {"setting": "self_generated", "structure": "mlp"},
        {"setting": "adaptive", "chunk_memory": 4},
        {"setting": "static", "chunk_memory": 4, "chunk_other": 8},
    ],
    ids=lambda chosen: "-".join(map(str, chosen.values())),
)
def test_a_model_chosen_by_settings_is_that_of_the_equations(chosen, monkeypatch):
    """S4-M11: two layers of HOPE; logits are those of the scan in every layer, and so is every gradient, none blocked.

    Chunks of one token make everything anew; longer ones are exact where what they make is not written meanwhile.
    """
    settings = {"chunk_memory": 1, "chunk_other": 1, "eta_scale": 0.05, "half_life": 8} | chosen
    overrides = [f"memory.self_reference.{key}={value}" for key, value in settings.items()]
    config = load_config("hope-micro", ["model.dim=8", "model.mlp_dim=9", "memory.head_dim=4", *overrides], {}).tree
    model, tokens_bt = build(config.model, config.memory, 29, 3).double(), torch.arange(2 * 19).reshape(2, 19) * 5 % 29
    parameters = dict(model.named_parameters())
    found = []
    for recall in (SelfReference.recall, scanned):
        monkeypatch.setattr(SelfReference, "recall", recall)
        logits_bto, _ = model(tokens_bt)
        loss = functional.cross_entropy(logits_bto[:, :-1].flatten(0, 1), tokens_bt[:, 1:].flatten())
        found.append((logits_bto, torch.autograd.grad(loss, list(parameters.values()))))
    torch.testing.assert_close(*(logits_bto for logits_bto, _ in found), **CLOSE)
    for name, gradient, true_gradient in zip(parameters, found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(gradient, true_gradient, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
        assert gradient.any(), name


@every_structure
def test_what_is_learned_from_a_window_recalls_more(structure):
    """S4-M11, S3b-M3: 200 steps of the outer optimizer, every gradient alive in each, and the loss falls."""
    module = layer(8, 4, is_grown=False, structure=structure, eta_scale=0.1).float()
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    generator, losses = torch.Generator().manual_seed(2), []
    for _ in range(200):
        # Every second token is what came two tokens before it, turned round.
        text_btd = torch.randn(4, 9, 8, generator=generator)
        wanted_btd = functional.pad(text_btd[:, :-2].flip(-1), (0, 0, 2, 0))
        loss = (module(text_btd)[0] - wanted_btd).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.any() and p.grad.isfinite().all() for p in module.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) < 0.9 * sum(losses[:20])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"chunk_memory": 8, "chunk_other": 12}, "chunk_memory 8 and chunk_other 12 do not nest; make one a multiple"),
        ({"setting": "static", "adaptive_query": True}, "'static' lets nothing adapt; set it to false"),
        (
            {"setting": "static", "adaptive_query": True, "chunk_memory": 3, "chunk_other": 2},
            "(?s)do not nest.*lets nothing adapt",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_with_every_reason(settings, message):
    with pytest.raises((ConflictingKeys, ValidationError), match=message):
        SelfReferenceConfig.model_validate(settings)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ConflictingKeys, match="model.dim 12 is not a multiple of memory.head_dim 5"):
        layer(12, 5)
