"""The doors of the native decoder: what does not fit is refused before the core is called."""

import copy
import threading

import pytest
import torch

import zoo
from meristem.errors import ShapeError, WrongValue
from meristem.memory.state import flatten
from meristem.models.decoding import Decoding
from meristem.native import decoding as native
from meristem.native.library import core

pytestmark = pytest.mark.skipif(core().library is None, reason=f"the native core is not there: {core().said}")


def parts(width=12, dtype=torch.float32):
    """A model of one layer of attention, as the decoder takes it."""
    f = 7
    sizes = {"mixer_norm": (width,), "mlp_norm": (width,), "attention": (3 * width, width)}
    sizes |= {"attention_out": (width, width), "up": (2 * f, width), "down": (width, f)}
    layer = native.LayerShape(mixer=native.ATTENTION, hidden=f, attention_heads=2, span=5, is_rotated=1)
    weights = {name: torch.randn(size, dtype=dtype) for name, size in sizes.items()}
    ends = {"embedding": torch.randn(11, width, dtype=dtype), "norm": torch.ones(width, dtype=dtype)}
    return native.ModelShape(width, 11, 1, 1e-6), layer, weights, ends | {"head": ends["embedding"]}


def decoder(shape, layer, weights, ends):
    return native.Decoder(core().library, shape, [(layer, weights)], ends)


@pytest.mark.parametrize(
    "name, change, said",
    [
        ("up", lambda x: x[:-1], r"up: \(13, 12\), expected \(14, 12\)"),
        ("attention", lambda x: x.double(), "do not fit the model that they are of .* attention"),
        ("down", None, r"down: None, expected \(12, 7\)"),
        ("memory", lambda x: torch.zeros(3), r"memory: \(3,\), expected None"),
    ],
)
def test_weights_that_do_not_fit_are_refused(name, change, said):
    shape, layer, weights, ends = parts()
    wrong = weights.pop(name, None)
    if change is not None:
        weights[name] = change(wrong)
    with pytest.raises(ShapeError, match=said):
        decoder(shape, layer, weights, ends)


def test_half_precision_is_refused():
    with pytest.raises(ShapeError, match="the core takes float32 or float64"):
        decoder(*parts(dtype=torch.bfloat16))


@pytest.mark.parametrize("change", ["size", "dtype", "gaps"])
def test_a_block_that_is_not_of_the_decoder_is_refused(change):
    made = decoder(*parts())
    block_n = made.blocks(1)[0]
    wrong = {"size": block_n[:-1], "dtype": block_n.double(), "gaps": torch.zeros(2 * len(block_n))[::2]}[change]
    with pytest.raises(ShapeError, match=f"this decoder takes {made.block_size} of torch.float32 side by side"):
        native.Readers(made, [wrong], [0])


def test_a_token_for_each_reader_is_needed():
    made = decoder(*parts())
    with pytest.raises(ShapeError, match="2 tokens were given for 1 readers"):
        native.Readers(made, [made.blocks(1)[0]], [0]).step([1, 2])


@pytest.mark.parametrize("name", ["preset-titans-mag", "preset-hope", "preset-attention"])
@pytest.mark.parametrize("n_rows", [1, 8, 17, 30])
def test_readers_share_threads(name, n_rows):
    """However many there are, predictions, hidden vectors and states have the same bits; a token that is none of the
    vocabulary is refused before any row was read."""
    model = zoo.grown(name, torch.float32)
    with torch.no_grad():
        _, state = model(zoo.ids(n_rows, 6))
    found = []
    try:
        for n_threads in (1, 2, 3, 7):
            native.share_readers(n_threads)
            rows = Decoding(model, state)
            logits = [rows.step(each) for each in zoo.ids(n_rows, 9).T.tolist()]
            hidden_bd = rows._rows.readers.hidden([1] * n_rows, is_mlp_left=False)
            with pytest.raises(WrongValue, match="the vocabulary of this model holds 0 to"):
                rows.step([1] * (n_rows - 1) + [zoo.VOCABULARY])
            found.append({"logits": torch.stack(logits), "hidden": hidden_bd} | flatten(rows.state))
    finally:
        native.share_readers(None)
    for each in found[1:]:
        for key, leaf in found[0].items():
            assert torch.equal(each[key], leaf) if isinstance(leaf, torch.Tensor) else each[key] == leaf


def test_threads_read_with_one_decoder():
    """Four threads, each with readers of its own, read what each reads alone."""
    model = zoo.grown("preset-titans-mag", torch.float32)
    with torch.no_grad():
        _, state = model(zoo.ids(2, 6))
    alone, tokens = Decoding(model, state), zoo.ids(2, 300).T.tolist()
    true = [alone.step(each) for each in tokens]
    rows, wrong = [Decoding(model, copy.deepcopy(state)) for _ in range(4)], []

    def read(each):
        found = [each.step(token_ids) for token_ids in tokens]
        wrong.extend(at for at in range(len(tokens)) if not torch.equal(found[at], true[at]))

    threads = [threading.Thread(target=read, args=(each,)) for each in rows]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
