"""What holds of every seed, in a model of ours and in a foreign one."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import meristem.growth as grow
import zoo
from growth.catalogue import PLACES, SEEDS, bits, grown, host, logits
from meristem.memory.state import join_rows, take_rows
from meristem.models.build import build
from meristem.models.online import frozen

every_seed = pytest.mark.parametrize("seed", SEEDS)
BLENDS = grow.blends.names()
every_host = pytest.mark.parametrize("name", PLACES)


@every_host
@pytest.mark.parametrize("is_training", [True, False])
def test_an_empty_slot_is_the_identity(name: str, is_training: bool) -> None:
    """The same outputs, the same names, the same class to ``isinstance``; and all of it comes off again."""
    model, tokens_bt = host(name).train(is_training), zoo.ids(2)
    before, wanted = bits(model), logits(model, tokens_bt)
    module = model.get_submodule(PLACES[name])
    cls, names = type(module), [name for name, _ in model.named_modules()]
    assert grow.attach(model, PLACES[name]) is model
    assert torch.equal(logits(model, tokens_bt), wanted) and bits(model) == before and isinstance(module, cls)
    assert grow.strip(model) is model
    assert type(module) is cls and [name for name, _ in model.named_modules()] == names and bits(model) == before


@every_host
@every_seed
def test_a_seed_changes_nothing_when_it_comes(name: str, seed: str) -> None:
    """Logits are equal, with gradients and without, and no number of the host moves."""
    plain, tokens_bt = host(name).eval(), zoo.ids(2)
    wanted = logits(plain, tokens_bt)
    with torch.no_grad():
        inferred = logits(plain, tokens_bt)
    model, _ = grown(name, seed, is_moved=False)
    model.eval()
    assert torch.equal(logits(model, tokens_bt), wanted)
    with torch.no_grad():
        assert torch.equal(logits(model, tokens_bt), inferred)
    held = bits(model)
    assert all(held[key] == value for key, value in bits(plain).items())


@every_host
@every_seed
def test_a_seed_sees_no_later_token_and_no_other_row(name: str, seed: str) -> None:
    model, _ = grown(name, seed)
    tokens_bt = zoo.ids(3)
    said_bto = logits(model, tokens_bt)
    later_bt, other_bt = tokens_bt.clone(), tokens_bt.clone()
    later_bt[:, 8:] = (later_bt[:, 8:] + 1) % zoo.VOCABULARY
    other_bt[1] = (other_bt[1] + 1) % zoo.VOCABULARY
    torch.testing.assert_close(logits(model, later_bt)[:, :8], said_bto[:, :8], rtol=0, atol=1e-12)
    torch.testing.assert_close(logits(model, other_bt)[[0, 2]], said_bto[[0, 2]], rtol=0, atol=1e-12)
    assert not torch.allclose(said_bto, logits(host(name), tokens_bt), atol=1e-4)


@every_seed
@pytest.mark.parametrize("name, blend", [("preset-default", "residual"), *(("foreign", b) for b in BLENDS)])
def test_gradients_reach_every_weight_of_a_seed(name: str, seed: str, blend: str) -> None:
    """The first step moves the seed, and once it has moved, all of it learns; the host's gradient is not cut."""
    model, made = grown(name, seed, is_moved=False, blend=blend)
    tokens_bt = zoo.ids(2)
    logits(model, tokens_bt).square().sum().backward()
    assert any(x.grad is not None and x.grad.any() for x in made.layer.parameters())
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3)
    model.zero_grad()
    logits(model, tokens_bt).square().sum().backward()
    silent = [key for key, x in made.named_parameters() if x.grad is None or not x.grad.any()]
    assert silent == [key for key in silent if "initial.learned" in key and "reset" in key]
    before = {key for key, x in host(name).named_parameters() if x.requires_grad}
    assert all(x.grad is not None for key, x in model.named_parameters() if key in before)


@every_seed
@pytest.mark.parametrize("blend", BLENDS)
def test_the_ends_of_the_blend_weight_are_exact(seed: str, blend: str) -> None:
    """At 0 the model is its host, whatever the seed would give; what is between lies on the line of the ends."""
    model, made = grown("foreign", seed, blend=blend)
    place, tokens_bt, said = PLACES["foreign"], zoo.ids(2), {}
    module = model.get_submodule(place)
    module.register_forward_hook(lambda _, __, hidden_btd: said.update(found=hidden_btd.detach()))
    found = {}
    for weight in (0.0, 0.5, 1.0):
        grow.set_blend(model, place, weight)
        logits(model, tokens_bt)
        found[weight] = said["found"]
    if blend == "logit_mix":  # of what the vectors would be as logits
        found = {weight: hidden_btd.softmax(-1) for weight, hidden_btd in found.items()}
    torch.testing.assert_close(found[0.5], (found[0.0] + found[1.0]) / 2, rtol=0, atol=1e-12)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.fill_(float("nan"))
    grow.set_blend(model, place, 0.0)
    assert torch.equal(logits(model, tokens_bt), logits(host("foreign"), tokens_bt))


@every_host
@every_seed
def test_strip_gives_the_host_back(name: str, seed: str) -> None:
    plain = host(name)
    model, _ = grown(name, seed)
    grow.strip(model)
    assert bits(model) == bits(plain) and torch.equal(logits(model, zoo.ids(2)), logits(plain, zoo.ids(2)))
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]


@every_host
@every_seed
def test_a_grown_model_is_built_again_from_files(name: str, seed: str, tmp_path: Path) -> None:
    """A JSON log and tensors; before the tensors come, the seed has the first weights that it had."""
    model, _ = grown(name, seed, blend="channel")
    grow.set_blend(model, PLACES[name], 0.3)
    (tmp_path / "topology.json").write_text(json.dumps(grow.to_json(model)))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    again = grow.replay(host(name), json.loads((tmp_path / "topology.json").read_text()))
    first, _ = grown(name, seed, is_moved=False, blend="channel")
    assert bits(again) == bits(first)
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert bits(again) == bits(model) and grow.to_json(again) == grow.to_json(model)
    assert torch.equal(logits(again, zoo.ids(2)), logits(model, zoo.ids(2)))


@every_seed
def test_our_own_models_are_built_from_settings_and_log(seed: str) -> None:
    model, _ = grown("preset-default", seed)
    settings = zoo.ZOO["preset-default"]
    again = build(*settings, zoo.VOCABULARY, random_seed=3, topology=grow.topology(model)).double()
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(again, zoo.ids(2)), logits(model, zoo.ids(2)))
    with torch.device("meta"):
        shapes = build(*settings, zoo.VOCABULARY, random_seed=3, topology=grow.topology(model))
    assert {key: x.shape for key, x in shapes.state_dict().items()} == {
        key: x.shape for key, x in model.state_dict().items()
    }


@every_seed
def test_the_state_of_a_seed_goes_in_and_comes_out(seed: str) -> None:
    """Piece by piece a model of ours reads what it reads at once, also where its rows have read differently."""
    model, made = grown("preset-default", seed)
    tokens_bt = zoo.ids(2)
    whole_bto, _ = model(tokens_bt)
    first_bto, state = model(tokens_bt[:, :5])
    assert ("slot_blocks" in state["layer"]["1"]) == made.has_state
    then_bto, _ = model(tokens_bt[:, 5:], state)
    torch.testing.assert_close(torch.cat([first_bto, then_bto], dim=1), whole_bto, rtol=0, atol=1e-10)
    _, longer = model(tokens_bt[1:, :9])
    mixed = join_rows([take_rows(state, 0, 1), longer])
    following_bt = torch.stack([tokens_bt[0, 5:9], tokens_bt[1, 9:13]])
    found_bto, _ = model(following_bt, mixed)
    torch.testing.assert_close(found_bto[0], whole_bto[0, 5:9], rtol=0, atol=1e-10)
    torch.testing.assert_close(found_bto[1], whole_bto[1, 9:13], rtol=0, atol=1e-10)


@every_seed
def test_documents_in_one_sequence_know_nothing_of_each_other(seed: str) -> None:
    model, _ = grown("preset-default", seed)
    tokens_bt = zoo.ids(2)
    mask_bt = torch.zeros(2, zoo.N_TIME, dtype=torch.bool)
    mask_bt[:, 6] = True
    said_bto, _ = model(tokens_bt, None, mask_bt)
    alone_bto, _ = model(tokens_bt[:, 6:])
    torch.testing.assert_close(said_bto[:, 6:], alone_bto, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["preset-default", "preset-titans-mac", "lm-levels-pooled"])
def test_seeds_inside_a_block_and_around_it_keep_apart(name: str) -> None:
    """Slots at a mixer, at the whole block, and inside its feed-forward: each carries its own state."""
    model = grow.attach(host(name), ["blocks.1", "blocks.1.mixer"], width=12)
    for slot, blueprint in (("blocks.1", "conv"), ("blocks.1.mixer", "memory")):
        made = grow.graft(model, slot, blueprint, **SEEDS[blueprint][1])
        with torch.no_grad():
            made.layer.get_submodule("out" if blueprint == "conv" else "layer.out").weight.add_(0.2)
    tokens_bt = zoo.ids(2)
    mask_bt = torch.zeros(2, zoo.N_TIME, dtype=torch.bool)
    mask_bt[:, 6] = True
    whole_bto, _ = model(tokens_bt, None, mask_bt)
    first_bto, state = model(tokens_bt[:, :6])
    assert {"slot_blocks", "slot_mixer"} <= state["layer"]["1"].keys()
    then_bto, _ = model(tokens_bt[:, 6:])
    torch.testing.assert_close(torch.cat([first_bto, then_bto], dim=1), whole_bto, rtol=0, atol=1e-10)
    on_bto, _ = model(tokens_bt[:, 6:], state)
    torch.testing.assert_close(on_bto, model(tokens_bt)[0][:, 6:], rtol=0, atol=1e-10)
    assert not torch.allclose(on_bto, then_bto, atol=1e-4)


def test_a_frozen_reader_does_not_write_the_memory_of_a_seed() -> None:
    model, _ = grown("preset-default", "memory")
    _, state = model(zoo.ids(2))
    memory = state["layer"]["1"]["slot_blocks"]["memory"]
    _, after = frozen(model)(zoo.ids(2, random_seed=8), state)
    kept = after["layer"]["1"]["slot_blocks"]["memory"]
    assert all(torch.equal(kept[key], x) for key, x in memory.items() if isinstance(x, torch.Tensor))
    _, written = model(zoo.ids(2, random_seed=8), state)
    assert not torch.equal(written["layer"]["1"]["slot_blocks"]["memory"]["matrix_bhkv"], memory["matrix_bhkv"])


@every_seed
def test_a_ramp_goes_on_where_it_was_saved(seed: str) -> None:
    model, made = grown("foreign", seed)
    place = PLACES["foreign"]
    grow.set_blend(model, place, 0.0)
    grow.set_blend(model, place, 0.7, steps=9)
    for _ in range(4):
        grow.advance(model)
    again = grow.replay(host("foreign"), grow.to_json(model))
    again.load_state_dict(model.state_dict())
    for _ in range(7):
        assert grow.advance(again) == grow.advance(model)
        assert torch.equal(logits(again, zoo.ids(1)), logits(model, zoo.ids(1)))
    assert float(made.blend_weight) == float(torch.tensor(0.7)) and made.way.is_done


@every_seed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_seed_follows_its_host_to_another_dtype(seed: str, dtype: torch.dtype) -> None:
    """It is born in the dtype of the host and adds nothing there; its blend weight stays in float32."""
    model = grow.attach(host("foreign", dtype), PLACES["foreign"])
    wanted = logits(model, zoo.ids(2))
    blueprint, settings = SEEDS[seed]
    made = grow.graft(model, PLACES["foreign"], blueprint, **settings)
    assert torch.equal(logits(model, zoo.ids(2)), wanted)
    model.to(torch.bfloat16)
    grow.set_blend(model, PLACES["foreign"], 0.3)
    assert made.blend_weight.dtype == made.course.dtype == torch.float32 and made.way.weight == pytest.approx(0.3)
    assert logits(model, zoo.ids(2)).dtype == torch.bfloat16


@every_seed
def test_a_seed_is_drawn_from_its_name_and_disturbs_no_other_draw(seed: str) -> None:
    torch.manual_seed(1)
    one, _ = grown("foreign", seed, is_moved=False)
    drawn = torch.rand(3)
    torch.manual_seed(1)
    model = grow.attach(host("foreign"), PLACES["foreign"])
    assert torch.equal(torch.rand(3), drawn)
    blueprint, settings = SEEDS[seed]
    grow.graft(model, PLACES["foreign"], blueprint, random_seed=1, **settings)
    same = bits(model) == bits(one)
    assert same == (blueprint == "norm")


D, READ, M, K = 12, 20, 5, 3
COSTS = {
    "low_rank": ({"rank": M}, M * (READ + D), 2 * M * (READ + D)),
    "norm": ({}, D, 0),
    "bottleneck": ({"hidden": M}, 2 * D * M + 2 * D + M, 4 * D * M),
    "gated_feedforward": ({"hidden": M}, 3 * D * M + D, 6 * D * M),
    "conv": ({"kernel": K}, D * D + D * K + D, 2 * D * D + 2 * D * K),
}


@pytest.mark.parametrize("blueprint", grow.blueprints.names())
def test_the_cost_is_that_of_the_formula_and_of_the_seed(blueprint: str) -> None:
    settings, n_parameters, flops = COSTS.get(blueprint, (SEEDS[blueprint][1], None, None))
    found = grow.cost(blueprint, (READ, D) if blueprint == "low_rank" else D, **settings)
    model = grow.attach(nn.Sequential(nn.Linear(READ if blueprint == "low_rank" else D, D)), "0", reads="input")
    made = grow.graft(model, "0", blueprint, **settings)
    held = [*made.parameters(), *made.buffers()]
    assert found.n_parameters == sum(x.numel() for x in made.parameters())
    assert found.size_bytes == sum(x.numel() * x.element_size() for x in held)
    assert (found.state_bytes > 0) == made.has_state
    if n_parameters is not None:
        assert (found.n_parameters, found.flops_per_token) == (n_parameters, flops)
    else:
        assert found.flops_per_token > found.n_parameters


@pytest.mark.compiled
def test_the_blend_weight_compiles_nothing_anew() -> None:
    """Ten values of it are one graph; switching the seed off is a second, and what is compiled follows a removal."""
    from torch._dynamo.testing import CompileCounter

    model, _ = grown("foreign", "bottleneck")
    counter, tokens_bt = CompileCounter(), zoo.ids(2)
    compiled = torch.compile(model, backend=counter)
    for weight in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1):
        grow.set_blend(model, PLACES["foreign"], weight)
        torch.testing.assert_close(logits(compiled, tokens_bt), logits(model, tokens_bt), rtol=0, atol=1e-12)
    assert counter.frame_count == 1
    grow.set_blend(model, PLACES["foreign"], 0.0)
    logits(compiled, tokens_bt)
    assert counter.frame_count == 2
    grow.remove(model, PLACES["foreign"])
    torch.testing.assert_close(logits(compiled, tokens_bt), logits(host("foreign"), tokens_bt), rtol=0, atol=1e-12)
