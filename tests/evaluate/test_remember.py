"""The suite remember: who copies the newest value is right always, who guesses about as often as chance."""

import re

import torch
from torch import nn

from meristem.data.config import NotebookConfig
from meristem.data.notebook_names import NAMES
from meristem.data.notebook_words import ATTRIBUTES
from meristem.data.tokenizer import byte_tokenizer
from meristem.device.config import DeviceConfig
from meristem.device.resolve import resolve
from meristem.evaluate.remember import N_FACTS, held_out_documents, mentions, remember, tell_facts, wilson
from meristem.events import silent

VALUES = re.compile(rf"\b({'|'.join(value for each in ATTRIBUTES for value in each.values)})\b")
PEOPLE = re.compile(rf"\b({'|'.join(NAMES)})\b")


class Lookup(nn.Module):
    """Predicts, after a text that names a person, the bytes of the value that was told of that person."""

    def forward(self, tokens_bt, state=None):
        texts = [b""] * len(tokens_bt) if state is None else state["texts"]
        logits_bto = torch.zeros(*tokens_bt.shape, 256)
        for row, ids in enumerate(tokens_bt.tolist()):
            told = dict(_facts(texts[row].decode()))
            asked = bytes(ids).decode()
            person = PEOPLE.search(asked)
            value = told.get(person[0]) if person else None
            found = VALUES.search(asked, person.end()) if person else None
            for place, letter in enumerate((value or "").encode() if found else b""):
                if found.start() + place - 1 < len(ids):
                    logits_bto[row, found.start() + place - 1, letter] = 9.0
        read = [before + bytes(ids) for before, ids in zip(texts, tokens_bt.tolist(), strict=True)]
        return logits_bto, {"texts": read}


def _facts(text):
    """Every person that is named, with the first value behind the name."""
    for person in PEOPLE.finditer(text):
        value = VALUES.search(text, person.end())
        if value:
            yield person[0], value[0]


def test_who_looks_it_up_remembers_everything_and_nothing_after_a_reset():
    """The scorer finds the value that was told; without what was read the candidates are a guess."""
    told = tell_facts(byte_tokenizer(), 5, 4, 0.1)
    how = {"piece": 10_000, "batch": 3, "device": resolve(DeviceConfig(device="cpu"), silent)}
    for score in remember(Lookup(), told, is_reset=False, **how):
        assert (score.n, score.n_greedy, score.n_chosen) == (4 * N_FACTS, 4 * N_FACTS, 4 * N_FACTS)
    for score in remember(Lookup(), told, is_reset=True, **how):
        assert (score.n, score.n_greedy) == (4 * N_FACTS, 0) and score.n_chosen < 2 * N_FACTS
    assert told.fingerprint == tell_facts(byte_tokenizer(), 5, 4, 0.1).fingerprint


def test_a_value_that_comes_back_counts_where_all_of_it_is_predicted():
    """Who knows the document has every value at every distance; who predicts one byte has none."""
    chosen = held_out_documents(NotebookConfig(size_bytes=1_000_000), 0.1, 1)
    text = torch.tensor([list(chosen[0].text)])

    def knows(tokens_bt, state):
        at = 0 if state is None else state["at"]
        stop = at + tokens_bt.shape[1]
        return torch.nn.functional.one_hot(text[:, at + 1 : stop + 1], 256).float(), {"at": stop}

    def repeats(tokens_bt, state):
        return torch.nn.functional.one_hot(torch.zeros_like(tokens_bt), 256).float(), {}

    how = {"piece": 1000, "device": resolve(DeviceConfig(device="cpu"), silent)}
    found = mentions(knows, chosen, byte_tokenizer(), **how)
    assert sum(n for n, _ in found.values()) == len(chosen[0].recalls)
    assert all(n == n_right for n, n_right in found.values())
    assert all(n_right == 0 for _, n_right in mentions(repeats, chosen, byte_tokenizer(), **how).values())


def test_the_interval_is_wilsons():
    """Values of the formula worked out by hand."""
    low, high = wilson(5, 10)
    assert abs(low - 0.2366) < 1e-3 and abs(high - 0.7634) < 1e-3
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == 1
