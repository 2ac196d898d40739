"""What the engine's thread gives to the loop: the first and the last at once, the rest together."""

import asyncio
from typing import NamedTuple

import pytest

from meristem.models.generate import Sampling
from meristem.safety.policy import NO_POLICY
from meristem.serve import replies
from meristem.serve.draw import Drawn
from meristem.serve.engine import Ended, Engine, Order
from meristem.serve.moment import FRESH
from meristem.serve.replies import Choice, Conversation, Piece, Wish
from meristem.serve.stops import StopTexts
from serving import TOKENIZER, model_of


class Loop:
    """Counts how often it is woken; does what it was given, and what is due later, when it is let."""

    def __init__(self) -> None:
        self.n_woken, self.calls, self.later, self.waits_s = 0, [], [], []

    def call_soon_threadsafe(self, call) -> None:
        self.n_woken += 1
        self.calls.append(call)

    def call_later(self, seconds, call):
        self.waits_s.append(seconds)
        timer = Timer(self, call)
        self.later.append(timer)
        return timer

    def run(self) -> None:
        """What is due now."""
        calls, self.calls = self.calls, []
        for call in calls:
            call()

    def wait(self) -> None:
        """What is due later."""
        later, self.later = self.later, []
        for timer in later:
            timer.call()


class Timer(NamedTuple):
    """What is due later, in its loop."""

    loop: Loop
    call: object

    def cancel(self) -> None:
        if self in self.loop.later:
            self.loop.later.remove(self)


class Reader:
    """Takes what has come when it is woken."""

    def __init__(self) -> None:
        self.waiting, self.taken, self.is_given_up = [], [], False

    def wake(self) -> bool:
        found, self.waiting = self.waiting, []
        self.taken += found
        return bool(found)

    def give_up(self) -> None:
        self.is_given_up = True


@pytest.fixture
def begun():
    """A post, a loop and a reader after the first token."""
    loop, reader = Loop(), Reader()
    post = replies._Post(loop)
    post.enter(reader)
    reader.waiting.append(0)
    post.hurry()
    post.send()
    loop.run()
    assert reader.taken == [0] and loop.n_woken == 1
    return post, loop, reader


def test_tokens_that_come_fast_are_sent_together(begun):
    """Without waking the loop, which looks by itself; when nothing comes it stops, and the next one wakes it."""
    post, loop, reader = begun
    for token in (1, 2, 3):
        reader.waiting.append(token)
        post.send()
    assert not loop.calls and len(loop.later) == 1
    loop.wait()
    assert reader.taken == [0, 1, 2, 3] and loop.n_woken == 1
    loop.wait()
    assert not loop.later
    reader.waiting.append(4)
    post.send()
    loop.run()
    assert reader.taken[-1] == 4 and loop.n_woken == 2


def test_an_end_takes_along_what_was_held(begun):
    post, loop, reader = begun
    other = Reader()
    post.enter(other)
    reader.waiting.append(1)
    post.send()
    other.waiting.append(2)
    post.hurry()
    post.send()
    loop.run()
    assert reader.taken == [0, 1] and other.taken == [2] and len(loop.later) == 1


def test_what_is_there_before_the_loop_runs_needs_no_second_call(begun):
    post, loop, reader = begun
    for token in (1, 2):
        reader.waiting.append(token)
        post.hurry()
        post.send()
    assert loop.n_woken == 2
    loop.run()
    assert reader.taken == [0, 1, 2]


def test_few_replies_wait_less_than_many(begun):
    post, loop, _ = begun
    assert loop.waits_s == [replies.HELD_EACH_S]
    many = [Reader() for _ in range(200)]
    for each in many:
        post.enter(each)
        each.waiting.append(0)
    loop.wait()
    assert loop.waits_s[-1] == replies.HELD_S


def test_who_has_left_is_not_woken(begun):
    post, loop, reader = begun
    post.leave(reader)
    reader.waiting.append(1)
    post.send()
    loop.wait()
    assert reader.taken == [0] and not loop.later


def test_where_the_loop_has_ended_its_replies_are_given_up():
    loop, reader = asyncio.new_event_loop(), Reader()
    post = replies._Post(loop)
    post.enter(reader)
    loop.close()
    post.send()
    assert reader.is_given_up


def reply_of(*stops: str, policy=NO_POLICY) -> replies._Reply:
    return replies._Reply(0, StopTexts(TOKENIZER, stops), policy.stream("output"), lambda: None)


def drawn(reply: replies._Reply, text: str) -> list[bool]:
    return [reply.drawn(Drawn(byte)) for byte in text.encode()]


def test_what_was_drawn_is_one_piece():
    reply = reply_of()
    assert not any(drawn(reply, "Oslo.")) and reply.n_unread == 5
    assert reply.take() == [Piece(0, "Oslo.", tuple(Drawn(byte) for byte in b"Oslo."))]
    assert reply.take() == [] and not reply.has_come


def test_a_stop_ends_a_reply_at_the_token_that_completes_it():
    """Also where nobody has taken anything yet, so that no text was made of what was drawn before."""
    reply = reply_of("END", "so")
    assert drawn(reply, "Oslo EN") == [False] * 7
    assert reply.drawn(Drawn(ord("D")))
    reply.ended(end := Ended("stop", FRESH, 8, 0.0, 0.0))
    piece, choice = reply.take()
    assert (piece.text, len(piece.tokens)) == ("Oslo ", 8) and choice == Choice(0, end, "END")


def test_text_that_was_held_back_comes_with_the_end():
    reply = reply_of("END")
    drawn(reply, "OslE")
    assert [item.text for item in reply.take()] == ["Osl"]
    reply.ended(Ended("length", FRESH, 4, 0.0, 0.0))
    piece, choice = reply.take()
    assert piece == Piece(0, "E", ()) and choice.finish == "length" and choice.stop is None


def test_a_reader_that_takes_nothing_is_given_up():
    """After ``MOST_UNREAD`` tokens, and before the next token."""
    engine = Engine(TOKENIZER.vocab_size, most_rows=4)
    reader = model_of(1)
    order = Order(reader, FRESH, tuple(TOKENIZER.encode("Ada")))

    async def unread() -> list[str]:
        conversation = Conversation(engine, TOKENIZER)
        writing = conversation.write(order, Wish(max_tokens=10**6, sampling=Sampling(), random_seed=0))
        first = asyncio.ensure_future(anext(writing))
        await asyncio.sleep(0)
        while not first.done():
            engine.step()
            await asyncio.sleep(0)
        n_rounds = 0
        while engine.n_at_work:
            engine.step()
            await asyncio.sleep(replies.HELD_EACH_S if n_rounds % 100 == 0 else 0)
            n_rounds += 1
        assert replies.MOST_UNREAD < n_rounds < replies.MOST_UNREAD + 300
        with pytest.raises(replies.WorkerTimeout, match="too slow"):
            async for _ in writing:
                pass

    asyncio.run(unread())
