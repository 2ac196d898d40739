"""Secrets in bytes of any length, found window by window; and text with its secrets taken out."""

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Protocol

from meristem.safety.patterns import LONGEST_BYTES, PATTERNS, SecretPattern

_WINDOW_BYTES: Final = 1 << 20
_CONTEXT_BYTES: Final = 8
_SHORTEST_BYTES: Final = 10
"""Of a text with a secret in it, an address with a password of three letters."""
_UTF16: Final = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class Readable(Protocol):
    """What gives bytes, fewer than were wanted only where it ends or has no more at hand."""

    def read(self, size: int, /) -> bytes | None: ...


@dataclass(frozen=True)
class Secret:
    """One secret. start: of its value in what was read. line: counted from 1.

    value: for a fingerprint; nothing that is written or printed may hold it.
    """

    pattern: SecretPattern
    start: int
    line: int
    value: bytes

    def __repr__(self) -> str:
        return f"Secret({self.pattern.id}, line {self.line}, {len(self.value)} bytes)"


def secrets_in(window: bytes) -> list[tuple[SecretPattern, int, int, int]]:
    """The secrets of a text in their order: the pattern, where its match begins, and where its value does and ends."""
    found, taken = list[tuple[SecretPattern, int, int, int]](), bytearray(len(window))
    for pattern, keyword, at in _occurrences(window):
        match = pattern.pattern.match(window, at)
        if match is None or not pattern.is_secret(match["value"]):
            continue
        start, end = match.span("value")
        # The same bytes are one secret, of the first pattern; a keyword within its value begins no other.
        if taken.find(1, start, end) < 0 and taken.find(1, at, at + len(keyword)) < 0:
            found.append((pattern, at, start, end))
            taken[start:end] = b"\1" * (end - start)
    return sorted(found, key=lambda each: each[2])


def _occurrences(window: bytes) -> Iterator[tuple[SecretPattern, bytes, int]]:
    """Where the keywords of each pattern stand, one pattern after the other."""
    folded = window.lower()
    for pattern in PATTERNS:
        text = folded if pattern.is_folded else window
        for keyword in pattern.keywords:
            at = text.find(keyword)
            while at >= 0:
                yield pattern, keyword, at
                at = text.find(keyword, at + len(keyword))


def find_secrets(stream: Readable) -> Iterator[Secret]:
    """The secrets of everything that ``stream`` gives, in their order. UTF-16 with its mark is read as text.

    Memory is that of a window, 1 MiB, whatever the length. A secret on the edge of two windows is found once.
    """
    kept, offset, n_lines = b"", 0, 0
    decided = resume = 0
    for block in _blocks(stream):
        window = kept + block
        # A match that begins later may go on beyond the window, and is found in the next.
        before, decided = decided, offset + (max(len(window) - LONGEST_BYTES, 0) if block else len(window))
        line_at, line = 0, n_lines
        for pattern, at, start, end in secrets_in(window):
            if not before <= offset + at < decided or offset + start < resume:
                continue
            line_at, line, resume = start, line + window.count(b"\n", line_at, start), offset + end
            yield Secret(pattern, offset + start, line + 1, window[start:end])
        drop = max(decided - _CONTEXT_BYTES - offset, 0)
        n_lines += window.count(b"\n", 0, drop)
        kept, offset = window[drop:], offset + drop


def _blocks(stream: Readable) -> Iterator[bytes]:
    """What the stream gives, in blocks that are not empty; then an empty one."""
    decoder: codecs.IncrementalDecoder | None = None
    block = stream.read(_WINDOW_BYTES)
    if block and block.startswith(_UTF16):
        decoder = codecs.getincrementaldecoder("utf-16")(errors="replace")
    while block:
        text = decoder.decode(block).encode("utf-8", "replace") if decoder else block
        if text:
            yield text
        block = stream.read(_WINDOW_BYTES)
    yield b""


def redact_secrets(text: str) -> str:
    """The text with each secret replaced by the name of its kind, as ``[secret: github-token]``."""
    window = text.encode("utf-8", "surrogatepass")
    found = secrets_in(window) if len(window) >= _SHORTEST_BYTES else []
    if not found:
        return text
    parts, at = [], 0
    for pattern, _, start, end in found:
        parts += [window[at:start], f"[secret: {pattern.id}]".encode()]
        at = end
    return b"".join((*parts, window[at:])).decode("utf-8", "surrogatepass")
