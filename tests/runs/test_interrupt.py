"""Signals between two steps."""

import os
import signal
import threading

import pytest

from meristem.runs.interrupt import interruptible


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_first_signal_only_asks(number):
    with interruptible() as is_asked_to_stop:
        assert not is_asked_to_stop()
        os.kill(os.getpid(), number)
        assert is_asked_to_stop()


def test_run_that_shall_outlive_its_terminal_does():
    """As nohup asks for it; whatever else comes is heard."""
    usual = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible() as is_asked_to_stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not is_asked_to_stop()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, usual)


def test_second_signal_does_what_it_always_did():
    """A run that hangs can be stopped, whichever signal came first."""
    with pytest.raises(KeyboardInterrupt), interruptible():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()


def test_handlers_are_given_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with interruptible():
        pass
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_other_threads_are_never_asked():
    """Python takes signals in its main thread only; elsewhere training goes on without them instead of failing."""
    answers = []

    def ask() -> None:
        with interruptible() as is_asked_to_stop:
            answers.append(is_asked_to_stop())

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert answers == [False]
