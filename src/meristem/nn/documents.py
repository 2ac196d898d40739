"""Several documents in one sequence, and sequences with padding: what a layer with a state reads of each by itself.

A document reads as if it were alone: its tokens are taken out of the sequence, documents become rows of their own, and
what they read is put back. So the law holds for every rule and every form, gradients and convolutions included, and a
padded token neither writes nor decays nor is counted, for the layer never meets it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from meristem.errors import ShapeError
from meristem.memory.state import State, is_mixed, join_rows, select_rows
from meristem.shapes import Hidden

Mask = Tensor
"""``(b, t)`` of torch.bool, which is checked here."""
Read = Callable[[Any, State | None], tuple[Tensor, State]]
"""What reads a sequence, ``(b, t, ...)``, and carries a state: a layer or a whole model."""
Begin = Callable[[Any], State]


class Document(NamedTuple):
    """The tokens of one document in a sequence, by their places in all rows, concatenated.

    goes_on: it began before this sequence. is_last: what it leaves is the state of its row.
    """

    row: int
    places_n: np.ndarray
    goes_on: bool
    is_last: bool


class Group(NamedTuple):
    """Documents that are read together, as rows.

    rows: those of the sequence that they come from. padded_nt: the places of their tokens, a short document filled up
    with its last one. taken_n: which of the tokens read, row after row, count; places_n: where these belong.
    """

    rows: list[int]
    goes_on: bool
    is_last: bool
    padded_nt: Tensor
    taken_n: Tensor
    places_n: Tensor


@runtime_checkable
class ReadsDocuments(Protocol):
    """A layer that reads packed documents in a way of its own, faster than document by document."""

    def forward_documents(
        self, hidden_btd: Hidden, state: State | None, documents: "Documents"
    ) -> tuple[Hidden, State]: ...


@dataclass(frozen=True)
class Documents:
    """How the rows of one sequence are packed; made once and handed to all layers.

    groups: what is read together. quiet: rows without a token, which keep their state.
    begins_bt: True where a document begins, on the host.
    is_joined: only attention is kept to a document; whatever else has a state reads the rows as they are.
    """

    groups: list[Group]
    quiet: list[int]
    begins_bt: Mask
    is_joined: bool = False

    @classmethod
    def packed(
        cls, like: Tensor, *, reset_mask_bt: Mask | None = None, padding_mask_bt: Mask | None = None
    ) -> "Documents":
        """Of masks of the sequence ``like``, ``(b, t, ...)``; they are read on the host.

        reset_mask_bt: True where a document begins, which knows nothing of what came before it.
        padding_mask_bt: True for tokens, False for padding, wherever it stands.
        Raises ShapeError for masks that do not fit.
        """
        _require_fit(like, reset_mask_bt, padding_mask_bt)
        n_rows, n_time = like.shape[:2]
        none_bt = torch.zeros(n_rows, n_time, dtype=torch.bool)
        begins_bt = none_bt if reset_mask_bt is None else reset_mask_bt.cpu()
        documents, quiet = [], []
        for row, begins_t in enumerate(begins_bt.numpy()):
            cuts = [0, *np.flatnonzero(begins_t), n_time]
            is_token_t = None if padding_mask_bt is None else padding_mask_bt[row].cpu().numpy()
            held = []
            for index, (start, stop) in enumerate(zip(cuts, cuts[1:], strict=False)):
                at_n = np.arange(start, stop) if is_token_t is None else start + np.flatnonzero(is_token_t[start:stop])
                if len(at_n):
                    held.append((at_n + row * n_time, index == 0))
            documents += [
                Document(row, places_n, goes_on, is_last=index == len(held) - 1)
                for index, (places_n, goes_on) in enumerate(held)
            ]
            quiet += [] if held else [row]
        return cls([_group(each, like.device) for each in _alike(documents)], quiet, begins_bt)

    @property
    def is_whole(self) -> bool:
        """Whether every row goes on as a whole: nothing begins, or for attention alone, and nothing is padding."""
        if self.is_joined:
            return True
        whole = len(self.groups) == 1 and self.groups[0].goes_on and not self.quiet
        return whole and self.groups[0].places_n.numel() == self.begins_bt.numel()

    @cached_property
    def starts_bt(self) -> Tensor:
        """Where the document of each token begins, as an index of this sequence; -1 before it. On the host."""
        index_t = torch.arange(self.begins_bt.shape[1])
        return torch.where(self.begins_bt, index_t, -1).cummax(dim=1).values


def documents_in(
    sequence: Tensor, state: State | None, reset_mask_bt: Mask | None, attend_mask_bt: Mask | None = None
) -> Documents | None:
    """How the rows of a sequence that a model reads are packed; None where they go on alike and nothing begins.

    attend_mask_bt: in place of the other, True where a document begins for attention alone.
    """
    mask_bt = attend_mask_bt if reset_mask_bt is None else reset_mask_bt
    if mask_bt is None:
        return None
    _require_fit(sequence, mask_bt, None)
    if not mask_bt.any() and (state is None or not is_mixed(state)):
        return None
    if reset_mask_bt is None:
        return Documents([], [], mask_bt.cpu(), is_joined=True)
    return Documents.packed(sequence, reset_mask_bt=reset_mask_bt)


def reset_mask(cu_seqlens: Int[Tensor, " n"]) -> Mask:
    """``reset_mask_bt`` of one row that holds documents of the lengths ``cu_seqlens.diff()``: ``(1, t)``.

    cu_seqlens: cumulative lengths from 0 to t, as flash-linear-attention and flash-attention take them.
    """
    mask_bt = torch.zeros(1, int(cu_seqlens[-1]), dtype=torch.bool, device=cu_seqlens.device)
    mask_bt[0, cu_seqlens[:-1].long()] = True
    return mask_bt


def read_documents(
    read: Read, sequence: Tensor, state: State | None, documents: Documents, begin: Begin | None = None
) -> tuple[Hidden, State]:
    """What ``read`` gives of every document; 0 where a token is padded. A row of padding keeps its state.

    sequence: ``(b, t, ...)``, hidden vectors or tokens. begin: the state of a row of padding that has read nothing.
    """
    if documents.is_whole:
        return read(sequence, state)
    flat = sequence.flatten(0, 1)
    found, left = [], []
    for group in documents.groups:
        begun = select_rows(state, group.rows) if state is not None and group.goes_on else None
        read_btd, after = read(flat[group.padded_nt], begun)
        found.append(read_btd.flatten(0, 1)[group.taken_n])
        if group.is_last:
            left.append((group.rows, after))
    quiet = documents.quiet
    if quiet and state is not None:
        left.append((quiet, select_rows(state, quiet)))
    elif quiet and begin is not None:
        left.append((quiet, begin(sequence[quiet])))
    order = [row for rows, _ in left for row in rows]
    after = select_rows(join_rows([each for _, each in left]), sorted(range(len(order)), key=order.__getitem__))
    if not found:
        return torch.zeros_like(sequence), after
    reads_nd = torch.cat(found)
    places_n = torch.cat([group.places_n for group in documents.groups])
    whole_nd = reads_nd.new_zeros(len(flat), *reads_nd.shape[1:]).index_copy(0, places_n, reads_nd)
    return whole_nd.unflatten(0, sequence.shape[:2]), after


def _require_fit(sequence: Tensor, reset_mask_bt: Mask | None, padding_mask_bt: Mask | None) -> None:
    shape = sequence.shape[:2]
    for name, mask in (("reset_mask", reset_mask_bt), ("padding_mask", padding_mask_bt)):
        if mask is not None and (mask.shape != shape or mask.dtype != torch.bool):
            raise ShapeError(
                f"{name} is {mask.dtype} of shape {tuple(mask.shape)}; the sequence needs a torch.bool of shape "
                f"{tuple(shape)}: one for every token. Make it so, for example with mask.bool().",
                found=tuple(mask.shape),
                expected=tuple(shape),
            )


def _alike(documents: list[Document]) -> list[list[Document]]:
    """Documents that are read together: those that leave a state are of one length, the others of about one."""
    groups: dict[tuple[bool, bool, int], list[Document]] = {}
    for document in documents:
        n_tokens = len(document.places_n)
        length = n_tokens if document.is_last else -n_tokens.bit_length()
        groups.setdefault((document.goes_on, document.is_last, length), []).append(document)
    return list(groups.values())


def _group(documents: list[Document], device: torch.device) -> Group:
    length = max(len(document.places_n) for document in documents)
    # What fills a short document up comes after it, and is read for nothing.
    padded_nt = np.stack([np.pad(each.places_n, (0, length - len(each.places_n)), mode="edge") for each in documents])
    taken_n = np.concatenate([n * length + np.arange(len(each.places_n)) for n, each in enumerate(documents)])
    places_n = np.concatenate([each.places_n for each in documents])
    index = (torch.from_numpy(each).to(device) for each in (padded_nt, taken_n, places_n))
    return Group([each.row for each in documents], documents[0].goes_on, documents[0].is_last, *index)
