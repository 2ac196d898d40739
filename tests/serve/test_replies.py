"""What the engine's thread gives to the loop: the first and the last at once, the rest together."""

import asyncio
from typing import NamedTuple

import pytest

from meristem.serve import replies


class Loop:
    """Counts how often it is woken; does what it was given, and what is due later, when it is let."""

    def __init__(self) -> None:
        self.n_woken, self.calls, self.later = 0, [], []

    def call_soon_threadsafe(self, call, *arguments) -> None:
        self.n_woken += 1
        self.calls.append((call, arguments))

    def call_later(self, seconds, call, *arguments):
        assert seconds == replies.HELD_S
        timer = Timer(self, (call, arguments))
        self.later.append(timer)
        return timer

    def run(self) -> None:
        """What is due now."""
        calls, self.calls = self.calls, []
        for call, arguments in calls:
            call(*arguments)

    def wait(self) -> None:
        """What is due after ``HELD_S``."""
        later, self.later = self.later, []
        for timer in later:
            call, arguments = timer.what
            call(*arguments)


class Timer(NamedTuple):
    """What is due later, in its loop."""

    loop: Loop
    what: tuple

    def cancel(self) -> None:
        if self in self.loop.later:
            self.loop.later.remove(self)


def taken(queue: asyncio.Queue) -> list[int]:
    return [queue.get_nowait() for _ in range(queue.qsize())]


@pytest.fixture
def begun():
    """A post, a loop and a queue after the first token."""
    post, loop, queue = replies._Post(), Loop(), asyncio.Queue()
    post.put(queue, 0, is_urgent=True)
    post.send(loop)
    loop.run()
    assert taken(queue) == [0] and loop.n_woken == 1
    return post, loop, queue


def test_tokens_that_come_fast_are_sent_together(begun):
    """Without waking the loop, which looks by itself; when nothing comes it stops, and the next one wakes it."""
    post, loop, queue = begun
    for token in (1, 2, 3):
        post.put(queue, token, is_urgent=False)
        post.send(loop)
    assert not loop.calls and len(loop.later) == 1
    loop.wait()
    assert taken(queue) == [1, 2, 3] and loop.n_woken == 1
    loop.wait()
    assert not loop.later
    post.put(queue, 4, is_urgent=False)
    post.send(loop)
    loop.run()
    assert taken(queue) == [4] and loop.n_woken == 2


def test_an_end_takes_along_what_was_held(begun):
    post, loop, queue = begun
    other = asyncio.Queue()
    post.put(queue, 1, is_urgent=False)
    post.send(loop)
    post.put(other, 2, is_urgent=True)
    post.send(loop)
    loop.run()
    assert taken(queue) == [1] and taken(other) == [2] and len(loop.later) == 1


def test_what_is_put_before_the_loop_runs_needs_no_second_call(begun):
    post, loop, queue = begun
    for token in (1, 2):
        post.put(queue, token, is_urgent=True)
        post.send(loop)
    assert loop.n_woken == 2
    loop.run()
    assert taken(queue) == [1, 2]
