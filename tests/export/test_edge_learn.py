"""The head and the last feed-forward layer learn on the edge as in a session, which goes from one to the other."""

from importlib.util import module_from_spec, spec_from_file_location

import pytest
import torch

import zoo
from edges import DAMAGED, KINDS, MISUSED, NOT_FINITE, NOT_TAKEN, OTHER_MODEL, Failed, Model, content_of, made
from edges import tokenizer as small_tokenizer
from meristem.export import edge
from meristem.models.config import LearnConfig
from meristem.models.generate import Sampling
from meristem.models.online import online_reader
from meristem.models.packed import parts_of
from meristem.models.weights import UNIFORM
from meristem.native import build
from meristem.native.build import has_compiler
from meristem.native.library import supported
from meristem.serve.moment import identity
from meristem.serve.session import Session
from meristem.serve.store import pack, unpack
from meristem.train.loss import cross_entropy

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),  # what is compiled first is kept
    pytest.mark.skipif(not (has_compiler() and supported()), reason="needs a C++ compiler: apt-get install g++"),
]
TEXT = "My sister Lydia likes soup.\nThe operation on the following line"
CHUNK = 16
MODELS = ("mag-additive", "attention", "mal", "wide")
"""Both feed-forward layers, heads that are the embedding and others, widths that are no multiple of a vector."""


@pytest.fixture(scope="module")
def runtime():
    spec = spec_from_file_location("edge_runtime", build.source_folder() / "edge" / "runtime.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plain_model(runtime, content, place):
    (place / "model").write_bytes(content)
    return runtime.Model(place / "model")


def relative(found: torch.Tensor, true: torch.Tensor) -> float:
    return float((found.double() - true).norm() / true.norm())


def session(shipped, which: str, text: str = TEXT) -> Session:
    how = LearnConfig(which=which, chunk=CHUNK)
    begun = Session(shipped.model, shipped.tokenizer, sampling=Sampling(temperature=0), learn="weights", learning=how)
    begun.feed(text)
    return begun


def written(begun: Session, n: int) -> list[int]:
    logits_bo, found = begun._now.logits_bo, []
    for _ in range(n):
        found.append(int(logits_bo.argmax()))
        logits_bo = begun._read_on(found[-1])
    begun._end_turn()
    return found


@pytest.mark.parametrize("which", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_it_learns_as_a_reader_does(core, runtime, name, which, tmp_path):
    """Every prediction of a text, and what was learned, in C and in torch beside NumPy in float64.

    A change is kept in bfloat16, so that a number which lies between two of these may go to either: predictions are
    within 1e-4 of their length, as everywhere, where those of a memory alone are within 3e-6.
    """
    model, n = made(name), 61
    content = content_of(model, small_tokenizer())
    how = LearnConfig(which=which, chunk=5, lr=0.5)
    ids = ((torch.arange(n) ** 2 * 3) % 11).tolist()
    plain, handle = plain_model(runtime, content, tmp_path), Model(core, content)
    plain.learn(which, lr=0.5, chunk=5)
    handle.learn(KINDS[which], 5, 0.5)
    true_to = torch.stack([torch.tensor(plain.read([token_id])) for token_id in ids])
    found_to = torch.stack([handle.read([token_id]) for token_id in ids])
    own_bto, state = online_reader(model, "weights", cross_entropy, how)(torch.tensor([ids]), None)
    assert relative(found_to, true_to) < 1e-4 and relative(own_bto[0], true_to) < 1e-4
    learned = state["learned"]
    assert handle.learned.n_steps == plain.learned["steps_b"] == float(learned["steps_b"]) == (n - 1) // 5
    assert handle.learned.saved_nats == pytest.approx(plain.learned["saved_b"], rel=1e-4)
    assert float(learned["saved_b"]) == pytest.approx(plain.learned["saved_b"], rel=1e-4)
    for leaf, delta in plain.learned["delta"].items():
        assert relative(learned["delta"][leaf][0], torch.tensor(delta)) < 2**-7


@pytest.mark.parametrize("which", KINDS)
def test_a_session_goes_on_learning_everywhere(core, runtime, shipped, content, which, tmp_path):
    """From chat to C, to NumPy, and back to chat: one greedy text, and predictions within 1e-4 of their length."""
    begun = session(shipped, which)
    begun.save(tmp_path / "begun")
    handle, plain = Model(core, content), plain_model(runtime, content, tmp_path)
    handle.load((tmp_path / "begun").read_bytes())
    assert torch.equal(handle.logits, begun._now.logits_bo[0]) and handle.learned.which == KINDS[which]
    assert [handle.step() for _ in range(70)] == written(begun, 70)
    assert relative(handle.logits, begun._now.logits_bo[0].double()) < 1e-4
    (tmp_path / "c").write_bytes(handle.save())
    plain.load(tmp_path / "c")
    assert [plain.step() for _ in range(70)] == written(begun, 70)
    assert relative(begun._now.logits_bo[0], torch.tensor(plain.logits)) < 1e-4
    plain.save(tmp_path / "numpy")
    back = Session.load(tmp_path / "numpy", shipped.model, shipped.tokenizer)
    assert (back.learn, back.learning, back.n_tokens) == ("weights", begun.learning, begun.n_tokens)
    assert written(back, 60) == written(begun, 60)
    found, true = (each._now.state["learned"] for each in (back, begun))
    assert found["n_chunks"] == true["n_chunks"] and torch.equal(found["steps_b"], true["steps_b"])


@pytest.mark.parametrize("which", KINDS)
def test_a_session_that_begins_to_learn_there_is_one(core, shipped, content, which, tmp_path):
    """At a rate of one's own, and at the one that was found for the model."""
    for rate, lr in ((-1.0, None), (0.123, pytest.approx(0.123, rel=1e-7))):
        handle = Model(core, content)
        handle.learn(KINDS[which], CHUNK, rate)
        handle.read(shipped.tokenizer.encode(TEXT))
        (tmp_path / "own").write_bytes(handle.save())
        opened = Session.load(tmp_path / "own", shipped.model, shipped.tokenizer, learn="weights")
        assert opened.learning.model_dump() == {"which": which, "lr": lr, "chunk": CHUNK, "grad_clip": 1.0}
        assert written(opened, 40) == [handle.step() for _ in range(40)]


@pytest.mark.parametrize("which", KINDS)
def test_saved_and_loaded_is_the_same_to_the_bit(core, shipped, content, which):
    """On both sides of the end of a chunk, and a session that has read nothing."""
    handle, other = Model(core, content), Model(core, content)
    handle.learn(KINDS[which], 4)
    other.load(handle.save())
    assert other.learned.which == KINDS[which] and other.n_tokens == 0
    ids = shipped.tokenizer.encode(TEXT)
    for first, end in ((0, 1), (1, 3), (3, 4), (4, 5), (5, 9)):
        handle.read(ids[first:end])
        other.load(handle.save())
        again = Model(core, content)
        again.load(other.save())
        assert torch.equal(again.logits, handle.logits)
        assert torch.equal(again.read(ids[end : end + 9]), other.read(ids[end : end + 9]))


@pytest.mark.parametrize("which", KINDS)
def test_steps_that_make_a_text_dearer_are_undone(core, runtime, which, tmp_path):
    """A rate that diverges is halved as in Python, until nothing is learned, and no token costs more than is proved."""
    model = made("mag-additive")
    content = content_of(model, small_tokenizer())
    ids = ((torch.arange(160) ** 2 * 7) % zoo.VOCABULARY).tolist()
    plain, handle = plain_model(runtime, content, tmp_path), Model(core, content)
    plain.learn(which, lr=300.0, chunk=4)
    handle.learn(KINDS[which], 4, 300.0)
    rates = set()
    for at, token_id in enumerate(ids):
        plain.read([token_id])
        logits = handle.read([token_id]).double()
        rates.add(handle.learned.rate)
        assert handle.learned.rate == plain.learned["rate_b"] and handle.learned.n_steps == plain.learned["steps_b"]
        if handle.learned.n_steps and at + 1 < len(ids):
            nats = -float(logits.log_softmax(0)[ids[at + 1]])
            assert nats <= -torch.tensor(UNIFORM / zoo.VOCABULARY).double().log() + 1e-5
    assert min(rates) < 300.0 and 300.0 in rates


def test_forgotten_is_as_begun(core, shipped, content):
    """What was learned is gone; what learns stays chosen."""
    handle, ids = Model(core, content), shipped.tokenizer.encode(TEXT)
    handle.learn(KINDS["head"], 4)
    first = handle.read(ids)
    assert handle.learned.n_steps > 0
    handle.forget()
    assert (handle.learned.which, handle.learned.n_steps, handle.learned.n_chunks) == (1, 0, 0)
    assert torch.equal(handle.read(ids), first)


def test_another_choice_is_refused(core, runtime, shipped, content, tmp_path):
    """A session goes on as it was saved, or not here."""
    begun = session(shipped, "head")
    begun.save(tmp_path / "head")
    begun_tokens = begun.n_tokens
    begun = Session(shipped.model, shipped.tokenizer, learn="weights")
    begun.feed(TEXT)
    begun.save(tmp_path / "mlp")
    head, plain = (tmp_path / "head").read_bytes(), plain_model(runtime, content, tmp_path)
    said = "while 'head' learned, and is to go on with '{}' or at another rate, chunk or clip"
    for choice, own in (
        ((2, CHUNK), "last_mlp"),
        ((0, CHUNK), "memory"),
        ((1, CHUNK + 1), "head"),
        ((1, 16, 0.1), "head"),
    ):
        handle = Model(core, content)
        handle.learn(*choice)
        with pytest.raises(Failed, match=said.format(own)) as refused:
            handle.load(head)
        assert refused.value.code == OTHER_MODEL and handle.n_tokens == 0
        core.meristem_learn(handle.at, None)
        handle.load(head)
        assert (handle.learned.which, handle.n_tokens) == (1, begun_tokens)
    handle = Model(core, content)
    handle.learn(1, CHUNK)
    handle.load(head)
    with pytest.raises(Failed, match="in the session learns 'mlp', and here the head or the last feed-forward") as no:
        handle.load((tmp_path / "mlp").read_bytes())
    assert no.value.code == NOT_TAKEN and handle.n_tokens > 0
    with pytest.raises(ValueError, match="learns 'mlp', which nothing here can"):
        plain.load(tmp_path / "mlp")
    plain.learn("last_mlp")
    with pytest.raises(ValueError, match="was saved while 'head' learned in another way than here"):
        plain.load(tmp_path / "head")


def test_misuse_has_a_code_and_a_sentence(core, runtime, content, tmp_path):
    handle, plain = Model(core, content), plain_model(runtime, content, tmp_path)
    nan = float("nan")
    for choice in ((3, 64), (-1, 64), (1, 1), (1, 2**30), (1, 64, nan), (1, 64, 1.0, 0.0), (1, 64, 1.0, nan), (2, -5)):
        with pytest.raises(Failed, match="what learns is memory, head or last_mlp, after chunks of 2 tokens") as no:
            handle.learn(*choice)
        assert no.value.code == MISUSED and handle.learned.which == 0
    with pytest.raises(ValueError, match="'mlp' does not learn here"):
        plain.learn("mlp")
    handle.read([5])
    plain.read([5])
    with pytest.raises(Failed, match="weights learn from the first token on, and some were read. Forget the session"):
        handle.learn(1)
    with pytest.raises(ValueError, match="some were read. Forget the session first"):
        plain.learn("head")
    assert core.meristem_learn(None, None) == core.meristem_learning_now(handle.at, None) == MISUSED


@pytest.mark.parametrize("which", KINDS)
def test_what_was_learned_is_checked(core, runtime, which, tmp_path):
    """Leaves that are missing, of another size or type, out of range or no numbers; the session before them stays."""
    content = content_of(made("mag-additive"), small_tokenizer())
    handle = Model(core, content)
    handle.learn(KINDS[which], 4)
    handle.read([1, 2, 3, 4, 5, 6])
    tensors, header = unpack(handle.save(), "session")
    wrong = {name: tensors[name][:0] for name in tensors if "learned" in name and tensors[name].ndim}
    wrong["state.learned.n_chunks"] = torch.tensor(-1)
    wrong["state.learned.tokens_bt"] = torch.tensor([[1, zoo.VOCABULARY]])
    no_number = {name: torch.full_like(leaf, torch.inf) for name, leaf in tensors.items() if leaf.is_floating_point()}
    changes = [({name: leaf}, DAMAGED) for name, leaf in wrong.items()]
    changes += [({name: tensors[name].double()}, DAMAGED) for name in wrong if tensors[name].is_floating_point()]
    changes += [({"state.learned.tokens_bt": torch.tensor([[1, -2]])}, DAMAGED)]
    changes += [({name: leaf}, NOT_FINITE) for name, leaf in no_number.items()]
    plain, before = plain_model(runtime, content, tmp_path), handle.logits
    for change, code in changes:
        spoilt = pack(tensors | change, header)
        with pytest.raises(Failed, match="damaged|NaN or infinity|not finite") as refused:
            handle.load(spoilt)
        assert (refused.value.code, handle.n_tokens) == (code, 6), change
        assert torch.equal(handle.logits, before)
        (tmp_path / "spoilt").write_bytes(spoilt)
        with pytest.raises(ValueError, match="not hold what was learned|no number|lacks|which no file"):
            plain.load(tmp_path / "spoilt")
    for name in wrong:
        less = pack({other: leaf for other, leaf in tensors.items() if other != name}, header)
        (tmp_path / "less").write_bytes(less)
        with pytest.raises(Failed, match="does not hold what a reader of this model carries"):
            handle.load(less)
        with pytest.raises(ValueError, match="does not hold what was learned in it"):
            plain.load(tmp_path / "less")


HOWS = (
    {"chunk": 1},
    {"chunk": 2**40},
    {"chunk": "4"},
    {"lr": -1},
    {"lr": "1"},
    {"lr": 1e40},
    {"grad_clip": 0},
    {"grad_clip": None},
)


@pytest.mark.parametrize("how", HOWS, ids=str)
def test_a_way_to_learn_that_is_none_is_refused(core, how):
    content = content_of(made("mag-additive"), small_tokenizer())
    handle = Model(core, content)
    handle.learn(1, 4)
    handle.read([1, 2, 3, 4, 5, 6])
    tensors, header = unpack(handle.save(), "session")
    spoilt = pack(tensors, header | {"learning": header["learning"] | how})
    with pytest.raises(Failed, match="learn at a rate, chunk or clip that this library does not compute") as refused:
        Model(core, content).load(spoilt)
    assert refused.value.code == NOT_TAKEN


def test_a_model_that_says_no_rates_is_refused(core):
    model = made("attention")
    for rates in ({}, {"head": 1.0}, {"head": -1.0, "last_mlp": 1.0}):
        parts = parts_of(model)._replace(learn_rates=rates)
        content = edge.weights_file(parts, small_tokenizer(), identity(model, small_tokenizer()))
        with pytest.raises(Failed, match="does not say at which rates its weights learn") as refused:
            Model(core, content)
        assert refused.value.code == NOT_TAKEN
