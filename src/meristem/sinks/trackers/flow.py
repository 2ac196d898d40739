"""MLflow: a run in ``mlflow.db`` beside the run directory, or on the server that ``sinks.mlflow`` names."""

import logging
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import filelock
import orjson
from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException

from meristem.sinks.trackers.follow import Followed, Record, scalars, seconds

RUN: Final = "meristem.run"
SEQ: Final = "meristem.seq"
BEGUN: Final = "meristem.seq_begun"
"""Tags: the id of the run that is followed, the ``seq`` of the last record that was written, and of the last that was
perhaps written, since writing it was begun."""

MOST_METRICS: Final = 1_000
MOST_PARAMS: Final = 100
LONGEST_VALUE: Final = 6_000
"""Limits of MLflow for one call and one value."""

CALM: Final = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
"""A server that does not answer holds up the end of the run, and gets later what it missed. No other host is called."""

STATUS: Final = {"finished": "FINISHED", "interrupted": "KILLED"}


class MLflow:
    """One run of MLflow, found again by its tag.

    A process may be killed between any two of its calls, and the next goes on in the same run of MLflow: the tag is
    there from the creation on, and what was written beyond ``SEQ`` is written once more, which MLflow takes as one.
    A setting that differs from what an earlier process logged is logged as ``KEY.2``, ``KEY.3`` and so on, since MLflow
    takes a value once.
    """

    holds_back: Final = True

    def __init__(self, run: Followed) -> None:
        for name, value in CALM.items():
            os.environ.setdefault(name, value)
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self.id, self.begun_seq = "", 0
        self._run = run
        self._client = MlflowClient(run.place or f"sqlite:///{_database(run.directory.resolve().parent / 'mlflow.db')}")

    def open(self) -> int:
        experiment = self._experiment()
        found = self._client.search_runs(
            [experiment], f"tags.`{RUN}` = '{self._run.id}'", max_results=1, order_by=["attributes.start_time DESC"]
        )
        if found:
            self.id = found[0].info.run_id
            self._client.update_run(self.id, "RUNNING")
            seq = int(found[0].data.tags.get(SEQ, 0))
            self.begun_seq = int(found[0].data.tags.get(BEGUN, seq))
            known = dict(found[0].data.params)
        else:
            made = self._client.create_run(experiment, tags={RUN: self._run.id, SEQ: "0"}, run_name=self._run.name)
            self.id, self.begun_seq, seq, known = made.info.run_id, 0, 0, {}
        self._log_settings(known)
        return seq

    def write(self, records: Sequence[Record]) -> None:
        values = [
            Metric(tag, value, int(seconds(record) * 1000), record["step"])
            for record in records
            for tag, value in scalars(record).items()
        ]
        last = str(records[-1]["seq"])
        self._client.set_tag(self.id, BEGUN, last)
        for first in range(0, len(values), MOST_METRICS):
            self._client.log_batch(self.id, metrics=values[first : first + MOST_METRICS])
        # What was written twice because this was not reached is the same to MLflow: time and value are equal.
        self._client.set_tag(self.id, SEQ, last)

    def restart(self) -> None:
        """MLflow takes no value back, so another run of it takes the place of this one, which goes to its bin.

        Should somebody take it out again, ``open`` still finds the one that was begun last.
        """
        self._client.delete_run(self.id)
        self.open()

    def close(self, status: str | None) -> None:
        if self.id:
            self._client.set_terminated(self.id, STATUS.get(status or "", "FAILED"))

    def _experiment(self) -> str:
        found = self._client.get_experiment_by_name(self._run.project)
        if found is not None:
            return str(found.experiment_id)
        where = None
        if self._run.place is None:
            where = (self._run.directory.parent / "mlflow-artifacts").resolve().as_uri()
        try:
            return str(self._client.create_experiment(self._run.project, artifact_location=where))
        except MlflowException:  # another process has made it meanwhile
            made = self._client.get_experiment_by_name(self._run.project)
            if made is None:
                raise
            return str(made.experiment_id)

    def _log_settings(self, known: dict[str, str]) -> None:
        new = []
        for key, value in self._run.settings.items():
            text = (value if isinstance(value, str) else orjson.dumps(value).decode())[:LONGEST_VALUE] or '""'
            names, number = [key], 2
            while names[-1] in known:
                names.append(f"{key}.{number}")
                number += 1
            if len(names) == 1 or known[names[-2]] != text:
                new.append(Param(names[-1], text))
        for first in range(0, len(new), MOST_PARAMS):
            self._client.log_batch(self.id, params=new[first : first + MOST_PARAMS])


def _database(path: Path) -> Path:
    """The path of MLflow's database, which MLflow is had to make if none is there.

    It does so in many steps, and cannot open what a process left that was killed between them, nor may two begin at
    once; so one process makes it under another name.
    """
    if path.exists():
        return path
    with filelock.FileLock(path.with_name(f".{path.name}.lock")):
        if path.exists():
            return path
        for left in path.parent.glob(f".{path.name}.*.partial"):
            left.unlink()
        # A name of its own: MLflow keeps connections by name.
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        MlflowClient(f"sqlite:///{partial}")
        partial.rename(path)
    return path
