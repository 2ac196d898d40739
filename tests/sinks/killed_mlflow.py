"""Followers of MLflow that are killed after a commit to its database, each a fork of a process that imported it once.

Run as a program with a folder. It kills one while MLflow makes its database, and then one after each commit that
changes something, as long as there are such; it goes on with all those runs, and answers with their names, the last
being that of the run which nobody killed.
"""

import itertools
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy.engine.default import DefaultDialect

from meristem.events import Event
from meristem.sinks.jsonl import read_records
from meristem.sinks.records import Records
from meristem.sinks.trackers.flow import MLflow
from meristem.sinks.trackers.follow import Followed, Follower

Act = Callable[[Records], None]


def steps(first: int, last: int) -> Act:
    """Measurements of some steps, which are the same whoever makes them; the last is evaluated."""

    def measure(records: Records) -> None:
        for step in range(first, last + 1):
            records.metrics(step, step, 0.0, "train", {"nats": 1.0 / step})
        records.metrics(last, last, 0.0, "val", {"nats": 2.0 / last})

    return measure


def event(name: str, **payload: object) -> Act:
    return lambda records: records.event(Event(name, payload))


def saved(step: int) -> Act:
    return event("checkpoint.saved", step=step, is_sound=True)


BEGIN = (
    *(event("run.started"), steps(1, 4), saved(2), saved(4), steps(5, 7)),
    *(event("rollback.done", resumed_from=3), steps(4, 5), saved(5), steps(6, 7), event("run.ended", status="failed")),
)
"""A run that goes back behind what a checkpoint covered, and at last fails at steps that none covers."""


def follow(run_dir: Path, acts: tuple[Act, ...]) -> None:
    """One process of a run."""
    records = Records(run_dir, run_dir.name)
    run = Followed(run_dir, run_dir.name, run_dir.name, "meristem", None, {"train.steps": 9})
    follower = Follower(run_dir, MLflow(run))
    records.listen(follower)
    for act in acts:
        act(records)
    follower.close()
    records.close()


def resume(run_dir: Path) -> None:
    """Go on from the last checkpoint: the step is evaluated again, and the rest is trained."""
    events = list(read_records(run_dir / "events.ndjson"))
    step = max((e["payload"]["step"] for e in events if e["name"] == "checkpoint.saved"), default=0)
    again = [steps(step, step)] if step else []
    after = (steps(step + 1, 9), saved(9), event("run.ended", status="finished"))
    follow(run_dir, (event("run.resumed", resumed_from=step), *again, *after))


def die_after(commit: int) -> None:
    """Have this process die once so many commits have changed a database."""
    plainly, seen = DefaultDialect.do_commit, dict[int, int]()
    n_commits = 0

    def do_commit(dialect: DefaultDialect, connection: Any) -> None:
        nonlocal n_commits
        plainly(dialect, connection)
        n_changes = connection.dbapi_connection.total_changes
        if n_changes > seen.get(id(connection), 0):
            seen[id(connection)] = n_changes
            n_commits += 1
            if n_commits == commit:
                os.kill(os.getpid(), signal.SIGKILL)

    DefaultDialect.do_commit = do_commit  # type: ignore[method-assign]


def is_killed(work: Callable[[], None]) -> bool:
    """Whether a fork that does this is killed. Raises where it fails."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - said by the parent
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    if status not in (0, signal.SIGKILL):
        raise RuntimeError(f"a process ended with {status}")
    return status == signal.SIGKILL


def main(place: Path) -> None:
    runs: list[Path] = []
    # The first dies amid the many commits by which MLflow makes its database.
    for commit in itertools.chain([30], itertools.count(1)):
        runs.append(place / f"run-{len(runs):02}")

        def work(run_dir: Path = runs[-1], commit: int = commit) -> None:
            die_after(commit)
            follow(run_dir, BEGIN)

        was_killed = is_killed(work)
        if len(runs) == 1:
            resume(runs[0])
        elif not was_killed:
            break
    for run_dir in runs[1:]:
        resume(run_dir)
    print(json.dumps([run_dir.name for run_dir in runs]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
