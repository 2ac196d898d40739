"""Text to ids and back: bytes, entries learned from the text, and what others have made.

Every id stands for a fixed run of bytes (``tokens``), and the bytes of an encoded text, joined, are the text, unless
``loses`` says why not. So the bits per byte of any tokenizer can be compared, and decoding needs no library. A special
token stands for no bytes: no text turns into one, and decoded it is nothing.
"""

import codecs
import re
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import orjson
import tokenizers

from meristem.checkpoint.atomic import sha256, write_atomic
from meristem.data.config import TokenizerConfig
from meristem.data.entries import byte_symbols, entries_of, is_cut_by_lines
from meristem.data.files import read
from meristem.data.pieces import pieces_of
from meristem.data.vocabulary import Kind, learn
from meristem.errors import DataError

FILE: Final = "tokenizer.json"
_BYTE_FILE: Final = orjson.dumps({"schema": "meristem.tokenizer/1", "kind": "byte"})
_SCHEMA: Final = "meristem.tokenizer/2"
"""Of a file that says more than what others know: where documents begin and end, and how a chat is laid out."""

LEARNED_BYTES: Final = 1 << 16
"""Bytes of a long text that entries are learned from at once."""
_LONG: Final = 1 << 20
"""Bytes up to which a text is encoded in one piece, where entries may span lines."""
_LONGEST: Final = 1 << 26
"""Bytes of a text that may be held in memory until there is a place where it can be cut."""

_NO_UTF8: Final = re.compile("([\udc80-\udcff]+)")
# The pre-tokenizer never joins across such a line end, so text cut there has the ids it has in one piece.
_SAFE_CUT: Final = re.compile(rb"[!-~]\n(?=[!-~])")


EncodeBatch = Callable[[Sequence[bytes]], list[np.ndarray]]


@dataclass(frozen=True)
class Tokenizer:
    """The bytes of each id, and how a text is cut into them.

    content: the bytes of ``tokenizer.json``, from which ``tokenizer_from_bytes`` makes the same tokenizer again.
    special: the special tokens with their ids. bos_id, eos_id: those that begin and end a document; None where none
    does, which no other id stands in for.
    chat_template: how the messages of a chat are laid out, in Jinja.
    portion_bytes: a long text is cut at the first line end after so many bytes where no entry goes across, which leaves
    its ids as they are; 0 where every byte is an id of its own.
    loses: why a text may come back changed, None where it never does. prefix: bytes that are put before every text.
    """

    kind: str
    tokens: tuple[bytes, ...]
    content: bytes
    encode_batch: EncodeBatch
    special: Mapping[str, int] = field(default_factory=dict)
    bos_id: int | None = None
    eos_id: int | None = None
    chat_template: str | None = None
    portion_bytes: int = 0
    loses: str | None = None
    prefix: bytes = b""

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

    def begin(self, ids: Sequence[int]) -> list[int]:
        """The ids behind the one that begins a document, unless they have it or there is none."""
        has_begun = self.bos_id is None or (len(ids) > 0 and ids[0] == self.bos_id)
        return [*ids] if has_begun or self.bos_id is None else [self.bos_id, *ids]

    def encode_documents(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """The ids of whole documents, between those that begin and end one."""
        begin = np.array([] if self.bos_id is None else [self.bos_id], dtype=np.uint32)
        end = np.array([] if self.eos_id is None else [self.eos_id], dtype=np.uint32)
        found = self.encode_batch(texts)
        return [np.concatenate([begin, ids, end]) for ids in found] if len(begin) or len(end) else found

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that the ids stand for."""
        given, tokens = list(ids), self.tokens
        if given and not (min(given) >= 0 and max(given) < len(tokens)):
            return b"".join(map(self._token, given))  # which says what it is that is none
        return b"".join([tokens[token_id] for token_id in given])

    def ids_with(self, byte: int) -> frozenset[int]:
        """The ids that stand for bytes of which this is one."""
        if byte not in self._holding:
            held = bytes([byte])
            self._holding[byte] = frozenset(at for at, token in enumerate(self.tokens) if held in token)
        return self._holding[byte]

    @cached_property
    def _holding(self) -> dict[int, frozenset[int]]:
        return {}

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids of a whole text; bytes that are not UTF-8, as half a character at the end, show as
        U+FFFD."""
        return self.decode_bytes(ids).removeprefix(self.prefix).decode("utf-8", "replace")

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


class DocumentEncoder:
    """Ids of documents of which the long ones come in pieces: joined, they are those of the whole."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._long: Portions | None = None

    def encode(self, texts: Sequence[bytes], goes_on: Sequence[bool]) -> list[np.ndarray]:
        """The ids of each text; of one that goes on in the next, those that are certain by now."""
        if self._long is None and not any(goes_on):
            return self._tokenizer.encode_documents(texts)
        runs: list[list[bytes]] = []
        marks: list[tuple[list[int | None], list[int | None]]] = []
        for text, is_more in zip(texts, goes_on, strict=True):
            bos = [self._tokenizer.bos_id] if self._long is None else []
            if self._long is None and is_more:
                self._long = Portions(self._tokenizer.portion_bytes)
            runs.append([text] if self._long is None else list(self._long.feed(text, is_end=not is_more)))
            self._long = self._long if is_more else None
            marks.append((bos, [] if is_more else [self._tokenizer.eos_id]))
        encoded = iter(self._tokenizer.encode_batch([portion for run in runs for portion in run]))
        return [
            np.concatenate([_ids(bos), *(next(encoded) for _ in run), _ids(eos)])
            for run, (bos, eos) in zip(runs, marks, strict=True)
        ]


def _ids(found: Sequence[int | None]) -> np.ndarray:
    return np.array([each for each in found if each is not None], dtype=np.uint32)


class Portions:
    """A long text, which comes in pieces, in the portions that have the ids they have within it.

    size_bytes: as ``Tokenizer.portion_bytes``. A text that cannot be cut for ``_LONGEST`` bytes is cut all the same.
    """

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes, self._held = size_bytes, b""

    def feed(self, piece: bytes, *, is_end: bool) -> Iterator[bytes]:
        """The portions that are whole with one more piece; at the end, all that is left."""
        text, start = self._held + piece if self._held else piece, 0
        while self._size_bytes and (cut := _SAFE_CUT.search(text, start + self._size_bytes)):
            yield text[start : cut.end()]
            start = cut.end()
        rest = text[start:] if start else text
        if rest and (is_end or not self._size_bytes or len(rest) > _LONGEST):
            yield rest
            rest = b""
        self._held = rest


class Decoder:
    """Text from ids as they come: a character appears when its last byte has come."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, *token_ids: int) -> str:
        """The characters that these ids complete; often none or several."""
        return self._characters.decode(self._tokenizer.decode_bytes(token_ids))

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

    Byte pairs (Sennrich et al. 2016) and the pieces of a unigram model (Kudo 2018) start from all 256 bytes, so no text
    is unknown. A short text gives fewer entries than ``config.vocab_size``. Special tokens come behind what is learned.
    """
    if config.kind == "byte":
        plain = with_special(byte_tokenizer(), config.special_tokens)
    else:
        kind = cast(Kind, config.kind)  # those that are given are read, by ``data.given``
        n_learned = config.vocab_size - len(config.special_tokens)
        pieces = (_text(portion) for text in texts for portion in _portions(text, LEARNED_BYTES))
        plain = with_special(tokenizer_from_bytes(learn(kind, n_learned, pieces)), config.special_tokens)
    return with_marks(plain, bos=config.bos_token, eos=config.eos_token, chat_template=template_of(config))


def template_of(config: TokenizerConfig) -> str | None:
    """The chat template that the settings name."""
    if config.chat_template is None:
        return None
    path = config.chat_template.expanduser()
    try:
        return read(path).decode()
    except UnicodeDecodeError as cause:
        raise DataError(f"{path} is not UTF-8: {cause.reason} at byte {cause.start}.", path=str(path)) from cause


def most_entries(config: TokenizerConfig) -> int:
    """The most entries that a tokenizer which is made here may have."""
    return 256 + len(config.special_tokens) if config.kind == "byte" else config.vocab_size


def with_special(tokenizer: Tokenizer, names: Sequence[str]) -> Tokenizer:
    """The same with special tokens behind its entries."""
    if not names:
        return tokenizer
    model = tokenizers.Tokenizer.from_str(library_file(tokenizer).decode())
    model.add_special_tokens(list(names))
    made = from_library_file(model.to_str().encode(), FILE)
    if made.vocab_size != tokenizer.vocab_size + len(names):
        raise DataError(
            f"of the special tokens {', '.join(names)}, some are entries of the tokenizer already. Give each once, and "
            f"none that a text may hold.",
            found=list(names),
        )
    return made


def with_marks(
    tokenizer: Tokenizer, *, bos: str | None, eos: str | None, chat_template: str | None = None
) -> Tokenizer:
    """The same with other tokens around a document, or another template.

    bos, eos: the special tokens; "" for none, None for what there is. Raises DataError for one that is none of its
    special tokens.
    """
    chosen = {"bos": (bos, tokenizer.bos_id), "eos": (eos, tokenizer.eos_id)}
    ids = {what: has if name is None else _special_id(tokenizer, what, name) for what, (name, has) in chosen.items()}
    template = tokenizer.chat_template if chat_template is None else chat_template
    if (ids["bos"], ids["eos"], template) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.chat_template):
        return tokenizer
    name_of = {token_id: name for name, token_id in tokenizer.special.items()}
    described = {
        **_described(tokenizer),
        "schema": _SCHEMA,
        "bos_token": None if ids["bos"] is None else name_of[ids["bos"]],
        "eos_token": None if ids["eos"] is None else name_of[ids["eos"]],
        "chat_template": template,
    }
    return tokenizer_from_bytes(orjson.dumps(described))


def _special_id(tokenizer: Tokenizer, what: str, name: str) -> int | None:
    if not name:
        return None
    if name not in tokenizer.special:
        has = ", ".join(sorted(tokenizer.special)) or "none"
        raise DataError(
            f"tokenizer.{what}_token is '{name}', which is no special token of this tokenizer; it has {has}. Name one "
            f"of these, or add it with tokenizer.special_tokens where the tokenizer is made here.",
            found=name,
            accepted=sorted(tokenizer.special),
        )
    return tokenizer.special[name]


def _described(tokenizer: Tokenizer) -> dict[str, Any]:
    """What the file of a tokenizer says of its entries, as part of one that says more."""
    described = orjson.loads(tokenizer.content)
    if described.get("schema") == _SCHEMA:
        return {key: described[key] for key in ("kind", "special_tokens", "library", "model") if key in described}
    if tokenizer.kind == "byte":
        return {"kind": "byte", "special_tokens": []}
    return {"kind": "library", "library": described}


def tokenizer_from_bytes(content: bytes, where: str = FILE) -> Tokenizer:
    """The tokenizer that a ``tokenizer.json`` describes: one of ours, or a file of the ``tokenizers`` library.

    where: the name used in errors.
    """
    try:
        described = orjson.loads(content)
    except orjson.JSONDecodeError as cause:
        raise DataError(f"{where} is not JSON: {cause}. Prepare the corpus again.", path=where) from cause
    if not isinstance(described, dict):
        raise _no_tokenizer(where)
    if described.get("schema") != _SCHEMA:
        return byte_tokenizer() if described.get("kind") == "byte" else _of_library(described, content, where)
    made = _of_kind(described, where)
    ids = {what: made.special.get(described[what] or "") for what in ("bos_token", "eos_token")}
    return replace(
        made,
        content=content,
        bos_id=ids["bos_token"],
        eos_id=ids["eos_token"],
        chat_template=described["chat_template"],
    )


def _of_kind(described: Mapping[str, Any], where: str) -> Tokenizer:
    """The tokenizer within a file that says more."""
    if described["kind"] == "byte":
        plain = byte_tokenizer()
        names = described["special_tokens"]
        special = {name: plain.vocab_size + number for number, name in enumerate(names)}
        return replace(plain, tokens=(*plain.tokens, *[b""] * len(names)), special=special)
    if described["kind"] == "library":
        return _of_library(described["library"], b"", where)
    if described["kind"] == "sentencepiece":
        return _of_pieces(b64decode(described["model"]), where)
    raise _no_tokenizer(where)


def sentencepiece_file(model: bytes) -> bytes:
    """The ``tokenizer.json`` of ours for the content of a ``.model`` file of SentencePiece."""
    marks = {"bos_token": None, "eos_token": None, "chat_template": None}
    return orjson.dumps({"schema": _SCHEMA, "kind": "sentencepiece", "model": b64encode(model).decode(), **marks})


def _of_pieces(model: bytes, where: str) -> Tokenizer:
    """model: the content of a ``.model`` file."""
    pieces = pieces_of(model, where)

    def encode_batch(texts: Sequence[bytes]) -> list[np.ndarray]:
        portions = [[_text(piece) for piece in _portions(text, _LONG)] for text in texts]
        encoded = iter(pieces.encode([piece for parts in portions for piece in parts]))
        ids = [[np.array(next(encoded), dtype=np.uint32) for _ in parts] for parts in portions]
        return [np.concatenate(parts) if parts else np.empty(0, dtype=np.uint32) for parts in ids]

    return Tokenizer(
        kind="sentencepiece",
        tokens=pieces.tokens,
        content=b"",
        encode_batch=encode_batch,
        special=pieces.special,
        portion_bytes=_LONG,
        loses="SentencePiece changes white space and joins characters that look alike",
        prefix=pieces.prefix,
    )


def _no_tokenizer(where: str) -> DataError:
    return DataError(
        f"{where} describes no tokenizer: expected kind 'byte', or a file of the tokenizers library with a model.",
        path=where,
    )


def _of_library(described: Mapping[str, Any], content: bytes, where: str) -> Tokenizer:
    """described: the content of a file of the ``tokenizers`` library."""
    if not isinstance(described.get("model"), dict):
        raise _no_tokenizer(where)
    try:
        model = tokenizers.Tokenizer.from_str(orjson.dumps(described).decode())
    except BaseException as cause:  # the library knows no narrower one, and where it panics none at all
        if isinstance(cause, KeyboardInterrupt | SystemExit):
            raise
        raise DataError(f"{where} is not a file of the tokenizers library: {cause}.", path=where) from cause
    model.no_truncation()  # those of a file are for rows of a batch; a text is encoded whole
    model.no_padding()
    model.encode_special_tokens = True
    entries = entries_of(model, described, where)
    framed, plain = model.encode("").ids, model.encode("", add_special_tokens=False).ids
    bos_id = framed[0] if len(framed) > len(plain) and framed[0] in entries.special.values() else None
    if "[CLS]" in entries.special and bos_id == entries.special["[CLS]"]:
        bos_id = None  # it begins what is classified, not a document
    portion = LEARNED_BYTES if is_cut_by_lines(described) else _LONG
    apart = _not_as_text(described)
    id_of = _byte_ids(entries.tokens) if entries.has_bytes else None

    def encode_batch(texts: Sequence[bytes]) -> list[np.ndarray]:
        portions = [[run for piece in _portions(text, portion) for run in _runs(piece, apart)] for text in texts]
        encoded = iter(
            model.encode_batch_fast(
                [run for runs in portions for run in runs if isinstance(run, str)], add_special_tokens=False
            )
        )
        ids = [
            [np.array(next(encoded).ids, dtype=np.uint32) if isinstance(run, str) else raw(run) for run in runs]
            for runs in portions
        ]
        return [np.concatenate(parts) if parts else np.empty(0, dtype=np.uint32) for parts in ids]

    def raw(run: bytes) -> np.ndarray:
        if id_of is None:
            raise DataError(
                f"byte 0x{run[0]:02x} is not UTF-8, and {where} has no entries for bytes. Leave the file out with "
                f"data.exclude, or set tokenizer.kind=byte.",
                path=where,
            )
        return id_of[list(run)]

    return Tokenizer(
        kind=str(described["model"].get("type", "")).lower(),
        tokens=entries.tokens,
        content=content,
        encode_batch=encode_batch,
        special=entries.special,
        bos_id=bos_id,
        portion_bytes=portion,
        loses=entries.loses,
        prefix=entries.prefix,
    )


def _not_as_text(described: Mapping[str, Any]) -> re.Pattern[str] | None:
    """What would become a special token though it stands in a text: pieces of a unigram model that are both."""
    names = {token["content"] for token in described.get("added_tokens") or () if token.get("special")}
    model = described["model"]
    both = sorted(names & {piece for piece, _ in model["vocab"]}) if model.get("type") == "Unigram" else []
    return re.compile("|".join(map(re.escape, both))) if both else None


def _byte_ids(tokens: Sequence[bytes]) -> np.ndarray:
    """The id of each byte; 0 for those below 0x80 that have none, which UTF-8 says as text."""
    first = {token: number for number, token in reversed(list(enumerate(tokens)))}
    return np.array([first.get(bytes([value]), 0) for value in range(256)], dtype=np.uint32)


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer saved in a directory."""
    path = directory / FILE
    return tokenizer_from_bytes(read(path), str(path))


def library_file(tokenizer: Tokenizer) -> bytes:
    """The same tokenizer as a file of the ``tokenizers`` library, which knows bytes as byte pairs without a pair."""
    described = orjson.loads(tokenizer.content)
    if tokenizer.kind == "sentencepiece":
        raise DataError(
            "a SentencePiece model is no file of the tokenizers library. Convert it with transformers, and train with "
            "tokenizer.kind=file.",
            found=tokenizer.kind,
        )
    if tokenizer.kind != "byte":
        return orjson.dumps(described["library"]) if described.get("schema") == _SCHEMA else tokenizer.content
    model = tokenizers.Tokenizer(tokenizers.models.BPE({symbol: value for value, symbol in byte_symbols()}, []))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.add_special_tokens(list(tokenizer.special))
    return model.to_str().encode()


def from_library_file(content: bytes, where: str) -> Tokenizer:
    """The inverse of ``library_file``, also where another program has written the file again."""
    found = tokenizer_from_bytes(content, where)
    has_pairs = bool((orjson.loads(content).get("model") or {}).get("merges"))
    plain = byte_tokenizer()
    is_byte = found.kind == "bpe" and not has_pairs and found.tokens[:256] == plain.tokens
    if not is_byte or any(found.tokens[256:]) or found.bos_id is not None:
        return found
    if not found.special:
        return plain
    marks = {"bos_token": None, "eos_token": None, "chat_template": None}
    described = {"schema": _SCHEMA, "kind": "byte", "special_tokens": list(found.special), **marks}
    return tokenizer_from_bytes(orjson.dumps(described))


def _portions(text: bytes, size_bytes: int) -> Iterator[bytes]:
    """A long text in pieces that have the ids they have within it: little memory, and work for every core."""
    start = 0
    while start < len(text):
        cut = _SAFE_CUT.search(text, start + size_bytes)
        end = cut.end() if cut else len(text)
        yield text[start:end]
        start = end


def _runs(portion: bytes, apart: re.Pattern[str] | None) -> Iterator[str | bytes]:
    """What is UTF-8 of a portion as text, and what is not as bytes. A text is cut within what ``apart`` matches."""
    for run in _NO_UTF8.split(portion.decode("utf-8", "surrogateescape")):
        if run and _NO_UTF8.match(run):
            yield run.encode("utf-8", "surrogateescape")
        elif run:
            cuts = [found.start() + 1 for found in apart.finditer(run)] if apart else []
            yield from (run[start:end] for start, end in pairwise((0, *cuts, len(run))) if start < end)


def _text(piece: bytes) -> str:
    try:
        return piece.decode()
    except UnicodeDecodeError as cause:
        raise DataError(
            f"byte {cause.start}, 0x{piece[cause.start]:02x}, is not UTF-8 ({cause.reason}); entries are learned from "
            f"characters, and SentencePiece reads no others. Leave the file out with data.exclude, or set "
            f"tokenizer.kind=byte.",
            offset=cause.start,
        ) from cause
