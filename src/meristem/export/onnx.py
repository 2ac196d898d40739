"""One ONNX file that reads tokens of any number and any batch, with its state in and out, for other runtimes.

A step of one token is exported from the tensor code of the model (inner updates are written out in it, as
``nn.decode`` has them), and stands as the body of a ``Scan`` over the tokens of a call. Its weights are in the file.

Inputs: ``tokens_bt`` int64; ``n_read_b`` int64, how many tokens each row has read before; and the state, each leaf by
its name in ``memory.state``. Outputs: ``logits_bto``, the prediction after every token, and under ``next.`` what comes
in with the next call. A row with ``n_read_b`` 0 begins afresh, whatever its state is.

Unlike in torch, keys and values of attention are always ``span - 1`` long: those of fewer tokens stand at the end.
"""

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from meristem import __version__, extras
from meristem.checkpoint.atomic import disk_full, write_atomic
from meristem.checkpoint.store import find
from meristem.device.random import stream
from meristem.errors import CheckpointMismatch, WrongValue
from meristem.events import Emit
from meristem.export.hf import require_new
from meristem.memory.kernels.select import force_reference
from meristem.memory.state import State, as_tensors, from_tensors, unflatten
from meristem.models.decoding import Decoding
from meristem.models.packed import NotTaken, parts_of
from meristem.models.weights import sharing_weights
from meristem.nn.attention import Attention, apply_rope, rope_angles
from meristem.runs.open import load_opened
from meristem.serve.moment import identity
from meristem.shapes import Hidden, Logits, Mixed

OPSET: Final = 18
READ, NEXT, INSIDE, AFTER, BEGIN = "n_read_b", "next.", "in.", "after.", "begin."
"""The count of tokens; and what names begin with: of outputs that go on, of what the body of the loop is given and
gives, and of initial values."""

WINDOWS: Final = ("keys_bshk", "values_bshv")
LENGTHS: Final = (1, 2, 63, 65, 777)
STEPPED: Final = 65
BATCHES: Final = (1, 3)
HALF: Final = 250
"""What is compared with torch when a model is exported: lengths of a text, up to which of them it is also read token by
token, rows, and greedy tokens with which a state of torch goes on in the graph, and that state then in both."""

BOUND: Final = 1e-4
"""By which a logit may differ from that of torch, of the largest."""

Shapes = Mapping[str, tuple[int, ...]]


class Exported(NamedTuple):
    """What was written. n_state: leaves of the state. differs_by: the most that a logit differed from torch's, of the
    largest."""

    path: Path
    size_bytes: int
    n_state: int
    differs_by: float


class Window(nn.Module):
    """Attention of one token to a window of fixed length, as ``Attention`` has it.

    State: the last ``span - 1`` keys and values, those of fewer tokens at the end, and ``n_read_b``.
    """

    cos_shk: Tensor
    sin_shk: Tensor

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention, self.out = attention, attention.out
        self.span, width = int(attention.span or 0), attention.out.in_features // attention.heads
        like_bshk = attention.qkv.weight.new_zeros(1, self.span, 1, width)
        cos_shk, sin_shk = rope_angles(like_bshk)
        self.register_buffer("cos_shk", cos_shk.clone())
        self.register_buffer("sin_shk", sin_shk.clone())
        self.n_pinned = 0 if attention.persistent_gd is None else len(attention.persistent_gd)
        if attention.persistent_gd is not None:
            _, keys_bghk, values_bghv = attention.project(attention.persistent_gd[None])
            self.register_buffer("pinned_keys_ghk", keys_bghk[0].clone())
            self.register_buffer("pinned_values_ghv", values_bghv[0].clone())

    def forward(self, hidden_btd: Hidden, state: State) -> tuple[Hidden, State]:
        """The branch of a layer without a memory, or above one."""
        mixed_btf, state = self.mix(hidden_btd, state)
        return self.out(mixed_btf), state

    def mix(self, hidden_btd: Hidden, state: State) -> tuple[Mixed, State]:
        """What the heads gathered for the one token."""
        query_bthk, key_bthk, value_bthv = self.attention.project(hidden_btd)
        query_bthk = query_bthk / query_bthk.shape[-1] ** 0.5
        keys_bshk = torch.cat([state["keys_bshk"], key_bthk], dim=1)
        values_bshv = torch.cat([state["values_bshv"], value_bthv], dim=1)
        after = {"keys_bshk": keys_bshk[:, 1:], "values_bshv": values_bshv[:, 1:]}
        still_bhk, seen_bhk, seen_bshk = query_bthk[:, 0], query_bthk[:, 0], keys_bshk
        if self.attention.rope:
            cos_shk, sin_shk = self.cos_shk, self.sin_shk
            seen_bhk = apply_rope(query_bthk, (cos_shk[self.span - 1 :], sin_shk[self.span - 1 :]))[:, 0]
            seen_bshk = apply_rope(keys_bshk, (cos_shk, sin_shk))
        score_bhs = torch.einsum("bhk,bshk->bhs", seen_bhk, seen_bshk)
        place_s = torch.arange(self.span, device=score_bhs.device)
        is_held_bs = place_s >= self.span - 1 - state["n_read_b"][:, None]
        score_bhs = torch.where(is_held_bs[:, None], score_bhs, torch.finfo(score_bhs.dtype).min)
        if self.n_pinned:
            pinned_bhg = torch.einsum("bhk,ghk->bhg", still_bhk, self.pinned_keys_ghk)
            share_bhs = torch.cat([pinned_bhg, score_bhs], dim=-1).softmax(-1)
            mixed_bhv = torch.einsum("bhg,ghv->bhv", share_bhs[..., : self.n_pinned], self.pinned_values_ghv)
            mixed_bhv = mixed_bhv + torch.einsum("bhs,bshv->bhv", share_bhs[..., self.n_pinned :], values_bshv)
        else:
            mixed_bhv = torch.einsum("bhs,bshv->bhv", score_bhs.softmax(-1), values_bshv)
        return mixed_bhv.flatten(1)[:, None], after


class Step(nn.Module):
    """One token of every row: ``(tokens_b, n_read_b, *state) -> (*state, logits_bo)``, leaves in the order of names."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.reader, self.names = sharing_weights(model), tuple(names)
        for module in list(self.reader.modules()):
            for name, inner in list(module.named_children()):
                if isinstance(inner, Attention):
                    setattr(module, name, Window(inner))

    def forward(self, tokens_b: Tensor, n_read_b: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        """See above."""
        flat: dict[str, Tensor | int] = dict(zip(self.names, leaves, strict=True))
        flat |= {name.replace("keys_bshk", "n_read_b"): n_read_b for name in self.names if name.endswith("keys_bshk")}
        logits_bto, after = self.reader(tokens_b[:, None], unflatten(flat))
        found = as_tensors(after)
        return *(found[name] for name in self.names), logits_bto[:, 0]


def export(source: Path, to: Path, *, emit: Emit) -> Exported:
    """Write the model of a checkpoint, or of the newest of a run, as one new ONNX file, after comparing it with torch.

    Raises MissingExtra without the extra onnx, WrongValue for a model of which there is no step of tensor code or that
    is too large for one file, and CheckpointMismatch where the graph computes something else; nothing is written then.
    """
    require_new(to)
    for library in ("onnx", "onnxscript", "onnxruntime"):
        extras.require(library, "export onnx")
    checkpoint = find(source, emit)
    model, tokenizer = load_opened(checkpoint)
    model.float().requires_grad_(False)
    try:
        graph = graph_of(model)
    except NotTaken as reason:
        raise WrongValue(
            f"the model of {checkpoint.path} cannot be exported as ONNX: {reason}. Use it with meristem, or write it "
            f"with `meristem export hf`.",
            value=str(checkpoint.path),
        ) from reason
    own = {"meristem": __version__, **identity(model, tokenizer)._asdict()}
    for key, value in own.items():
        graph.metadata_props.add(key=key, value=value)
    if graph.ByteSize() >= 1 << 31:
        raise WrongValue(
            f"the graph has {graph.ByteSize()} bytes, and an ONNX file has at most 2 GiB. Export a smaller model.",
            value=graph.ByteSize(),
        )
    content: bytes = graph.SerializeToString()
    differs_by = compare(model, content)
    if not differs_by <= BOUND:
        raise CheckpointMismatch(
            f"{to} was not written: run by onnxruntime, its logits differ by {differs_by:g} from those of the "
            f"checkpoint. Report this; `meristem export edge` may do meanwhile.",
            path=str(to),
            differs_by=differs_by,
        )
    with disk_full(to):
        to.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(to, content)
    return Exported(to, len(content), len(leaf_shapes(model)), differs_by)


def leaf_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """The leaves that a reader of the graph carries, by name, with their shapes for one row."""
    with torch.no_grad(), force_reference():
        _, state = model(torch.zeros(1, 1, dtype=torch.int64))
    spans = [next((x.span for x in block.modules() if isinstance(x, Attention)), None) for block in model.blocks]
    shapes = {}
    for name, leaf in sorted(as_tensors(state).items()):
        layer = int(name.split(".")[1])
        shapes[name] = (1, (spans[layer] or 0) - 1, *leaf.shape[2:]) if name.endswith(WINDOWS) else tuple(leaf.shape)
    return shapes


def graph_of(model: Any) -> Any:
    """The model as an ``onnx.ModelProto``. Raises NotTaken for one that is not read by a step of tensor code."""
    onnx = extras.imported("onnx", "export onnx")
    parts, shapes = parts_of(model), leaf_shapes(model)
    step = _exported_step(model, shapes)
    body, make = step.graph, onnx.helper.make_node
    weights = list(body.initializer)
    del body.initializer[:]
    begin = {f"layer.{index}.{name}": leaf for index, leaves in enumerate(parts.begin) for name, leaf in leaves.items()}
    weights += [onnx.numpy_helper.from_array(np.array(number), name) for name, number in (("zero", 0), ("one", 1))]
    nodes = [make("Equal", [READ, "zero"], ["is_fresh_b"])]
    for name, shape in shapes.items():
        first = begin.get(name, torch.zeros([1] * len(shape)))
        weights.append(onnx.numpy_helper.from_array(first.float().numpy(), BEGIN + name))
        weights.append(onnx.numpy_helper.from_array(np.arange(1, len(shape)), f"axes.{name}"))
        nodes.append(make("Unsqueeze", ["is_fresh_b", f"axes.{name}"], [f"is_fresh.{name}"]))
        nodes.append(make("Where", [f"is_fresh.{name}", BEGIN + name, name], [f"begun.{name}"]))
    _make_body(onnx, body, shapes)
    begun = [READ, *(f"begun.{name}" for name in shapes), "tokens_bt"]
    found = [NEXT + READ, *(NEXT + name for name in shapes), "logits_bto"]
    axes = {"num_scan_inputs": 1, "scan_input_axes": [1], "scan_output_axes": [1]}
    nodes.append(make("Scan", begun, found, body=body, **axes))
    given = [_integers(onnx, "tokens_bt", "time"), _integers(onnx, READ), *_leaves(onnx, shapes)]
    logits = _numbers(onnx, "logits_bto", ("time", parts.shape.vocabulary))
    results = [logits, _integers(onnx, NEXT + READ), *_leaves(onnx, shapes, NEXT)]
    graph = onnx.helper.make_graph(nodes, "meristem", given, results, weights)
    how = {"opset_imports": step.opset_import, "ir_version": step.ir_version, "functions": list(step.functions)}
    made = onnx.helper.make_model(graph, producer_name="meristem", **how)
    onnx.checker.check_model(made)
    return made


def _make_body(onnx: Any, body: Any, shapes: Shapes) -> None:
    """Put inputs and outputs in the order of a ``Scan``: the count of tokens, the state, and the one token of a row."""
    given, found = ({each.name: each for each in ends} for ends in (body.input, body.output))
    del body.input[:]
    del body.output[:]
    body.node.append(onnx.helper.make_node("Add", [READ, "one"], [AFTER + READ]))
    body.input.extend([given[READ], *(given[INSIDE + name] for name in shapes), given["tokens_b"]])
    after = (found[AFTER + name] for name in shapes)
    body.output.extend([_integers(onnx, AFTER + READ), *after, found["logits_bo"]])


def _integers(onnx: Any, name: str, *axes: str) -> Any:
    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, ["batch", *axes])


def _numbers(onnx: Any, name: str, axes: Sequence[int | str]) -> Any:
    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", *axes])


def _leaves(onnx: Any, shapes: Shapes, before: str = "") -> list[Any]:
    return [_numbers(onnx, before + name, shape[1:]) for name, shape in shapes.items()]


def _exported_step(model: Any, shapes: Shapes) -> Any:
    """The step of one token as an ``onnx.ModelProto`` for any number of rows."""
    batch = torch.export.Dim("batch", min=1, max=1 << 16)
    step = Step(model, list(shapes)).eval()
    # Two rows: of one the graph would take for granted that it is one.
    leaves = [torch.zeros(2, *shape[1:]) for shape in shapes.values()]
    given = (torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64), *leaves)
    with torch.no_grad(), force_reference(), _quiet():
        program = torch.onnx.export(
            step,
            given,
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
            input_names=["tokens_b", READ, *(INSIDE + name for name in shapes)],
            output_names=[*(AFTER + name for name in shapes), "logits_bo"],
            dynamic_shapes=({0: batch}, {0: batch}, tuple({0: batch} for _ in leaves)),
            custom_translation_table={torch.ops.prims.hypot.default: _hypot},
        )
    return program.model_proto  # type: ignore[union-attr]


@contextmanager
def _quiet() -> Iterator[None]:
    """What the exporter says to its developers, of packages that are not there and of names, is none of ours."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def _hypot(x: Any, y: Any) -> Any:
    """Of gates, whose squares neither overflow nor count where they vanish."""
    op = extras.imported("onnxscript", "export onnx").opset18
    return op.Sqrt(op.Add(op.Mul(x, x), op.Mul(y, y)))


class Graph:
    """An exported file, run by onnxruntime on the CPU."""

    def __init__(self, content: bytes, shapes: Shapes) -> None:
        runtime = extras.imported("onnxruntime", "export onnx")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = 1  # a step of one token is over before others could help
        self.session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self.shapes, self.names = shapes, [each.name for each in self.session.get_outputs()]

    def fresh(self, batch: int) -> dict[str, np.ndarray]:
        """The inputs, but for tokens, of rows that have read nothing."""
        leaves = {name: np.zeros((batch, *shape[1:]), np.float32) for name, shape in self.shapes.items()}
        return leaves | {READ: np.zeros(batch, np.int64)}

    def read(self, tokens_bt: Tensor, given: Mapping[str, np.ndarray]) -> tuple[Logits, dict[str, np.ndarray]]:
        """The prediction after each token, and the inputs of the next call."""
        found = self.session.run(self.names, {"tokens_bt": tokens_bt.numpy(), **given})
        after = dict(zip(self.names, found, strict=True))
        logits_bto = torch.from_numpy(after.pop("logits_bto"))
        return logits_bto, {name.removeprefix(NEXT): leaf for name, leaf in after.items()}

    def inputs_of(self, state: State, n_read: int) -> dict[str, np.ndarray]:
        """The inputs of rows that stand where a state of torch stands, after ``n_read`` tokens each."""
        leaves = as_tensors(state)
        batch = len(next(iter(leaves.values())))
        given = {name: np.zeros((batch, *shape[1:]), np.float32) for name, shape in self.shapes.items()}
        for name, leaf in leaves.items():
            n = leaf.shape[1]
            given[name][:, given[name].shape[1] - n :] = leaf.numpy()
        return given | {READ: np.full(batch, n_read, np.int64)}

    def state_of(self, given: Mapping[str, np.ndarray]) -> State:
        """The state of torch that rows have which have all read as much."""
        n_read = int(given[READ][0])
        tensors = {}
        for name in self.shapes:
            n = given[name].shape[1]
            first = max(n - n_read, 0) if name.endswith(WINDOWS) else 0
            tensors[name] = torch.from_numpy(given[name][:, first:].copy())
        return from_tensors(tensors)


@torch.no_grad()
def compare(model: Any, content: bytes) -> float:
    """The most by which a logit of the graph differs from torch's, of the largest, over ``LENGTHS`` and ``BATCHES``: at
    once, token by token, and after a change from one to the other and back."""
    graph, n_ids = Graph(content, leaf_shapes(model)), model.embedding.num_embeddings
    worst = 0.0
    for batch in BATCHES:
        generator = stream(0, "export.onnx", batch)
        for length in LENGTHS:
            tokens_bt = torch.randint(n_ids, (batch, length), generator=generator)
            true_bto, state = model(tokens_bt)
            found_bto, given = graph.read(tokens_bt, graph.fresh(batch))
            worst = max(worst, _apart(found_bto, true_bto))
            if length <= STEPPED:
                steps, given = [], graph.fresh(batch)
                for token_b1 in tokens_bt.split(1, dim=1):
                    step_b1o, given = graph.read(token_b1, given)
                    steps.append(step_b1o)
                worst = max(worst, _apart(torch.cat(steps, dim=1), true_bto))
        worst = max(worst, _apart_in_turns(model, graph, (state, length), true_bto[:, -1]))
    return worst


def _apart(found: Tensor, true: Tensor) -> float:
    """Not a number where one of them is not."""
    return float((found - true).abs().max() / true.abs().max())


def _apart_in_turns(model: Any, graph: Graph, at: tuple[State, int], logits_bo: Tensor) -> float:
    """The same over greedy tokens, from a state of torch on; then that of the graph goes on in both."""
    state, n_read = at
    given, worst = graph.inputs_of(state, n_read), 0.0
    for _ in range(2):
        decoding = Decoding(model, state)
        for _ in range(HALF):
            token_b = logits_bo.argmax(-1)
            logits_bo = decoding.step(token_b.tolist())
            found_bto, given = graph.read(token_b[:, None], given)
            worst = max(worst, _apart(found_bto[:, 0], logits_bo))
        state = graph.state_of(given)
    return worst
