"""Byte pairs are learned in bounded work from any text, the same as ever from an ordinary one, and can be stopped."""

import random
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from meristem.data import vocabulary
from meristem.data.config import TokenizerConfig
from meristem.data.tokenizer import train_tokenizer
from meristem.data.vocabulary import LONGEST_WORD, learn
from meristem.errors import WorkerDied


def uncut(vocab_size: int, texts: list[str]) -> bytes:
    """What the library learns when no word is cut."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(texts, trainer=trainer)
    return model.to_str().encode()


@pytest.mark.parametrize("at_once", [0, vocabulary._AT_ONCE_BYTES])
def test_gr7_ordinary_text_gives_the_file_it_always_gave(at_once, monkeypatch):
    """Cutting long words changes nothing where there are none; nor does another process."""
    monkeypatch.setattr(vocabulary, "_AT_ONCE_BYTES", at_once)
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-c]*.py"))
    texts = [path.read_text("utf-8") for path in paths] + ["wächst 🌱\r\n" * 50, "a" * LONGEST_WORD]
    assert learn("bpe", 700, texts) == uncut(700, texts)


def test_gr7_a_word_without_end_is_counted_in_pieces():
    """The work for each merge is bounded by the pieces, of which an entry never holds more than one."""
    learned = train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=400), [b"a" * 50_000, "ä".encode() * 50_000])
    assert max(map(len, learned.tokens)) <= LONGEST_WORD
    assert learned.decode_bytes(learned.encode_bytes(b"a" * 12_345)) == b"a" * 12_345


@pytest.fixture
def letters(tmp_path):
    """Four million letters without a space."""
    path = tmp_path / "letters.txt"
    path.write_text("".join(random.Random(1).choices("abcdefghijklmnopqrstuvwxyz", k=4_000_000)))
    return path


LEARNER = """
import os, sys
from pathlib import Path
from meristem.data.vocabulary import learn
def texts():
    yield Path(sys.argv[1]).read_text()
    print("sent", flush=True)
try:
    learn("bpe", 2048, texts())
except KeyboardInterrupt:
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        print("stopped, no child is left", flush=True)
"""


def started(letters):
    """A process that has sent all letters to its own, which is learning; and the id of that one."""
    learner = subprocess.Popen([sys.executable, "-c", LEARNER, str(letters)], stdout=subprocess.PIPE, text=True)
    assert learner.stdout.readline() == "sent\n"
    child = int(Path(f"/proc/{learner.pid}/task/{learner.pid}/children").read_text())
    return learner, child


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.fault
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")
def test_gr7_ctrl_c_ends_the_learning(letters):
    learner, child = started(letters)
    learner.send_signal(signal.SIGINT)
    assert learner.communicate(timeout=60)[0] == "stopped, no child is left\n"
    assert is_gone(child)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")
def test_gr7_learning_ends_with_the_process_that_asked_for_it(letters):
    learner, child = started(letters)
    learner.kill()
    learner.communicate()
    end = time.monotonic() + 60
    while not is_gone(child) and time.monotonic() < end:
        time.sleep(0.01)
    assert is_gone(child)


def test_gr7_learning_that_dies_is_our_error(monkeypatch):
    """As where memory runs out."""
    monkeypatch.setattr(vocabulary, "_AT_ONCE_BYTES", 0)
    monkeypatch.setattr(vocabulary, "_PROGRAM", "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(WorkerDied, match="ended with -9 and gave nothing"):
        learn("bpe", 300, ["a text " * 100_000])


def test_gr7_an_error_of_the_text_ends_the_learning(monkeypatch):
    monkeypatch.setattr(vocabulary, "_AT_ONCE_BYTES", 0)
    begun, popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *words, **more: begun.append(popen(*words, **more)) or begun[0])

    def texts():
        yield "a text"
        raise KeyError("this one")

    with pytest.raises(KeyError, match="this one"):
        learn("bpe", 300, texts())
    assert [child.returncode for child in begun] == [-signal.SIGKILL]
