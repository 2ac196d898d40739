"""`meristem sweep`: many runs that differ in some keys."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from meristem.cli.answer import Json, answer, columns

File = Annotated[Path, typer.Argument(metavar="FILE", help="A sweep as YAML; docs/sweeps.md shows one.")]


def sweep(file: File, as_json: Json = False) -> None:
    """Make the runs of a sweep, several at once, a table and a picture; the same command goes on with what is left.

    Exit code 1 where a run failed.

    \b
    Example:
      meristem sweep rates.yaml
    """
    from meristem.recipes.sweeps.config import read_sweep
    from meristem.recipes.sweeps.run import sweep as run_sweep
    from meristem.recipes.sweeps.table import table

    config = read_sweep(file)
    rows, place, is_done = run_sweep(config, lambda line: typer.echo(line, err=True))
    result = {"dir": str(place), "is_done": is_done, "rows": [asdict(row) for row in rows]}
    answer(result, as_json, lambda _: [*columns(*table(config, rows)), "", f"{len(rows)} runs in {place}"])
    if not is_done:
        raise typer.Exit(130)
    if any(row.status == "failed" for row in rows):
        raise typer.Exit(1)


def show(file: File, as_json: Json = False) -> None:
    """Show the runs of a sweep before they start; each is tried as settings.

    \b
    Example:
      meristem config sweep rates.yaml
    """
    from meristem.recipes.sweeps.config import read_sweep
    from meristem.recipes.sweeps.points import n_points, points_of
    from meristem.recipes.sweeps.search import require_optuna

    config = read_sweep(file)
    require_optuna(config)
    points = points_of(config)
    later = [(number, config.known_to(number)) for number in range(len(points) + 1, n_points(config) + 1)]
    rows = [(point.name, " ".join(point.words)) for point in points]
    rows += [(f"{number:03d}", f"drawn from what the first {known} come to") for number, known in later]
    answer(
        [*(asdict(point) for point in points), *({"number": each, "settings": None} for each, _ in later)],
        as_json,
        lambda _: columns(("point", "settings"), rows),
    )
