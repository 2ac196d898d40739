"""The model in the box: small enough, whole, in the wheel, and what its card says it is."""

import re
import tomllib
from pathlib import Path

from meristem.checkpoint.store import find
from meristem.cli import run
from meristem.events import silent
from meristem.models.load import load
from meristem.models.shipped import DIRECTORY
from meristem.serve.session import Session

ROOT = Path(__file__).parents[2]
MOST_BYTES = 8_000_000


def test_it_is_small_and_goes_into_the_wheel():
    """Every file is one that the packaging names, and all together have at most eight megabytes."""
    files = [path for path in DIRECTORY.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert 0 < sum(path.stat().st_size for path in files) <= MOST_BYTES
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    globs = settings["tool"]["setuptools"]["package-data"]["meristem"]
    inside = [path.relative_to(DIRECTORY.parents[1]) for path in files if path.suffix != ".py"]
    assert [path for path in inside if not any(path.match(glob) for glob in globs)] == []


def test_it_is_what_is_opened_where_nothing_is_named(capsys):
    """Every byte verified; a line that it is given, it writes on from."""
    model, tokenizer = load()
    expected = Session(model, tokenizer, random_seed=3)
    expected.feed("Ada lives in Oslo.")
    assert run(["sample", "--prompt", "Ada lives in Oslo.", "--max-tokens", "5", "--seed", "3"]) == 0
    assert capsys.readouterr().out.rstrip("\n") == expected.generate(5).rstrip("\n")


def test_settings_may_follow_where_nothing_is_named(capsys):
    """The first word is a setting then, and no checkpoint: a misspelt one is refused as such."""
    assert run(["eval", "data.sorce=x", "--suite", "remember"]) == 2
    assert "data.source" in capsys.readouterr().err


def test_its_card_names_its_size_and_its_training():
    """As they are in the checkpoint."""
    card = (DIRECTORY / "card.md").read_text("utf-8")
    checkpoint, (model, _) = find(DIRECTORY, silent), load()
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    numbers = set(re.findall(r"\d[\d,]+", card))
    assert {f"{n_parameters:,}", f"{checkpoint.manifest['tokens']:,}"} <= numbers
    assert checkpoint.settings()["data"]["source"] in card
