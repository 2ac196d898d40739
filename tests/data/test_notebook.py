"""Generated text: the same for a seed, values where they are said to be, nothing held out in training."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meristem.data.config import DataConfig, NotebookConfig, TokenizerConfig
from meristem.data.notebook import FARTHEST, HELD_OUT_GAP, document, documents, names, wordings
from meristem.data.notebook_names import CITIES, IN_USE, NAMES
from meristem.data.notebook_phrases import NEWS, TITLES, UNTOLD
from meristem.data.notebook_words import ATTRIBUTES, OWN
from meristem.data.prepare import prepare
from meristem.data.sources import resolve
from meristem.errors import DataError

SMALL = NotebookConfig(size_bytes=2_000_000)


@pytest.fixture(scope="module")
def made():
    """Some two million bytes of it."""
    return list(documents(SMALL, 0.1))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), number=st.integers(0, 400), done=st.floats(0, 1))
def test_every_recall_stands_where_it_says(seed, number, done):
    """The value is there, the newest one of its fact, and a document is the same whenever it is made."""
    chosen = NotebookConfig(seed=seed)
    one = document(chosen, 0.1, number, done)
    assert one == document(chosen, 0.1, number, done)
    last = {}
    for recall in one.recalls:
        before = one.text[recall.start - recall.distance :]
        assert one.text[recall.start :].startswith(recall.value.encode())
        assert before.startswith(recall.value.encode()), "the newest value stands at the distance"
        assert recall.start - recall.distance >= last.get((recall.subject, recall.attribute), 0)
        last[recall.subject, recall.attribute] = recall.start


def test_facts_are_dense_at_first_and_rare_at_last():
    """Where no document ends early, sentences about facts have the share of the bytes that is asked for."""
    people = set(NAMES)
    for done, share in ((0.0, 0.9), (1.0, 0.1)):
        texts = [document(SMALL, 0.0, number, done).text.decode() for number in range(20)]
        parts = [part for text in texts for part in text.split("\n\n")]
        n_facts = sum(len(part) for part in parts if not people.isdisjoint(re.findall(r"\w+", part)))
        assert n_facts / sum(map(len, texts)) == pytest.approx(share, abs=0.1)


def test_what_is_held_out_is_in_no_training_document(made):
    """Names, wordings and distances; the held-out documents have all of them."""
    training = b"".join(one.text for one in made if not one.is_held_out).decode()
    assert not set(names(is_held_out=True)) & set(re.findall(r"\w+", training))
    low, high = HELD_OUT_GAP
    for one in made:
        far = [recall for recall in one.recalls if low <= recall.distance < high]
        is_new = [recall for recall in one.recalls if recall.is_wording_held_out or recall.is_name_held_out]
        assert one.is_held_out or not (far or is_new)
    for attribute in (*ATTRIBUTES, *OWN):
        assert all(wording.count("{v}") == 1 for wording in (*attribute.statements, *attribute.questions))
        for wording in (*wordings(attribute.statements, True), *wordings(attribute.questions, True)):
            pattern = re.escape(wording).replace(r"\{s\}", r"\w+").replace(r"\{v\}", r"\w+")
            assert not re.search(rf"(?<!\w){pattern}", training), wording
    assert any(recall.is_wording_held_out for one in made for recall in one.recalls)
    assert any(low <= recall.distance < high for one in made for recall in one.recalls)


def test_in_a_conversation_every_line_is_answered(made):
    """One line, its answer, a blank line; no value stands in an exchange that ends in not knowing."""
    talks = [one for one in made if re.match(r"[^\n]+\n[^\n]+\n\n", one.text.decode())]
    assert 0.3 < len(talks) / len(made) < 0.7
    n_untold = 0
    for one in talks:
        exchanges = one.text.decode().split("\n\n")
        assert exchanges.pop() == ""
        assert all(exchange.count("\n") == 1 for exchange in exchanges)
        at = 0
        for exchange in exchanges:
            said, answer = exchange.split("\n")
            start, at = at, at + len(exchange.encode()) + 2
            inside = [recall for recall in one.recalls if start <= recall.start < at]
            if answer in UNTOLD:
                n_untold += 1
                assert not inside, said
    assert n_untold > 10


def without_titles(text):
    """A sentence with names alone."""
    return re.sub(rf"\b(?:{'|'.join(TITLES)}) ", "", text, flags=re.IGNORECASE)


def question_of(wording):
    """A question without its answer."""
    return without_titles(re.split(r"(?<=[?.]) |(?<=[?.]\") ", wording)[0])


def test_what_nobody_told_is_not_in_the_document_before(made):
    """The question of an exchange that ends in not knowing names a person and an attribute of which nothing stands."""
    for one in made:
        for exchange in re.finditer(r"([^\n]+)\n([^\n]+)\n\n", one.text.decode()):
            if exchange[2] not in UNTOLD:
                continue
            asks = without_titles(exchange[1])
            subjects = {"I"} | set(re.findall(r"\w+", asks)) & set(NAMES)
            before = {(recall.subject, recall.attribute) for recall in one.recalls if recall.start < exchange.start()}
            asked = [
                (subject, attribute.name)
                for subject in subjects
                for attribute in (OWN if subject == "I" else ATTRIBUTES)
                for question in map(question_of, attribute.questions)
                if asks.lower().endswith(question.format(s=subject).lower())
            ]
            assert asked, exchange[1]
            assert not before & set(asked), exchange[1]


def test_people_and_towns_that_there_are_have_their_share(made):
    """Half of the names that facts are told of, and more than half of the homes."""
    told = {(one.id, recall.subject) for one in made for recall in one.recalls if recall.subject != "I"}
    in_use = [name for _, name in told if name in set(IN_USE)]
    assert len(in_use) / len(told) == pytest.approx(0.5, abs=0.05)
    assert len(set(in_use)) > 0.5 * len(IN_USE)
    homes = [recall.value for one in made for recall in one.recalls if recall.attribute == "home"]
    assert 0.6 < sum(home in set(CITIES) for home in homes) / len(homes) < 0.9


def test_a_value_changes_with_a_word_or_without_the_old_one(made):
    """Half of the corrections name the value that was; behind the others it comes up no more unless it is told."""
    texts = [one.text.decode() for one in made]
    n_plain = sum(text.count(f"{opening} ") for text in texts for opening in ("Since today", "From now on", "Wait:"))
    n_named = sum(len(re.findall(r"About (?:the|my) [\w ]+,", text)) for text in texts)
    assert n_plain / 3 * len(NEWS) == pytest.approx(n_named, rel=0.3)


def test_distances_reach_from_a_few_bytes_to_the_farthest(made):
    """Every octave from 8 bytes to ``FARTHEST``."""
    octaves = {recall.distance.bit_length() for one in made for recall in one.recalls}
    assert octaves >= set(range(4, FARTHEST.bit_length()))


def test_another_version_of_its_words_is_read_anew():
    """A text that was prepared is taken as it is while its files stay; the modules that write it are among them."""
    paths = {path.name for path in resolve(DataConfig(source="notebook")).paths()}
    assert paths == {"topics.py", "notebook.py", "notebook_names.py", "notebook_phrases.py", "notebook_words.py"}


def test_it_is_prepared_as_any_text(tmp_path):
    """Held-out documents are the validation split; another seed or share is another corpus."""
    data = DataConfig(source="notebook", root=tmp_path, notebook=NotebookConfig(size_bytes=1_000_000))
    corpus = prepare(data, TokenizerConfig())
    expected = b"".join(one.text for one in documents(data.notebook, 0.1) if one.is_held_out)
    assert corpus.tokens("val").rows(np.zeros(1, dtype=int), len(expected)).astype("uint8").tobytes() == expected
    other = prepare(
        data.model_copy(update={"notebook": NotebookConfig(size_bytes=1_000_000, seed=1)}), TokenizerConfig()
    )
    assert other.fingerprint != corpus.fingerprint
    with pytest.raises(DataError, match=r"Set data.validation to 0.5 or less"):
        prepare(data.model_copy(update={"validation": 0.9}), TokenizerConfig())
