"""What a person reads when a setting is wrong, word for word, before torch is imported."""

import subprocess
import sys
from typing import Literal

import pytest
from pydantic import Field, model_validator

from meristem.config import Part, load
from meristem.errors import ConfigError, ConflictingKeys, UnknownKey, WrongValue


class OptimPart(Part):
    kind: Literal["adamw", "sgd"] = "adamw"
    rate: float = Field(1e-3, gt=0)


class DataPart(Part):
    batch: int = 8
    window: int = Field(512, ge=2)


class TrainPart(Part):
    accumulate: int = 1
    steps: int | None = None
    budget: float | Literal["auto"] = "auto"

    @model_validator(mode="after")
    def _has_end(self) -> "TrainPart":
        if self.steps == 0:
            raise ValueError("steps is 0, so nothing would be trained")
        if self.steps and self.budget != "auto":
            raise ConflictingKeys("train.steps and train.budget are both set. Keep one.")
        return self


class Tree(Part):
    optim: OptimPart = OptimPart()
    data: DataPart = DataPart()
    train: TrainPart = TrainPart()


GOLDEN = [
    ("lr=3", UnknownKey, "unknown key 'lr' (command line lr=3). Did you mean 'optim.rate'?"),
    (
        "learning_rate=3",
        UnknownKey,
        "unknown key 'learning_rate' (command line learning_rate=3). Did you mean 'optim.rate'?",
    ),
    ("train.lr=3", UnknownKey, "unknown key 'train.lr' (command line train.lr=3). Did you mean 'optim.rate'?"),
    ("optim.rte=3", UnknownKey, "unknown key 'optim.rte' (command line optim.rte=3). Did you mean 'optim.rate'?"),
    (
        "accumulate=3",
        UnknownKey,
        "unknown key 'accumulate' (command line accumulate=3). Did you mean 'train.accumulate'?",
    ),
    ("train.batch=3", UnknownKey, "unknown key 'train.batch' (command line train.batch=3). Did you mean 'data.batch'?"),
    ("zzz=1", UnknownKey, "unknown key 'zzz' (command line zzz=1). There are the keys optim, data, train."),
    ("optim.zzz=1", UnknownKey, "unknown key 'optim.zzz' (command line optim.zzz=1). optim has the keys kind, rate."),
    ("optim.rate=-1", WrongValue, "optim.rate: found -1 (command line optim.rate=-1); expected more than 0.0."),
    ("optim.rate=fast", WrongValue, "optim.rate: found 'fast' (command line optim.rate=fast); expected a number."),
    ("data.window=1", WrongValue, "data.window: found 1 (command line data.window=1); expected at least 2."),
    ("data.batch=1.5", WrongValue, "data.batch: found 1.5 (command line data.batch=1.5); expected a whole number."),
    (
        "optim.kind=adam",
        WrongValue,
        "optim.kind: found 'adam' (command line optim.kind=adam); expected 'adamw' or 'sgd'.",
    ),
    (
        "train.budget=x",
        WrongValue,
        "train.budget: found 'x' (command line train.budget=x); expected a number or 'auto'.",
    ),
    ("data=3", WrongValue, "data: found 3 (command line data=3); expected a section with the keys batch, window."),
    ("train.steps=0", WrongValue, "train: steps is 0, so nothing would be trained."),
    ("train", ConfigError, "found 'train' on the command line; expected a.b=c, such as train.accumulate=4."),
    ("train..x=1", ConfigError, "found 'train..x=1' on the command line; expected a.b=c, such as train.accumulate=4."),
]


@pytest.mark.parametrize("override, kind, message", GOLDEN)
def test_golden_table(override: str, kind: type[ConfigError], message: str) -> None:
    with pytest.raises(kind) as caught:
        load(Tree, overrides=[override])
    assert str(caught.value) == message
    assert type(caught.value) is kind


def test_the_error_carries_what_a_program_needs() -> None:
    with pytest.raises(UnknownKey) as caught:
        load(Tree, environment={"MERISTEM__OPTIM__RTE": "3"})
    assert caught.value.fields == {
        "path": "optim.rte",
        "value": 3,
        "accepted": [],
        "nearest": "optim.rate",
        "layer": "environment MERISTEM__OPTIM__RTE",
    }


def test_all_mistakes_are_told_at_once() -> None:
    """Unknown keys come first: a misspelt key is often why another is missing."""
    with pytest.raises(UnknownKey) as caught:
        load(Tree, overrides=["data.window=1", "optim.rte=3"])
    assert str(caught.value).splitlines() == [
        "2 settings are wrong.",
        "- unknown key 'optim.rte' (command line optim.rte=3). Did you mean 'optim.rate'?",
        "- data.window: found 1 (command line data.window=1); expected at least 2.",
    ]


def test_a_key_without_default_is_asked_for() -> None:
    class Needy(Part):
        path: str

    with pytest.raises(WrongValue, match=r"^path is not set and has no default\. Set it with path=VALUE\.$"):
        load(Needy)


def test_a_part_raises_its_own_errors() -> None:
    """A conflict between two keys is known to the part; the loader passes its error on unchanged."""
    with pytest.raises(ConflictingKeys, match="both set"):
        load(Tree, overrides=["train.steps=3", "train.budget=2"])


def test_a_wrong_tree_is_refused_without_torch() -> None:
    program = """
import sys
from meristem.config import Part, load
from meristem.errors import UnknownKey
class Tree(Part):
    rate: float = 1.0
try:
    load(Tree, overrides=["rte=2"])
except UnknownKey as error:
    print(error.fields["nearest"], "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["rate", "False"]
