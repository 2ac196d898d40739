"""`meristem doctor`: is this machine fit to train and talk, and if not, what is missing."""

import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import typer

from meristem.cli.answer import Json, answer, columns, size
from meristem.cli.drill import drill
from meristem.errors import CapabilityError


class Item(NamedTuple):
    """One thing that was checked: fit, fit with a drawback, or in the way."""

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str


LOW_DISK_BYTES, NO_DISK_BYTES = 5e9, 2e8
LOW_RAM_BYTES, NO_RAM_BYTES = 2e9, 3e8


def doctor(
    run_root: Annotated[Path, typer.Option("--run-root", help="Where runs are to be written.")] = Path("runs"),
    drills: Annotated[
        list[str] | None,
        typer.Option(
            "--drill",
            metavar="NAME",
            help="Break this in a tiny run instead, and see what becomes of it; may be given again. 'all' for each.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check this machine: Python, torch, devices, room, extras, plugins. Exit code 1 when something is in the way.

    With --drill, cause a fault on purpose in a temporary directory; exit code 1 when the outcome is not the expected.

    \b
    Examples:
      meristem doctor
      meristem doctor --json
      meristem doctor --drill killed --drill disk-full
    """
    if drills:
        if not drill(drills, as_json):
            raise typer.Exit(1)
        return
    items = [item for look in _LOOKS for item in look(run_root)]
    worst = max(items, key=lambda item: ("ok", "warn", "fail").index(item.status)).status
    report = {"status": worst, "items": [item._asdict() for item in items]}
    answer(report, as_json, lambda report: columns(("item", "status", "detail"), items))
    if worst == "fail":
        raise typer.Exit(1)


def _python(run_root: Path) -> Iterator[Item]:
    found = ".".join(str(part) for part in sys.version_info[:3])
    yield Item("python", "ok" if sys.version_info >= (3, 11) else "fail", f"{found} (3.11 or newer is needed)")


def _torch(run_root: Path) -> Iterator[Item]:
    try:
        import torch
    except ImportError as cause:
        yield Item("torch", "fail", f"cannot be imported: {cause}. pip install torch")
        return
    from meristem.device.limits import n_cpus

    fits = torch.__version__.startswith("2.13.")
    yield Item("torch", "ok" if fits else "warn", f"{torch.__version__}" + ("" if fits else " (made for 2.13)"))
    yield Item("threads", "ok", f"{torch.get_num_threads()} for torch, {n_cpus()} processors may be used")


def _devices(run_root: Path) -> Iterator[Item]:
    import torch

    from meristem.device.resolve import DTYPES, available, probe

    for name in available():
        failed = {}
        for dtype_name, dtype in DTYPES.items():
            try:
                probe(torch.device(name), torch.float32, dtype)
            except CapabilityError as error:
                failed[dtype_name] = str(error.fields["reason"])
        working = ", ".join(dtype_name for dtype_name in DTYPES if dtype_name not in failed)
        reasons = "".join(f"; no {dtype_name}: {reason}" for dtype_name, reason in failed.items())
        yield Item(f"device {name}", "fail" if "fp32" in failed else "ok", f"computes in {working}{reasons}")


def _native(run_root: Path) -> Iterator[Item]:
    from meristem.native.library import core

    found, name = core(), "native core"
    if found.library is None:
        drawback = "memories on the CPU run as tensor code, at less than half the speed"
        yield Item(name, "warn", f"not used: {found.said}; {drawback}")
    else:
        yield Item(name, "ok", found.said)


def _room(run_root: Path) -> Iterator[Item]:
    from meristem.device.limits import available_bytes

    existing = next(path for path in (run_root.absolute(), *run_root.absolute().parents) if path.exists())
    yield _enough("disk", shutil.disk_usage(existing).free, LOW_DISK_BYTES, NO_DISK_BYTES)
    yield _enough("ram", available_bytes(), LOW_RAM_BYTES, NO_RAM_BYTES)
    try:
        with tempfile.TemporaryFile(dir=existing):
            yield Item("run root", "ok", f"{run_root} can be written")
    except OSError as cause:
        yield Item(
            "run root", "fail", f"{run_root} cannot be written: {cause.strerror}. Choose another with --run-root"
        )


def _enough(name: str, free_bytes: float, low_bytes: float, none_bytes: float) -> Item:
    status: Literal["ok", "warn", "fail"] = (
        "ok" if free_bytes > low_bytes else "warn" if free_bytes > none_bytes else "fail"
    )
    return Item(name, status, f"{size(free_bytes)} free")


def _clock(run_root: Path) -> Iterator[Item]:
    import meristem

    installed = Path(meristem.__file__).stat().st_mtime
    behind_s = installed - time.time()
    if behind_s > 0:
        yield Item(
            "clock", "warn", f"{behind_s:.0f} s behind the files of this package: times in records will be wrong"
        )
    else:
        yield Item("clock", "ok", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))


def _extras(run_root: Path) -> Iterator[Item]:
    from importlib.metadata import PackageNotFoundError, requires, version

    for line in requires("meristem") or ():
        extra = re.search(r"""extra == ["']([\w-]+)["']""", line)
        package = re.match(r"[\w.-]+", line)
        if package is None or package[0] == "torch" or (extra and extra[1] in ("test", "lint")):
            continue
        try:
            yield Item(package[0], "ok", version(package[0]) + (f" (extra {extra[1]})" if extra else ""))
        except PackageNotFoundError:
            name = f"meristem[{extra[1]}]" if extra else "meristem"
            yield Item(package[0], "warn" if extra else "fail", f"not installed: pip install '{name}'")


def _plugins(run_root: Path) -> Iterator[Item]:
    from meristem.cli.plugins import findings

    found = findings()
    broken = [f"{finding.origin.kind} {finding.origin.name}" for finding in found if finding.error]
    if broken:
        yield Item("plugins", "warn", f"{', '.join(broken)} cannot be loaded: `meristem plugins check` says why")
    else:
        yield Item("plugins", "ok", f"{len(found)} entries load")


def _tokenizers(run_root: Path) -> Iterator[Item]:
    from meristem.data.config import TokenizerConfig
    from meristem.data.tokenizer import train_tokenizer

    text = "Ada: na\N{LATIN SMALL LETTER I WITH DIAERESIS}ve \N{SNOWMAN}\n" * 9
    for kind in ("byte", "bpe"):
        tokenizer = train_tokenizer(TokenizerConfig(kind=kind, vocab_size=300), [text.encode()])
        is_lossless = tokenizer.decode(tokenizer.encode(text)) == text
        detail = "gives a text back as it was" if is_lossless else "does not give a text back as it was"
        yield Item(f"tokenizer {kind}", "ok" if is_lossless else "fail", detail)


_LOOKS = (_python, _torch, _devices, _native, _room, _clock, _extras, _plugins, _tokenizers)
