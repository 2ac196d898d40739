"""Text to ids and back, without loss: bytes, and byte pairs learned from the text.

Every id stands for a fixed run of bytes (``tokens``), and the bytes of an encoded text, joined, are the text. So the
bits per byte of any tokenizer can be compared, and decoding needs no library.
"""

import codecs
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import orjson
import tokenizers

from meristem.checkpoint.atomic import sha256, write_atomic
from meristem.data.byte_pairs import learn
from meristem.data.config import TokenizerConfig
from meristem.data.files import read
from meristem.errors import DataError

FILE: Final = "tokenizer.json"
_BYTE_FILE: Final = orjson.dumps({"schema": "meristem.tokenizer/1", "kind": "byte"})
_PORTION: Final = 1 << 16
_NO_UTF8: Final = re.compile("([\udc80-\udcff]+)")
# The pre-tokenizer never joins across such a line end, so text cut there has the ids it has in one piece.
_SAFE_CUT: Final = re.compile(rb"[!-~]\n(?=[!-~])")


@dataclass(frozen=True)
class Tokenizer:
    """The bytes of each id, and how a text is cut into them.

    content: the bytes of ``tokenizer.json``, from which ``tokenizer_from_bytes`` makes the same tokenizer again.
    """

    kind: str
    tokens: tuple[bytes, ...]
    content: bytes
    encode_batch: Callable[[Sequence[bytes]], list[np.ndarray]]

    @property
    def vocab_size(self) -> int:
        """How many ids there are."""
        return len(self.tokens)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the file that describes it."""
        return sha256(self.content)

    @cached_property
    def byte_lengths(self) -> np.ndarray:
        """How many bytes each id stands for: summed over the ids of a text, the bytes of the text."""
        return np.array([len(token) for token in self.tokens], dtype=np.uint32)

    def encode(self, text: str) -> list[int]:
        """The ids of a text; ``decode`` gives it back.

        What Python has for a byte that is no UTF-8 (U+DC80 to U+DCFF, PEP 383) counts as that byte.
        """
        try:
            return self.encode_bytes(text.encode("utf-8", "surrogateescape"))
        except UnicodeEncodeError as cause:
            raise DataError(
                f"the text holds a lone surrogate at character {cause.start}, which UTF-8 cannot say. Remove it.",
                offset=cause.start,
            ) from cause

    def encode_bytes(self, text: bytes) -> list[int]:
        """The ids of one text given as bytes."""
        ids: list[int] = self.encode_batch([text])[0].tolist()
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that the ids stand for."""
        given, tokens = list(ids), self.tokens
        if given and not (min(given) >= 0 and max(given) < len(tokens)):
            return b"".join(map(self._token, given))  # which says what it is that is none
        return b"".join([tokens[token_id] for token_id in given])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; bytes that are not UTF-8, as half a character at the end, show as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decoder(self) -> "Decoder":
        """A decoder for ids that come one at a time."""
        return Decoder(self)

    def to_bytes(self) -> bytes:
        """What a checkpoint keeps as ``tokenizer.json``."""
        return self.content

    def save(self, directory: Path) -> Path:
        """Write ``tokenizer.json`` into a directory."""
        path = directory / FILE
        write_atomic(path, self.content)
        return path

    def _token(self, token_id: int) -> bytes:
        if not 0 <= token_id < len(self.tokens):
            raise DataError(f"id {token_id} is not in a vocabulary of {len(self.tokens)}.", found=token_id)
        return self.tokens[token_id]


class Decoder:
    """Text from ids one at a time: a character appears when its last byte has come."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        """The characters that this id completes; often none or several."""
        return self._characters.decode(self._tokenizer.decode_bytes([token_id]))

    def finish(self) -> str:
        """What is left: U+FFFD when the ids ended inside a character."""
        return self._characters.decode(b"", final=True)


def byte_tokenizer() -> Tokenizer:
    """256 ids, each its own byte: any bytes at all, nothing to learn."""
    return Tokenizer(
        kind="byte",
        tokens=tuple(bytes([value]) for value in range(256)),
        content=_BYTE_FILE,
        encode_batch=lambda texts: [np.frombuffer(text, dtype=np.uint8) for text in texts],
    )


def train_tokenizer(config: TokenizerConfig, texts: Iterable[bytes]) -> Tokenizer:
    """The tokenizer of ``config``, learned from ``texts`` where it learns: same texts, same file.

    Byte pairs (Sennrich et al. 2016) start from all 256 bytes, so no text is unknown. A short text gives fewer
    entries than ``config.vocab_size``.
    """
    if config.kind == "byte":
        return byte_tokenizer()
    content = learn(config.vocab_size, (_text(portion) for text in texts for portion in _portions(text)))
    return tokenizer_from_bytes(content)


def tokenizer_from_bytes(content: bytes, where: str = FILE) -> Tokenizer:
    """The tokenizer that a ``tokenizer.json`` describes; for byte pairs it is a file of the ``tokenizers`` library.

    where: the name used in errors. A file whose encoding loses or adds anything is refused.
    """
    try:
        described = orjson.loads(content)
    except orjson.JSONDecodeError as cause:
        raise DataError(f"{where} is not JSON: {cause}. Prepare the corpus again.", path=where) from cause
    if isinstance(described, dict) and described.get("kind") == "byte":
        return byte_tokenizer()
    _require_lossless(described, where)
    try:
        model = tokenizers.Tokenizer.from_str(content.decode())
    except Exception as cause:  # the library knows no narrower one
        raise DataError(f"{where} is not a file of the tokenizers library: {cause}.", path=where) from cause

    def encode_batch(texts: Sequence[bytes]) -> list[np.ndarray]:
        portions = [[run for portion in _portions(text) for run in _runs(portion)] for text in texts]
        encoded = iter(model.encode_batch_fast([run for runs in portions for run in runs if isinstance(run, str)]))
        ids = [
            [np.array(next(encoded).ids, dtype=np.uint32) if isinstance(run, str) else id_of[list(run)] for run in runs]
            for runs in portions
        ]
        return [np.concatenate(parts) if parts else np.empty(0, dtype=np.uint32) for parts in ids]

    tokens = _tokens(model, where)
    id_of = np.array([tokens.index(bytes([value])) for value in range(256)], dtype=np.uint32)
    return Tokenizer("bpe", tokens, content, encode_batch)


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer saved in a directory."""
    path = directory / FILE
    return tokenizer_from_bytes(read(path), str(path))


def _require_lossless(described: Any, where: str) -> None:
    """Refuse a file that changes text on the way in; the fields are those of the tokenizers library."""
    if not isinstance(described, dict) or not isinstance(described.get("model"), dict):
        raise DataError(f"{where} describes no tokenizer: expected kind 'byte' or a model of type BPE.", path=where)
    before = described.get("pre_tokenizer") or {}
    accepted: dict[str, tuple[object, object]] = {
        "model.type": (described["model"].get("type"), "BPE"),
        "model.unk_token": (described["model"].get("unk_token"), None),
        "model.dropout": (described["model"].get("dropout"), None),
        "normalizer": (described.get("normalizer"), None),
        "post_processor": (described.get("post_processor"), None),
        "truncation": (described.get("truncation"), None),
        "padding": (described.get("padding"), None),
        "added_tokens": (described.get("added_tokens"), []),
        "pre_tokenizer.type": (before.get("type"), "ByteLevel"),
        "pre_tokenizer.add_prefix_space": (before.get("add_prefix_space"), False),
    }
    for name, (found, expected) in accepted.items():
        if found != expected:
            raise DataError(
                f"{where} has {name} = {found!r}; only {expected!r} gives every text back as it was. "
                f"Train a tokenizer with tokenizer.kind=bpe.",
                path=where,
                found=found,
            )


def _tokens(model: tokenizers.Tokenizer, where: str) -> tuple[bytes, ...]:
    """The bytes of each id, undoing the characters that byte-level files write for bytes."""
    byte_of = {symbol: value for value, symbol in _byte_symbols()}
    try:
        tokens = tuple(
            bytes(byte_of[symbol] for symbol in entry)
            for entry, _ in sorted(model.get_vocab().items(), key=lambda item: item[1])
        )
    except KeyError as cause:
        raise DataError(f"{where} has an entry with {cause}, which stands for no byte.", path=where) from cause
    missing = {bytes([value]) for value in range(256)} - set(tokens)
    if missing or sorted(model.get_vocab().values()) != list(range(len(tokens))):
        raise DataError(
            f"{where} lacks {len(missing)} of the 256 bytes or skips ids; some text could not be encoded.", path=where
        )
    return tokens


def _byte_symbols() -> Iterator[tuple[int, str]]:
    """Each byte with the printable character that stands for it (Radford et al. 2019, GPT-2)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    shifted = 0x100
    for value in range(256):
        if value in printable:
            yield value, chr(value)
        else:
            yield value, chr(shifted)
            shifted += 1


def _portions(text: bytes) -> Iterator[bytes]:
    """A long text in pieces that have the ids they have within it: little memory, and work for every core."""
    start = 0
    while start < len(text):
        cut = _SAFE_CUT.search(text, start + _PORTION)
        end = cut.end() if cut else len(text)
        yield text[start:end]
        start = end


def _runs(portion: bytes) -> Iterator[str | bytes]:
    """What is UTF-8 of a portion as text, and what is not as bytes."""
    for run in _NO_UTF8.split(portion.decode("utf-8", "surrogateescape")):
        if run:
            yield run.encode("utf-8", "surrogateescape") if _NO_UTF8.match(run) else run


def _text(piece: bytes) -> str:
    try:
        return piece.decode()
    except UnicodeDecodeError as cause:
        raise DataError(
            f"byte {cause.start}, 0x{piece[cause.start]:02x}, is not UTF-8 ({cause.reason}); byte pairs are learned "
            f"from characters. "
            f"Leave the file out with data.exclude, or set tokenizer.kind=byte.",
            offset=cause.start,
        ) from cause
