"""General-purpose compressors on the held-out text: a scale that needs no knowledge of language models."""

import bz2
import gzip
import lzma
from dataclasses import dataclass
from functools import lru_cache

HELD_OUT_BYTES = 1 << 20
"""Of the held-out text at most this much is compressed, from its start: enough for a figure, and a second or two."""

PRIMING_BYTES = 4 << 20
"""Of the training text at most this much is shown to xz first, from its end; its dictionary reaches twice as far."""


@dataclass(frozen=True)
class Baseline:
    """What one compressor needs per byte of held-out text."""

    name: str
    bits_per_byte: float


@lru_cache(maxsize=1)
def baselines(training: bytes, held_out: bytes) -> tuple[Baseline, ...]:
    """gzip, bz2 and xz on the held-out text alone, and xz after the training text.

    The last is the difference of two compressed sizes, with and without the held-out text at the end: like the model,
    xz may then refer to what it has read before. Of runs on one text, one after the other, only the first waits.
    """
    text = held_out[:HELD_OUT_BYTES]
    primer = training[-PRIMING_BYTES:]
    primed_bytes = len(lzma.compress(primer + text)) - len(lzma.compress(primer))
    sizes_bytes = {
        "gzip": len(gzip.compress(text)),
        "bz2": len(bz2.compress(text)),
        "xz": len(lzma.compress(text)),
        "xz given the training text": primed_bytes,
    }
    return tuple(Baseline(name, 8 * size_bytes / len(text)) for name, size_bytes in sizes_bytes.items())
