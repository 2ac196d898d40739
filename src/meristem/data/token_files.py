"""The token files of a corpus: written, counted and hashed while the text passes."""

import array
import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

import numpy as np

from meristem.checkpoint.atomic import write_synced
from meristem.data import chat as chats
from meristem.data import manifest as manifests
from meristem.data import split
from meristem.data.corpus import DOCUMENTS, TOKENS
from meristem.data.hashing import HashThread
from meristem.data.tokenizer import DocumentEncoder, Tokenizer
from meristem.errors import SplitError

_DTYPES: Final = ((1 << 8, "uint8"), (1 << 16, "uint16"), (1 << 32, "uint32"))


_LONG: Final = 1 << 15
"""Tokens of a document above which it is written by itself, and not joined to others before."""

_SYNC_BYTES: Final = 1 << 25
"""After how many bytes the disk is asked to take them."""


class Piece(NamedTuple):
    """A document, or what of it belongs to a split. source: the number of its source.

    goes_on: whether the next piece is the rest of the same.
    """

    split: str
    text: bytes
    source: int
    goes_on: bool = False


class Written(NamedTuple):
    """What the manifest says of the files: counts by split, entries, and the largest id."""

    counts: dict[str, Any]
    files: list[dict[str, Any]]
    max_token_id: int


@dataclass
class _Part:
    """A split as it is written: its token file, where its documents begin and end, and how many are of each source."""

    file: BinaryIO
    digest: Any = field(default_factory=hashlib.sha256)
    edges: "array.array[int]" = field(default_factory=lambda: array.array("Q", [0]))
    n_tokens: int = 0
    unsynced_bytes: int = 0
    size_bytes: int = 0
    n_of: Counter[int] = field(default_factory=Counter)


class TokenFiles:
    """Writes the tokens and document starts of every split into a directory.

    is_chat: the pieces are chats, which the template of the tokenizer lays out.
    """

    def __init__(self, directory: Path, tokenizer: Tokenizer, hashing: HashThread, *, is_chat: bool) -> None:
        self._directory, self._tokenizer, self._hashing, self._is_chat = directory, tokenizer, hashing, is_chat
        self._dtype = next(np.dtype(name) for limit, name in _DTYPES if tokenizer.vocab_size <= limit)
        self._parts: dict[str, _Part] = {}
        self._encoder = DocumentEncoder(tokenizer)
        self._open = contextlib.ExitStack()
        self._disk = self._open.enter_context(ThreadPoolExecutor(4))  # a disk takes several requests at once
        self._syncing: list[Future[None]] = []
        self.size_bytes, self._max_token_id = 0, 0

    @property
    def splits(self) -> frozenset[str]:
        """Those that hold something."""
        return frozenset(self._parts)

    def close(self) -> None:
        """Close the files, whatever they hold."""
        self._open.close()

    def write(self, pieces: Sequence[Piece]) -> None:
        """Append pieces, encoded together, so that the cores can share the work."""
        encoded = self._encode(pieces)
        by_split: dict[str, list[np.ndarray]] = {}
        for piece, ids in zip(pieces, encoded, strict=True):
            part = self._parts.get(piece.split) or self._begin(piece.split)
            by_split.setdefault(piece.split, []).append(ids)
            part.n_tokens += len(ids)
            part.size_bytes += int(self._tokenizer.byte_lengths[ids].sum()) if self._is_chat else len(piece.text)
            self.size_bytes += len(piece.text)
            if not piece.goes_on:
                part.edges.append(part.n_tokens)
                part.n_of[piece.source] += 1
        for name, found in by_split.items():
            is_long = sum(map(len, found)) > _LONG * len(found)
            for ids in found if is_long else [np.concatenate(found)]:
                self._append(self._parts[name], ids)

    def _append(self, part: _Part, ids: np.ndarray) -> None:
        if not len(ids):
            return
        self._max_token_id = max(self._max_token_id, int(ids.max()))
        content = ids.astype(self._dtype, copy=False).data
        self._hashing.submit(content.nbytes, part.digest.update, content)
        part.file.write(content)
        part.unsynced_bytes += content.nbytes
        if part.unsynced_bytes >= _SYNC_BYTES and all(each.done() for each in self._syncing):
            # The disk begins on them while the rest is read.
            part.file.flush()
            self._syncing = [self._disk.submit(os.fdatasync, part.file.fileno())]
            part.unsynced_bytes = 0

    def finish(self, n_sources: int | None) -> Written:
        """Wait until the disk has all of it. n_sources: of a mixture, whose documents are counted apart."""
        for part in self._parts.values():
            part.file.flush()
        counts: dict[str, Any] = {}
        starts = {name: self._directory / f"{DOCUMENTS}.{name}.u64" for name in self._parts}
        self._syncing += [self._disk.submit(os.fsync, part.file.fileno()) for part in self._parts.values()]
        for name, part in self._parts.items():
            self._syncing.append(self._disk.submit(write_synced, starts[name], part.edges.tobytes()))
        self._hashing.submit(0, int).result()  # the last of what was handed over
        for each in self._syncing:
            each.result()
        files = []
        for name in sorted(self._parts, key=split.SPLITS.index):
            part, n_documents = self._parts[name], len(self._parts[name].edges) - 1
            counts[name] = {"records": n_documents, "tokens": part.n_tokens, "size_bytes": part.size_bytes}
            if n_sources is not None:
                counts[name]["sources"] = [part.n_of[number] for number in range(n_sources)]
            files.append(
                {
                    "path": Path(part.file.name).name,
                    "size_bytes": part.n_tokens * self._dtype.itemsize,
                    "sha256": part.digest.hexdigest(),
                    "dtype": str(self._dtype),
                    "records": n_documents,
                }
            )
            files.append(manifests.describe_file(starts[name], "uint64", n_documents))
        self.close()
        return Written(counts, files, self._max_token_id)

    def _begin(self, name: str) -> _Part:
        path = self._directory / f"{TOKENS}.{name}.u{8 * self._dtype.itemsize}"
        self._parts[name] = _Part(self._open.enter_context(open(path, "wb")))
        return self._parts[name]

    def _encode(self, pieces: Sequence[Piece]) -> list[np.ndarray]:
        if self._is_chat:
            return chats.encode_documents(self._tokenizer, [piece.text for piece in pieces])
        return self._encoder.encode([piece.text for piece in pieces], [piece.goes_on for piece in pieces])


def require_filled(splits: frozenset[str], ratios: Sequence[float], size_bytes: int, name: str) -> None:
    """Raises SplitError where a split that has a share holds nothing."""
    for each, ratio in zip(split.SPLITS, ratios, strict=True):
        if ratio > 0 and each not in splits:
            raise SplitError(
                f"the split '{each}' of '{name}' would be empty: {size_bytes} bytes are too few for a "
                f"share of {ratio:g}. Add text, or change data.validation.",
                split=each,
            )
