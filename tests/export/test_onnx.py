"""The ONNX file reads as the model does, whatever is read at once, and a state goes from torch to it and back."""

import functools

import pytest
import torch

import zoo
from edges import made, save_checkpoint
from meristem.cli import run
from meristem.errors import CheckpointMismatch, WrongValue
from meristem.events import silent
from meristem.export import onnx as graphs
from meristem.memory.state import flatten
from meristem.models.load import load
from meristem.models.shipped import DIRECTORY

pytestmark = [pytest.mark.extras, pytest.mark.timeout(600)]
MODELS = ("mag-gated_delta", "mag-additive", "attention", "mal", "mag-persistent", "memory-titans", "before", "one-key")
"""The gated delta rule and the one with momentum, beside attention and below it; attention alone; memory alone, from a
start that is learned; a window of one key."""
CHUNK = 3
LENGTHS = (1, 2, CHUNK - 1, CHUNK + 1, 41)
BOUND = 1e-4


@functools.cache
def graph_of(name: str) -> tuple[torch.nn.Module, graphs.Graph]:
    pytest.importorskip("onnxruntime")
    model = made(name).requires_grad_(False)
    content = graphs.graph_of(model).SerializeToString()
    return model, graphs.Graph(content, graphs.leaf_shapes(model))


@pytest.mark.parametrize("name", MODELS)
def test_a4_any_length_and_batch_is_read_as_in_torch(name):
    """At once and token by token, and in pieces of all lengths."""
    model, graph = graph_of(name)
    for batch in (1, 3):
        tokens_bt = zoo.ids(batch, sum(LENGTHS))
        with torch.no_grad():
            true_bto, _ = model(tokens_bt)
        for sizes in ([sum(LENGTHS)], LENGTHS, [1] * 12 + [sum(LENGTHS) - 12]):
            given, parts = graph.fresh(batch), []
            for part_bt in tokens_bt.split(list(sizes), dim=1):
                part_bto, given = graph.read(part_bt, given)
                parts.append(part_bto)
            torch.testing.assert_close(torch.cat(parts, dim=1), true_bto, rtol=0, atol=BOUND)


@pytest.mark.parametrize("name", MODELS)
def test_a4_a_state_of_torch_goes_on_and_comes_back(name):
    """Before and after windows are full: the next predictions, and the state that is left."""
    model, graph = graph_of(name)
    for n_read in (1, 2, 9):
        tokens_bt, more_bt, last_bt = zoo.ids(2, 21).split([n_read, 6, 15 - n_read], dim=1)
        with torch.no_grad():
            _, state = model(tokens_bt)
            true_bto, after = model(more_bt, state)
            last_bto, _ = model(last_bt, after)
        found_bto, given = graph.read(more_bt, graph.inputs_of(state, n_read))
        torch.testing.assert_close(found_bto, true_bto, rtol=0, atol=BOUND)
        back = graph.state_of(given)
        found, true = flatten(back), flatten(after)
        assert {leaf: x.shape for leaf, x in found.items()} == {leaf: x.shape for leaf, x in true.items()}
        for leaf, tensor in found.items():
            torch.testing.assert_close(tensor, true[leaf], rtol=0, atol=BOUND)
        with torch.no_grad():
            torch.testing.assert_close(model(last_bt, back)[0], last_bto, rtol=0, atol=BOUND)


def test_a_row_that_has_read_nothing_begins_afresh():
    """Whatever its state holds, and whatever the rows beside it have read."""
    model, graph = graph_of("memory-titans")
    tokens_bt = zoo.ids(2, 7)
    _, given = graph.read(tokens_bt, graph.fresh(2))
    given[graphs.READ][1] = 0
    found_bto, _ = graph.read(tokens_bt, given)
    with torch.no_grad():
        _, state = model(tokens_bt)
        fresh_bto, _ = model(tokens_bt)
        later_bto, _ = model(tokens_bt, state)
    torch.testing.assert_close(found_bto[0], later_bto[0], rtol=0, atol=BOUND)
    torch.testing.assert_close(found_bto[1], fresh_bto[1], rtol=0, atol=BOUND)


def test_the_model_in_the_box_is_compared_before_it_is_written(tmp_path, capsys):
    """By the command, which says by how much it differs; a second file is not written over the first."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    assert run(["export", "onnx", "--to", str(tmp_path / "model.onnx"), "--json"]) == 0
    assert '"differs_by":' in capsys.readouterr().out
    described = onnx.load(tmp_path / "model.onnx")
    assert {each.key for each in described.metadata_props} == {"meristem", "model", "tokenizer"}
    assert {each.name for each in described.graph.input} >= {"tokens_bt", "n_read_b", "layer.0.attention.keys_bshk"}
    assert run(["export", "onnx", "--to", str(tmp_path / "model.onnx")]) != 0


def test_a_graph_that_computes_something_else_is_not_written(tmp_path, monkeypatch):
    """The graph of other weights in the place of the model's: the check finds it, and says so."""
    pytest.importorskip("onnxruntime")
    other = load().model.requires_grad_(False)
    other.blocks[1].mlp.out.weight.mul_(1.01)
    graph = graphs.graph_of(other)
    monkeypatch.setattr(graphs, "graph_of", lambda model: graph)
    with pytest.raises(CheckpointMismatch, match=r"its logits differ by \S+ from those of the checkpoint"):
        graphs.export(DIRECTORY, tmp_path / "model.onnx", emit=silent)
    assert not (tmp_path / "model.onnx").exists()


def test_a_model_without_a_step_of_tensor_code_is_refused(tmp_path):
    pytest.importorskip("onnxruntime")
    save_checkpoint(tmp_path, "lm-mac-4-each")
    with pytest.raises(WrongValue, match="cannot be exported as ONNX: .* Use it with meristem"):
        graphs.export(tmp_path, tmp_path / "model.onnx", emit=silent)
    assert not (tmp_path / "model.onnx").exists()
