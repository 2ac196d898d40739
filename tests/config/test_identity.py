"""The same command goes on: which settings make another run of a run, and which do not."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from meristem.config import ConfigSection, identity, identity_of_choices
from meristem.data.config import DifficultyConfig
from meristem.runs.config import Config

# Values of the wrong type, which copies are made with here, are not what a user can give.
pytestmark = pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")


def keys(
    tree: ConfigSection, above: tuple[str, ...] = (), is_outside: bool = False
) -> Iterator[tuple[tuple[str, ...], bool]]:
    """Every leaf of a tree by its path, and whether it is outside the identity."""
    for key in type(tree).model_fields:
        value, path, is_out = getattr(tree, key), (*above, key), is_outside or key in tree.outside_identity
        yield from keys(value, path, is_out) if isinstance(value, ConfigSection) else [(path, is_out)]


KEYS = dict(keys(Config()))


def another(value: object) -> object:
    """Some other value."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return f"{value}x"
    return Path("elsewhere") if isinstance(value, Path) else {1: 0.5} if isinstance(value, dict) else ("x",)


def changed(tree: ConfigSection, path: tuple[str, ...]) -> ConfigSection:
    """The tree with another value at one path."""
    key, *rest = path
    value = getattr(tree, key)
    return tree.model_copy(update={key: changed(value, tuple(rest)) if rest else another(value)})


def test_key_makes_another_run_unless_it_is_declared_outside():
    """Each key is changed alone, in a run that grows, begins with weights and reads what is easy first: of one that
    does none of it, what is said of that is outside."""
    begins = Config().finetune.model_copy(update={"base": "models/ada"})
    rises = Config().data.model_copy(update={"difficulty": DifficultyConfig(score="length")})
    full = changed(Config(), ("grow", "enabled")).model_copy(update={"finetune": begins, "data": rises})
    kept = {path for path in KEYS if identity(changed(full, path)) == identity(full)}
    for path in (("grow", "boundary_every"), ("finetune", "rank"), ("data", "difficulty", "cap")):
        assert identity(changed(Config(), path)) == identity(Config())
    assert kept == {path for path, is_outside in KEYS.items() if is_outside}


def sections(config: type[ConfigSection]) -> Iterator[type[ConfigSection]]:
    """The sections below one that are not outside as a whole."""
    yield config
    for key, field in config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, ConfigSection):
            if key not in config.outside_identity:
                yield from sections(field.annotation)


@pytest.mark.parametrize("part", list(sections(Config)), ids=lambda part: part.__name__)
def test_section_says_which_of_its_keys_are_outside(part):
    """Each section decides for itself, so that a new one cannot be forgotten; and no name of a key is wrong."""
    assert "outside_identity" in vars(part)
    assert part.outside_identity <= part.model_fields.keys()


def test_what_a_user_may_change_in_the_middle_is_outside():
    """Records, the screen, intervals of saving and evaluating, the device and its threads, the number of processes."""
    outside = {".".join(path) for path, is_outside in KEYS.items() if is_outside}
    assert {
        "train.log_every",
        "checkpoint.every",
        "checkpoint.every_s",
        "eval.every",
        "sinks.rotate_mib",
    } <= outside
    assert {"device.threads", "run.dir", "distributed.timeout_s", "rollback.snapshots", "profile.steps"} <= outside
    inside = {".".join(path) for path, is_outside in KEYS.items() if not is_outside}
    assert {"run.seed", "model.dim", "optim.lr", "data.source", "train.steps", "device.dtype"} <= inside
    assert {"guard.z", "rollback.change", "aggregate.how", "memory.rule", "schedule.warmup"} <= inside


class Branch(ConfigSection):
    a: int = 1


class Tree(ConfigSection):
    branch: Branch = Branch()
    b: str = "x"


class BranchLater(Branch):
    new: float | None = None


class TreeLater(Tree):
    branch: BranchLater = BranchLater()
    also_new: tuple[int, ...] = ()


def test_a_key_that_is_new_changes_no_identity_of_choices():
    """Results that are known by it stay known when a version adds a key, and not when the key is set."""
    for words in ({}, {"b": "y"}, {"branch": {"a": 2}}):
        before, after = (identity_of_choices(kind.model_validate(words)) for kind in (Tree, TreeLater))
        assert before == after and identity(Tree.model_validate(words)) != identity(TreeLater.model_validate(words))
    different = [Tree(), Tree(b="y"), Tree(branch=Branch(a=2)), TreeLater(also_new=(1,))]
    different.append(TreeLater(branch=BranchLater(new=0.5)))
    assert len({identity_of_choices(each) for each in different}) == len(different)
