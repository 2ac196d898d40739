"""What a session is: the model's one forward, and a state that is a value."""

import functools
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from meristem.data.config import TokenizerConfig
from meristem.data.tokenizer import byte_tokenizer, train_tokenizer
from meristem.device.random import stream
from meristem.errors import CheckpointMismatch, WrongValue
from meristem.memory.state import flatten
from meristem.models.build import build
from meristem.models.config import LearnConfig, ModelConfig
from meristem.models.decoding import Decoding
from meristem.models.generate import Sampling, choose
from meristem.nn.config import MemoryConfig
from meristem.serve.moment import READ_AT_ONCE
from meristem.serve.session import KEPT_TURNS, Session

TOKENIZER = byte_tokenizer()
MODELS = {
    "titans": build(
        ModelConfig(dim=12, n_layers=2, n_heads=2, sliding_window=5),
        MemoryConfig(rule="titans", head_dim=6, chunk=7),
        256,
        1,
    ),
    "delta": build(
        ModelConfig(dim=12, n_layers=2, mixer="memory"),
        MemoryConfig(rule="delta", head_dim=4, chunk=7, conv=3),
        256,
        2,
    ),
    "hope": build(
        ModelConfig(dim=12, n_layers=2, mixer="self_reference", mlp="levels", levels={"count": 2, "periods": [1, 128]}),
        MemoryConfig(head_dim=4, self_reference={"chunk_memory": 2, "chunk_other": 4}),
        256,
        6,
    ),
    "mac-levels": build(
        ModelConfig(dim=12, n_layers=2, n_heads=2, mixer="mac", segment=5),
        MemoryConfig(head_dim=4, chunk=7, levels={"count": 2, "tokens": "each"}),
        256,
        7,
    ),
    "chargru": build(ModelConfig(name="chargru", dim=11, n_layers=2), MemoryConfig(), 256, 4),
    "charformer": build(
        ModelConfig(name="charformer", dim=12, n_layers=2, n_heads=3, max_seq_len=37), MemoryConfig(), 256, 5
    ),
}
TEXTS = ("My name is Ada.\n", "", "na\N{LATIN SMALL LETTER I WITH DIAERESIS}ve \N{SNOWMAN}", "x", "The name is ")


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]


def assert_same(a: Session, b: Session) -> None:
    """Both stand at the same place, to the bit."""
    assert a.n_tokens == b.n_tokens
    left, right = flatten(a._now.state or {}), flatten(b._now.state or {})
    assert left.keys() == right.keys()
    for name, leaf in left.items():
        assert torch.equal(leaf, right[name]) if isinstance(leaf, torch.Tensor) else leaf == right[name], name
    if a._now.logits_bo is not None or b._now.logits_bo is not None:
        assert torch.equal(a._now.logits_bo, b._now.logits_bo)


def fed(model, *texts: str, **settings) -> Session:
    session = Session(model, TOKENIZER, **settings)
    for text in texts:
        session.feed(text)
    return session


def test_feeding_is_the_raw_forward(model):
    """Forty texts fed one by one leave the state, logits and surprise of forty calls of the model."""
    session, state, last_bo, nats, told = Session(model, TOKENIZER), None, None, 0.0, 0.0
    for index in range(40):
        text = f"{index * 7919} {'ab' * (index % 5)}"
        ids = list(text.encode())
        with torch.no_grad():
            logits_bto, state = model(torch.tensor([ids]), state)
        before = [last_bo[:, None]] if last_bo is not None else []
        predicted_bto = torch.cat([*before, logits_bto[:, :-1]], 1)
        targets = torch.tensor(ids[len(ids) - predicted_bto.shape[1] :])
        nats += float(-predicted_bto[0].log_softmax(-1)[range(len(targets)), targets].sum())
        last_bo = logits_bto[:, -1]
        told += session.feed(text).nats
        assert torch.equal(session._now.logits_bo, last_bo)
    found, true = flatten(session._now.state), flatten(state)
    assert found.keys() == true.keys()
    torch.testing.assert_close(found, true, rtol=0, atol=0)
    assert told == pytest.approx(nats, rel=1e-5)


def test_writing_is_reading(model):
    """A session that wrote a text stands, but for rounding, where one stands that was fed it."""
    writer, reader = fed(model, "The "), fed(model, "The ")
    writer.sampling = Sampling(temperature=0)
    written_ids = []
    with torch.no_grad():
        for _ in range(23):
            written_ids.append(int(writer._now.logits_bo.argmax()))
            writer.generate(1)
    moment, _ = reader._read(reader._now, written_ids)
    torch.testing.assert_close(writer._now.logits_bo, moment.logits_bo, rtol=1e-4, atol=1e-5)


def test_streamed_pieces_are_whole_characters(model):
    """The pieces joined are the reply, however the characters were cut into tokens."""
    ones, other = fed(model, "a"), fed(model, "a")
    assert "".join(ones.stream(50)) == other.generate(50)
    assert_same(ones, other)


def test_leaving_a_stream_ends_the_turn(model):
    """What was written before the reader left stays read; the session goes on from there."""
    session = fed(model, "a")
    pieces = session.stream(50)
    next(pieces)
    pieces.close()
    assert session.turn == 2
    assert 2 <= session.n_tokens <= 6


def test_until_ends_a_reply():
    """The reply ends once the text stands in it, and white space in front of the first word does not count."""
    session = fed(MODELS["chargru"], "a", sampling=Sampling(temperature=5.0))
    whole = session.fork().generate(300)
    # One byte: another character may come together with the one after it.
    word = next(character for character in whole.lstrip() if character.isascii() and whole.count(character) > 1)
    reply = session.generate(300, until=word)
    assert whole.startswith(reply)
    assert reply.endswith(word) and reply.lstrip().count(word) == 1


def test_a_session_that_read_nothing_writes(model):
    """It begins at a line end."""
    assert Session(model, TOKENIZER).generate(9) == fed(model, "\n").generate(9)


def test_a_saved_session_goes_on(model, tmp_path):
    """Twenty texts, restored, and twenty more are forty; a reply draws the same tokens."""
    whole, session = Session(model, TOKENIZER, random_seed=3), Session(model, TOKENIZER, random_seed=3)
    for index in range(20):
        whole.feed(f"{index}ab")
        session.feed(f"{index}ab")
    session.save(tmp_path / "ada.session")
    session = Session.load(tmp_path / "ada.session", model, TOKENIZER)
    for index in range(20):
        whole.feed(f"{index}cd")
        session.feed(f"{index}cd")
    assert session.generate(17) == whole.generate(17)
    assert_same(session, whole)


def test_a_fresh_session_is_saved_too(model, tmp_path):
    """Nothing read comes back as nothing read, with name, identity and sampling."""
    session = Session(model, TOKENIZER, sampling=Sampling(0.5, 7, 0.9), random_seed=11, name="Ada")
    session.save(tmp_path / "fresh.session")
    found = Session.load(tmp_path / "fresh.session", model, TOKENIZER)
    assert (found.name, found.id, found.sampling, found.random_seed) == ("Ada", session.id, session.sampling, 11)
    assert_same(found, session)


def test_forks_do_not_know_of_each_other(model):
    """What is said in one changes nothing in the other."""
    session = fed(model, "My name is Ada.")
    other = session.fork("other")
    other.feed("My name is Bob.")
    other.generate(5)
    assert_same(session, fed(model, "My name is Ada."))
    session.feed("!")
    assert_same(session, fed(model, "My name is Ada.", "!"))
    assert (other.name, other.id != session.id) == ("other", True)


def test_rollback_is_never_having_said_it(model):
    """State, draws and turn numbers are as if the last exchanges had not been."""
    session = fed(model, "My name is Ada.")
    turn = session.feed("I live in ")
    reply = session.fork().generate(20)
    session.generate(20)
    session.feed("a secret")
    session.rollback(to=turn)
    assert_same(session, fed(model, "My name is Ada.", "I live in "))
    assert (session.turn, session.generate(20)) == (2, reply)


def test_rollback_reaches_a_stated_number_of_turns():
    """Older turns are let go, and the message says which are kept."""
    session = fed(MODELS["chargru"], *"abcdefghijklmnopqrstuvwxyz")
    session.rollback(to=26 - KEPT_TURNS)
    assert_same(session, fed(MODELS["chargru"], *"abcdefghijklmnopqrstuvwxyz"[: 26 - KEPT_TURNS]))
    with pytest.raises(WrongValue, match="turn 9 is not saved.*the turns 10 to 10"):
        session.rollback(to=9)


def test_forgetting_is_being_fresh(model):
    """Nothing said before shows in what follows."""
    session = fed(model, "My name is Ada.")
    session.generate(5)
    session.forget()
    assert_same(session, Session(model, TOKENIZER))
    session.feed("Hello")
    assert_same(session, fed(model, "Hello"))
    assert session.turn == 1


@pytest.mark.parametrize("name", ["titans", "delta", "chargru"])
def test_memory_of_the_past_has_one_size(name):
    """However much was read, a session remembers in the same number of bytes."""
    session = fed(MODELS[name], "x" * 40)
    size_bytes = session.size_bytes
    session.feed("y" * 997)
    assert session.size_bytes == size_bytes


def test_looking_at_the_memory_changes_nothing():
    """A look between two texts leaves no trace, and tells what was written."""
    session, unseen = Session(MODELS["titans"], TOKENIZER), Session(MODELS["titans"], TOKENIZER)
    assert session.memory() == {"n_tokens": 0, "size_bytes": 0, "layers": {}}
    for text in TEXTS:
        session.feed(text)
        session.memory()
        unseen.feed(text)
    assert_same(session, unseen)
    memory = session.memory()
    assert list(memory["layers"]) == ["layer.0.recall", "layer.1.recall"]
    matrix_bhkv = session._now.state["layer"]["1"]["recall"]["memory"]["matrix_bhkv"]
    assert memory["layers"]["layer.1.recall"]["norm"] == pytest.approx(float(matrix_bhkv.norm()), rel=1e-6)
    assert memory["layers"]["layer.0.recall"]["half_lives"] == pytest.approx([MemoryConfig().half_life] * 2, rel=1e-3)
    assert memory["size_bytes"] == session.size_bytes > memory["layers"]["layer.0.recall"]["size_bytes"] * 2


@pytest.mark.parametrize("name, layers", [("hope", ["layer.0", "layer.1"]), ("mac-levels", None)])
def test_every_memory_of_a_layer_is_looked_at(name, layers):
    """Also where it is no recall, or several stand side by side; and after a file has put names in another order."""
    session = fed(MODELS[name], *TEXTS)
    found = session.memory()["layers"]
    assert list(found) == (layers or [f"layer.{layer}.recall.level.{level}" for layer in (0, 1) for level in (0, 1)])
    assert all(memory["norm"] > 0 and memory["size_bytes"] > 0 for memory in found.values())
    with tempfile.TemporaryDirectory() as folder:
        session.save(Path(folder) / "session")
        assert Session.load(Path(folder) / "session", MODELS[name], TOKENIZER).memory() == session.memory()


def test_a_session_modifies_its_memory_and_no_weight():
    """S4-M14: memories that make their own keys, values and rates change with the text; weights do not."""
    model = MODELS["hope"]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    session = fed(model, TEXTS[0])
    first = flatten(session._now.state)
    session.feed(TEXTS[4])
    now = {name: leaf for name, leaf in flatten(session._now.state).items() if ".makers.live" in name}
    assert now and all(not torch.equal(leaf, first[name]) for name, leaf in now.items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_levels_learn_stays_in_the_session():
    """With learn = levels a session's own copy changes, and no other session's; a fork and a file take it along."""
    model, text = MODELS["hope"], "to be or not to be, " * 8
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    session, plain = fed(model, text, learn="levels"), fed(model, text)
    own = session._now.state["learned"]["moved"]
    assert own and "learned" not in plain._now.state
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert_same(plain, fed(model, text))
    other = session.fork()
    other.feed(text)
    moved, later = flatten(own), flatten(other._now.state["learned"]["moved"])
    assert moved.keys() == later.keys() and any(not torch.equal(leaf, later[name]) for name, leaf in moved.items())
    torch.testing.assert_close(flatten(session._now.state["learned"]["moved"]), moved, rtol=0, atol=0)
    with tempfile.TemporaryDirectory() as folder:
        session.save(Path(folder) / "session")
        loaded = Session.load(Path(folder) / "session", model, TOKENIZER)
    assert loaded.learn == "levels"
    loaded.feed(text)
    assert_same(loaded, other)


@pytest.mark.parametrize("name", ["titans", "hope", "mac-levels"])
def test_with_learning_off_a_memory_stays_as_it_was(name):
    session = fed(MODELS[name], "x" * 40, learn="none")
    before = {path: memory["norm"] for path, memory in session.memory()["layers"].items()}
    session.feed("y" * 97)
    assert {path: memory["norm"] for path, memory in session.memory()["layers"].items()} == pytest.approx(before)
    assert before and session.n_tokens == 137


def test_a_long_text_is_read_in_portions():
    """A text longer than one forward holds gives the state of its portions, and a model's window is kept."""
    text = "to be or not to be " * (READ_AT_ONCE // 10)
    session, state = fed(MODELS["titans"], text), None
    for first in range(0, len(text), READ_AT_ONCE):
        portion = text[first : first + READ_AT_ONCE].encode()
        with torch.no_grad():
            logits_bto, state = MODELS["titans"](torch.tensor([list(portion)]), state)
    assert torch.equal(session._now.logits_bo, logits_bto[:, -1])
    assert fed(MODELS["charformer"], text).n_tokens == len(text)


def test_another_model_is_refused(tmp_path):
    """A session belongs to weights, not to a shape: a model of other weights is named as such."""
    part = ModelConfig(name="chargru", dim=11, n_layers=2)
    fed(MODELS["chargru"], "abc").save(tmp_path / "a.session")
    with pytest.raises(CheckpointMismatch, match="another model"):
        Session.load(tmp_path / "a.session", build(part, MemoryConfig(), 256, 5), TOKENIZER)
    found = Session.load(tmp_path / "a.session", build(part, MemoryConfig(), 256, 4), TOKENIZER)
    assert_same(found, fed(MODELS["chargru"], "abc"))


def test_another_tokenizer_is_refused(tmp_path):
    """The same ids would mean other text."""
    other = train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=256), [b"to be or not to be"])
    fed(MODELS["chargru"], "abc").save(tmp_path / "a.session")
    with pytest.raises(CheckpointMismatch, match="another tokenizer"):
        Session.load(tmp_path / "a.session", MODELS["chargru"], other)


def test_a_reply_needs_a_token():
    """A door of its own type."""
    with pytest.raises(WrongValue, match="max_tokens is 0"):
        Session(MODELS["chargru"], TOKENIZER).generate(0)


@functools.cache
def replayed(said):
    """State, logits and tokens read that follow from everything said, by the model and by what reads on token by token,
    begun anew at each of them."""
    if not said:
        return None, None, 0
    (state, logits_bo, n_tokens), (kind, what) = replayed(said[:-1]), said[-1]

    def read(ids):
        nonlocal state, logits_bo, n_tokens
        with torch.no_grad():
            logits_bto, state = MODELS["titans"](torch.tensor([ids]), state)
        logits_bo, n_tokens = logits_bto[:, -1], n_tokens + len(ids)

    if kind == "feed" and what:
        read(list(what.encode()))
    if kind == "generate":
        if logits_bo is None:
            read(list(b"\n"))
        generator = stream(0, "session.sample", n_tokens)
        for _ in range(what):
            decoding = Decoding(MODELS["titans"], state)
            logits_bo = decoding.step([int(choose(logits_bo, Sampling(), generator))])
            state, n_tokens = decoding.state, n_tokens + 1
    return state, logits_bo, n_tokens


class Sessions(RuleBasedStateMachine):
    """Several sessions of one model under all that can be done to them, against a replay of what each was told.

    ``said`` holds for each session what it was told up to the end of each turn that it keeps.
    """

    names = Bundle("names")
    files = Bundle("files")

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.sessions, self.said, self.saved = {}, {}, []

    def teardown(self):
        self.folder.cleanup()

    def enter(self, session, said):
        name = str(len(self.sessions))
        self.sessions[name], self.said[name] = session, dict(said)
        return name

    def tell(self, name, *what):
        said = self.said[name]
        turn = max(said) + 1
        said[turn] = (*said[turn - 1], what)
        self.said[name] = {index: said[index] for index in sorted(said)[-KEPT_TURNS - 1 :]}

    @initialize(target=names)
    def begin(self):
        return self.enter(Session(MODELS["titans"], TOKENIZER), {0: ()})

    @rule(name=names, text=st.sampled_from(TEXTS))
    def feed(self, name, text):
        self.sessions[name].feed(text)
        self.tell(name, "feed", text)

    @rule(name=names, n_tokens=st.integers(1, 5))
    def generate(self, name, n_tokens):
        self.sessions[name].generate(n_tokens)
        self.tell(name, "generate", n_tokens)

    @rule(target=names, name=names)
    def fork(self, name):
        return self.enter(self.sessions[name].fork(), self.said[name])

    @rule(name=names, data=st.data())
    def rollback(self, name, data):
        to = data.draw(st.sampled_from(sorted(self.said[name])))
        self.sessions[name].rollback(to=to)
        self.said[name] = {turn: said for turn, said in self.said[name].items() if turn <= to}

    @rule(name=names)
    def forget(self, name):
        self.sessions[name].forget()
        self.said[name] = {0: ()}

    @rule(target=files, name=names)
    def save(self, name):
        path = Path(self.folder.name) / f"{len(self.saved)}.session"
        self.sessions[name].save(path)
        turn = max(self.said[name])
        self.saved.append({turn: self.said[name][turn]})
        return path

    @rule(target=names, path=files)
    def load(self, path):
        return self.enter(Session.load(path, MODELS["titans"], TOKENIZER), self.saved[int(path.stem)])

    @invariant()
    def each_is_what_it_was_told(self):
        for name, session in self.sessions.items():
            turn = max(self.said[name])
            state, logits_bo, n_tokens = replayed(self.said[name][turn])
            found, true = flatten(session._now.state or {}), flatten(state or {})
            assert (session.turn, session.n_tokens, found.keys()) == (turn, n_tokens, true.keys())
            assert all(torch.equal(found[leaf], true[leaf]) for leaf in true)
            assert logits_bo is None or torch.equal(session._now.logits_bo, logits_bo)


TestSessions = Sessions.TestCase
TestSessions.settings = settings(max_examples=15, stateful_step_count=15, deadline=None)


@pytest.mark.parametrize("name, which", [("titans", "mlp"), ("hope", "low_rank"), ("charformer", "head")])
def test_a_session_whose_weights_learn_keeps_the_change_to_itself(name, which, tmp_path):
    """A fork and a file take it along; the model and what is loaded beside it do not change."""
    model, text = MODELS[name], "to be or not to be, " * 8
    before = {path: tensor.clone() for path, tensor in model.state_dict().items()}
    learning = LearnConfig(which=which, lr=0.3)
    session = fed(model, text, learn="weights", learning=learning)
    assert all(torch.equal(tensor, before[path]) for path, tensor in model.state_dict().items())
    other, turn = session.fork(), session.turn
    session.save(tmp_path / "session")
    loaded = Session.load(tmp_path / "session", model, TOKENIZER)
    assert (loaded.learn, loaded.learning) == ("weights", learning)
    for each in (session, loaded):
        each.feed(text)
    assert_same(loaded, session)
    session.rollback(to=turn)
    assert_same(session, other)


def test_a_session_that_learns_in_another_way_is_refused(tmp_path):
    fed(MODELS["titans"], "a", learn="weights", learning=LearnConfig(which="head")).save(tmp_path / "session")
    for wrong in ({"learn": "memory"}, {"learning": LearnConfig()}):
        with pytest.raises(CheckpointMismatch, match="saved with learn=weights .which head.*, and is to go on with"):
            Session.load(tmp_path / "session", MODELS["titans"], TOKENIZER, **wrong)
