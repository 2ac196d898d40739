"""Self-referential memories of two layers each, hidden layers side by side."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from meristem.memory.state import Memory
from meristem.nn.self_chunk import GATES, ChunkForm, Projections, WriteSystem
from meristem.nn.self_matrix import NOISE


@dataclass(frozen=True)
class _Seen:
    """Rows of keys at the memories that begin a chunk.

    preact: before the GELU. hidden: after it, by output layer. lacking: what each output layer has to add to lower the
    loss, and the hidden layers, the gradients negated.
    """

    preact_hcf: Tensor
    hidden: dict[str, Tensor]
    lacking: dict[str, Tensor]
    lacking_hcf: Tensor


@dataclass(frozen=True)
class Networks:
    """``M(x) = x + gelu(x W_1) W_2``, hidden as wide as x; the memories of gates say one number and add no x.

    Gradients of a chunk are taken at the memories that begin it. What ``- rate k k^T`` erases of ``W_1`` is exact, as
    for a matrix; ``W_2``, whose rows are no keys, only fades (memory.md 7.1, 7.2).

    is_generated, is_squared: as for ``Matrices``.
    """

    names: tuple[str, ...]
    is_generated: bool
    is_squared: bool

    def first(self, heads: int, width: int) -> Memory:
        """Identity-like: random input layers (Xavier) and output layers near zero, but not at it, which is a saddle."""
        values: Memory = {}
        for name in self.names:
            values[f"{name}_in_hkf"] = torch.randn(heads, width, width) / width**0.5
            values[f"{name}_out_hfv"] = NOISE * torch.randn(heads, width, 1 if name in GATES else width)
        return values

    def joined(self, values: Mapping[str, Tensor]) -> Memory:
        """The values of ``first`` beside each other: hidden layers within a head, output layers as heads of their
        own."""
        weights = {"in_bhkf": torch.cat([values[f"{name}_in_hkf"] for name in self.names], dim=-1)}
        for layer, names in self._layers.items():
            weights[layer] = torch.stack([values[f"{name}_out_hfv"] for name in names], dim=1).flatten(0, 1)
        return {name: x[None] for name, x in weights.items()}

    @property
    def _layers(self) -> dict[str, tuple[str, ...]]:
        """The output layers: those of vectors, and those of numbers where there are any."""
        vectors = tuple(name for name in self.names if name not in GATES)
        numbers = tuple(name for name in self.names if name in GATES)
        return {"out_bhfv": vectors} | ({"gate_bhfv": numbers} if numbers else {})

    def project(self, weights: Memory, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """What the memories of vectors make of rows, and what those of gates do, ``h c l``."""
        outputs = self._outputs(weights, rows, self._apart(functional.gelu(rows @ weights["in_bhkf"])))
        vectors = self._layers["out_bhfv"]
        projections = outputs["out_bhfv"].unflatten(0, (-1, len(vectors))).unbind(1)
        return dict(zip(vectors, projections, strict=True)), outputs["gate_bhfv"].view(len(rows), len(GATES), -1).mT

    def write(self, start: Memory, live: Memory, rows: WriteSystem) -> Memory:
        """The memories after the rows of a chunk, or of a slice of it.

        start: as they were when the chunk began. live: as the rows before have left them.
        """
        seen = self._seen(start, rows.projections, self._probes(rows.projections))
        return self._written(live, rows, seen, self._new(start, live, rows, seen))

    def read(self, start: Memory, live: Memory, rows: WriteSystem) -> tuple[Tensor, Memory]:
        """What each query recalls just before its token is written, and the memory after the rows."""
        seen, asked = self._seen(start, rows.projections, self._probes(rows.projections)), rows.projections.query
        new_hcf = self._new(start, live, rows, seen)
        query_hcf = functional.gelu(rows.recalled_before(asked @ live["in_bhkf"], asked, rows.projections.key, new_hcf))
        written = seen.hidden["out_bhfv"], seen.lacking["out_bhfv"]
        read = asked + rows.recalled_before(query_hcf @ live["out_bhfv"], query_hcf, *written)
        return read, self._written(live, rows, seen, new_hcf)

    def read_chunks(self, live: Memory, chunks: ChunkForm) -> tuple[Tensor, Memory]:
        """``read`` of whole chunks behind each other, ``n h c``: writes in order, reads at once."""
        entering, news, hidden, lacking = [], [], [], []
        probes = self._probes(chunks.projections).unbind()
        for chunk, probe_hck in zip(chunks.inverted().unbound(), probes, strict=True):
            entering.append(live)
            seen = self._seen(live, chunk.projections, probe_hck)
            news.append(chunk.new(seen.lacking_hcf, seen.preact_hcf))
            hidden.append(seen.hidden["out_bhfv"])
            lacking.append(seen.lacking["out_bhfv"])
            live = self._written(live, chunk, seen, news[-1])
        in_nhkf, out_nhfv = (torch.stack([x[name] for x in entering]) for name in ("in_bhkf", "out_bhfv"))
        query_nhck = chunks.projections.query
        recalled_nhcf = chunks.recalled_before(
            query_nhck @ in_nhkf, query_nhck, chunks.projections.key, torch.stack(news)
        )
        hidden_nhcf = functional.gelu(recalled_nhcf)
        written = torch.stack(hidden), torch.stack(lacking)
        read_nhcv = query_nhck + chunks.recalled_before(hidden_nhcf @ out_nhfv, hidden_nhcf, *written)
        return read_nhcv.transpose(0, 1).flatten(1, 2), live

    def _probes(self, projections: Projections) -> Tensor:
        """The rows that are read of the memories at a chunk's start: keys, and values where they make their own."""
        return torch.cat([projections.key, projections.value], dim=-2) if self.is_generated else projections.key

    def _seen(self, start: Memory, projections: Projections, probes: Tensor) -> _Seen:
        """Gradients of a chunk's rows at the memories that begin it."""
        key, value = projections.key, projections.value
        sizes = [key.shape[-2], probes.shape[-2] - key.shape[-2]]
        preact = probes @ start["in_bhkf"]
        split = {layer: x.split(sizes, dim=-2) for layer, x in self._apart(functional.gelu(preact)).items()}
        of_key = {layer: x for layer, (x, _) in split.items()}
        if self.is_generated:
            lacking = self._outputs(start, value, {layer: x for layer, (_, x) in split.items()})
        else:
            # A gate is to recall the mean of the value.
            goals = {"out_bhfv": value, "gate_bhfv": value.mean(dim=-1, keepdim=True)}
            lacking = {layer: goals[layer].repeat_interleave(len(x), 0) for layer, x in self._layers.items()}
        if self.is_squared:
            recalled = self._outputs(start, key, of_key)
            lacking = {layer: goal - recalled[layer] for layer, goal in lacking.items()}
        pulled_hcf = self._beside({layer: x @ start[layer].mT for layer, x in lacking.items()})
        preact_hcf = preact.split(sizes, dim=-2)[0]
        return _Seen(preact_hcf, of_key, lacking, torch.ops.aten.gelu_backward(pulled_hcf, preact_hcf))

    def _outputs(self, weights: Memory, rows: Tensor, hidden: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the output layers say of hidden rows, vectors beside the rows themselves."""
        n_vectors = len(self._layers["out_bhfv"])
        added = rows if n_vectors == 1 else rows.repeat_interleave(n_vectors, dim=0)
        outputs = {"out_bhfv": torch.baddbmm(added, hidden["out_bhfv"], weights["out_bhfv"])}
        if "gate_bhfv" in weights:
            outputs["gate_bhfv"] = hidden["gate_bhfv"] @ weights["gate_bhfv"]
        return outputs

    def _new(self, start: Memory, live: Memory, rows: WriteSystem, seen: _Seen) -> Tensor:
        """What is new at each hidden layer: the probe is the live layer's, the gradient that of the chunk's start."""
        preact_hcf = seen.preact_hcf if start is live else rows.projections.key @ live["in_bhkf"]
        return rows.new(seen.lacking_hcf, preact_hcf)

    def _written(self, live: Memory, rows: WriteSystem, seen: _Seen, new_hcf: Tensor) -> Memory:
        written = {"in_bhkf": rows.after(live["in_bhkf"], rows.projections.key, new_hcf)}
        for layer, names in self._layers.items():
            written[layer] = rows.repeated(len(names)).after(live[layer], seen.hidden[layer], seen.lacking[layer])
        return written

    def _apart(self, side_by_side: Tensor) -> dict[str, Tensor]:
        """h c (g f) -> (h g) c f, by output layer."""
        if len(self.names) == 1:
            return {"out_bhfv": side_by_side}
        apart_hgcf = side_by_side.unflatten(-1, (len(self.names), -1)).transpose(1, 2)
        sizes = [len(names) for names in self._layers.values()]
        pieces = (x.flatten(0, 1) for x in apart_hgcf.split(sizes, dim=1))
        return dict(zip(self._layers, pieces, strict=True))

    def _beside(self, apart: dict[str, Tensor]) -> Tensor:
        """(h g) c f, by output layer -> h c (g f)"""
        if len(self.names) == 1:
            return apart["out_bhfv"]
        pieces = [apart[layer].unflatten(0, (-1, len(names))) for layer, names in self._layers.items()]
        return torch.cat(pieces, dim=1).transpose(1, 2).flatten(-2)
