"""From settings to a model, and what is refused on the way."""

import inspect
from functools import partial
from itertools import chain

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from meristem.errors import ConflictingKeys, DeadKey, ShapeError, WrongValue
from meristem.models.build import build, drawn
from meristem.models.config import READS, ModelConfig
from meristem.models.init import seeded
from meristem.models.lm import mixers
from meristem.nn.config import MemoryConfig
from zoo import SMALL_MEMORY, VOCABULARY, ZOO, grown, ids


def test_an_unknown_model_is_answered_with_the_nearest():
    """CX-2.1."""
    with pytest.raises(WrongValue, match="no model is called 'charfomer'. Nearest: charformer"):
        build(ModelConfig(name="charfomer"), MemoryConfig(), 29, random_seed=0)


def test_an_unknown_mixer_is_answered_with_the_nearest():
    with pytest.raises(WrongValue, match="no mixer is called 'atention'. Nearest: attention"):
        build(ModelConfig(mixer="atention"), MemoryConfig(), 29, random_seed=0)


@pytest.mark.parametrize(
    "settings, key",
    [
        ({"name": "charrnn", "n_heads": 2}, "n_heads"),
        ({"name": "charformer", "sliding_window": 7}, "sliding_window"),
        ({"name": "lm", "max_seq_len": 7}, "max_seq_len"),
        ({"mixer": "memory", "n_persistent_tokens": 3}, "n_persistent_tokens"),
        ({"mixer": "mac", "sliding_window": 7}, "sliding_window"),
        ({"layers": [{"mixer": "memory"}, {"mixer": "attention"}], "combine": "additive"}, "combine"),
    ],
)
def test_a_key_that_the_model_does_not_read_is_refused(settings, key):
    with pytest.raises(DeadKey, match=f"model.{key} is .* does not read it; .* reads .*Remove the key") as caught:
        ModelConfig(**settings)
    assert caught.value.fields["path"] == f"model.{key}"


@pytest.mark.parametrize("name", ZOO)
def test_settings_survive_being_written_out(name):
    """All keys are written, those at their default too; reading them back is no dead key."""
    model, memory = ZOO[name]
    assert ModelConfig.model_validate(model.model_dump(mode="json")) == model
    assert MemoryConfig.model_validate(memory.model_dump(mode="json")) == memory


def test_every_key_is_read_by_some_model_and_every_entry_names_keys():
    """CX-2.1."""
    keys = set(ModelConfig.model_fields) - {"name"}
    assert set().union(*READS.values()) == keys


CHANGES = {
    "dim": 24,
    "n_layers": 3,
    "n_heads": 3,
    "mlp_dim": 19,
    "mlp": "gelu",
    "mixer": "attention",
    "sliding_window": 4,
    "rope": False,
    "n_persistent_tokens": 2,
    "tied": True,
    "max_seq_len": 29,
    "order": "pre",
    "positions": "learned",
    "init": "unscaled",
    "combine": "additive",
    "segment": 5,
    "is_residual": False,
    "layers": [{"mixer": "attention"}],
    "aggregate": "sum",
    "levels": {"count": 3},
}
READ_BY = {"segment": {"mixer": "mac"}, "is_residual": {"mixer": "mal"}, "levels": {"mlp": "levels"}}
"""The choice that reads a key, where the default one does not."""


CONSTRAINS = {"pattern"}
"""Keys that change nothing and refuse: tests/models/test_layers.py."""


@pytest.mark.parametrize(
    "name, key", [(name, key) for name, keys in READS.items() for key in sorted(keys - CONSTRAINS)]
)
def test_every_key_changes_the_model_that_reads_it(name, key):
    """Its output, its weights, or the longest text it takes."""

    def described(settings):
        small = {"dim": 12, "n_heads": 2, "n_layers": 2} if name in ("lm", "charformer") else {"dim": 12, "n_layers": 2}
        if key in READ_BY:
            small |= READ_BY[key]
        model = build(ModelConfig(**{"name": name} | small | settings), MemoryConfig(**SMALL_MEMORY), 29, random_seed=3)
        with torch.no_grad():
            logits_bto, _ = model(ids(2, 100 if name == "lm" else 13))
        return model.window, round(float(logits_bto.double().sum()), 3)

    assert described({}) != described({key: CHANGES[key]})


@pytest.mark.parametrize("settings", [{"dim": 12, "n_heads": 5}, {"name": "charformer", "dim": 12, "n_heads": 5}])
def test_heads_that_do_not_divide_the_width_are_refused(settings):
    with pytest.raises(ConflictingKeys, match="model.dim 12 does not divide into 5 heads. Set model.n_heads"):
        ModelConfig(**settings)


def test_rotary_positions_need_an_even_key_width():
    with pytest.raises(ConflictingKeys, match="key width of 3, and rotary positions rotate channels in pairs"):
        ModelConfig(dim=12, n_heads=4)
    assert not ModelConfig(dim=12, n_heads=4, rope=False).rope


@pytest.mark.parametrize(
    "settings", [{"dim": 0}, {"n_layers": 0}, {"sliding_window": 0}, {"order": "middle"}, {"depth": 3}]
)
def test_values_out_of_range_are_refused(settings):
    with pytest.raises(ValidationError):
        ModelConfig(**settings)


@pytest.mark.parametrize("name", ["preset-titans-mag", "preset-charformer", "preset-chargru"])
@pytest.mark.parametrize(
    "tokens, message",
    [
        (torch.zeros(7, dtype=torch.int64), r"shape \(7,\); a model reads \(batch, time\).*tokens\[None\]"),
        (torch.zeros(2, 0, dtype=torch.int64), r"shape \(2, 0\)"),
        (torch.zeros(2, 3), "tokens are torch.float32; ids are integers"),
        (torch.zeros(2, 3, dtype=torch.bool), "tokens are torch.bool; ids are integers"),
    ],
)
def test_what_is_no_batch_of_ids_is_refused_at_the_door(name, tokens, message):
    model = grown(name)
    door = inspect.unwrap(type(model).forward)  # without the shape checks of the test run, which would come first
    with pytest.raises(ShapeError, match=message):
        door(model, tokens)


def test_a_mixer_can_be_registered():
    """A plugin's mixer takes its place in the stack like ours."""

    class Past(torch.nn.Module):
        def __init__(self, width):
            super().__init__()
            self.out = torch.nn.Linear(width, width)

        def forward(self, hidden_btd, state):
            return self.out(hidden_btd.cumsum(1)), {"nothing_b": hidden_btd[:, 0, 0]}

    mixers.register("past", lambda model, memory: Past(model.dim))
    try:
        model = build(ModelConfig(mixer="past", dim=12, n_heads=2), MemoryConfig(), 29, random_seed=0)
        assert model(ids(2, 7))[0].shape == (2, 7, 29)
    finally:
        del mixers._entries["past"]


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(chain(model.named_parameters(), model.named_buffers()))


@pytest.mark.parametrize("name", ZOO)
def test_a_model_is_drawn_block_by_block(name):
    """To the bit as it is built at once, buffers too that are not saved; nothing twice, and no block with another."""
    make = partial(build, *ZOO[name], VOCABULARY, random_seed=3)
    model = make()
    whole, n_blocks = tensors(model), len(getattr(model, "blocks", ()))
    found = list(drawn(make, n_blocks))
    assert len(found) == len(whole) and all(torch.equal(tensor, whole[name]) for name, tensor in found)
    blocks = [name.split(".")[1] for name, _ in found if name.startswith("blocks.")]
    assert blocks == sorted(blocks, key=int) and len(set(blocks)) == n_blocks


def test_random_maps_and_foreign_models_are_drawn_too():
    """What draws under numbers of its own, or past all named streams, is still drawn once and whole."""
    memory = MemoryConfig(rule="delta", head_dim=8, features="fourier(n_features=12)")
    mapped = partial(build, ModelConfig(dim=16, n_layers=2, mixer="memory"), memory, VOCABULARY, random_seed=3)

    def foreign() -> nn.Module:
        torch.manual_seed(5)
        model = nn.Module()
        model.blocks = nn.ModuleList([nn.Linear(2, 3)])
        with seeded(3, "pairs", 0, 1):
            model.pair = nn.Linear(3, 2)
        return model

    for make, n_blocks in ((mapped, 2), (foreign, 1)):
        whole, found = tensors(make()), dict(drawn(make, n_blocks))
        assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)
