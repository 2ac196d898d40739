"""The plain scan against other people's code, whose answers lie in ``oracles/`` (memory.md 4.12).

The fixtures were made in float64 by ``oracles/generate.py``; versions are in their metadata. What cannot be mapped:
titans-pytorch reads as wide as it writes, and where its network is normed it learns a gain that our memory lacks, so
the normed case takes all surprises at the first weights, where that gain is 1.
"""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from meristem.memory import Gates, Rule, named, run, scan
from meristem.memory.bias import Bias, squared
from meristem.memory.forms import accepting, forms
from meristem.memory.forms.decay import compute_decay
from meristem.memory.retention import decay
from meristem.memory.state import Memory
from meristem.memory.structure import matrix, mlp
from meristem.memory.update import momentum, plain

FOLDER = Path(__file__).with_name("oracles")
VERSIONS = {"fla_core": "0.6.0", "transformers": "5.23.0", "titans_pytorch": "0.5.5"}
CASES = ["hebbian", "delta", "gated_delta", "titans", "momentum_delta"]
DOUBLE = {"rtol": 0, "atol": 1e-12}
SINGLE = {"rtol": 0, "atol": 1e-5}
DTYPES = [(torch.float64, DOUBLE), (torch.float32, SINGLE)]


@cache
def stored(library: str) -> dict[str, Tensor]:
    return load_file(FOLDER / f"{library}.safetensors")


def case(library: str, name: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """What the fixture holds under a name, the name cut off; ``given`` is what the cases of fla-core share."""
    named_so = {key: x for key, x in stored(library).items() if key.startswith(f"{name}.")}
    return {key.removeprefix(f"{name}."): x.to(dtype) for key, x in named_so.items()}


def given(rule: Rule, dtype: torch.dtype) -> tuple[Memory, Tensor, Tensor, Tensor, Gates]:
    """The inputs that all cases of fla-core share, as arguments of a form."""
    inputs = case("fla_core", "given", dtype)
    gates = {name: inputs[name] for name in ("retain_bth", "write_bth")}
    memory = {"matrix_bhkv": inputs["matrix_bhkv"]}
    if rule.update.has_momentum:
        gates["momentum_bth"] = inputs["momentum_bth"]
        memory["matrix_momentum_bhkv"] = inputs["matrix_momentum_bhkv"]
    return memory, inputs["keys_bthk"], inputs["values_bthv"], inputs["queries_bthk"], Gates(**gates)


EXACT = [(name, form) for name in CASES for form in accepting(named(name)) if forms.get(form).is_exact]


@pytest.mark.parametrize("library", VERSIONS)
def test_the_fixtures_say_what_made_them(library: str) -> None:
    with safe_open(FOLDER / f"{library}.safetensors", "pt") as opened:
        assert opened.metadata()["version"] == VERSIONS[library]
    assert sum(path.stat().st_size for path in FOLDER.glob("*.safetensors")) < 100_000


@pytest.mark.parametrize("name, form", EXACT)
@pytest.mark.parametrize("dtype, tolerance", DTYPES, ids=["float64", "float32"])
def test_exact_forms_answer_as_fla_does(name: str, form: str, dtype: torch.dtype, tolerance: dict[str, float]) -> None:
    """S1-M4, S1-M5, S1-M6: reads, memory and momentum of fla-core's recurrences."""
    rule, expected = named(name), case("fla_core", name, dtype)
    read_bthv, memory = run(rule, *given(rule, dtype), form=form, chunk=4)
    torch.testing.assert_close({"read_bthv": read_bthv} | memory, expected, **tolerance)


@pytest.mark.parametrize("name", ["delta", "gated_delta"])
def test_without_decay_both_delta_rules_are_that_of_fla(name: str) -> None:
    """S1-M4: fla-core's delta rule, which has no decay."""
    expected = case("fla_core", "delta_without_decay")
    *rest, gates = given(named(name), torch.float64)
    read_bthv, memory = scan(named(name), *rest, replace(gates, retain_bth=torch.ones_like(gates.retain_bth)))
    torch.testing.assert_close({"read_bthv": read_bthv} | memory, expected, **DOUBLE)


def test_gated_delta_is_that_of_qwen() -> None:
    """S1-M4: the recurrence of transformers' Qwen3-Next, a second hand on the same equation."""
    read_bthv, memory = scan(named("gated_delta"), *given(named("gated_delta"), torch.float64))
    torch.testing.assert_close({"read_bthv": read_bthv} | memory, case("transformers", "gated_delta"), **DOUBLE)


def test_a_chunk_flows_as_in_fla() -> None:
    """S1-M5: the weights of the past within one chunk of Titans, with momentum."""
    inputs, expected = case("fla_core", "given"), case("fla_core", "titans_chunk")
    gates = (inputs[name].movedim(1, 2) for name in ("retain_bth", "momentum_bth", "write_bth"))
    retain_bhc, momentum_bhc, write_bhc = gates
    decay = compute_decay(retain_bhc.log(), momentum_bhc.log(), write_bhc)
    found = {
        "kept_bhc": decay.entering_nhcl[..., 0],
        "kept_bh": decay.carry_nhll[..., 0, 0],
        "joined_bhc": decay.entering_nhcl[..., 1],
        "joined_bh": decay.carry_nhll[..., 0, 1],
        "arriving_bhs": decay.write_nhcl[..., 0],
        "reach_bhcs": decay.intra_nhcs,
        "moving_bh": decay.carry_nhll[..., 1, 1],
        "moved_bhs": decay.write_nhcl[..., 1],
    }
    torch.testing.assert_close(found, expected, **DOUBLE)


def test_a_frozen_chunk_of_a_normed_loss_is_ttt() -> None:
    """S1-M17: TTT-Linear, whose loss is ``1/2 |LN(W k + b) - (v - k)|^2`` and whose reads are ``o + LN(o)``.

    Its shift b is the row of W for a key that is always 1, appended here to keys and queries.
    """
    inputs, ttt = case("fla_core", "given"), case("fla_core", "ttt")
    n_time, width = ttt["write_bth"].shape[1], ttt["matrix_bhkv"].shape[-1]
    keys_bthk, values_bthv, queries_bthk = (
        inputs[name][:, :n_time, :, :width] for name in ("keys_bthk", "values_bthv", "queries_bthk")
    )

    def normed(rows: Tensor) -> Tensor:
        unit = functional.layer_norm(rows, (width,), eps=1e-6)
        return unit * ttt["gain_hv"][:, None] + ttt["shift_hv"][:, None]

    def gradient(recalled: Tensor, target: Tensor, _: Tensor | None) -> Tensor:
        leaf = recalled.detach().requires_grad_()
        return torch.autograd.grad(0.5 * (normed(leaf) - target).square().sum(), leaf)[0]

    rule = Rule(matrix(), Bias("ttt", gradient), decay(), plain())
    memory = {"matrix_bhkv": functional.pad(inputs["matrix_bhkv"][..., :width], (0, 0, 0, 1))}
    with_one = (functional.pad(x, (0, 1), value=1.0) for x in (keys_bthk, queries_bthk))
    keys_bthk_one, queries_bthk_one = with_one
    gates = Gates(torch.ones_like(ttt["write_bth"]), ttt["write_bth"])
    window = keys_bthk_one, values_bthv - keys_bthk, queries_bthk_one, gates
    read_bthv, after = run(rule, memory, *window, form="frozen_chunk", chunk=4)
    answer_bhtv = read_bthv.movedim(1, 2) + normed(read_bthv.movedim(1, 2))
    torch.testing.assert_close(answer_bhtv.movedim(1, 2), ttt["read_bthv"], **DOUBLE)
    expected_bhkv = torch.cat([ttt["matrix_bhkv"], ttt["added_bh1v"]], dim=-2)
    torch.testing.assert_close(after["matrix_bhkv"], expected_bhkv, **DOUBLE)


DEPTHS = {
    "depth1": (matrix(), 4),
    "depth2": (mlp(2, expand=2), 4),
    "depth3": (mlp(3, expand=2), 4),
    "normed": (mlp(2, expand=2, is_normed=True), 64),
}


@pytest.mark.parametrize("name", DEPTHS)
def test_frozen_chunks_of_titans_are_those_of_titans_pytorch(name: str) -> None:
    """S1-M17: reads, weights and momentum of whole forward passes, whose loss is a mean over the width.

    Without a norm it adds no key to what its network answers: here values and reads are taken with the key added.
    """
    (structure, chunk), oracle = DEPTHS[name], case("titans_pytorch", name)
    rule = Rule(structure, squared(), decay(), momentum())
    gates = Gates(oracle["retain_bth"], oracle["write_bth"], oracle["momentum_bth"])
    values_bthv, expected_bthv = oracle["values_bthv"], oracle["read_bthv"]
    if name in ("depth2", "depth3"):
        values_bthv = values_bthv + oracle["keys_bthk"]
        expected_bthv = expected_bthv + oracle["queries_bthk"]
    memory: Memory = {}
    for index, weight in enumerate(structure.weights):
        memory |= {weight: oracle[f"first{index}"][:, None]}
    memory |= rule.update.carry(memory)
    window = oracle["keys_bthk"], values_bthv, oracle["queries_bthk"], gates
    read_bthv, after = run(rule, memory, *window, form="frozen_chunk", chunk=chunk)
    torch.testing.assert_close(read_bthv, expected_bthv, **DOUBLE)
    for index, weight in enumerate(structure.weights):
        torch.testing.assert_close(after[weight][:, 0], oracle[f"after{index}"], **DOUBLE)
        stem, axes = weight.rsplit("_", 1)
        torch.testing.assert_close(after[f"{stem}_momentum_{axes}"][:, 0], oracle[f"momentum{index}"], **DOUBLE)
