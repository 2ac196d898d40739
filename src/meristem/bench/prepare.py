"""How long a text takes to be prepared, beside reading and writing it, and beside the ``tokenizers`` library alone."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Final

import numpy as np
import tokenizers

from meristem.bench.measure import Row, medians, timed
from meristem.data.config import DataConfig, TokenizerConfig
from meristem.data.prepare import prepare
from meristem.data.sources import documents
from meristem.data.tokenizer import Tokenizer, library_file, train_tokenizer
from meristem.device.allocator import peak_process_bytes

DEFAULT_BYTES: Final = 256_000_000
MOST_PAIRED_BYTES: Final = 16_000_000
"""Of the text that is cut into byte pairs, which takes a hundred times as long."""

ENTRIES: Final = 4096
MOST_MEMORY_MB: Final = 1000.0
"""Of the whole process, whatever it measured before."""

LEAST: Final = {"byte": "reading and writing it", "bpe": "the tokenizers library alone"}
"""What preparing is measured against, by kind of tokenizer."""

_DOCUMENT_BYTES: Final = 1 << 18
_LEARNED_FROM_BYTES: Final = 1 << 21
_SOURCES_BYTES: Final = 1 << 24
_AT_ONCE: Final = 16


def preparing(n_repeats: int, size_bytes: int = DEFAULT_BYTES) -> Iterator[Row]:
    """The speed of preparing ``size_bytes`` of source code in documents of 256 KiB, and the least that takes."""
    with tempfile.TemporaryDirectory(prefix="meristem-bench-") as directory:
        place = Path(directory)
        _write_texts(place / "text", size_bytes)
        paired = min(size_bytes, MOST_PAIRED_BYTES)
        texts = _write_texts(place / "paired", paired)
        pairs = train_tokenizer(
            TokenizerConfig(kind="bpe", vocab_size=ENTRIES), texts[: max(1, _LEARNED_FROM_BYTES // _DOCUMENT_BYTES)]
        )
        library, numbers = tokenizers.Tokenizer.from_str(library_file(pairs).decode()), count()

        def prepared(text: str, tokenizer: Tokenizer | TokenizerConfig) -> None:
            root = place / f"store-{next(numbers)}"
            prepare(DataConfig(source=str(place / text), root=root), tokenizer)
            shutil.rmtree(root)

        candidates = {
            "disk": timed(lambda: _copied(place)),
            "byte": timed(lambda: prepared("text", TokenizerConfig())),
            "library": timed(lambda: _encoded(library, texts)),
            "bpe": timed(lambda: prepared("paired", pairs)),
        }
        seconds = medians(candidates, n_repeats=n_repeats, n_warm=1)
    for name, beside, most, size in (("byte", "disk", 2.0, size_bytes), ("bpe", "library", 1.5, paired)):
        least = LEAST[name]
        yield Row(f"preparing, {name}", size / seconds[name] / 1e6, "MB/s", note=f"{size / 1e6:.0f} MB")
        yield Row(f"{least}, {name}", size / seconds[beside] / 1e6, "MB/s")
        yield Row(f"preparing, {name}, beside {least}", seconds[name] / seconds[beside], "x", most, "<=")
    peak_mb = peak_process_bytes() / 1e6
    yield Row("peak memory of the process", peak_mb, "MB", MOST_MEMORY_MB, "<=", "torch included")


def _write_texts(place: Path, size_bytes: int) -> list[bytes]:
    """Documents of the sources of the standard library, over and over with a number before each; the first of them."""
    place.mkdir()
    prose = b""
    for document in documents(DataConfig(source="stdlib")):
        prose += document.text
        if len(prose) >= min(size_bytes, _SOURCES_BYTES):
            break
    texts = []
    for number in range(-(-size_bytes // _DOCUMENT_BYTES)):
        first = number * _DOCUMENT_BYTES % len(prose)
        body = (prose[first : first + _DOCUMENT_BYTES] + prose)[:_DOCUMENT_BYTES].decode(errors="ignore")
        text = f"# {number}\n{body}".encode()
        (place / f"{number:06}.py").write_bytes(text)
        if number * _DOCUMENT_BYTES < MOST_PAIRED_BYTES:
            texts.append(text)
    return texts


def _copied(place: Path) -> None:
    """Every file read, and all of it written to the disk."""
    with open(place / "copy", "wb") as file:
        for path in sorted((place / "text").iterdir()):
            file.write(path.read_bytes())
        file.flush()
        os.fsync(file.fileno())
    (place / "copy").unlink()


def _encoded(library: tokenizers.Tokenizer, texts: Sequence[bytes]) -> None:
    """The ids of every text."""
    for first in range(0, len(texts), _AT_ONCE):
        for found in library.encode_batch_fast([text.decode() for text in texts[first : first + _AT_ONCE]]):
            np.array(found.ids, dtype=np.uint16)
