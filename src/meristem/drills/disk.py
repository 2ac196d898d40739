"""Drills in which the disk is at fault: full, torn, flipped, cut."""

import contextlib
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import torch

from meristem.checkpoint import journal
from meristem.checkpoint.store import newest
from meristem.drills.drill import Drill, Seen
from meristem.drills.scene import SAVED_EVERY, Break, Ended, Scene, counting, cut_off
from meristem.errors import DataError
from meristem.events import Event, silent
from meristem.runs.directory import Run
from meristem.runs.resume import Job

AT: Final = 14
"""The step, counted from 1, in which things break."""

LAST_SAVED: Final = (AT - 1) // SAVED_EVERY * SAVED_EVERY
"""Of the checkpoints before that the newest."""

DISK_BYTES: Final = 8 << 20
LITTLE_BYTES: Final = 48 << 10
"""Room for records, and not for a checkpoint."""


@dataclass(frozen=True)
class Disk:
    """A directory that can be made to take no more. ``kind``: how; ``fill``: all but so many bytes."""

    place: Path
    kind: str
    fill: Callable[[int], None]
    free: Callable[[], None]


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[Disk]:
    """A disk of a few megabytes in RAM; where that may not be mounted, a limit on how large files may grow."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(place)]
    is_mounted = (
        bool(shutil.which("mount")) and subprocess.run(command, capture_output=True, check=False).returncode == 0
    )
    if not is_mounted:
        usual = resource.getrlimit(resource.RLIMIT_FSIZE)

        def limit(left_bytes: int) -> None:
            largest = max((path.stat().st_size for path in place.glob("run/*.ndjson")), default=0)
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest + left_bytes, usual[1]))

        try:
            yield Disk(place, "file size limit", limit, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, usual))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, usual)
        return
    ballast = place / "ballast"
    try:
        yield Disk(place, "tmpfs", lambda left_bytes: _fill(ballast, left_bytes), lambda: ballast.unlink())
    finally:
        # Lazily: a checkpoint that was opened there keeps its files open until the last reference to it is gone.
        subprocess.run(["umount", "--lazy", str(place)], check=True, capture_output=True)


def _fill(ballast: Path, left_bytes: int) -> None:
    """Write until the disk takes no more, then give so many bytes back."""
    descriptor = os.open(ballast, os.O_WRONLY | os.O_CREAT)
    try:
        with contextlib.suppress(OSError):
            while os.write(descriptor, bytes(4096)):
                pass
        os.ftruncate(descriptor, max(0, os.fstat(descriptor).st_size - left_bytes))
    finally:
        os.close(descriptor)


def in_step(at: int, act: Callable[[Job], None]) -> Break:
    """Do something in the forward of that step, counted from where the process starts."""

    def breaks(run: Run, job: Job) -> Job:
        count = counting()

        def hook(*_: object) -> None:
            if torch.is_grad_enabled() and next(count) == at:
                act(job)

        job.model.register_forward_pre_hook(hook)
        return job

    return breaks


def full(left_bytes: int, *settings: str, needs: str, last_saved: int) -> Callable[[Drill, Path], Seen]:
    """A disk that fills up in the middle of the run, and has room again later.

    needs: what the message says could not be written.
    """

    def act(drill: Drill, place: Path) -> Seen:
        scene = Scene.at(place)
        truth = scene.run("truth")
        with small_disk(place / "disk") as disk:
            fill = partial(_fill_up, disk, left_bytes)
            ended = scene.run("disk/run", *settings, breaks=in_step(AT, fill))
            checkpoint = newest(ended.run_dir / "checkpoints", silent)
            records = [path.read_bytes()[-1:] for path in ended.run_dir.glob("*.ndjson") if path.stat().st_size]
            left_over = [path.name for path in (ended.run_dir / "checkpoints").glob(".*")]
            disk.free()
            again = scene.run("disk/run", *settings)
            checks = {
                "the run ends with exit code 3 and says that the disk is full": (ended.exit_code, ended.error)
                == (3, "DiskFull"),
                f"what found no room was {needs}": needs in ended.message,
                "the older checkpoint loads": checkpoint is not None and checkpoint.step == last_saved,
                "no half checkpoint and no half record is left": not left_over and set(records) == {b"\n"},
                **goes_on(again, truth, last_saved),
            }
            return Seen(checks, {"disk": disk.kind, "message": ended.message, "exit_code": ended.exit_code})

    return act


def _fill_up(disk: Disk, left_bytes: int, job: Job) -> None:
    """Fill the disk when no save is in flight: what is written next finds no room."""
    deadline_s = time.monotonic() + 60
    while journal.uncommitted(journal.read(disk.place / "run" / "journal")) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    disk.fill(left_bytes)


def goes_on(again: Ended, truth: Ended, last_saved: int) -> dict[str, bool]:
    """The same command once more."""
    resumed = [event["resumed_from"] for event in again.events("run.resumed")]
    return {
        f"the same command goes on from step {last_saved}": resumed[-1:] == [last_saved],
        "and ends as an undisturbed run, to the bit": again.exit_code == 0 and again.is_same_as(truth),
    }


def tear(path: Path) -> None:
    """Cut a file in half."""
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def damaged(damage: Callable[[Path], None]) -> Callable[[Drill, Path], Seen]:
    """Each file of the newest checkpoint in turn; with the last of them damaged the run goes on."""

    def act(drill: Drill, place: Path) -> Seen:
        scene = Scene.at(place)
        truth, ended = scene.run("truth"), scene.run("run", breaks=cut_off(AT))
        root = ended.run_dir / "checkpoints"
        files = sorted((root / f"step-{LAST_SAVED:08d}").iterdir())
        unseen = []
        for file in files:
            content = file.read_bytes()
            damage(file)
            passed_over: list[Event] = []
            found = newest(root, passed_over.append)
            is_seen = [event.name for event in passed_over] == ["checkpoint.skipped"]
            if not is_seen or found is None or found.step != LAST_SAVED - SAVED_EVERY:
                unseen.append(file.name)
            if file != files[-1]:
                file.write_bytes(content)
        again = scene.run("run")
        skipped = [event["checkpoint"] for event in again.events("checkpoint.skipped")]
        checks = {
            "damage in any file makes the checkpoint unfit, and the one before is taken": not unseen,
            "an event names the one that is passed over": skipped == [f"step-{LAST_SAVED:08d}"],
            **goes_on(again, truth, LAST_SAVED - SAVED_EVERY),
        }
        return Seen(checks, {"files": [file.name for file in files], "unseen": unseen, "skipped": skipped})

    return act


def truncated_corpus(drill: Drill, place: Path) -> Seen:
    """The prepared text is cut under the run; then it is prepared again."""
    scene = Scene.at(place)
    truth = scene.run("truth")

    def cut(job: Job) -> None:
        name = next(name for name in job.corpus.numbers if name.startswith("tokens.train."))
        os.truncate(job.corpus.path / name, 100)

    # Batches that were read ahead are whole, and would be trained on first.
    as_needed = "data.prefetch_bytes=0"
    ended = scene.run("run", as_needed, breaks=in_step(AT, cut))
    n_steps = ended.n_steps()
    refused = scene.run("run", as_needed)
    for corpus in (place / "corpora").iterdir():
        shutil.rmtree(corpus, ignore_errors=True)
    again = scene.run("run", as_needed)
    checks = {
        "the run ends with exit code 4 and names the file": (ended.exit_code, ended.error) == (4, "FileChanged")
        and "tokens.train" in ended.message,
        "the step in progress ends, and none is made of what is left": n_steps == AT,
        "while it is cut the run does not start": refused.exit_code == DataError.exit_code,
        **goes_on(again, truth, LAST_SAVED),
    }
    return Seen(
        checks, {"exit_code": ended.exit_code, "message": ended.message, "refused": refused.message, "steps": n_steps}
    )


def torn_record(drill: Drill, place: Path) -> Seen:
    """A crash of the machine left half a line in two files of records, and half a record in the journal."""
    scene = Scene.at(place)
    truth, ended = scene.run("truth"), scene.run("run", breaks=cut_off(AT))
    for name in ("metrics.ndjson", "events.ndjson", "journal"):
        path = ended.run_dir / name
        with open(path, "ab") as file:
            file.write(path.read_bytes()[:40])
    again = scene.run("run")
    cut = sorted(event["path"] for event in again.events("degraded") if event["what"] == "torn end cut off")
    checks = {
        "the torn ends are cut off, which is an event": cut == ["events.ndjson", "journal", "metrics.ndjson"],
        **goes_on(again, truth, LAST_SAVED),
    }
    return Seen(checks, {"cut": cut, "exit_code": again.exit_code})


def flipped_record(drill: Drill, place: Path) -> Seen:
    """Other bytes in the middle of the records of a run."""
    scene = Scene.at(place)
    truth, ended = scene.run("truth"), scene.run("run", breaks=cut_off(AT))
    path = ended.run_dir / "metrics.ndjson"
    lines = path.read_bytes().splitlines(keepends=True)
    broken = lines[4].replace(b"{", b"z")
    path.write_bytes(b"".join([*lines[:4], broken, *lines[5:]]))
    met = scene.run("run")
    path.write_bytes(path.read_bytes().replace(broken, lines[4]))
    again = scene.run("run")
    checks = {
        "the run trains to its end, then names the line with exit code 4": (met.exit_code, met.error)
        == (4, "BadRecords")
        and "line 5" in met.message,
        **goes_on(again, truth, last_saved=max(truth.losses())),
    }
    return Seen(checks, {"exit_code": met.exit_code, "message": met.message})


def flipped_journal(drill: Drill, place: Path) -> Seen:
    """Other bytes in the journal, which says what a crash left in the middle."""
    scene = Scene.at(place)
    truth, ended = scene.run("truth"), scene.run("run", breaks=cut_off(AT))
    flip(ended.run_dir / "journal")
    met = scene.run("run")
    (ended.run_dir / "journal").rename(place / "journal")
    again = scene.run("run")
    checks = {
        "the run does not start, with exit code 4, and says where the damage is": (met.exit_code, met.error)
        == (4, "CheckpointCorrupt")
        and "at byte" in met.message,
        **goes_on(again, truth, LAST_SAVED),
    }
    return Seen(checks, {"exit_code": met.exit_code, "message": met.message})


DRILLS: Final = (
    Drill(
        "disk-full",
        "the disk is full when a checkpoint is written",
        "removes the half checkpoint and ends; the older ones are untouched",
        "`DiskFull` names the place; free space, and the same command goes on from the last checkpoint",
        3,
        full(LITTLE_BYTES, needs="step-00000016", last_saved=LAST_SAVED),
    ),
    Drill(
        "disk-full-records",
        "the disk is full when a record is written",
        "takes back the half line and ends",
        "`DiskFull` names the file; free space, and the same command goes on from the last checkpoint",
        3,
        full(0, "checkpoint.every=12", "eval.every=12", needs="ndjson", last_saved=12),
    ),
    Drill(
        "torn-checkpoint",
        "a file of the newest checkpoint is cut in half",
        "goes on from the checkpoint before it",
        "`checkpoint.skipped` names the file; nothing to do",
        0,
        damaged(tear),
    ),
    Drill(
        "flipped-byte",
        "one bit of a file of the newest checkpoint is another",
        "goes on from the checkpoint before it",
        "`checkpoint.skipped` names the file; check the disk",
        0,
        damaged(flip),
    ),
    Drill(
        "truncated-corpus",
        "the prepared text is cut while the run reads it",
        "ends before a batch of it is trained on",
        "`FileChanged` names the file; remove that corpus, and the same command prepares it again and goes on",
        4,
        truncated_corpus,
    ),
    Drill(
        "torn-record",
        "the machine went down and left half a record at the end of its files",
        "cuts it off and goes on from the last checkpoint",
        "`degraded` names each file; nothing to do",
        0,
        torn_record,
    ),
    Drill(
        "corrupt-record",
        "a line in the middle of metrics.ndjson has other bytes",
        "trains to its end and saves; the report, which reads the records, is refused",
        "`BadRecords` names the line; mend or remove it, and the same command writes the report",
        4,
        flipped_record,
    ),
    Drill(
        "corrupt-journal",
        "one bit of the journal is another",
        "does not start",
        "`CheckpointCorrupt` names the byte; move the journal away, and the same command goes on",
        4,
        flipped_journal,
    ),
)
