"""The three reference models: their sizes, positions, windows and first weights."""

import math

import pytest
import torch
import torch.nn.functional as F

from meristem.errors import ShapeError
from meristem.models.build import build
from meristem.models.char import sinusoids
from meristem.models.config import ModelConfig
from meristem.nn.config import MemoryConfig
from zoo import SMALL, grown, ids


@pytest.mark.parametrize(
    "settings, n_parameters",
    [
        ({"name": "charformer"}, 858_880),
        ({"name": "charformer", "order": "pre"}, 859_136),
        ({"name": "charrnn"}, 197_888),
        ({"name": "chargru"}, 462_080),
        (
            {"name": "charformer", "order": "pre", "positions": "learned", "dim": 768, "n_heads": 12, "n_layers": 12},
            85_646_080,
        ),
    ],
)
def test_reference_sizes_have_their_number_of_parameters(settings, n_parameters):
    with torch.device("meta"):
        model = build(ModelConfig(**settings), MemoryConfig(), 256, random_seed=0)
    assert sum(parameter.numel() for parameter in model.parameters()) == n_parameters


def test_sinusoids_are_those_of_the_formula():
    position_td = sinusoids(7, 6)
    for position in range(7):
        for pair in range(3):
            angle = position * 10_000 ** (-2 * pair / 6)
            assert position_td[position, 2 * pair] == pytest.approx(math.sin(angle), abs=1e-6)
            assert position_td[position, 2 * pair + 1] == pytest.approx(math.cos(angle), abs=1e-6)


def test_charformer_is_the_transformer_of_its_equations():
    """The whole model once more, with torch's own encoder layer, which normalises after each branch as well."""
    model = grown("preset-charformer")
    tokens_bt = ids(3, 11)
    width, hidden = SMALL["dim"], SMALL["mlp_dim"]
    hidden_btd = model.embedding(tokens_bt) + sinusoids(11, width)
    mask_ts = torch.nn.Transformer.generate_square_subsequent_mask(11, dtype=torch.float64)
    for block in model.blocks:
        layer = torch.nn.TransformerEncoderLayer(width, SMALL["n_heads"], hidden, dropout=0, batch_first=True).double()
        names = {
            "self_attn.in_proj_": "mixer.qkv.",
            "self_attn.out_proj.": "mixer.out.",
            "linear1.": "mlp.up.",
            "linear2.": "mlp.out.",
            "norm1.": "mixer_norm.",
            "norm2.": "mlp_norm.",
        }
        ours = dict(block.named_parameters())
        layer.load_state_dict(
            {there + kind: ours[here + kind] for there, here in names.items() for kind in ("weight", "bias")}
        )
        hidden_btd = layer(hidden_btd, src_mask=mask_ts, is_causal=True)
    torch.testing.assert_close(model(tokens_bt)[0], model.head(hidden_btd), rtol=0, atol=1e-10)


def test_a_whole_window_is_read_and_one_more_token_refused():
    model = grown("preset-charformer")
    assert model(ids(2, 23))[0].shape == (2, 23, 29)
    with pytest.raises(
        ShapeError, match="24 tokens were given at once.*at most 23.*larger model.max_seq_len"
    ) as caught:
        model(ids(2, 24))
    assert caught.value.fields == {"found": 24, "expected": 23}


@pytest.mark.parametrize("n_next, n_kept", [(1, 11), (12, 11), (13, 10), (23, 0)])
def test_past_the_window_the_last_part_of_the_text_is_kept(n_next, n_kept):
    """Of a full window of 23 the last half stays, or what the next call leaves room for, as if read afresh."""
    model, tokens_bt = grown("preset-charformer"), ids(2, 23 + n_next)
    _, state = model(tokens_bt[:, :23])
    logits_bto, state = model(tokens_bt[:, 23:], state)
    fresh_bto, fresh = model(tokens_bt[:, 23 - n_kept :])
    torch.testing.assert_close(logits_bto, fresh_bto[:, n_kept:], rtol=0, atol=1e-10)
    torch.testing.assert_close(state, fresh, rtol=0, atol=1e-10)


def test_a_long_text_can_be_read_token_by_token_in_bounded_state():
    model, state = grown("preset-charformer"), None
    for token_b in ids(1, 67).unbind(1):
        logits_bto, state = model(token_b[:, None], state)
        assert state["tokens_bt"].shape[1] <= 23
    assert logits_bto.isfinite().all()


def test_unscaled_weights_start_far_from_a_uniform_guess():
    """The baseline of a lesson: about 26 nats, where the default starts at 5.7."""
    first_losses = {}
    for init in ("default", "unscaled"):
        model = build(ModelConfig(name="charformer", init=init), MemoryConfig(), 256, random_seed=3)
        tokens_bt = torch.randint(256, (4, 129), generator=torch.Generator().manual_seed(7))
        with torch.no_grad():
            logits_bto, _ = model(tokens_bt[:, :-1])
        first_losses[init] = float(F.cross_entropy(logits_bto.flatten(0, 1), tokens_bt[:, 1:].flatten()))
    assert first_losses["default"] < 6 < 20 < first_losses["unscaled"]
