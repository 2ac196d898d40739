"""A change of structure in all processes of a run, or in none (growth.md 25)."""

from collections.abc import Callable, Iterable
from typing import cast

from meristem.distributed.agreement import Agreement, Change, fingerprint
from meristem.errors import AgreementFailed, TransactionUndone
from meristem.events import Emit, Event
from meristem.growth.plan import Plan
from meristem.growth.transaction import Receipt


def together(
    agreement: Agreement, order: bytes, plan: Callable[[bytes], Plan], make: Callable[[Plan], Receipt]
) -> Receipt:
    """Make what the first process orders in all of them, or in none.

    Each plans for itself, and only where all plans are the same does any of them change. Where one fails, or comes out
    with other weights, those that did not fail are put back to the bit.

    order: what any but the first process gives is ignored. plan: of an order, as a registered operator makes it; what
    it raises is this process's refusal. make: ``transaction`` of that plan, with all that it needs here.

    Raises TransactionUndone, in every process, where one of them refused, planned something else, or failed while it
    changed: nothing has changed then, and the run can go on. Raises AgreementFailed where the first was lost; of any
    other that is lost the next exchange says so.
    """
    planned: list[Plan] = []
    made: list[Receipt] = []

    def agree_to(wanted: bytes) -> str:
        planned.append(plan(wanted))
        return planned[-1].digest

    def apply(wanted: bytes) -> str:
        made.append(make(planned[-1]))
        return fingerprint(made[-1].model.state_dict())

    def undo() -> None:
        if made:
            made[-1].undo()

    try:
        against = agreement.commit(order, Change(agree_to, apply, undo)).against
    except AgreementFailed as error:
        if "against" not in error.fields:
            raise
        against = tuple(map(str, cast(Iterable[str], error.fields["against"])))
    if against:
        raise TransactionUndone(
            f"the change was made in no process: {'; '.join(against)}. Mend the cause, or go on without it.",
            operation=planned[-1].operation if planned else "",
            against=against,
        )
    return made[-1]


def made_in_all(agreement: Agreement, plan: Plan, make: Callable[[Emit], Receipt], emit: Emit) -> Receipt:
    """A change that every process has planned for itself, made in all of them, or in none (``together``).

    make: the ``transaction`` of the plan here. Its events are emitted when it is known what came of it in all of them:
    ``graft.done``, or ``graft.undone``, also where it was another process that failed.
    """
    told: list[Event] = []
    try:
        receipt = together(agreement, plan.digest.encode(), lambda order: plan, lambda planned: make(told.append))
    except TransactionUndone as cause:
        emit(Event("graft.undone", {"operation": plan.operation, **plan.fields, "cause": str(cause)}, "error"))
        raise
    for event in told:
        emit(event)
    return receipt
