"""Byte pairs learned from text, in about linear time and where it can be stopped.

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
from typing import BinaryIO, Final, cast

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from meristem.errors import WorkerDied

LONGEST_WORD: Final = 256
"""Bytes of a word while pairs are counted; a longer one counts as several, or each merge would read all of it again."""

_AT_ONCE_BYTES: Final = 1 << 18
"""What is learned from without another process: less than a second in any case."""

_END: Final = (1 << 64) - 1
_PROGRAM: Final = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from meristem.data.byte_pairs import serve
serve(int(sys.argv[2]))
"""


def learn(vocab_size: int, texts: Iterable[str]) -> bytes:
    """The file of the tokenizers library that holds the byte pairs of ``texts``, at most ``vocab_size`` entries.

    Source: Sennrich et al. 2016; the bytes and the words of GPT-2 (Radford et al. 2019).
    """
    rest, first, size_bytes = iter(texts), [], 0
    for text in rest:
        first.append(text)
        size_bytes += len(text.encode())
        if size_bytes > _AT_ONCE_BYTES:
            return _learn_apart(vocab_size, itertools.chain(first, rest))
    return _learn_here(vocab_size, first)


def serve(vocab_size: int) -> None:
    """Learn from the texts that come through stdin, write the file to stdout; stop when stdin closes before that."""
    sys.stdout.buffer.write(_learn_here(vocab_size, _received(sys.stdin.buffer)))
    sys.stdout.buffer.flush()
    os._exit(0)  # the thread that waits for stdin is still waiting


def _learn_here(vocab_size: int, texts: Iterable[str]) -> bytes:
    model = tokenizers.Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.FixedLength(LONGEST_WORD)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer=trainer)
    model.pre_tokenizer = words
    model.decoder = decoders.ByteLevel()
    return model.to_str().encode()


def _learn_apart(vocab_size: int, texts: Iterable[str]) -> bytes:
    command = [sys.executable, "-c", _PROGRAM, json.dumps(sys.path), str(vocab_size)]
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
                f"the process that learned byte pairs ended with {child.returncode} and gave nothing. Look whether "
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
