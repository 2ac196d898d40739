"""`meristem config`: what a run would be configured as, and what may be set."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from meristem.cli import complete, sweep
from meristem.cli.answer import Json, Overrides, Preset, answer, columns

app = typer.Typer(help="Show the settings of a preset or file, and what may be set.")
app.command("sweep")(sweep.show)


@app.command()
def show(
    preset: Preset,
    overrides: Overrides = None,
    why: Annotated[
        bool, typer.Option("--why", help="Name the layer that set each value, and where a paper's number is from.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Print the settings a run would use, all layers merged.

    \b
    Examples:
      meristem config show default
      meristem config show default train.max_time=60s --why
      meristem config show mine.yaml faster.yaml --why
    """
    from meristem.config import dump_yaml, sources
    from meristem.runs.config import files_among, load_config

    words = overrides or ()
    loaded = load_config(preset, words)
    tree = loaded.tree.model_dump(mode="json")
    if not why:
        answer(tree, as_json, lambda tree: dump_yaml(tree).splitlines())
        return
    told: dict[str, str] = {}
    for name in (preset, *files_among(words)):
        told |= sources(name)
    leaves = {
        key: {
            "value": _leaf(tree, key),
            "layer": layer,
            "source": told.get(key, "") if layer.startswith(("preset ", "size ")) else "",
        }
        for key, layer in loaded.why.items()
    }
    answer(leaves, as_json, lambda leaves: columns(("key", "value", "set by", "source"), _why_rows(leaves)))


def _why_rows(leaves: Mapping[str, Mapping[str, object]]) -> list[tuple[object, ...]]:
    return [(key, leaf["value"], leaf["layer"], leaf["source"]) for key, leaf in sorted(leaves.items())]


def _leaf(tree: object, key: str) -> object:
    for name in key.split("."):
        tree = tree[name] if isinstance(tree, Mapping) else None
    return tree


@app.command()
def explain(
    key: Annotated[
        str,
        typer.Argument(
            metavar="KEY", autocompletion=complete.keys, help="A setting, as data.seq_len, or a section, as data."
        ),
    ],
    as_json: Json = False,
) -> None:
    """Say what a setting means and takes, who sets it, and whether another value makes another run.

    \b
    Examples:
      meristem config explain optim.lr
      meristem config explain train
    """
    from meristem.config.describe import describe
    from meristem.runs.config import Config

    answer(describe(Config, key)._asdict(), as_json, _explained)


def _explained(key: Mapping[str, Any]) -> list[str]:
    """What is known of a key, in words; of a section its keys."""
    identity = "another value makes another run" if key["is_identity"] else "may change when a run goes on"
    if key["keys"]:
        return [key["key"], f"  {key['description']}", f"  {identity}", "", *columns(("key", ""), key["keys"].items())]
    places: dict[str, list[str]] = {}
    for place, value in key["set_by"].items():
        places.setdefault(str(value), []).append(place)
    told = {
        "type": key["type"],
        "default": str(key["default"]),
        "allowed": ", ".join(key["allowed"]),
        "run": identity,
        "set by": "; ".join(f"{', '.join(names)}: {value}" for value, names in places.items()),
        "environment": key["environment"],
        "example": f"meristem train default {key['example']}",
    }
    rows = [f"{name:<11}  {said}" for name, said in told.items() if said]
    return [key["key"], f"  {key['description']}", "", *rows]


@app.command()
def schema(as_json: Json = False) -> None:
    """Print the JSON Schema of the settings.

    \b
    Example:
      meristem config schema > meristem.schema.json
    """
    import orjson

    from meristem.config import schema as schema_of
    from meristem.runs.config import Config

    described = schema_of(Config)
    answer(described, as_json, lambda described: [orjson.dumps(described, option=orjson.OPT_INDENT_2).decode()])


@app.command()
def presets(as_json: Json = False) -> None:
    """List the presets.

    \b
    Example:
      meristem config presets
    """
    from meristem.config import preset_names, size_names, sized

    also = f"{', '.join(sized())}: also as NAME-SIZE, where SIZE is {', '.join(size_names())}"
    answer(list(preset_names()), as_json, lambda names: [*names, "", also])
