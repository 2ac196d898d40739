"""A change of structure in all processes of a run, or in none (growth.md 25)."""

from collections.abc import Callable

from meristem.distributed.agreement import Agreement, Change, fingerprint
from meristem.errors import TransactionUndone
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

    Raises TransactionUndone, in every process, where one of them refused or planned something else, and AgreementFailed
    where one of them failed while it changed, or was lost; nothing has changed then.
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

    outcome = agreement.commit(order, Change(agree_to, apply, undo))
    if not outcome.is_applied:
        raise TransactionUndone(
            f"the change was made in no process: {'; '.join(outcome.against)}. Mend the cause, or go on without it.",
            operation=planned[-1].operation if planned else "",
            against=outcome.against,
        )
    return made[-1]
