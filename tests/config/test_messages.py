"""What a person reads when a setting is wrong, word for word, before torch is imported."""

import subprocess
import sys
from typing import Literal

import pytest
from pydantic import Field, model_validator

from meristem.config import ConfigSection, load
from meristem.errors import ConfigError, ConflictingKeys, UnknownKey, WrongValue


class OptimConfig(ConfigSection):
    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(1e-3, gt=0)


class DataConfig(ConfigSection):
    batch_size: int = 8
    seq_len: int = Field(512, ge=2)


class TrainConfig(ConfigSection):
    grad_accum_steps: int = 1
    steps: int | None = None
    max_time: float | Literal["auto"] = "auto"

    @model_validator(mode="after")
    def _has_end(self) -> "TrainConfig":
        if self.steps == 0:
            raise ValueError("steps is 0, so nothing would be trained")
        if self.steps and self.max_time != "auto":
            raise ConflictingKeys("train.steps and train.max_time are both set. Keep one.")
        return self


class Tree(ConfigSection):
    optim: OptimConfig = OptimConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()


GOLDEN = [
    ("lr=3", UnknownKey, "unknown key 'lr' (command line lr=3). Did you mean 'optim.lr'?"),
    (
        "learning_rate=3",
        UnknownKey,
        "unknown key 'learning_rate' (command line learning_rate=3). Did you mean 'optim.lr'?",
    ),
    ("train.lr=3", UnknownKey, "unknown key 'train.lr' (command line train.lr=3). Did you mean 'optim.lr'?"),
    ("optim.nme=3", UnknownKey, "unknown key 'optim.nme' (command line optim.nme=3). Did you mean 'optim.name'?"),
    (
        "accumulate=3",
        UnknownKey,
        "unknown key 'accumulate' (command line accumulate=3). Did you mean 'train.grad_accum_steps'?",
    ),
    (
        "train.batch=3",
        UnknownKey,
        "unknown key 'train.batch' (command line train.batch=3). Did you mean 'data.batch_size'?",
    ),
    ("zzz=1", UnknownKey, "unknown key 'zzz' (command line zzz=1). There are the keys optim, data, train."),
    ("optim.zzz=1", UnknownKey, "unknown key 'optim.zzz' (command line optim.zzz=1). optim has the keys name, lr."),
    ("optim.lr=-1", WrongValue, "optim.lr: found -1 (command line optim.lr=-1); expected more than 0.0."),
    ("optim.lr=fast", WrongValue, "optim.lr: found 'fast' (command line optim.lr=fast); expected a number."),
    ("data.seq_len=1", WrongValue, "data.seq_len: found 1 (command line data.seq_len=1); expected at least 2."),
    (
        "data.batch_size=1.5",
        WrongValue,
        "data.batch_size: found 1.5 (command line data.batch_size=1.5); expected a whole number.",
    ),
    (
        "optim.name=adam",
        WrongValue,
        "optim.name: found 'adam' (command line optim.name=adam); expected 'adamw' or 'sgd'.",
    ),
    (
        "train.max_time=x",
        WrongValue,
        "train.max_time: found 'x' (command line train.max_time=x); expected a number or 'auto'.",
    ),
    (
        "data=3",
        WrongValue,
        "data: found 3 (command line data=3); expected a section with the keys batch_size, seq_len.",
    ),
    ("train.steps=0", WrongValue, "train: steps is 0, so nothing would be trained."),
    ("train", ConfigError, "found 'train' on the command line; expected a.b=c, such as train.grad_accum_steps=4."),
    (
        "train..x=1",
        ConfigError,
        "found 'train..x=1' on the command line; expected a.b=c, such as train.grad_accum_steps=4.",
    ),
]


@pytest.mark.parametrize("override, kind, message", GOLDEN)
def test_golden_table(override: str, kind: type[ConfigError], message: str) -> None:
    """CX-4.2."""
    with pytest.raises(kind) as caught:
        load(Tree, overrides=[override])
    assert str(caught.value) == message
    assert type(caught.value) is kind


def test_the_error_carries_what_a_program_needs() -> None:
    with pytest.raises(UnknownKey) as caught:
        load(Tree, environment={"MERISTEM__OPTIM__NME": "3"})
    assert caught.value.fields == {
        "path": "optim.nme",
        "value": 3,
        "accepted": [],
        "nearest": "optim.name",
        "layer": "environment MERISTEM__OPTIM__NME",
    }


def test_all_mistakes_are_told_at_once() -> None:
    """Unknown keys come first: a misspelt key is often why another is missing."""
    with pytest.raises(UnknownKey) as caught:
        load(Tree, overrides=["data.seq_len=1", "optim.nme=3"])
    assert str(caught.value).splitlines() == [
        "2 settings are wrong.",
        "- unknown key 'optim.nme' (command line optim.nme=3). Did you mean 'optim.name'?",
        "- data.seq_len: found 1 (command line data.seq_len=1); expected at least 2.",
    ]


def test_a_key_without_default_is_asked_for() -> None:
    class Needy(ConfigSection):
        path: str

    with pytest.raises(WrongValue, match=r"^path is not set and has no default\. Set it with path=VALUE\.$"):
        load(Needy)


def test_a_part_raises_its_own_errors() -> None:
    """A conflict between two keys is known to the part; the loader passes its error on unchanged."""
    with pytest.raises(ConflictingKeys, match="both set"):
        load(Tree, overrides=["train.steps=3", "train.max_time=2"])


def test_a_wrong_tree_is_refused_without_torch() -> None:
    """CX-4.2."""
    program = """
import sys
from meristem.config import ConfigSection, load
from meristem.errors import UnknownKey
class Tree(ConfigSection):
    rate: float = 1.0
try:
    load(Tree, overrides=["rte=2"])
except UnknownKey as error:
    print(error.fields["nearest"], "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["rate", "False"]
