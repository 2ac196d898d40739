"""What an order gives depends on no other: alone, in any batch, and beside rows that hold NaN."""

import random
import time
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

import zoo
from meristem.errors import QueueFull, WorkerDied
from meristem.memory.kernels.select import force_reference
from meristem.memory.state import flatten
from meristem.models.build import build
from meristem.models.config import ModelConfig
from meristem.models.generate import Sampling
from meristem.native.library import core
from meristem.nn.config import MemoryConfig
from meristem.serve.batch import LEAST, Batch, exact_sizes
from meristem.serve.engine import READ_PER_ROUND, Ended, Engine, Order
from meristem.serve.moment import FRESH, Moment, portion, read
from serving import poison

GREEDY = Sampling(temperature=0)
WIDE = build(
    ModelConfig(dim=32, n_layers=2, n_heads=2, sliding_window=5, mlp_dim=48),
    MemoryConfig(rule="gated_delta", head_dim=16, chunk=7),
    zoo.VOCABULARY,
    1,
)
"""Wide enough for batches: its rows fill whole registers."""


class Asked:
    """An order, and what came of it."""

    def __init__(self, reader, text=(), moment=FRESH, **settings) -> None:
        self.ids, self.at, self.end = [], [], None
        settings = {"portion": portion(reader), "sampling": GREEDY, "max_tokens": 9} | settings
        self.order = Order(reader, moment, tuple(text), drawn=self._drawn, ended=self._ended, **settings)

    def _drawn(self, token) -> bool:
        self.ids.append(token.token_id)
        self.at.append(time.monotonic())
        return False

    def _ended(self, end: Ended) -> None:
        assert self.end is None
        self.end = end


EXACT = {}
"""By the rows of an engine, what its kind has found out of readers: that takes longer than a test."""


def engine_of(most_rows: int = 8, **settings) -> Engine:
    engine = Engine(zoo.VOCABULARY, most_rows=most_rows, **settings)
    engine._sizes = EXACT.setdefault(most_rows, engine._sizes)
    return engine


def alone(reader, text, most_rows: int = 8, **settings) -> Asked:
    """The same order in an engine of its own."""
    asked = Asked(reader, text, **settings)
    engine = engine_of(most_rows)
    engine.submit(asked.order)
    run(engine)
    return asked


def run(engine: Engine, *, poisoned: bool = False) -> None:
    while engine.n_at_work or engine.n_waiting:
        engine.step()
        if poisoned:
            poison(engine)


def assert_same_moment(found: Moment, true: Moment) -> None:
    assert found.n_tokens == true.n_tokens
    assert torch.equal(found.logits_bo, true.logits_bo)
    left, right = flatten(found.state), flatten(true.state)
    assert left.keys() == right.keys()
    for name, leaf in left.items():
        assert torch.equal(leaf, right[name]) if isinstance(leaf, torch.Tensor) else leaf == right[name], name


def texts(n: int, longest: int, random_seed: int = 0) -> list[tuple[int, ...]]:
    draw = random.Random(random_seed)
    return [tuple(draw.randrange(zoo.VOCABULARY) for _ in range(draw.randint(1, longest))) for _ in range(n)]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    monkeypatch.setattr("meristem.serve.batch.CHECKED_LENGTHS", (1, 9))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["native", "torch"])
def by(request):
    """Read by the native core where it takes the model, and by torch."""
    if request.param == "native" and core().library is None:
        pytest.skip(f"the native core is not there: {core().said}")
    with force_reference() if request.param == "torch" else nullcontext():
        yield request.param


@pytest.mark.parametrize(
    "name, how", [*((name, nullcontext) for name in zoo.ZOO), *((name, force_reference) for name in sorted(zoo.NATIVE))]
)
def test_s3_s4_an_answer_does_not_depend_on_its_batch(name, how):
    """Every model of the zoo, at widths that fill no register: reply, predictions and state have the bits they have
    alone, with rows that come, go and are poisoned."""
    model = zoo.grown(name, torch.float32)
    with how():
        assert_answers_like_alone(model)


def assert_answers_like_alone(model):
    said = texts(4, 9)
    true = [alone(model, text, most_rows=4, max_tokens=2 + 2 * at) for at, text in enumerate(said)]
    asked = [Asked(model, text, max_tokens=2 + 2 * at) for at, text in enumerate(said)]
    engine = engine_of(4)
    for at, each in enumerate(asked):
        engine.submit(each.order)
        if at % 2:
            engine.step()
            poison(engine)
    run(engine, poisoned=True)
    for found, wanted in zip(asked, true, strict=True):
        assert (found.ids, found.end.reason) == (wanted.ids, "length")
        assert_same_moment(found.end.moment, wanted.end.moment)


@pytest.mark.parametrize("n_times, n_orders", [(1, 12), pytest.param(10, 64, marks=pytest.mark.slow)])
def test_s3_answers_under_random_load(n_times, n_orders, by):
    """In random order and number, in batches of many sizes: equal to the bit, every time."""
    said = texts(n_orders, 30)
    true = [alone(WIDE, text, max_tokens=3 + at % 9) for at, text in enumerate(said)]
    draw = random.Random(3)
    sizes = set()
    for _ in range(n_times):
        engine = engine_of(16)
        order = draw.sample(range(len(said)), len(said))
        asked = {at: Asked(WIDE, said[at], max_tokens=3 + at % 9) for at in order}
        for at in order:
            engine.submit(asked[at].order)
            for _ in range(draw.choice([0, 0, 0, 1, 3])):
                engine.step()
                sizes |= {batch.size for batch in engine._batches}
                poison(engine)
        run(engine, poisoned=True)
        for at, found in asked.items():
            assert found.ids == true[at].ids
            assert_same_moment(found.end.moment, true[at].end.moment)
    assert {4, 8} <= sizes if by == "torch" else len(sizes) > 2, "the rows were read in batches"


def test_s4_a_state_does_not_depend_on_what_stood_in_its_row(by):
    """A state after N tokens is that of N tokens alone, for N around the borders of windows and chunks, when others
    end, their rows are poisoned and taken again meanwhile."""
    for n_read in (5, 7):
        text = texts(1, 1, n_read)[0] * n_read
        engine = engine_of()
        asked = Asked(WIDE, text, max_tokens=20)
        for at in range(15):
            if at == 7:
                engine.submit(asked.order)
            if at % 3 == 0:
                engine.submit(Asked(WIDE, texts(1, 9, at)[0], max_tokens=1 + at % 4).order)
            engine.step()
            poison(engine)
        run(engine, poisoned=True)
        assert_same_moment(asked.end.moment, alone(WIDE, text, max_tokens=20).end.moment)


def test_a_reply_goes_on_from_its_moment(by):
    """A moment that an order came to is where the next begins: two replies in a row are one."""
    text = texts(1, 9)[0]
    whole = alone(WIDE, text, max_tokens=20)
    first = alone(WIDE, text, max_tokens=8)
    second = alone(WIDE, (), moment=first.end.moment, max_tokens=12)
    assert first.ids + second.ids == whole.ids
    assert_same_moment(second.end.moment, whole.end.moment)


def test_reading_is_what_a_session_reads():
    """Read alone, an order leaves the bits and the surprise of the raw forward, portion by portion."""
    text = texts(1, 1)[0] * 1300
    asked = alone(WIDE, text, max_tokens=0)
    moment = FRESH
    for first in range(0, 1300, portion(WIDE)):
        moment, _ = read(WIDE, moment, text[first : first + portion(WIDE)])
    assert_same_moment(asked.end.moment, moment)
    assert (asked.ids, asked.end.reason) == ([], "length") and asked.end.nats > 0


def test_exact_sizes_hold_a_model_to_its_word():
    """Rows of whole registers are read in batches, and a model whose rows see each other is found out."""
    assert LEAST in exact_sizes(WIDE, zoo.VOCABULARY, 16)

    class Gossip(torch.nn.Module):
        def forward(self, tokens_bt, state=None):
            logits_bto, state = WIDE(tokens_bt, state)
            return logits_bto + 1e-6 * logits_bto.mean(0, keepdim=True), state

    assert exact_sizes(Gossip(), zoo.VOCABULARY, 16) == (1,)


def test_s9_a_long_text_does_not_hold_up_the_others():
    """While one order reads a hundred thousand tokens, a reply gets a token for every portion read, and another text is
    read in its turn."""
    engine = engine_of()
    long = Asked(WIDE, (3,) * 20 * READ_PER_ROUND, max_tokens=0)
    engine.submit(long.order)
    engine.step()
    short, writing = Asked(WIDE, (5,) * 7, max_tokens=0), Asked(WIDE, (1, 2), max_tokens=10)
    engine.submit(short.order)
    engine.submit(writing.order)
    for _ in range(13):
        engine.step()
    assert short.end and writing.end.reason == "length" and long.end is None
    run(engine)
    assert long.end.moment.n_tokens == 20 * READ_PER_ROUND


def test_s1_a_cancelled_order_ends_before_its_next_token():
    """Writing, reading or waiting: its place is free after one round, and its moment has read what it drew."""
    engine = engine_of(2)
    writing, reading = Asked(WIDE, (1, 2), max_tokens=10_000), Asked(WIDE, (3,) * 5000)
    waiting = Asked(WIDE, (4,))
    jobs = [engine.submit(each.order) for each in (writing, reading, waiting)]
    for _ in range(3):
        engine.step()
    assert (len(writing.ids), engine.n_at_work, engine.n_waiting) == (3, 2, 1)
    for job in jobs:
        job.cancel()
    engine.step()
    assert (engine.n_at_work, engine.n_waiting, len(writing.ids)) == (0, 0, 3)
    assert {each.end.reason for each in (writing, reading, waiting)} == {"cancelled"}
    assert_same_moment(writing.end.moment, alone(WIDE, (1, 2), max_tokens=3).end.moment)


def test_an_order_ends_at_its_deadline():
    engine = engine_of(2)
    late = Asked(WIDE, (1, 2), max_tokens=10_000, deadline_s=0)
    engine.submit(late.order)
    time.sleep(0.001)
    engine.step()
    assert (late.end.reason, engine.n_at_work) == ("deadline", 0)


def test_the_queue_is_bounded_and_places_are_given_in_order():
    engine = engine_of(1, most_waiting=2)
    first, second = Asked(WIDE, (1,), max_tokens=2), Asked(WIDE, (2,), max_tokens=2)
    engine.submit(first.order)
    engine.submit(second.order)
    with pytest.raises(QueueFull, match="2 requests wait already"):
        engine.submit(Asked(WIDE, (3,)).order)
    while not second.end:
        engine.step()
    assert first.at[-1] <= second.at[0]


def test_an_order_that_fails_takes_no_other_along():
    """A state of NaN, a reader that raises and a listener that does, end their own orders with the error."""

    class Broken(torch.nn.Module):
        def forward(self, tokens_bt, state=None):
            raise RuntimeError("broken")

    moment, _ = read(WIDE, FRESH, (1, 2, 3))
    bad = Moment(moment.state, moment.logits_bo * float("nan"), 3)
    deaf = Asked(WIDE, (1, 2))
    deaf.order = replace(deaf.order, drawn=lambda token: {}["deaf"])
    asked = [Asked(WIDE, (1, 2)), Asked(WIDE, (), moment=bad), Asked(Broken(), (1,)), deaf]
    engine = engine_of()
    for each in asked:
        engine.submit(each.order)
    run(engine)
    assert [each.end.reason for each in asked] == ["length", "error", "error", "error"]
    assert asked[0].ids == alone(WIDE, (1, 2)).ids
    assert "not finite" in str(asked[1].end.error) and str(asked[2].end.error) == "broken"


def test_s2_choices_and_seeds_draw_differently(by):
    """Four choices of one seed are four texts, and the same four again; another seed gives others."""
    moment, _ = read(WIDE, FRESH, (1, 2, 3))
    hot = Sampling(temperature=1.0)

    def drawn(random_seed):
        asked = [
            Asked(WIDE, (), moment=moment, sampling=hot, random_seed=random_seed, choice=choice, max_tokens=12)
            for choice in range(4)
        ]
        engine = engine_of()
        for each in asked:
            engine.submit(each.order)
        run(engine)
        return [tuple(each.ids) for each in asked]

    first, again, other = drawn(1), drawn(1), drawn(2)
    assert first == again
    assert len({*first, *other}) == 8


def test_s3_a_reply_that_is_drawn_does_not_depend_on_its_batch(by):
    """At any temperature, with settings and seeds of its own: alone, or beside others that come and go."""
    settings = [
        {"sampling": sampling, "random_seed": 7 + row, "max_tokens": 6 + row % 3}
        for row, sampling in enumerate([Sampling(1.0), Sampling(0.7, top_p=0.8), Sampling(3.0, top_k=5), GREEDY] * 2)
    ]
    said = texts(len(settings), 9)
    true = [alone(WIDE, text, **each) for text, each in zip(said, settings, strict=True)]
    engine = engine_of()
    asked = [Asked(WIDE, text, **each) for text, each in zip(said, settings, strict=True)]
    for at, each in enumerate(reversed(asked)):
        engine.submit(each.order)
        if at % 2:
            engine.step()
    run(engine)
    for found, wanted in zip(asked, true, strict=True):
        assert found.ids == wanted.ids
        assert_same_moment(found.end.moment, wanted.end.moment)


def test_logprobs_are_those_of_the_prediction():
    moment, _ = read(WIDE, FRESH, (1, 2, 3))
    tokens = []
    order = Order(WIDE, moment, max_tokens=1, sampling=GREEDY, n_top=3, drawn=lambda token: bool(tokens.append(token)))
    engine = engine_of()
    engine.submit(order)
    run(engine)
    logprob_o = moment.logits_bo[0].log_softmax(-1)
    assert tokens[0].logprob == float(logprob_o.max()) == tokens[0].top[0][1]
    assert [token_id for token_id, _ in tokens[0].top] == logprob_o.topk(3).indices.tolist()


def test_a_thread_runs_the_rounds_and_ends_with_its_orders():
    engine = engine_of()
    engine.start()
    done, endless = Asked(WIDE, (1, 2)), Asked(WIDE, (3,), max_tokens=10**9)
    engine.submit(done.order)
    engine.submit(endless.order)
    while not done.end:
        time.sleep(0.001)
    assert not engine.has_ended and endless.end is None
    engine.close()
    assert (endless.end.reason, engine.has_ended, engine.n_at_work) == ("cancelled", True, 0)
    with pytest.raises(WorkerDied, match="closed"):
        engine.submit(Asked(WIDE, (1,)).order)


def test_an_engine_that_never_ran_lets_no_order_wait():
    engine = engine_of()
    waiting = Asked(WIDE, (1,))
    engine.submit(waiting.order)
    assert not engine.has_ended
    engine.close()
    assert (waiting.end.reason, engine.has_ended) == ("cancelled", True)


def test_levels_that_learn_are_read_one_by_one():
    """A reader that takes one row gets one row, beside batches of others."""

    def single(tokens_bt, state=None):
        assert tokens_bt.shape[0] == 1
        return WIDE(tokens_bt, state)

    asked = [Asked(single, (1, 2)), Asked(single, (1, 2)), Asked(WIDE, (1, 2))]
    engine = engine_of()
    for each in asked:
        engine.submit(each.order)
    run(engine)
    assert asked[0].ids == asked[1].ids and all(each.end.reason == "length" for each in asked)
    assert Batch.of(WIDE, 4, [(asked[2].end.moment.state, 1)]).size == 4
