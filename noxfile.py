"""The gates of a change. ``.venv/bin/nox -l`` lists them, ``.venv/bin/nox -s lint types tests`` runs some.

Gates that run the package use the environment that ``./check`` makes; tools that nothing else needs get their own.
"""

import json
import os
import sys
from pathlib import Path

import nox

BASE = os.environ.get("MERISTEM_BASE", "main")
"""The branch that a change is compared with."""

LANES = "fault or soak or slow or extras"
BUILD = Path("build")

nox.options.sessions = ["lint", "types", "tests"]
nox.options.error_on_external_run = False
nox.options.reuse_existing_virtualenvs = True


def python(session: nox.Session, *words: str, **variables: str) -> None:
    """Run a module or a file of this repository with the Python that runs nox."""
    session.run(sys.executable, *words, external=True, env=variables)


@nox.session(venv_backend="none")
def lint(session: nox.Session) -> None:
    """Style and shortcuts that are not ours: ruff."""
    python(session, "-m", "ruff", "check", ".")
    python(session, "-m", "ruff", "format", "--check", ".")


@nox.session(venv_backend="none")
def types(session: nox.Session) -> None:
    """Types of the package: mypy, strict on the lower floors."""
    python(session, "-m", "mypy")


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """The default lane; options of pytest may follow behind --."""
    python(session, "-m", "pytest", *session.posargs)


@nox.session(venv_backend="none")
def lanes(session: nox.Session) -> None:
    """What kills, fills, soaks, learns for long, or needs the libraries of the extra ci."""
    python(session, "-m", "pytest", "-m", LANES, *session.posargs)


@nox.session(venv_backend="none")
def order(session: nox.Session) -> None:
    """The default lane in an order that no run had before; the seed is printed."""
    python(session, "-m", "pytest", f"--randomly-seed={int.from_bytes(os.urandom(3), 'big')}", *session.posargs)


@nox.session(venv_backend="none")
def unchecked(session: nox.Session) -> None:
    """The default lane without the checks of shapes, as the product runs."""
    python(session, "-m", "pytest", "--shape-checks=off", *session.posargs)


@nox.session
def coverage(session: nox.Session) -> None:
    """Branches and lines that the default lane runs: no less than the floor, and nine tenths of what a change adds."""
    session.install("diff-cover==11.0.1")
    BUILD.mkdir(exist_ok=True)
    reports = [f"--cov-report={kind}:{BUILD}/coverage.{kind}" for kind in ("json", "xml")]
    python(session, "-m", "pytest", "--cov", "--cov-report=", *reports, *session.posargs)
    python(session, "scripts/ratchet.py", f"{BUILD}/coverage.json", "--base", BASE)
    session.run("diff-cover", f"{BUILD}/coverage.xml", f"--compare-branch={BASE}", "--fail-under=90")


@nox.session
def bandit(session: nox.Session) -> None:
    """Dangerous calls in the package."""
    session.install("bandit==1.9.4")
    session.run("bandit", "-q", "-c", "pyproject.toml", "-r", "src", "scripts", "examples")


@nox.session
def audit(session: nox.Session) -> None:
    """Known faults in the packages of the image; asks a service, and fails where that does not know a package."""
    session.install("pip-audit==2.10.1")
    words = [
        "--strict",
        "--disable-pip",
        "--timeout",
        "15",
        "--progress-spinner",
        "off",
        "-r",
        "docker/requirements.txt",
    ]
    try:
        session.run("pip-audit", *words)
    except nox.command.CommandFailed:
        session.error(
            "a package has a known fault, or could not be audited: the lines above name it. Where they speak of a "
            "connection, or of packages that are not found, the service cannot be reached from here, and nothing is "
            "known; run this gate where it can."
        )


@nox.session
def sbom(session: nox.Session) -> None:
    """The bill of materials of the image: build/sbom.cdx.json, CycloneDX 1.6, checked against its schema."""
    session.install("cyclonedx-bom==7.5.0")
    BUILD.mkdir(exist_ok=True)
    kind = ["--spec-version", "1.6", "--output-format", "JSON", "--output-reproducible", "--validate"]
    project = ["--pyproject", "pyproject.toml", "--mc-type", "application"]
    lock, bill = Path("docker/requirements.txt"), BUILD / "sbom.cdx.json"
    session.run("cyclonedx-py", "requirements", *kind, *project, "-o", str(bill), str(lock))
    found = {f"{each['name']}=={each['version']}" for each in json.loads(bill.read_text())["components"]}
    locked = {line.split()[0] for line in lock.read_text().splitlines() if not line.startswith("#")}
    if found != locked:
        session.error(f"{bill} and {lock} differ in {sorted(found ^ locked)}")


@nox.session
def wheel(session: nox.Session) -> None:
    """Wheel and source archive are made, and the wheel works by itself: version, doctor, 20 steps, a text, a server."""
    session.install("build==1.6.1", "twine==7.0.0")
    session.run("pyproject-build", "--outdir", str(BUILD / "dist"))
    session.run("twine", "check", "--strict", *map(str, (BUILD / "dist").glob("meristem-*")))
    python(session, "-m", "pytest", "-n0", "-m", "slow or not slow", "tests/test_image.py")


@nox.session
def docs(session: nox.Session) -> None:
    """The site: pages from docs/ and docstrings, built into site/; a warning is a failure."""
    session.install("zensical==0.0.73", "mkdocstrings-python==2.0.11")
    python(session, "scripts/site.py")
    session.run("zensical", "build", "--clean", "--strict")


@nox.session
def notebooks(session: nox.Session) -> None:
    """The notebooks of examples/ run from top to bottom."""
    session.install("nbclient==0.11.0", "ipykernel==7.4.0")
    # The kernel has the packages of the environment that stands, behind its own.
    standing = os.pathsep.join(["src", *(path for path in sys.path if path.endswith("site-packages"))])
    for path in sorted(Path("examples").glob("*.ipynb")):
        away = {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, standing.split(os.pathsep))), "MPLBACKEND": "agg"}
        away["OMP_NUM_THREADS"] = "1"  # on a busy machine two threads wait for each other
        session.run("jupyter", "execute", "--timeout=900", str(path), env=away)
