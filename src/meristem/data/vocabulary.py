"""Entries learned from text, byte pairs or the pieces of a unigram model, in about linear time and where it can be
stopped.

The library learns in one call that no signal reaches. So from all but little text it learns in a process of its own,
which ends with the call, or with the process that made it.
"""

import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, BinaryIO, Final, Literal, cast

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from meristem.errors import WorkerDied

Kind = Literal["bpe", "unigram"]

LONGEST_WORD: Final = 256
"""Bytes of a word while entries are counted; a longer one counts as several, or each merge would read all of it again.
"""

_STEP: Final = 1e-4
"""By which the library ranks the bytes that a unigram model has no need of, in an order of chance."""

_DIGITS: Final = 6
"""Of a score that are kept: the last ones depend on the order of a sum."""

_AT_ONCE_BYTES: Final = 1 << 18
"""What is learned from without another process: less than a second in any case."""

_END: Final = (1 << 64) - 1
_PROGRAM: Final = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from meristem.data.vocabulary import serve
serve(sys.argv[2], int(sys.argv[3]))
"""


def learn(kind: Kind, vocab_size: int, texts: Iterable[str]) -> bytes:
    """The file of the tokenizers library that holds the entries of ``texts``, at most ``vocab_size``.

    Source: Sennrich et al. 2016 for bpe, Kudo 2018 for unigram; the bytes and the words of GPT-2 (Radford et al. 2019).
    """
    rest, first, size_bytes = iter(texts), [], 0
    for text in rest:
        first.append(text)
        size_bytes += len(text.encode())
        if size_bytes > _AT_ONCE_BYTES:
            return _learn_apart(kind, vocab_size, itertools.chain(first, rest))
    return _learn_here(kind, vocab_size, first)


def serve(kind: Kind, vocab_size: int) -> None:
    """Learn from the texts that come through stdin, write the file to stdout; stop when stdin closes before that."""
    sys.stdout.buffer.write(_learn_here(kind, vocab_size, _received(sys.stdin.buffer)))
    sys.stdout.buffer.flush()
    os._exit(0)  # the thread that waits for stdin is still waiting


def _learn_here(kind: Kind, vocab_size: int, texts: Iterable[str]) -> bytes:
    model = tokenizers.Tokenizer(models.BPE() if kind == "bpe" else models.Unigram())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.FixedLength(LONGEST_WORD)])
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "special_tokens": [],
        "initial_alphabet": sorted(pre_tokenizers.ByteLevel.alphabet()),
        "show_progress": False,
    }
    trainer = trainers.BpeTrainer(**settings) if kind == "bpe" else trainers.UnigramTrainer(**settings)
    model.train_from_iterator(texts, trainer=trainer)
    model.pre_tokenizer = words
    model.decoder = decoders.ByteLevel()
    return model.to_str().encode() if kind == "bpe" else _ranked(model.to_str())


def _ranked(file: str) -> bytes:
    """The file of a unigram model, with what chance put into it taken out: same texts, same file.

    The library counts in an order of chance, and on that depend: the last digits of a score, the order of pieces with
    one score, and by how many steps each of the bytes that no text needs lies above the lowest. These have that here.
    """
    described = json.loads(file)
    pieces = described["model"]["vocab"]
    lowest = min(score for _, score in pieces)
    scores = {
        piece: round(lowest if len(piece) == 1 and _is_by_steps(score - lowest) else score, _DIGITS)
        for piece, score in pieces
    }
    described["model"]["vocab"] = sorted(
        ([*entry] for entry in scores.items()), key=lambda entry: (-entry[1], entry[0])
    )
    return json.dumps(described, ensure_ascii=False, separators=(",", ":")).encode()


def _is_by_steps(difference: float) -> bool:
    steps = difference / _STEP
    return steps < 256.5 and abs(steps - round(steps)) < 1e-3


def _learn_apart(kind: Kind, vocab_size: int, texts: Iterable[str]) -> bytes:
    command = [sys.executable, "-c", _PROGRAM, json.dumps(sys.path), kind, str(vocab_size)]
    # A session of its own: Ctrl-C is for the caller, who then ends this.
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    sending, receiving = cast(BinaryIO, child.stdin), cast(BinaryIO, child.stdout)
    try:
        with suppress(BrokenPipeError):  # how it ended is said below
            for text in texts:
                content = text.encode()
                sending.write(len(content).to_bytes(8, "big") + content)
            sending.write(_END.to_bytes(8, "big"))
            sending.flush()
        learned = receiving.read()
        if child.wait() or not learned:
            raise WorkerDied(
                f"the process that learned the entries ended with {child.returncode} and gave nothing. Look whether "
                f"memory ran out, learn from less text, or set tokenizer.kind=byte.",
                found=child.returncode,
            )
        return learned
    finally:
        child.kill()
        child.wait()
        receiving.close()
        with suppress(BrokenPipeError):
            sending.close()


def _received(stream: BinaryIO) -> Iterable[str]:
    """The texts that the caller sends. From the last on, the end of ``stream`` is the end of this process."""
    while True:
        head = stream.read(8)
        size = int.from_bytes(head, "big")
        if size == _END:
            break
        content = stream.read(size)
        if len(head) < 8 or len(content) < size:
            os._exit(1)
        yield content.decode()
    threading.Thread(target=lambda: (stream.read(), os._exit(1)), daemon=True).start()
