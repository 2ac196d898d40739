"""Secrets in a text are found before a corpus is made of it, as ``data.scan`` says."""

from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import orjson

from meristem import config
from meristem.checkpoint.atomic import sha256, write_atomic
from meristem.data.config import DataConfig
from meristem.data.sources import Source
from meristem.errors import DiskFull, SecretsFound
from meristem.events import Emit, Event
from meristem.safety.patterns import PATTERNS
from meristem.safety.policy import BYPASSED
from meristem.safety.scan import Finding, Scan, ScanReport, read_baseline

_N_SHOWN: Final = 5


def require_scanned(data: DataConfig, source: Source, stamps: str | None, corpora: Path, emit: Emit) -> None:
    """Search a text for secrets and record what was found; SecretsFound where ``data.scan`` is ``refuse``.

    What is known of files that have not changed is not looked for again.

    stamps: of the files of the text, None where one is not there.
    corpora: the directory where what is known is kept.
    """
    if data.scan == "off":
        return
    baseline = read_baseline(data.scan_baseline) if data.scan_baseline else None
    patterns = [(each.id, each.keywords, each.pattern.pattern) for each in PATTERNS]
    said = {"source": source.name, "loader": source.loader, "args": source.args, "stamps": stamps}
    known = [config.canonical({**said, "baseline": baseline and baseline.model_dump()}), repr(patterns).encode()]
    place = corpora / f".{sha256(b'|'.join(known))[:32]}.scan"
    report = _recall(place)
    if report is None:
        report = Scan(baseline).texts((each.id, each.text, each.goes_on) for each in source.read())
        if stamps is not None:
            with suppress(OSError, DiskFull):
                write_atomic(place, orjson.dumps(asdict(report)))
    emit(Event("data.scanned", _told(source, report), "warning" if report.n_findings else "info"))
    if report.n_findings and data.scan == "refuse":
        if data.scan_bypass is None:
            raise _refusal(source, report)
        bypass = {"what": "data.scan=refuse", "reason": data.scan_bypass, "n_findings": report.n_findings}
        emit(Event(BYPASSED, bypass, "warning"))


def _told(source: Source, report: ScanReport) -> dict[str, Any]:
    """What an event says: counts, and the first findings."""
    return {
        "source": source.name,
        "n_findings": report.n_findings,
        "n_allowed": report.n_allowed,
        "n_documents": report.n_files,
        "n_bytes": report.n_bytes,
        "rules": report.counts(),
        "first": [asdict(finding) for finding in report.findings[:_N_SHOWN]],
        "seconds": report.seconds,
    }


def _refusal(source: Source, report: ScanReport) -> SecretsFound:
    shown = ", ".join(f"{each.rule} in {each.path} line {each.line}" for each in report.findings[:_N_SHOWN])
    more = f" and {report.n_findings - _N_SHOWN} more" if report.n_findings > _N_SHOWN else ""
    return SecretsFound(
        f"the text '{source.name}' holds what looks like secrets: {shown}{more}. Take them out; or allow them with "
        f"data.scan_baseline, which `meristem scan --write-baseline` writes; or say in data.scan_bypass why not.",
        source=source.name,
        n_findings=report.n_findings,
        rules=report.counts(),
    )


def _recall(place: Path) -> ScanReport | None:
    """The report kept at ``place``; None where there is none that can be understood."""
    try:
        said = orjson.loads(place.read_bytes())
        return ScanReport(**{**said, "findings": [Finding(**each) for each in said["findings"]]})
    except (OSError, ValueError, KeyError, TypeError):
        return None
