"""A prepared corpus: memory-mapped tokens with their documents, tokenizer and manifest."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from meristem.data import manifest as manifests
from meristem.data.files import map_array, refused
from meristem.data.tokenizer import Tokenizer, load_tokenizer
from meristem.errors import FileChanged, ManifestMismatch, SplitError

TOKENS: Final = "tokens"
DOCUMENTS: Final = "documents"


@dataclass(frozen=True)
class Corpus:
    """Tokens by split, read only. ``arrays`` and ``stamps`` go by the name of the file."""

    path: Path
    manifest: Mapping[str, Any]
    tokenizer: Tokenizer
    arrays: Mapping[str, np.ndarray]
    stamps: Mapping[str, tuple[int, int, int]]

    @property
    def name(self) -> str:
        """What the text is called."""
        return str(self.manifest["name"])

    @property
    def fingerprint(self) -> str:
        """The name of exactly this data."""
        return str(self.manifest["fingerprint"])

    @property
    def splits(self) -> tuple[str, ...]:
        """The parts that hold text."""
        return tuple(self.manifest["counts"])

    def tokens(self, split: str) -> np.ndarray:
        """The ids of a split, document after document."""
        return self.arrays[self._file(TOKENS, split)]

    def documents(self, split: str) -> np.ndarray:
        """Where each document begins among the tokens, and last where they end."""
        return self.arrays[self._file(DOCUMENTS, split)]

    def size_bytes(self, split: str) -> int:
        """The bytes of text in a split."""
        self._file(TOKENS, split)
        return int(self.manifest["counts"][split]["size_bytes"])

    def text(self, split: str) -> bytes:
        """The text of a split as it was before it became tokens."""
        return self.tokenizer.decode_bytes(self.tokens(split).tolist())

    def require_unchanged(self) -> None:
        """Refuse to read on when a file was replaced, cut or written to since it was opened."""
        for name, stamp in self.stamps.items():
            path = self.path / name
            try:
                found = _stamp(os.stat(path))
            except OSError as cause:
                raise refused("read", path, cause) from cause
            if found != stamp:
                raise FileChanged(
                    f"{path} changed while it was in use: size, time and inode were {stamp}, now {found}. "
                    f"Prepare the text again and resume the run.",
                    path=str(path),
                    found=found,
                    expected=stamp,
                )

    def _file(self, kind: str, split: str) -> str:
        for name in self.arrays:
            if name.startswith(f"{kind}.{split}."):
                return name
        raise SplitError(
            f"corpus '{self.name}' has no split '{split}'; it has {', '.join(self.splits)}. "
            f"Prepare it with data.validation above 0.",
            found=split,
        )


def open_corpus(path: Path, verify: bool = True) -> Corpus:
    """Open a prepared corpus. ``verify`` reads every file and compares its hash; sizes are always compared."""
    manifest = manifests.load(path)
    manifests.verify(path, manifest, hashes=verify)
    tokenizer = load_tokenizer(path)
    described = manifest["tokenizer"]
    if tokenizer.fingerprint != described["fingerprint"] or tokenizer.vocab_size != described["vocab_size"]:
        raise ManifestMismatch(
            f"{path} holds a {tokenizer.kind} tokenizer of {tokenizer.vocab_size} entries, its manifest says "
            f"{described}. Remove the directory and prepare the text again.",
            path=str(path),
        )
    arrays, stamps = {}, {}
    for entry in manifest["files"]:
        name = entry["path"]
        if name.startswith((f"{TOKENS}.", f"{DOCUMENTS}.")):
            arrays[name], status = map_array(path / name, entry["dtype"])
            stamps[name] = _stamp(status)
    return Corpus(path, manifest, tokenizer, arrays, stamps)


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ino
