"""Tokenizers lose nothing, and are the same whenever they are made from the same."""

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meristem.data import tokenizer as tokenizers
from meristem.data.config import TokenizerConfig
from meristem.data.tokenizer import byte_tokenizer, load_tokenizer, tokenizer_from_bytes, train_tokenizer
from meristem.errors import DataError

TEXTS = [
    b"def write(memory, key, value):\n    return memory + key * value\n" * 30,
    "Ein Baum wächst. 🌱🌿\r\nEin zweiter Baum wächst.\x00\n".encode() * 30,
]
BPE = train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=300), TEXTS)
SPACED = train_tokenizer(
    TokenizerConfig(kind="bpe", vocab_size=300), [b"a\n\n\n  b\n\n\tx1\n \n a's\r\n\r\n  b\n\n\n\na x1\n  b a\n" * 30]
)
EACH = pytest.mark.parametrize("tokenizer", [byte_tokenizer(), BPE], ids=["byte", "bpe"])

any_text = st.text(max_size=200) | st.text(st.sampled_from("wäch🌱\r\n\0 \t\u2028Ba'"), max_size=200)


@EACH
@given(any_text)
@settings(max_examples=150, deadline=None)
def test_every_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= id < tokenizer.vocab_size for id in ids)
    assert int(tokenizer.byte_lengths[ids].sum()) == len(text.encode())


@EACH
@given(any_text)
@settings(max_examples=50, deadline=None)
def test_decoding_one_id_at_a_time_gives_the_same_text(tokenizer, text):
    decoder = tokenizer.decoder()
    assert "".join([*map(decoder.feed, tokenizer.encode(text)), decoder.finish()]) == text


def test_a_character_appears_with_its_last_byte():
    decoder = byte_tokenizer().decoder()
    assert [decoder.feed(byte) for byte in "ä🌱".encode()] == ["", "ä", "", "", "", "🌱"]


def test_half_a_character_shows_as_a_replacement():
    decoder = byte_tokenizer().decoder()
    assert decoder.feed(0xC3) + decoder.finish() == "\ufffd"
    assert byte_tokenizer().decode([0x41, 0xC3]) == "A\ufffd"


@given(st.binary(max_size=300))
def test_bytes_of_any_kind_are_their_own_ids(content):
    assert bytes(byte_tokenizer().encode_bytes(content)) == content


@EACH
def test_ids_do_not_depend_on_what_was_encoded_before(tokenizer):
    first = tokenizer.encode("Ein Baum wächst.")
    tokenizer.encode("never seen: ☃ " * 50)
    assert tokenizer.encode("Ein Baum wächst.") == first


@given(st.lists(st.sampled_from(["a", "  b", "\n", "\n\n", "\r\n", "'s", "x1", "\t", "ä", "\u2028"]), max_size=60))
@settings(max_examples=100, deadline=None)
def test_a_long_text_has_the_ids_of_the_whole(parts):
    """Text is encoded in portions; where it is cut must not show, also where entries span lines."""
    text = "".join(parts)
    whole = SPACED.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizers, "_PORTION", 3)
        assert SPACED.encode(text) == whole


def test_training_twice_gives_the_same_bytes():
    again = train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=300), TEXTS)
    assert again.to_bytes() == BPE.to_bytes()
    assert again.fingerprint == BPE.fingerprint


def test_other_texts_give_another_fingerprint():
    other = train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=300), TEXTS[:1])
    assert len({other.fingerprint, BPE.fingerprint, byte_tokenizer().fingerprint}) == 3


def test_byte_pairs_are_learned():
    assert BPE.vocab_size == 300
    assert len(BPE.encode("Ein Baum wächst.")) < 8


def test_a_short_text_gives_fewer_entries():
    assert train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=2048), [b"abab"]).vocab_size < 300


@EACH
def test_saving_and_loading_gives_the_same_tokenizer(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    for loaded in (load_tokenizer(tmp_path), tokenizer_from_bytes(tokenizer.to_bytes())):
        assert (loaded.kind, loaded.tokens, loaded.fingerprint) == (
            tokenizer.kind,
            tokenizer.tokens,
            tokenizer.fingerprint,
        )
        assert loaded.encode("Baum 🌱") == tokenizer.encode("Baum 🌱")


def test_text_that_utf8_cannot_say_is_refused_with_its_place():
    with pytest.raises(DataError, match="lone surrogate at character 2"):
        BPE.encode("ab\ud800")


def test_byte_pairs_are_not_learned_from_bytes_that_are_not_text():
    with pytest.raises(DataError, match=r"byte 1, 0xff, is not UTF-8 .* tokenizer.kind=byte"):
        train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=300), [b"a\xff"])


@EACH
@given(st.binary(max_size=300) | st.text(max_size=40).map(lambda text: text.encode()[1:-1]))
@settings(max_examples=200, deadline=None)
def test_gr3_bytes_go_in_as_bytes(tokenizer, content):
    """Any bytes at all, and the text around them has the ids it has without them."""
    ids = tokenizer.encode_bytes(content)
    assert tokenizer.decode_bytes(ids) == content
    assert tokenizer.encode(content.decode("utf-8", "surrogateescape")) == ids
    around = tokenizer.encode("Ein Baum") + tokenizer.encode_bytes(b"\xff") + tokenizer.encode("wächst")
    assert tokenizer.encode_bytes(b"Ein Baum" + b"\xff" + "wächst".encode()) == around


@EACH
@pytest.mark.parametrize("beyond", [-1, 300])
def test_an_id_outside_the_vocabulary_is_refused(tokenizer, beyond):
    with pytest.raises(DataError, match=f"id {beyond} is not in a vocabulary of"):
        tokenizer.decode([beyond])


def altered(**changes):
    described = orjson.loads(BPE.to_bytes())
    for path, value in changes.items():
        *above, last = path.split("__")
        place = described
        for name in above:
            place = place[name]
        place[last] = value
    return orjson.dumps(described)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"{", "is not JSON"),
        (b"[]", "describes no tokenizer"),
        (b'{"kind": "byt"}', "describes no tokenizer"),
        (altered(normalizer={"type": "Lowercase"}), "normalizer = .* only None"),
        (altered(pre_tokenizer__add_prefix_space=True), "add_prefix_space = True; only False"),
        (altered(model__unk_token="<unk>"), "unk_token = '<unk>'"),
        (altered(model__type="Unigram"), "model.type = 'Unigram'; only 'BPE'"),
        (altered(model__vocab={}), "is not a file of the tokenizers library"),
        (altered(model__vocab={"a": 0}, model__merges=[]), "lacks 255 of the 256 bytes"),
        (altered(model__vocab={"\u3042": 0}, model__merges=[]), "stands for no byte"),
    ],
)
def test_a_file_that_would_change_text_is_refused(content, message):
    with pytest.raises(DataError, match=message):
        tokenizer_from_bytes(content)
