"""Kept memories (memory.md 5.7): what is read is what a loop over tokens reads, and the laws of a memory hold."""

import copy
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from meristem.errors import ConflictingKeys, DeadKey
from meristem.evaluate.memory import memory_figures
from meristem.memory import named
from meristem.memory.named import rules
from meristem.memory.rule import write
from meristem.memory.state import State, clone, flatten, size_bytes, unflatten
from meristem.memory.structure import Live
from meristem.nn.config import MemoryCacheConfig, MemoryConfig
from meristem.nn.decode import can_decode
from meristem.nn.memory import MemoryLayer
from meristem.nn.memory_cache import MemoryCache, Shares, with_cache
from meristem.nn.neural_memory import NeuralMemory
from meristem.nn.norm import RMSNorm
from meristem.serve import store

WIDTH, N_TIME, LENGTH = 12, 13, 3
READS = ("sum", "gated", "soup", "sparse")
LAWFUL: list[dict[str, Any]] = [
    *({"rule": "titans", "cache": {"read": read}} for read in ("sum", "gated", "sparse")),
    *({"rule": "titans_mlp", "form": "frozen_chunk", "cache": {"read": read}} for read in ("gated", "soup", "sparse")),
    {"rule": "titans_mlp", "cache": {"read": "soup", "write": "fresh"}},
    {"rule": "trellis", "form": "refined", "cache": {"read": "soup", "length": 5}},
    {"rule": "lattice", "form": "lattice", "cache": {"read": "gated"}},
    {"rule": "atlas", "form": "atlas", "cache": {"read": "sparse", "write": "fresh"}},
    {"rule": "titans", "form": "tnt", "chunk": 4, "cache": {"read": "gated"}},
    {"rule": "yaad", "form": "frozen_chunk", "cache": {"read": "gated", "length": 4, "segments": "logarithmic"}},
    {"rule": "gated_delta", "cache": {"read": "gated", "segments": "logarithmic", "length": 1}},
    {"rule": "gated_delta", "cache": {"read": "sum", "segments": "logarithmic", "limit": 1, "length": 2}},
    {"rule": "omega", "cache": {"read": "gated", "limit": 2}},
    {"rule": "hebbian", "gates": "channel", "cache": {"read": "gated", "write": "fresh"}},
]
"""Forms, structures and every choice; chunks of 2 tokens that do not fill segments of 3 or 5."""
every_choice = pytest.mark.parametrize("settings", LAWFUL, ids=str)


def part_of(settings: dict[str, Any]) -> MemoryConfig:
    kept = {"length": LENGTH} | settings["cache"]
    kept |= {"top": 1} if kept["read"] == "sparse" and "top" not in kept else {}
    return MemoryConfig.model_validate({"head_dim": 4, "chunk": 2} | settings | {"cache": kept})


def made(settings: dict[str, Any], dtype: torch.dtype = torch.float64) -> MemoryCache:
    """Off its first weights: a zero must not hide what it multiplies."""
    torch.manual_seed(0)
    module = with_cache(WIDTH, part_of(settings)).to(dtype)
    assert isinstance(module, MemoryCache)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        if module.shares is not None:
            module.shares.ask.weight.mul_(8)
    return module


def inputs(batch: int = 2, n_time: int = N_TIME, random_seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(random_seed)
    return torch.randn(batch, n_time, WIDTH, generator=generator, dtype=dtype)


@torch.no_grad()
def truth(module: MemoryCache, hidden_btd: Tensor) -> tuple[Tensor, list[tuple[Tensor, int]]]:
    """Token by token, with the weights of every token; and the descriptor and the tokens of every kept memory."""
    rule, part, recall = replace(module.rule, values="given"), module.config, module.recall
    query_bthk, key_bthk, value_bthv, _ = module.project(hidden_btd, None)
    gates = module.gates(hidden_btd)
    memory = recall.initial(len(hidden_btd))
    kept: list[tuple[dict[str, Tensor], Tensor, int]] = []
    segment: list[Tensor] = []
    reads: list[Tensor] = []
    for t in range(hidden_btd.shape[1]):
        segment.append(hidden_btd[:, t])
        before = rule.weights(memory)
        memory = write(rule, memory, key_bthk[:, t], value_bthv[:, t], gates.at(t))
        now = before if rule.reads == "before" else rule.weights(memory)
        candidates = [*((weights, mean_bd) for weights, mean_bd, _ in kept), (now, torch.stack(segment).mean(0))]
        share_bn = torch.ones(len(hidden_btd), len(candidates), dtype=hidden_btd.dtype)
        if module.shares is not None:
            ask_bd = hidden_btd[:, t] @ module.shares.ask.weight.T / WIDTH**0.5
            score_bn = torch.stack([(ask_bd * mean_bd).sum(-1) for _, mean_bd in candidates], dim=-1)
            if part.read == "sparse":
                for row, row_n in enumerate(score_bn.tolist()):
                    for index in sorted(range(len(row_n) - 1), key=lambda i: -row_n[i])[part.top :]:
                        score_bn[row, index] = -torch.inf
            share_bn = score_bn.softmax(-1)
        query_bh1k = rule.features.apply(query_bthk[:, t])[:, :, None]
        share = [share_bn[:, index, None, None, None] for index in range(len(candidates))]
        if part.read == "soup":
            mixed = {
                name: sum(g * weights[name] for g, (weights, _) in zip(share, candidates, strict=True)) for name in now
            }
            reads.append(rule.structure.recall(Live(mixed), query_bh1k))
        else:
            outputs = [rule.structure.recall(Live(weights), query_bh1k) for weights, _ in candidates]
            reads.append(torch.stack([g * answer for g, answer in zip(share, outputs, strict=True)]).sum(0))
        if len(segment) == part.length:
            entry, segment = (rule.weights(memory), torch.stack(segment).mean(0), part.length), []
            while part.segments == "logarithmic" and kept and kept[-1][2] == entry[2]:
                entry = entry[0], (entry[1] + kept.pop()[1]) / 2, 2 * entry[2]
            kept = [*kept, entry][-part.limit :]
            memory = recall.initial(len(hidden_btd)) if part.write == "fresh" else memory
    return torch.cat(reads, dim=2).movedim(1, 2).flatten(2), [(mean_bd, size) for _, mean_bd, size in kept]


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("name", rules.names())
def test_what_is_read_is_what_a_loop_over_tokens_reads(name: str, read: str) -> None:
    """Every rule of the catalogue and every read, run by ``scan``: weights per token, mixed and read one by one."""
    module, hidden_btd = made({"rule": name, "form": "scan", "cache": {"read": read}}), inputs()
    true_btd, kept = truth(module, hidden_btd)
    read_btd, state = module(hidden_btd)
    torch.testing.assert_close(read_btd, true_btd, rtol=0, atol=1e-10)
    if read != "sum":
        means_bnd = torch.stack([mean_bd for mean_bd, _ in kept], dim=1)
        torch.testing.assert_close(state["kept"]["descriptor_bnd"], means_bnd, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "kept",
    [
        {"read": "gated", "write": "fresh"},
        {"read": "gated", "limit": 2},
        {"read": "sparse", "top": 2, "limit": 3},
        {"read": "gated", "segments": "logarithmic", "length": 1},
        {"read": "sum", "segments": "logarithmic", "length": 1},
        {"read": "gated", "segments": "logarithmic", "length": 1, "limit": 2},
        {"read": "soup", "write": "fresh", "limit": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("name, form", [("titans", "auto"), ("titans_mlp", "scan")])
def test_every_way_to_keep_is_that_of_the_loop(name: str, form: str, kept: dict[str, Any]) -> None:
    module, hidden_btd = made({"rule": name, "form": form, "cache": kept}), inputs(n_time=23)
    torch.testing.assert_close(module(hidden_btd)[0], truth(module, hidden_btd)[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("name", rules.names())
def test_one_segment_is_the_rule_alone(name: str, read: str) -> None:
    """Until the first segment has ended, bit by bit; its end memory is kept, and the rule goes on as if it were not."""
    # A chunk ends where its segment ends; soup shows weights that not every form has.
    form = "scan" if read == "soup" else "auto"
    settings = {"rule": name, "form": form, "chunk": 7, "cache": {"read": read, "length": 7}}
    module, hidden_btd = made(settings), inputs()
    read_btd, _ = module(hidden_btd[:, :7])
    plain_btd, _ = module.recall(hidden_btd[:, :7])
    assert torch.equal(read_btd, plain_btd)
    ours, plain = module(hidden_btd)[1]["memory"], module.recall(hidden_btd)[1]["memory"]
    torch.testing.assert_close(flatten(ours), flatten(plain))


@pytest.mark.parametrize("form", ["frozen_chunk", "tnt"])
def test_a_segment_of_whole_chunks_leaves_the_chunks_of_the_rule_alone(form: str) -> None:
    settings = {"rule": "titans_mlp", "form": form, "cache": {"read": "gated", "length": 4}}
    module, hidden_btd = made(settings), inputs()
    ours, plain = module(hidden_btd)[1]["memory"], module.recall(hidden_btd)[1]["memory"]
    torch.testing.assert_close(flatten(ours), flatten(plain), rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ["frozen_chunk", "refined"])
@pytest.mark.parametrize("name", ["titans_mlp", "trellis"])
def test_soup_of_chunks_of_one_token_is_that_of_scan(name: str, form: str) -> None:
    settings = {"rule": name, "chunk": 1, "cache": {"read": "soup"}}
    module, hidden_btd = made(settings | {"form": form}), inputs()
    torch.testing.assert_close(module(hidden_btd)[0], truth(module, hidden_btd)[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["titans", "titans_mlp"])
def test_sparse_over_all_is_gated_and_over_fewer_is_not(name: str) -> None:
    """With ``top`` at s - 1 or more, s - 1 the kept memories."""
    hidden_btd = inputs()
    gated_btd, state = made({"rule": name, "cache": {"read": "gated"}})(hidden_btd)
    n_kept = state["kept"]["descriptor_bnd"].shape[1]
    for top in (n_kept, n_kept + 3):
        sparse_btd, _ = made({"rule": name, "cache": {"read": "sparse", "top": top}})(hidden_btd)
        assert torch.equal(sparse_btd, gated_btd)
    fewer_btd, _ = made({"rule": name, "cache": {"read": "sparse", "top": 1}})(hidden_btd)
    assert torch.equal(fewer_btd[:, : 2 * LENGTH], gated_btd[:, : 2 * LENGTH]), "one kept memory is all there is"
    assert not torch.isclose(fewer_btd[:, -1], gated_btd[:, -1]).all(-1).any()


def test_sparse_takes_the_kept_memories_that_score_highest_and_always_the_running_one() -> None:
    torch.manual_seed(0)
    shares, some_btd = Shares(WIDTH, top=2).double(), inputs(3, 7)
    means_bnd = inputs(3, 5, random_seed=2)
    share_btn = shares(some_btd, inputs(3, 7, random_seed=3), means_bnd)
    score_btn = (some_btd @ shares.ask.weight.T) @ means_bnd.mT
    highest_btn = score_btn.topk(2).indices.sort().values
    assert torch.equal(share_btn[..., :-1].topk(2).indices.sort().values, highest_btn)
    assert ((share_btn > 0).sum(-1) == 3).all() and (share_btn[..., -1] > 0).all()
    torch.testing.assert_close(share_btn.sum(-1), torch.ones(3, 7, dtype=torch.float64))


def test_the_sum_of_linear_memories_is_one_summed_matrix() -> None:
    module, hidden_btd = made({"rule": "gated_delta", "cache": {"read": "sum"}}), inputs()
    _, state = module(hidden_btd[:, :12])
    query_bthk = module.project(hidden_btd, None)[0][:, 12]
    plain_btd, after = module.recall(hidden_btd)
    summed_bhkv = state["kept"]["matrix_bnhkv"].sum(1) + after["memory"]["matrix_bhkv"]
    read_bd = torch.einsum("bhk,bhkv->bhv", query_bthk, summed_bhkv).flatten(1)
    torch.testing.assert_close(module(hidden_btd)[0][:, 12], read_bd, rtol=0, atol=1e-10)
    assert not torch.isclose(plain_btd[:, 12], read_bd).any(-1).any()


@pytest.mark.parametrize("name", rules.names())
def test_soup_is_gated_for_a_linear_memory_and_not_for_another(name: str) -> None:
    hidden_btd = inputs()
    gated_btd, _ = made({"rule": name, "form": "scan", "cache": {"read": "gated"}})(hidden_btd)
    soup_btd, _ = made({"rule": name, "form": "scan", "cache": {"read": "soup"}})(hidden_btd)
    is_linear = named(name).structure.kind == "matrix"
    assert torch.allclose(gated_btd, soup_btd, rtol=0, atol=1e-10) == is_linear


def known_of_later(module: MemoryCache, now: int) -> bool:
    """Whether reads up to ``now`` depend on a later token, by perturbation or by gradient."""
    hidden_btd = inputs()
    other_btd = hidden_btd.clone()
    other_btd[:, now + 1] += 1.0
    read_btd, others_btd = module(hidden_btd)[0], module(other_btd)[0]
    assert not torch.isclose(read_btd[:, now + 1 :], others_btd[:, now + 1 :]).all()
    leaf_btd = hidden_btd.clone().requires_grad_()
    (upstream_btd,) = torch.autograd.grad(module(leaf_btd)[0][:, now].square().sum(), leaf_btd)
    assert upstream_btd[:, now].any()
    is_moved = not torch.equal(read_btd[:, : now + 1], others_btd[:, : now + 1])
    return is_moved or bool(upstream_btd[:, now + 1 :].any())


@every_choice
@pytest.mark.parametrize("now", [0, 6, 8])
def test_no_read_knows_a_later_token(settings: dict[str, Any], now: int) -> None:
    """At the beginning and at the end of a segment; descriptors included."""
    assert not known_of_later(made(settings), now)


@pytest.mark.parametrize("settings", [s for s in LAWFUL if part_of(s).cache.length > 1 and made(s).shares], ids=str)
def test_the_mean_of_a_whole_segment_would_be_found_out(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The law can fail: with the full mean of the current segment as its descriptor tokens know what comes."""
    causal = Shares.forward

    def leaking(self: Shares, inputs_btd: Tensor, mean_btd: Tensor, descriptor_bnd: Tensor) -> Tensor:
        return causal(self, inputs_btd, mean_btd[:, -1:].expand_as(mean_btd), descriptor_bnd)

    module = made(settings)
    # The first token of a segment that has others, with memories kept before it.
    now = 2 * module.config.length
    monkeypatch.setattr(Shares, "forward", leaking)
    assert known_of_later(module, now)


@every_choice
@pytest.mark.parametrize("cuts", [[1] * N_TIME, [5, 1, 7], [2, 4, 6, 1]], ids=str)
def test_cutting_a_text_anywhere_changes_nothing(settings: dict[str, Any], cuts: list[int]) -> None:
    module, hidden_btd = made(settings), inputs()
    whole_btd, last = module(hidden_btd)
    state, reads = None, []
    for part_btd in hidden_btd.split(cuts, dim=1):
        read_btd, state = module(part_btd, state)
        reads.append(read_btd)
    assert state is not None
    torch.testing.assert_close(torch.cat(reads, dim=1), whole_btd, rtol=0, atol=1e-10)
    torch.testing.assert_close(flatten(state), flatten(last), rtol=0, atol=1e-10)


@every_choice
def test_what_is_frozen_reads_by_itself_whatever_the_cut(settings: dict[str, Any]) -> None:
    """From one state, token by token: memories stay as they are, and only the inputs before a token move on."""
    module, hidden_btd = made(settings), inputs()
    _, state = module(hidden_btd[:, :7])
    whole_btd, after = module.forward_frozen(hidden_btd[:, 7:], state)
    for name in ("memory", "kept"):
        torch.testing.assert_close(flatten(after[name]), flatten(state[name]), rtol=0, atol=0)
    reads, now = [], state
    for part_btd in hidden_btd[:, 7:].split(1, dim=1):
        read_btd, now = module.forward_frozen(part_btd, now)
        reads.append(read_btd)
    torch.testing.assert_close(torch.cat(reads, dim=1), whole_btd, rtol=0, atol=1e-10)
    assert not torch.allclose(whole_btd[:, 1:], module(hidden_btd[:, 7:], state)[0][:, 1:])


@every_choice
@pytest.mark.parametrize("cut", [6, 7])
def test_gradients_do_not_depend_on_the_cut(settings: dict[str, Any], cut: int) -> None:
    module, hidden_btd = made(settings), inputs()
    parameters = list(module.parameters())
    whole = torch.autograd.grad(module(hidden_btd)[0].square().sum(), parameters)
    first_btd, state = module(hidden_btd[:, :cut])
    second_btd, _ = module(hidden_btd[:, cut:], state)
    parts = torch.autograd.grad(first_btd.square().sum() + second_btd.square().sum(), parameters)
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("read", READS)
def test_one_token_outside_training_is_the_same_token(read: str) -> None:
    """The short way of a session, over ends of segments; the state that came in stays as it was."""
    module, hidden_btd = made({"rule": "titans", "cache": {"read": read}}), inputs()
    whole_btd, whole = module(hidden_btd)
    state, reads = module(hidden_btd[:, :1])[1], []
    with torch.no_grad():
        for t in range(1, N_TIME):
            assert can_decode(module.recall, hidden_btd[:, t : t + 1], state)
            before, came_in = clone(state), state
            read_btd, state = module(hidden_btd[:, t : t + 1], state)
            torch.testing.assert_close(flatten(came_in), flatten(before), rtol=0, atol=0)
            reads.append(read_btd)
    torch.testing.assert_close(torch.cat(reads, dim=1), whole_btd[:, 1:], rtol=0, atol=1e-10)
    torch.testing.assert_close(flatten(state), flatten(whole), rtol=0, atol=1e-10)


@every_choice
def test_rows_of_a_batch_know_nothing_of_each_other(settings: dict[str, Any]) -> None:
    """By value and by gradient, in one call and through the state; permuted rows give permuted reads."""
    module, hidden_btd = made(settings), inputs(3)
    other_btd = hidden_btd.clone()
    other_btd[1] = inputs(1, random_seed=5)[0]
    read_btd, state = module(hidden_btd)
    others_btd, other_state = module(other_btd)
    torch.testing.assert_close(read_btd[::2], others_btd[::2], rtol=0, atol=0)
    leaf_btd = inputs(3, 4, random_seed=6).requires_grad_()
    later_btd, _ = module(leaf_btd, state)
    torch.testing.assert_close(later_btd[::2], module(leaf_btd, other_state)[0][::2], rtol=0, atol=0)
    (upstream_btd,) = torch.autograd.grad(later_btd[0].square().sum(), leaf_btd)
    assert upstream_btd[0].any() and not upstream_btd[1:].any()
    torch.testing.assert_close(module(hidden_btd[[2, 0, 1]])[0], read_btd[[2, 0, 1]], rtol=0, atol=1e-10)


@every_choice
def test_no_parameter_is_dead(settings: dict[str, Any]) -> None:
    """At the first weights; ``sum`` weighs nothing and has no projection for it."""
    torch.manual_seed(0)
    module = with_cache(WIDTH, part_of(settings))
    module(inputs(dtype=torch.float32))[0].square().sum().backward()
    assert [path for path, p in module.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert any("ask" in path for path, _ in module.named_parameters()) == (settings["cache"]["read"] != "sum")


@every_choice
def test_inputs_ten_times_as_large_stay_finite(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = with_cache(WIDTH, part_of(settings))
    read_btd, _ = module(10 * inputs(n_time=24, dtype=torch.float32))
    read_btd.square().sum().backward()
    assert read_btd.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@every_choice
def test_forward_is_pure(settings: dict[str, Any]) -> None:
    module, hidden_btd = made(settings), inputs()
    _, state = module(hidden_btd[:, :8])
    before = {path: leaf.clone() for path, leaf in flatten(clone(state)).items() if isinstance(leaf, Tensor)}
    first_btd, second_btd = (module(hidden_btd[:, 8:], state)[0] for _ in range(2))
    assert torch.equal(first_btd, second_btd)
    assert all(torch.equal(leaf, before[path]) for path, leaf in flatten(state).items() if isinstance(leaf, Tensor))


@every_choice
def test_memories_stay_in_full_precision_and_reads_near_it(settings: dict[str, Any]) -> None:
    """Under autocast and across a cut: within 0.1 of the largest read, or twice the error of bfloat16 throughout."""
    module, hidden_btd = made(settings, torch.float32), inputs(dtype=torch.float32)
    true_btd, _ = module(hidden_btd)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        first_btd, state = module(hidden_btd[:, :8])
        second_btd, state = module(hidden_btd[:, 8:], state)
    errors_btd = (torch.cat([first_btd, second_btd], dim=1).float() - true_btd).abs()
    if errors_btd.max() >= 0.1 * true_btd.abs().max():
        with torch.no_grad():
            plain_btd, _ = copy.deepcopy(module).to(torch.bfloat16)(hidden_btd.bfloat16())
        assert errors_btd.mean() < 2 * (plain_btd.float() - true_btd).abs().mean()
    leaves = {path: leaf for path, leaf in flatten(state).items() if path.split(".")[0] in ("memory", "kept")}
    assert all(leaf.dtype == torch.float32 for leaf in leaves.values() if isinstance(leaf, Tensor))


@pytest.mark.parametrize("settings", LAWFUL[::2], ids=str)
def test_shapes_on_meta_are_the_real_ones(settings: dict[str, Any]) -> None:
    _, real = made(settings, torch.float32)(inputs(3, 8, dtype=torch.float32))
    with torch.device("meta"):
        module = with_cache(WIDTH, part_of(settings))
        _, state = module(torch.zeros(3, 7, WIDTH))
        _, state = module(torch.zeros(3, 1, WIDTH), state)
    assert {path: getattr(leaf, "shape", leaf) for path, leaf in flatten(state).items()} == {
        path: getattr(leaf, "shape", leaf) for path, leaf in flatten(real).items()
    }


@pytest.mark.parametrize("settings", LAWFUL[-9:], ids=str)
@pytest.mark.parametrize("n_time", [2, 8])
def test_a_state_can_be_written_to_a_file_and_read_back(settings: dict[str, Any], n_time: int, tmp_path: Path) -> None:
    """Also before anything is kept, and in the middle of a chunk."""
    module, hidden_btd = made(settings), inputs()
    _, state = module(hidden_btd[:, :n_time])
    leaves = flatten(clone(state))
    store.write(tmp_path / "state", {path: x for path, x in leaves.items() if isinstance(x, Tensor)}, {})
    tensors, _ = store.read(tmp_path / "state")
    integers = {path: x for path, x in leaves.items() if isinstance(x, int)}
    again = unflatten(dict(sorted(tensors.items())) | integers)
    assert torch.equal(module(hidden_btd[:, n_time:], again)[0], module(hidden_btd[:, n_time:], state)[0])


def test_no_more_memories_are_kept_than_the_limit_and_the_oldest_goes_first() -> None:
    """State bytes stop growing; what was dropped is known from the count of segments."""
    settings = {"rule": "gated_delta", "cache": {"read": "gated", "limit": 3}}
    module, hidden_btd = made(settings), inputs(1, 60)
    ends, sizes = [], []
    state: State | None = None
    for part_btd in hidden_btd.split(LENGTH, dim=1):
        _, state = module(part_btd, state)
        ends.append(state["memory"]["matrix_bhkv"])
        sizes.append(size_bytes(state))
    assert state is not None
    assert torch.equal(state["kept"]["matrix_bnhkv"], torch.stack(ends[-3:], dim=1))
    assert sizes[0] < sizes[1] < sizes[2] and set(sizes[2:]) == {sizes[2]}
    assert state["kept"]["n_segments"] == 20 and state["kept"]["n_tokens"] == 0
    held = state["kept"]["matrix_bnhkv"]
    assert held.untyped_storage().nbytes() == held.numel() * held.element_size(), "nothing dropped is held alive"


def test_logarithmic_segments_are_as_many_as_ones_in_their_number() -> None:
    """After n segments: of the sizes that the binary digits of n say, each with the memory at its end."""
    settings = {"rule": "gated_delta", "cache": {"read": "gated", "segments": "logarithmic", "limit": 9}}
    module, n_segments = made(settings), 45
    hidden_btd = inputs(1, n_segments * LENGTH)
    ends: list[Tensor] = []
    state: State | None = None
    for n, part_btd in enumerate(hidden_btd.split(LENGTH, dim=1), start=1):
        _, state = module(part_btd, state)
        ends.append(state["memory"]["matrix_bhkv"])
        sizes = [1 << digit for digit in reversed(range(n.bit_length())) if n >> digit & 1]
        stops = list(itertools.accumulate(sizes))
        assert len(sizes) == state["kept"]["matrix_bnhkv"].shape[1] <= n.bit_length()
        assert torch.equal(state["kept"]["matrix_bnhkv"], torch.stack([ends[stop - 1] for stop in stops], dim=1))
        spans = [hidden_btd[:, LENGTH * (stop - size) : LENGTH * stop] for size, stop in zip(sizes, stops, strict=True)]
        means_bnd = torch.stack([span_btd.mean(1) for span_btd in spans], dim=1)
        torch.testing.assert_close(state["kept"]["descriptor_bnd"], means_bnd, rtol=0, atol=1e-12)


def test_a_fresh_segment_knows_the_others_only_by_what_was_kept() -> None:
    module, hidden_btd = made({"rule": "titans", "cache": {"read": "gated", "write": "fresh"}}), inputs()
    _, state = module(hidden_btd[:, : 2 * LENGTH])
    torch.testing.assert_close(state["memory"], dict(module.recall.initial(2)), rtol=0, atol=0)
    assert not torch.isclose(state["kept"]["matrix_bnhkv"][:, 0], state["kept"]["matrix_bnhkv"][:, 1]).all()


@pytest.mark.parametrize("name, read", list(itertools.product(["titans", "titans_mlp", "atlas"], READS)))
def test_a_look_reads_all_memories_and_writes_none(name: str, read: str) -> None:
    """What ``look`` of one memory gives for each kept one, weighed; before anything is kept, that of the rule alone."""
    module, query_btd = made({"rule": name, "form": "scan", "cache": {"read": read}}), inputs(2, 5, random_seed=9)
    _, state = module(inputs()[:, :2])
    assert torch.equal(module.read(query_btd, state), module.recall.read(query_btd, state))
    _, state = module(inputs()[:, :8])
    kept, names = state["kept"], module.stacked
    memories = [state["memory"] | {name: kept[names[name]][:, n] for name in names} for n in range(2)]
    memories.append(state["memory"])
    share_btn = torch.ones(2, 5, 3, dtype=torch.float64)
    if module.shares is not None:
        mean_btd = inputs()[:, 6:8].mean(1, keepdim=True).expand(-1, 5, -1)
        share_btn = module.shares(query_btd, mean_btd, kept["descriptor_bnd"])
    if module.is_souped:
        each = []
        for t in range(5):
            share = [share_btn[:, t, n, None, None, None] for n in range(3)]
            mixed = {name: sum(g * memory[name] for g, memory in zip(share, memories, strict=True)) for name in names}
            each.append(module.recall.read(query_btd[:, t : t + 1], {"memory": state["memory"] | mixed}))
        true_btd = torch.cat(each, dim=1)
    else:
        outputs = [module.recall.read(query_btd, {"memory": memory}) for memory in memories]
        true_btd = sum(share_btn[..., n, None] * outputs[n] for n in range(3))
    torch.testing.assert_close(module.read(query_btd, state), true_btd, rtol=0, atol=1e-10)


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("name, form", [("titans", "auto"), ("titans_mlp", "frozen_chunk")])
def test_no_tensor_of_time_times_key_times_value(name: str, form: str, read: str) -> None:
    """Neither forward nor backward: no weights per token, mixed or not."""
    part = MemoryConfig(rule=name, form=form, head_dim=16, chunk=8, cache=MemoryCacheConfig(read=read, length=32))
    torch.manual_seed(0)
    module, hidden_btd = with_cache(16, part), torch.randn(1, 96, 16)

    class Largest(TorchDispatchMode):
        n_elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            for x in result if isinstance(result, tuple | list) else [result]:
                self.n_elements = max(self.n_elements, x.numel() if isinstance(x, Tensor) else 0)
            return result

    with Largest() as mode:
        module(hidden_btd)[0].sum().backward()
    assert mode.n_elements < 96 * 16 * 16 * (1 if name == "titans" else 4)


@pytest.mark.compiled
@pytest.mark.slow
@pytest.mark.parametrize("read", ["gated", "sparse"])
def test_it_is_one_graph(read: str) -> None:
    """Fresh and with a state; every number of kept memories up to the limit has a graph of its own."""
    module, hidden_btd = made({"rule": "titans", "cache": {"read": read}}), inputs()
    _, state = module(hidden_btd[:, :7])
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    for before in (None, state):
        torch.testing.assert_close(compiled(hidden_btd, before)[0], module(hidden_btd, before)[0], rtol=0, atol=1e-12)


class Reader(nn.Module):
    """A model of one layer: tokens, memory with kept ones, logits."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.norm = nn.Embedding(29, WIDTH), RMSNorm(WIDTH)
        self.mixer = MemoryLayer(WIDTH, part_of(settings))
        self.mixer.recall = with_cache(WIDTH, part_of(settings))
        self.head = nn.Linear(WIDTH, 29)

    def forward(self, tokens_bt: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        hidden_btd = self.embedding(tokens_bt)
        mixed_btd, state = self.mixer(self.norm(hidden_btd), state)
        return self.head(hidden_btd + mixed_btd), state


def test_a_layer_learns_with_it_and_its_figures_are_those_of_the_running_memory() -> None:
    reader = Reader({"rule": "titans", "cache": {"read": "gated"}})
    tokens_bt = torch.randint(29, (4, 14), generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.Adam(reader.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = functional.cross_entropy(reader(tokens_bt[:, :-1])[0].flatten(0, 1), tokens_bt[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    figures = memory_figures(reader, tokens_bt)
    _, state = reader(tokens_bt)
    norms = state["memory"]["matrix_bhkv"].flatten(2).norm(dim=-1)
    assert figures["norm"] == pytest.approx(norms.mean().item(), rel=1e-4)
    assert figures["half_life"] > 0


@pytest.mark.parametrize(
    "settings, key",
    [
        ({"length": 8}, "length"),
        ({"segments": "logarithmic"}, "segments"),
        ({"write": "fresh"}, "write"),
        ({"limit": 3}, "limit"),
        ({"top": 2}, "top"),
        ({"read": "gated", "top": 2}, "top"),
        ({"read": "sum", "top": 2}, "top"),
    ],
)
def test_a_setting_that_nothing_reads_is_refused(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(DeadKey, match=rf"memory\.cache\.{key} is .*memory\.cache\.read=.*Remove the key"):
        MemoryCacheConfig.model_validate(settings)


def test_what_cannot_be_kept_is_refused_with_every_reason() -> None:
    with pytest.raises(ConflictingKeys, match=r"'logarithmic'.*'fresh'.*memory\.cache\.write=continue"):
        MemoryCacheConfig(read="gated", segments="logarithmic", write="fresh")
    soup = MemoryCacheConfig(read="soup")
    with pytest.raises(
        ConflictingKeys, match=r"structure 'slots'.*'lattice' never shows.*memory\.form=.*read to gated"
    ):
        with_cache(WIDTH, MemoryConfig(rule="lattice", form="lattice", head_dim=4, cache=soup))
    spanning = {"rule": "omega_net", "structure": "mlp", "form": "tnt", "head_dim": 4}
    with pytest.raises(ConflictingKeys) as caught:
        with_cache(WIDTH, MemoryConfig.model_validate(spanning | {"form": "scan", "cache": soup}))
    assert "remembered" in str(caught.value) and "scan' never" not in str(caught.value)


def test_without_kept_memories_a_recall_is_a_recall() -> None:
    assert type(with_cache(WIDTH, MemoryConfig(head_dim=4))) is NeuralMemory
