"""A prepared corpus: tokens in files with their documents, tokenizer and manifest."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from meristem.data import manifest as manifests
from meristem.data.config import DataConfig, DifficultyConfig
from meristem.data.files import Numbers, open_numbers
from meristem.data.tokenizer import Tokenizer, load_tokenizer
from meristem.errors import ManifestMismatch, SplitError

TOKENS: Final = "tokens"
DOCUMENTS: Final = "documents"


@dataclass(frozen=True)
class Corpus:
    """Tokens by split, read only. ``numbers`` go by the name of the file.

    weights: the shares in which training takes its sources; empty where they are one text.
    difficulty: which documents training reads when.
    """

    path: Path
    manifest: Mapping[str, Any]
    tokenizer: Tokenizer
    numbers: Mapping[str, Numbers]
    weights: tuple[float, ...] = ()
    difficulty: DifficultyConfig = DifficultyConfig()

    def for_training(self, data: DataConfig) -> "Corpus":
        """The same text, as training with these settings takes it."""
        return replace(self, weights=data.weights, difficulty=data.difficulty)

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

    def tokens(self, split: str) -> Numbers:
        """The ids of a split, document after document."""
        return self.numbers[self._file(TOKENS, split)]

    def documents(self, split: str) -> np.ndarray:
        """Where each document begins among the tokens, and last where they end."""
        return self.numbers[self._file(DOCUMENTS, split)][:]

    def sources(self, split: str) -> dict[str, slice]:
        """Which documents of a split are of which source of a mixture; of any other corpus all are of one."""
        n_documents = len(self.numbers[self._file(DOCUMENTS, split)]) - 1
        counted = self.manifest["counts"][split].get("sources")
        if counted is None:
            return {self.name: slice(0, n_documents)}
        names = [part["name"] for part in self.manifest["loader"]["args"]["parts"]]
        edges = [0, *itertools.accumulate(counted)]
        return dict(zip(names, map(slice, edges, edges[1:]), strict=True))

    def size_bytes(self, split: str) -> int:
        """The bytes of text in a split."""
        self._file(TOKENS, split)
        return int(self.manifest["counts"][split]["size_bytes"])

    def text(self, split: str) -> bytes:
        """The text of a split as it was before it became tokens."""
        return self.tokenizer.decode_bytes(self.tokens(split)[:].tolist())

    def require_unchanged(self) -> None:
        """Refuse to read on when a file was replaced, cut or written to since it was opened."""
        for numbers in self.numbers.values():
            numbers.require_unchanged()

    def _file(self, kind: str, split: str) -> str:
        for name in self.numbers:
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
    names = [entry for entry in manifest["files"] if entry["path"].startswith((f"{TOKENS}.", f"{DOCUMENTS}."))]
    numbers = {entry["path"]: open_numbers(path / entry["path"], entry["dtype"]) for entry in names}
    return Corpus(path, manifest, tokenizer, numbers)
