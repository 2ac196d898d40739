"""Models of SentencePiece, which its own library runs: what each piece stands for."""

from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

from meristem.data.entries import UNKNOWN
from meristem.errors import DataError
from meristem.extras import imported

_SPACE: Final = "\u2581"
"""What the library writes for a space."""


class Pieces(NamedTuple):
    """tokens: the bytes of each id. special: the pieces that no text has. prefix: what is put before a text.

    encode: the ids of texts.
    """

    tokens: tuple[bytes, ...]
    special: Mapping[str, int]
    prefix: bytes
    encode: Callable[[Sequence[str]], list[list[int]]]


def pieces_of(model: bytes, where: str) -> Pieces:
    """model: the content of a ``.model`` file. MissingExtra where the library is not installed."""
    library = imported("sentencepiece", "a SentencePiece model")
    try:
        read = library.SentencePieceProcessor(model_proto=model)
    except RuntimeError as cause:
        raise DataError(
            f"{where} is no SentencePiece model. Name the .model file that its training wrote.", path=where
        ) from cause
    tokens, special = [], {}
    for number in range(read.vocab_size()):
        piece = read.id_to_piece(number)
        if read.is_control(number):
            special[piece] = number
        if read.is_control(number) or read.is_unused(number):
            tokens.append(b"")
        elif read.is_unknown(number):
            tokens.append(UNKNOWN)
        elif read.is_byte(number):
            tokens.append(bytes([int(piece[3:-1], 16)]))
        else:
            tokens.append(piece.replace(_SPACE, " ").encode())
    first = read.encode_as_pieces("a")
    prefix = b" " if first and first[0].startswith(_SPACE) else b""
    return Pieces(tuple(tokens), special, prefix, lambda texts: read.encode(list(texts), out_type=int))
