"""Causal language models of Hugging Face as hosts: tiny ones, with drawn weights (needs the extra hf)."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import meristem.growth as grow
from growth.catalogue import bits
from meristem.errors import WrongValue
from meristem.growth.isolation import enter, leave

pytestmark = [pytest.mark.extras, pytest.mark.timeout(300)]

VOCABULARY = 23
SIZES = {
    "llama": {
        "hidden_size": 12,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32,
    },
    "gpt2": {"n_embd": 12, "n_layer": 2, "n_head": 3, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0},
}
BLOCKS = {"llama": "model.layers", "gpt2": "transformer.h"}
every_host = pytest.mark.parametrize("kind", SIZES)


def host(kind: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, **SIZES[kind])
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(config).eval()


def text(n_rows: int, *, step: int = 1, n_time: int = 17) -> Tensor:
    """Rows that count up by ``step``, each from a number of its own: a text that can be learned."""
    return (torch.arange(n_rows)[:, None] + step * torch.arange(n_time)) % VOCABULARY


def logits(model: Any, tokens_bt: Tensor) -> Tensor:
    found: Tensor = model(input_ids=tokens_bt, use_cache=False).logits
    return found


def loss(model: Any, tokens_bt: Tensor) -> Tensor:
    logits_bto = logits(model, tokens_bt[:, :-1])
    return nn.functional.cross_entropy(logits_bto.flatten(0, 1), tokens_bt[:, 1:].flatten())


@every_host
def test_slots_and_seeds_change_nothing_and_come_off(kind: str) -> None:
    """Outputs, names and classes; and the grown model is built again from its log and its tensors."""
    model, tokens_bt = host(kind), text(3)
    before, wanted, classes = bits(model), logits(model, tokens_bt), [type(each) for each in model.modules()]
    grow.attach(model, f"{BLOCKS[kind]}.*")
    assert [*grow.slots_in(model)] == [f"{BLOCKS[kind]}.0", f"{BLOCKS[kind]}.1"]
    seed = grow.graft(model, f"{BLOCKS[kind]}.1", "bottleneck", hidden=5)
    assert torch.equal(logits(model, tokens_bt), wanted)
    assert {name: value for name, value in bits(model).items() if name in before} == before
    with torch.no_grad():
        for parameter in seed.parameters():
            parameter.add_(0.1)
    grown = logits(model, tokens_bt)
    again = grow.replay(host(kind), json.loads(json.dumps(grow.to_json(model))))
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(again, tokens_bt), grown) and not torch.equal(grown, wanted)
    grow.strip(model)
    assert bits(model) == before and torch.equal(logits(model, tokens_bt), wanted)
    assert [type(each) for each in model.modules()] == classes


@every_host
def test_a_second_text_is_learned_and_the_first_is_the_same_bits(kind: str) -> None:
    """With the host frozen: a seed learns to count by fives, and with it off the model counts by ones as before."""
    model, slot = host(kind), f"{BLOCKS[kind]}.1"
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss(model, text(8)).backward()
        optimizer.step()
        optimizer.zero_grad()
    first, second = loss(model, text(5)).item(), loss(model, text(5, step=5)).item()
    grow.attach(model, slot)
    seed = grow.graft(model, slot, "gated_feedforward", hidden=16)
    frozen = enter(model, slot, "frozen_host")
    assert frozen == {name for name, _ in model.named_parameters() if ".slot." not in name}
    optimizer = torch.optim.AdamW(seed.parameters(), lr=1e-2)
    for _ in range(60):
        loss(model, text(8, step=5)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss(model, text(5, step=5)).item() < second - 0.5
    grow.set_blend(model, slot, 0.0)
    assert loss(model, text(5)).item() == first
    leave(model, frozen)
    assert all(each.requires_grad for each in model.parameters())


@every_host
def test_it_generates_with_a_cache_what_it_generates_without(kind: str) -> None:
    model = grow.attach(host(kind), f"{BLOCKS[kind]}.*")
    seed = grow.graft(model, f"{BLOCKS[kind]}.0", "low_rank", rank=3)
    with torch.no_grad():
        for parameter in seed.parameters():
            parameter.add_(0.2)
    prompt_bt, found = text(2, n_time=5), []
    for is_cached in (True, False):
        found.append(model.generate(prompt_bt, max_new_tokens=9, do_sample=False, use_cache=is_cached, pad_token_id=0))
    assert torch.equal(*found) and found[0].shape[1] > 5


def test_a_pattern_that_fits_no_module_names_the_nearest() -> None:
    with pytest.raises(WrongValue, match=r"no module is called 'model.layer.\*'. Nearest: model.layers"):
        grow.attach(host("llama"), "model.layer.*")
