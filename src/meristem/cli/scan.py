"""`meristem scan`: whether secrets stand in files, archives or changes."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meristem.cli.answer import Json, answer, columns, size
from meristem.errors import ConflictingKeys

if TYPE_CHECKING:
    from meristem.safety.scan import Finding, ScanReport


def scan(
    paths: Annotated[
        list[Path] | None, typer.Argument(metavar="[PATH]...", help="Files and directories; here.")
    ] = None,
    diff: Annotated[
        str | None,
        typer.Option(
            "--diff", metavar="COMMIT", help="Scan only what the repository at PATH has and had not at this commit."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", metavar="SOURCE", help="Scan the documents of a text to train on, as data.source names it."
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", help="Glob of names or paths to leave out. May be repeated.")
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option("--baseline", help="YAML file of findings that are known and allowed.")
    ] = None,
    write: Annotated[
        Path | None, typer.Option("--write-baseline", help="Write such a file, which allows all that is found now.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Look for secrets in files, in archives within archives, and in what changed. A finding never holds the secret.

    Exit code 1 when there are findings; what cannot be read is one.

    \b
    Examples:
      meristem scan
      meristem scan data exports.zip --json
      meristem scan --diff main
      meristem scan --data notes.jsonl
      meristem scan . --baseline known.yaml --write-baseline known.yaml
    """
    from meristem.checkpoint.atomic import require_replaceable
    from meristem.data.config import DataConfig
    from meristem.data.sources import documents
    from meristem.safety.scan import Scan, read_baseline, write_baseline

    if diff is not None and (exclude or data is not None or len(paths or ()) > 1):
        raise ConflictingKeys("--diff takes one directory of a repository and nothing else. Leave the others out.")
    if data is not None and (exclude or paths):
        raise ConflictingKeys("--data takes the place of paths and of --exclude. Leave them out.")
    if write:
        require_replaceable(write)
    known = read_baseline(baseline) if baseline else None
    job, places = Scan(known), paths or [Path(".")]
    if data is not None:
        report = job.texts((each.id, each.text, each.goes_on) for each in documents(DataConfig(source=data)))
    else:
        report = job.changes(places[0], diff) if diff is not None else job.paths(places, exclude or ())
    if write:
        write_baseline(write, report, job.salt, known)
    answer(report.as_json() if as_json else report, as_json, lambda _: _words(report))
    if report.n_findings and not write:
        raise typer.Exit(1)


def _words(report: "ScanReport") -> Iterable[str]:
    if report.findings:
        yield from columns(("rule", "place", "line", "bytes", "fingerprint", ""), map(_row, report.findings))
        yield ""
    if report.n_findings > len(report.findings):
        yield f"The first {len(report.findings)} are listed."
    speed = f", {size(report.n_bytes / report.seconds)}/s" if report.seconds else ""
    yield (
        f"{report.n_findings} findings in {report.n_files} files and {report.n_members} members of archives, "
        f"{size(report.n_bytes)}{speed}; {report.n_allowed} more are allowed."
    )


def _row(finding: "Finding") -> tuple[object, ...]:
    place = finding.path + (f"!{finding.member}" if finding.member else "")
    return finding.rule, place, finding.line or None, finding.length or None, finding.fingerprint, finding.reason
