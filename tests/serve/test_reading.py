"""What the memory view says is what other readings of the same tokens give, and looking changes nothing."""

import contextlib
import json
import math

import pytest
import torch

import zoo
from meristem.data.tokenizer import byte_tokenizer
from meristem.errors import NoSession
from meristem.memory.state import flatten, unflatten
from meristem.models.build import build
from meristem.models.config import ModelConfig
from meristem.nn.config import MemoryConfig
from meristem.serve.moment import FRESH, Moment, read, surprise, tensors_of
from meristem.serve.reading import TurnViews
from meristem.serve.session import KEPT_TURNS, memory_view
from meristem.serve.sessions import MOST_KEPT_IDS, Said, Sessions

TOKENIZER = byte_tokenizer()
MEMORY = MemoryConfig(rule="gated_delta", head_dim=6, chunk=7)
SOME = (
    "preset-default",
    "preset-titans-mac",
    "preset-hope",
    "preset-tnt-titans",
    "preset-attention",
    "lm-mag-kept-soup",
)


def model_of(settings: ModelConfig, memory: MemoryConfig = MEMORY):
    """Weights off their first values, so that every gate and memory counts."""
    model = build(settings, memory, 256, 1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


MODEL = model_of(ModelConfig(dim=12, n_layers=2, n_heads=2, sliding_window=5))


class Conversation:
    """A session in a directory, and its turns."""

    def __init__(self, directory, model=MODEL, **settings):
        self.sessions = Sessions(directory, model, TOKENIZER)
        self.views = TurnViews(self.sessions)
        self.id = self.sessions.create(**settings).id

    def turn(self, text: str, reply: str = "", **changes) -> Said:
        """Read a text and then, token by token, a reply."""
        with self.sessions.writing(self.id) as record:
            reader, before = self.sessions.reader(record.learn, record.learning), self.sessions.moment(record)
            ids, written = TOKENIZER.encode(text), TOKENIZER.encode(reply)
            moment, logits_bto = read(reader, before, ids)
            nats = surprise(before.logits_bo, logits_bto, ids)
            for each in written:
                moment, _ = read(reader, moment, [each])
            told = {"ids": (*ids, *written)[:MOST_KEPT_IDS], "n_drawn": len(written), **changes}
            said = Said(text, reply, n_read=len(ids), nats=nats, **told)
            self.sessions.add(record, moment, said)
        return said

    def moment(self, turn: int) -> Moment:
        return self.sessions.moment_after(self.id, turn)


@pytest.fixture
def begin(tmp_path):
    """Begins conversations, each in a directory of its own."""
    with contextlib.ExitStack() as stack:

        def begun(**settings) -> Conversation:
            made = Conversation(tmp_path / str(len(list(tmp_path.iterdir()))), **settings)
            stack.callback(made.sessions.close)
            return made

        yield begun


def nats_of(model, moment: Moment, text: str, reply: str) -> float:
    """Of a reply, read from a moment on behind a text."""
    ids = TOKENIZER.encode(text + reply)
    n_reply = len(TOKENIZER.encode(reply))
    _, logits_bto = read(model, moment, ids)
    logprob_to = logits_bto[0, -n_reply - 1 : -1].log_softmax(-1)
    return -float(logprob_to.gather(1, torch.tensor(ids[-n_reply:])[:, None]).sum())


def with_memory(moment: Moment, other: Moment) -> Moment:
    """A moment with the matrices of another."""
    flat, found = flatten(moment.state), flatten(other.state)
    swapped = {name: found[name] if ".memory." in name else leaf for name, leaf in flat.items()}
    return Moment(unflatten(swapped), None, moment.n_tokens)


def test_each_token_has_the_surprise_that_the_session_had(begin):
    conversation = begin()
    for text, reply in (("Ada lives in Oslo.\n", "Yes.\n"), ("Where?\n", "Os\u00e9\n")):
        said = conversation.turn(text, reply)
        turn = conversation.sessions.get(conversation.id).turn
        tokens = conversation.views.reading(conversation.id, turn)["tokens"]
        n_read = tokens["n_read"]
        assert n_read == said.n_read and len(tokens["nats"]) == said.n_read + said.n_drawn
        assert sum(filter(None, tokens["nats"][:n_read])) == pytest.approx(said.nats, rel=1e-4)
        before = conversation.moment(turn - 1)
        assert sum(tokens["nats"][n_read:]) == pytest.approx(nats_of(MODEL, before, text, reply), rel=1e-4)
        assert (tokens["nats"][0] is None) == (turn == 1)
        assert "".join(tokens["texts"]) == text + reply
    # The first byte of two has no text of its own.
    assert tokens["texts"][-3:] == ["", "\u00e9", "\n"]


def test_an_empty_memory_is_that_of_a_session_that_read_nothing(begin):
    """All else stays: the keys of attention, the tails of convolutions."""
    conversation = begin()
    conversation.turn("Ada lives in Oslo.\n", "Yes.\n")
    conversation.turn("Where?\n", "Oslo\n")
    reading = conversation.views.reading(conversation.id, 2)
    empty = read(conversation.sessions.reader("none"), FRESH, [0])[0]
    before = with_memory(conversation.moment(1), empty)
    without = reading["tokens"]["nats_without"]
    assert sum(without[-5:]) == pytest.approx(nats_of(MODEL, before, "Where?\n", "Oslo\n"), rel=1e-4)
    assert without[0] is None and without != reading["tokens"]["nats"]


def test_sources_are_gains_from_one_memory_to_the_next(begin):
    conversation = begin()
    for text in ("Ada lives in Oslo.\n", "Bruno bakes.\n", "Cora has a dog.\n"):
        conversation.turn(text)
    conversation.turn("Where does Ada live?\n", "In Oslo.\n")
    found = conversation.views.sources(conversation.id, 4)
    last = conversation.moment(3)
    empty = read(conversation.sessions.reader("none"), FRESH, [0])[0]
    steps = [with_memory(last, each) for each in (empty, *map(conversation.moment, (1, 2, 3)))]
    nats = [nats_of(MODEL, each, "Where does Ada live?\n", "In Oslo.\n") for each in steps]
    assert (found["measured"], found["n_tokens"]) == ("reply", 9)
    assert found["nats_without"] == pytest.approx(nats[0], rel=1e-4)
    assert found["nats"] == pytest.approx(nats[-1], rel=1e-4)
    assert found["nats_fresh"] == pytest.approx(nats_of(MODEL, FRESH, "Where does Ada live?\n", "In Oslo.\n"), rel=1e-4)
    assert [(each["first"], each["last"]) for each in found["sources"]] == [(1, 1), (2, 2), (3, 3)]
    gains = [before - after for before, after in zip(nats, nats[1:], strict=False)]
    assert [each["nats"] for each in found["sources"]] == pytest.approx(gains, abs=1e-3)
    assert max(map(abs, gains)) > 0.01


def test_of_a_text_alone_its_reading_is_measured(begin):
    conversation = begin()
    conversation.turn("Ada lives in Oslo.\n")
    conversation.turn("Ada again.\n")
    found = conversation.views.sources(conversation.id, 2)
    nats = conversation.views.reading(conversation.id, 2)["tokens"]["nats"]
    assert (found["measured"], found["n_tokens"]) == ("text", 10)
    assert found["nats"] == pytest.approx(sum(nats[1:]), rel=1e-4)


def test_layers_are_those_of_the_memory_and_its_gates(begin):
    conversation = begin()
    conversation.turn("Ada lives in Oslo.\n")
    conversation.turn("Ada again.\n")
    earlier, layers = (conversation.views.reading(conversation.id, turn)["layers"] for turn in (1, 2))
    seen = memory_view(MODEL, conversation.moment(2))["layers"]
    assert list(layers) == sorted(seen)
    before, after = (flatten(conversation.moment(turn).state) for turn in (1, 2))
    for path, layer in layers.items():
        name = f"{path}.memory.matrix_bhkv"
        assert layer["norm"] == pytest.approx(seen[path]["norm"], rel=1e-6)
        assert layer["change"] == pytest.approx(float((after[name] - before[name]).norm()), rel=1e-5)
        assert layer["half_life"] > 0 and layer["half_life"] != earlier[path]["half_life"]


def test_looking_changes_nothing_and_hears_no_other_reading(begin):
    conversation = begin()
    conversation.turn("Ada lives in Oslo.\n", "Yes.\n")
    conversation.turn("Where?\n", "Oslo\n")
    before = {name: tensor.clone() for name, tensor in tensors_of(conversation.moment(2)).items()}
    first = conversation.views.reading(conversation.id, 2), conversation.views.sources(conversation.id, 2)
    assert (conversation.views.reading(conversation.id, 2), conversation.views.sources(conversation.id, 2)) == first
    after = tensors_of(conversation.moment(2))
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert not any(module._forward_hooks for module in MODEL.modules())
    assert conversation.sessions.get(conversation.id).turn == 2


@pytest.mark.parametrize("name", SOME)
def test_every_kind_of_memory_can_be_looked_into(begin, name):
    conversation = begin(model=model_of(*zoo.ZOO[name]))
    for text in ("Ada i", "n Oslo"):
        conversation.turn(text)
    conversation.turn("Ada?", "Os")
    reading, found = (look(conversation.id, 3) for look in (conversation.views.reading, conversation.views.sources))
    json.dumps([reading, found], allow_nan=False)
    has_memory = bool(memory_view(conversation.sessions.model, conversation.moment(3))["layers"])
    assert bool(reading["layers"]) is has_memory
    gain = found["nats_without"] - found["nats"]
    assert sum(each["nats"] for each in found["sources"]) == pytest.approx(gain, abs=1e-4)
    assert (abs(gain) > 1e-4) is has_memory
    assert found["nats"] == pytest.approx(sum(reading["tokens"]["nats"][-2:]), rel=1e-4)


@pytest.mark.parametrize("learn", ["none", "levels", "weights"])
def test_whatever_learns_can_be_looked_into(begin, learn):
    conversation = begin(model=model_of(*zoo.ZOO["preset-hope-attention"]), learn=learn)
    conversation.turn("Ada in Oslo")
    conversation.turn("Ada?", "Os")
    found = conversation.views.sources(conversation.id, 2)
    reading = conversation.views.reading(conversation.id, 2)
    assert math.isfinite(found["nats"]) and reading["tokens"]["n_read"] == 4
    if learn == "none":
        assert found["nats"] == pytest.approx(found["nats_without"], abs=1e-6)
        assert all(layer["change"] == 0 and layer["half_life"] is None for layer in reading["layers"].values())


def test_turns_that_are_not_kept_count_with_the_next_one_that_is(begin):
    conversation = begin()
    for _ in range(KEPT_TURNS + 3):
        conversation.turn("Ada.\n")
    last = KEPT_TURNS + 3
    found = conversation.views.sources(conversation.id, last)
    assert [(each["first"], each["last"]) for each in found["sources"]][:2] == [(1, 4), (5, 5)]
    assert sum(each["nats"] for each in found["sources"]) == pytest.approx(
        found["nats_without"] - found["nats"], abs=1e-4
    )
    with pytest.raises(NoSession, match="stood after turn 2 is not kept"):
        conversation.views.reading(conversation.id, 3)
    with pytest.raises(NoSession, match="has no turn 99"):
        conversation.views.reading(conversation.id, 99)


@pytest.mark.parametrize("ids", [(), (65, 256)])
def test_a_turn_without_its_tokens_is_refused(begin, ids):
    """One that an earlier version stored, or a file that somebody made with ids that are none."""
    conversation = begin()
    conversation.turn("Ad", ids=ids)
    with pytest.raises(NoSession, match="tokens of turn 1 are not kept"):
        conversation.views.reading(conversation.id, 1)


def test_of_a_long_turn_the_beginning_is_shown(begin):
    conversation = begin()
    conversation.turn("ab" * MOST_KEPT_IDS)
    reading = conversation.views.reading(conversation.id, 1)
    assert (reading["n_left_out"], len(reading["tokens"]["nats"])) == (MOST_KEPT_IDS, MOST_KEPT_IDS)
    assert conversation.views.sources(conversation.id, 1)["n_tokens"] == 511


def test_ids_travel_with_a_session_file_and_a_fork(begin):
    conversation = begin()
    said = conversation.turn("Ada lives.\n", "Yes.\n")
    for made in (
        conversation.sessions.put(conversation.sessions.export(conversation.id)),
        conversation.sessions.fork(conversation.id),
    ):
        assert conversation.sessions.turns(made.id)[0].said.ids == said.ids


def test_another_owner_sees_no_turn(begin):
    conversation = begin(owner="ada")
    mine = conversation.sessions.create(owner="bruno").id
    for look in (conversation.views.reading, conversation.views.sources):
        with pytest.raises(NoSession, match="there is no session"):
            look(conversation.id, 1, "bruno")
        with pytest.raises(NoSession, match="has no turn 1"):
            look(mine, 1, "bruno")
