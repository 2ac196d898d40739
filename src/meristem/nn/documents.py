"""Several documents in one sequence, and sequences with padding: what a layer with a state reads of each by itself.

A document reads as if it were alone: its tokens are taken out of the sequence, documents become rows of their own, and
what they read is put back. So the law holds for every rule and every form, gradients and convolutions included, and a
padded token neither writes nor decays nor is counted, for the layer never meets it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from meristem.errors import ShapeError
from meristem.memory.state import State, join_rows, select_rows
from meristem.shapes import Hidden

Mask = Tensor
"""``(b, t)`` of torch.bool, which is checked here."""
Read = Callable[[Hidden, State | None], tuple[Hidden, State]]
Begin = Callable[[Hidden], State]


class Document(NamedTuple):
    """The tokens of one document in a sequence, by their places in all rows, concatenated.

    goes_on: it began before this sequence. is_last: what it leaves is the state of its row.
    """

    row: int
    places: list[int]
    goes_on: bool
    is_last: bool


def reset_mask(cu_seqlens: Int[Tensor, " n"]) -> Mask:
    """``reset_mask_bt`` of one row that holds documents of the lengths ``cu_seqlens.diff()``: ``(1, t)``.

    cu_seqlens: cumulative lengths from 0 to t, as flash-linear-attention and flash-attention take them.
    """
    mask_bt = torch.zeros(1, int(cu_seqlens[-1]), dtype=torch.bool, device=cu_seqlens.device)
    mask_bt[0, cu_seqlens[:-1].long()] = True
    return mask_bt


def read_documents(
    read: Read,
    begin: Begin,
    hidden_btd: Hidden,
    state: State | None,
    *,
    reset_mask_bt: Mask | None,
    padding_mask_bt: Mask | None,
) -> tuple[Hidden, State]:
    """What ``read`` gives of every document; 0 where a token is padded. The masks are read on the host.

    reset_mask_bt: True where a document begins, which knows nothing of what came before it.
    padding_mask_bt: True for tokens, False for padding, wherever it stands. A row of padding keeps its state.
    """
    documents = _documents(hidden_btd, reset_mask_bt, padding_mask_bt)
    flat_nd, found, left = hidden_btd.flatten(0, 1), [], []
    for group in _groups(documents):
        length = max(len(document.places) for document in group)
        # What fills a short document up comes after it, and is read for nothing.
        padded = [document.places + document.places[-1:] * (length - len(document.places)) for document in group]
        rows = [document.row for document in group]
        begun = select_rows(state, rows) if state is not None and group[0].goes_on else None
        read_btd, after = read(flat_nd[torch.tensor(padded, device=hidden_btd.device)], begun)
        taken = [n * length + at for n, document in enumerate(group) for at in range(len(document.places))]
        places = [place for document in group for place in document.places]
        found.append((places, read_btd.flatten(0, 1)[torch.tensor(taken, device=hidden_btd.device)]))
        if group[0].is_last:
            left.append((rows, after))
    quiet = sorted(set(range(len(hidden_btd))) - {row for rows, _ in left for row in rows})
    if quiet:
        left.append((quiet, begin(hidden_btd[quiet]) if state is None else select_rows(state, quiet)))
    order = [row for rows, _ in left for row in rows]
    after = select_rows(join_rows([each for _, each in left]), sorted(range(len(order)), key=order.__getitem__))
    if not found:
        return torch.zeros_like(hidden_btd), after
    index_n = torch.tensor([place for each, _ in found for place in each], device=hidden_btd.device)
    reads_nd = torch.cat([each for _, each in found])
    return torch.zeros_like(flat_nd, dtype=reads_nd.dtype).index_copy(0, index_n, reads_nd).view_as(hidden_btd), after


def _documents(hidden_btd: Hidden, reset_mask_bt: Mask | None, padding_mask_bt: Mask | None) -> list[Document]:
    shape = hidden_btd.shape[:2]
    for name, mask in (("reset_mask", reset_mask_bt), ("padding_mask", padding_mask_bt)):
        if mask is not None and (mask.shape != shape or mask.dtype != torch.bool):
            raise ShapeError(
                f"{name} is {mask.dtype} of shape {tuple(mask.shape)}; the hidden vectors need a torch.bool of shape "
                f"{tuple(shape)}: one for every token. Make it so, for example with mask.bool().",
                found=tuple(mask.shape),
                expected=tuple(shape),
            )
    none: list[list[bool]] = [[False] * shape[1]] * shape[0]
    begins = none if reset_mask_bt is None else reset_mask_bt.tolist()
    is_token = [[True] * shape[1]] * shape[0] if padding_mask_bt is None else padding_mask_bt.tolist()
    documents = []
    for row in range(shape[0]):
        cut: list[tuple[bool, list[int]]] = [(True, [])]
        for at in range(shape[1]):
            if begins[row][at]:
                cut.append((False, []))
            if is_token[row][at]:
                cut[-1][1].append(row * shape[1] + at)
        held = [(goes_on, places) for goes_on, places in cut if places]
        documents += [
            Document(row, places, goes_on, is_last=index == len(held) - 1)
            for index, (goes_on, places) in enumerate(held)
        ]
    return documents


def _groups(documents: Sequence[Document]) -> list[list[Document]]:
    """Documents that are read together: those that leave a state are of one length, the others of about one."""
    groups: dict[tuple[bool, bool, int], list[Document]] = {}
    for document in documents:
        length = len(document.places) if document.is_last else -len(document.places).bit_length()
        groups.setdefault((document.goes_on, document.is_last, length), []).append(document)
    return list(groups.values())
