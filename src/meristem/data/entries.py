"""What the entries of a file of the ``tokenizers`` library stand for: bytes of text, or none; and what the file loses.

Such a file may do anything to a text before it looks its entries up. Where all that it does can be undone, the bytes of
the ids of a text, joined, are the text; where not, they are the text as the tokenizer has it, and ``Entries.loses``
says why it may be another.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

import tokenizers

from meristem.errors import DataError

UNKNOWN: Final = "\ufffd".encode()
"""What an entry for whatever has no entry stands for."""

_BYTE: Final = re.compile("<0x([0-9A-Fa-f]{2})>")
_KEEPING: Final = frozenset({"ByteLevel", "Split", "Digits", "FixedLength", "Punctuation", "UnicodeScripts"})
"""Steps that cut a text and leave every character of it, unless set to remove what they cut at."""


class Entries(NamedTuple):
    """tokens: the bytes of each id; none for a special token, which no text turns into.

    special: the special tokens with their ids. prefix: what is put before a text, and belongs to none. loses: why a
    text may come back changed; None where it never does. has_bytes: whether text that is no UTF-8 can be said.
    """

    tokens: tuple[bytes, ...]
    special: Mapping[str, int]
    prefix: bytes
    loses: str | None
    has_bytes: bool


def entries_of(model: tokenizers.Tokenizer, described: Mapping[str, Any], where: str) -> Entries:
    """described: what the file says, of which ``model`` was made.

    Raises DataError for a file whose ids depend on chance, or do not have a text of their own.
    """
    if described["model"].get("dropout"):
        raise DataError(
            f"{where} has model.dropout = {described['model']['dropout']}: the ids of a text would depend on chance. "
            f"Set it to null there.",
            path=where,
            found=described["model"]["dropout"],
        )
    found = model.get_added_tokens_decoder()
    added = {token.content: token for token in found.values()}
    is_byte_level = any(
        step["type"] == "ByteLevel" for key in ("pre_tokenizer", "decoder") for step in _steps(described, key)
    )
    written = _byte_level() if is_byte_level else _decoded(described, where)
    unknown = _unknown(described["model"])
    special = {token.content: number for number, token in found.items() if token.special and token.content != unknown}
    ids = model.get_vocab()
    tokens = [b""] * (max(ids.values(), default=-1) + 1)
    for entry, token_id in ids.items():
        if entry in special:
            continue
        if entry == unknown:
            tokens[token_id] = UNKNOWN
        elif entry in added:
            tokens[token_id] = entry.encode()
        else:
            tokens[token_id] = written(entry)
    known = set(tokens)
    n_missing = sum(bytes([value]) not in known for value in range(256))
    return Entries(
        tokens=tuple(tokens),
        special=special,
        prefix=b"" if is_byte_level else _prefix(described),
        loses=_loses(described, list(added.values()), is_byte_level, n_missing),
        has_bytes=all(bytes([value]) in known for value in range(0x80, 0x100)),
    )


def byte_symbols() -> Iterator[tuple[int, str]]:
    """Each byte with the printable character that stands for it (Radford et al. 2019, GPT-2)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    shifted = 0x100
    for value in range(256):
        if value in printable:
            yield value, chr(value)
        else:
            yield value, chr(shifted)
            shifted += 1


def is_cut_by_lines(described: Mapping[str, Any]) -> bool:
    """Whether no entry spans a line end between two characters that are no white space, as with GPT-2's words."""
    steps = list(_steps(described, "pre_tokenizer"))
    is_plain = [step["type"] for step in steps] == ["ByteLevel"] and steps[0].get("use_regex", True)
    return is_plain and described.get("normalizer") is None


def _steps(described: Mapping[str, Any], key: str) -> Iterator[Mapping[str, Any]]:
    """The steps of a part of the file in their order, those of a sequence one by one."""
    found = described.get(key)
    if not found:
        return
    inner = {"pre_tokenizer": "pretokenizers", "decoder": "decoders", "normalizer": "normalizers"}[key]
    for step in found[inner] if found["type"] == "Sequence" else [found]:
        yield from _steps({key: step}, key) if step["type"] == "Sequence" else [step]


def _byte_level() -> Callable[[str], bytes]:
    byte_of = {symbol: value for value, symbol in byte_symbols()}

    def written(entry: str) -> bytes:
        """An entry with another character is one that somebody put there by hand, as it is."""
        if all(symbol in byte_of for symbol in entry):
            return bytes(byte_of[symbol] for symbol in entry)
        return entry.encode()

    return written


def _decoded(described: Mapping[str, Any], where: str) -> Callable[[str], bytes]:
    """How the decoder of the file writes one entry in the middle of a text."""
    steps = list(_steps(described, "decoder"))
    known = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace", "WordPiece", "BPEDecoder"}
    unknown = sorted({step["type"] for step in steps} - known)
    if unknown:
        raise DataError(
            f"{where} has a decoder of type {unknown[0]}, by which an entry has no text of its own. Use a tokenizer "
            f"with one of {', '.join(sorted(known | {'ByteLevel'}))}.",
            path=where,
            found=unknown[0],
        )
    has_bytes = any(step["type"] == "ByteFallback" for step in steps)

    def written(entry: str) -> bytes:
        byte = _BYTE.fullmatch(entry)
        if has_bytes and byte:
            return bytes([int(byte[1], 16)])
        for step in steps:
            if step["type"] == "Replace" and "String" in step["pattern"]:
                entry = entry.replace(step["pattern"]["String"], step["content"])
            elif step["type"] == "Metaspace":
                entry = entry.replace(step["replacement"], " ")
            elif step["type"] == "BPEDecoder":
                entry = entry.replace(step["suffix"], " ")
            elif step["type"] == "WordPiece":
                is_inside = entry.startswith(step["prefix"])
                entry = entry.removeprefix(step["prefix"]) if is_inside else f" {entry}"
        return (entry if steps else f" {entry}").encode()

    return written


def _prefix(described: Mapping[str, Any]) -> bytes:
    """The space that a decoder takes away from the beginning of a text."""
    steps = list(_steps(described, "decoder"))
    strips = any(
        (step["type"] == "Strip" and step["content"] == " " and step["start"] > 0)
        or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        or step["type"] == "WordPiece"
        for step in steps
    )
    return b" " if strips or not steps else b""


def _unknown(model: Mapping[str, Any]) -> str | None:
    """The entry for whatever has no entry."""
    if model.get("type") == "Unigram":
        number = model.get("unk_id")
        return None if number is None else str(model["vocab"][number][0])
    return model.get("unk_token")


def _loses(described: Mapping[str, Any], added: list[Any], is_byte_level: bool, n_missing: int) -> str | None:
    """Why a text may come back changed, in the words of the file; None where it cannot."""
    model = described["model"]
    if model["type"] not in ("BPE", "Unigram"):
        return f"model.type is {model['type']}"
    for step in _steps(described, "normalizer"):
        return f"normalizer is {step['type']}"
    if not is_byte_level:
        return "its entries are not made of bytes"
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            return f"model.{key} is {model[key]!r}"
    for step in _steps(described, "pre_tokenizer"):
        if step.get("add_prefix_space"):
            return "pre_tokenizer.add_prefix_space is true"
        if step["type"] not in _KEEPING or step.get("behavior") == "Removed":
            return f"pre_tokenizer is {step['type']}, which removes characters"
    for token in added:
        if not token.special and (token.lstrip or token.rstrip):
            return f"the added token {token.content!r} takes the white space beside it"
    return f"{n_missing} of the 256 bytes have no entry" if n_missing else None
