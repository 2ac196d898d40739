"""Who may train which parameter, as a value (growth.md 9.2)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal, Self

from torch import nn

from meristem.errors import OwnershipRefused
from meristem.optim.origins import HOST, origin_of

Code = Literal["", "teacher_clash", "unregistered", "other_seed"]

ADVICE: Final[Mapping[Code, str]] = {
    "teacher_clash": "A teacher stays as it is while it teaches; register another one, or wait until it is released",
    "unregistered": "Take names that the model has, and read the owners anew where its structure has changed",
    "other_seed": "Give each seed parameters of its own, or release those of the seed that holds them",
}


@dataclass(frozen=True)
class Validation:
    """Whether an owner may claim parameters. code: why not; names: which are in the way; holder: whose they are."""

    is_ok: bool
    code: Code = ""
    names: tuple[str, ...] = ()
    holder: str | None = None


@dataclass(frozen=True)
class Owners:
    """The owner of every parameter by its name: the host, a seed (``seed:blocks.1``), or the teacher.

    What the host owns anybody may claim; what a seed or a teacher owns nobody else may. Each change gives a new value.

    teacher: the name of the owner that teaches; there is one at a time.
    """

    holders: Mapping[str, str]
    teacher: str | None = None

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """The owners in a model as it is: each seed holds what is in it, and the host all else.

        Raises OwnershipRefused with the code ``other_seed`` where two of them hold one parameter: what trains a seed
        would train the other too.
        """
        named = list(model.named_parameters(remove_duplicate=False))
        holders = {name: origin_of(name) for name, _ in named}
        first: dict[int, str] = {}
        for name, parameter in named:
            held = first.setdefault(id(parameter), name)
            if holders[held] != holders[name]:
                raise _refusal(holders[name], Validation(False, "other_seed", (name,), holders[held]))
        return cls(holders)

    def validate(self, owner: str, names: Iterable[str]) -> Validation:
        """Whether ``owner`` may claim these; the first reason against it, with all names that it holds for."""
        wanted = list(names)
        unknown = tuple(name for name in wanted if name not in self.holders)
        if unknown:
            return Validation(False, "unregistered", unknown)
        others = [name for name in wanted if self.holders[name] not in (owner, HOST)]
        of_teacher = tuple(name for name in others if self.holders[name] == self.teacher)
        if of_teacher:
            return Validation(False, "teacher_clash", of_teacher, self.teacher)
        if others:
            holder = self.holders[others[0]]
            return Validation(False, "other_seed", tuple(x for x in others if self.holders[x] == holder), holder)
        return Validation(True)

    def claim(self, owner: str, names: Iterable[str]) -> Self:
        """The same with these owned by ``owner``. Raises OwnershipRefused for what ``validate`` refuses."""
        wanted = list(names)
        found = self.validate(owner, wanted)
        if not found.is_ok:
            raise _refusal(owner, found)
        return replace(self, holders={**self.holders, **dict.fromkeys(wanted, owner)})

    def release(self, owner: str) -> Self:
        """The same with all that ``owner`` held given back to the host."""
        holders = {name: HOST if holder == owner else holder for name, holder in self.holders.items()}
        return replace(self, holders=holders, teacher=None if owner == self.teacher else self.teacher)

    def with_teacher(self, teacher: str, names: Iterable[str]) -> Self:
        """The same with a teacher that owns these, in place of the one before, whose names are the host's again.

        Names that nobody knows yet are those of a model beside this one. Raises OwnershipRefused where a seed holds
        one of them; the teacher before then stays.
        """
        wanted = list(names)
        freed = self.release(self.teacher) if self.teacher else self
        known = replace(freed, holders={**dict.fromkeys(wanted, HOST), **freed.holders})
        return replace(known.claim(teacher, wanted), teacher=teacher)


def _refusal(owner: str, found: Validation) -> OwnershipRefused:
    held = f", held by '{found.holder}'" if found.holder else ""
    return OwnershipRefused(
        f"'{owner}' cannot own {', '.join(found.names[:3])} ({len(found.names)} parameters in all{held}): "
        f"{found.code}. {ADVICE[found.code]}.",
        code=found.code,
        names=found.names,
        holder=found.holder,
    )
