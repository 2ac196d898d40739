"""The outside of the command line: what every verb shows, how it fails, and what it costs to ask."""

import json
import re
import shlex
import subprocess
import sys

import pytest
import typer

from meristem import __version__
from meristem.cli import app, run

VERBS = (
    "bench chat checkpoint config data doctor eval export finetune grow "
    "keys plan plugins policy runs sample scan serve sweep train watch"
).split()


def leaf_commands():
    """Every command line that does something, as a list of words."""

    def walk(command, words):
        below = getattr(command, "commands", None)
        if below is None:
            yield words
            return
        for name, inner in below.items():
            yield from walk(inner, [*words, name])

    return list(walk(typer.main.get_command(app), []))


def test_verbs():
    """The verbs are these and no others."""
    assert sorted(typer.main.get_command(app).commands) == VERBS


@pytest.mark.parametrize("words", leaf_commands(), ids=" ".join)
def test_help_has_an_example(words, capsys):
    """Every verb explains itself and shows a command line that begins with itself."""
    assert run([*words, "--help"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"Examples?:", shown)
    assert f"meristem {' '.join(words)}" in shown.split("Example", 1)[1]


@pytest.mark.parametrize("words", leaf_commands(), ids=" ".join)
def test_examples_can_be_typed(words):
    """Every word of every example is an argument or an option that the verb takes."""
    command = typer.main.get_command(app)
    for word in words:
        command = command.commands[word]
    examples = re.findall(r"^ *(?:.* \| )?(meristem .*?)(?: > .*)?$", command.help, flags=re.MULTILINE)
    assert examples
    for example in examples:
        typed = shlex.split(example)[1:]
        assert typed[: len(words)] == words
        command.make_context(words[-1], typed[len(words) :])


@pytest.mark.parametrize("words", leaf_commands(), ids=" ".join)
def test_every_verb_has_json(words, capsys):
    """No verb is without a form for programs."""
    run([*words, "--help"])
    assert "--json" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, nearest",
    [(["trian"], "train"), (["checkpoint", "verfy"], "verify"), (["train", "x", "--resum", "auto"], "--resume")],
)
def test_misspelt_words_suggest(words, nearest, capsys):
    """A slip in a verb or an option names the nearest one, with the code for usage."""
    assert run(words) == 2
    assert nearest in capsys.readouterr().err


def test_misspelt_choice_suggests(capsys):
    """What the library of the command line found, without its own words, and the nearest that it takes."""
    assert run(["eval", "runs/mine", "--suite", "likelyhood"]) == 2
    said = capsys.readouterr().err
    assert "error: Invalid value for '--suite': 'likelyhood' is not one of 'likelihood'" in said
    assert "Did you mean 'likelihood'?" in said and "Value error" not in said


def test_misspelt_preset_suggests(capsys):
    """A slip in the name of a preset too."""
    assert run(["config", "show", "charforme"]) == 2
    assert "charformer" in capsys.readouterr().err


def test_a_setting_in_the_place_of_the_preset_is_told_from_one(capsys):
    assert run(["config", "show", "optim.lr=0.1"]) == 2
    assert "'optim.lr=0.1' is a setting, and a preset or a YAML file stands before all" in capsys.readouterr().err


def test_usage_error_as_json(capsys):
    """Under --json a wrong command line is one JSON value on stdout."""
    assert run(["config", "shwo", "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["type"], error["fields"]) == ("UsageError", {})
    assert "show" in error["message"]


def test_own_error_is_words_without_traceback(capsys):
    """What the user can mend is one message on stderr, nothing on stdout, and the exit code of its kind."""
    assert run(["checkpoint", "show", "nowhere"]) == 4
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and "nowhere" in err and "Traceback" not in err


def test_own_error_as_json(capsys):
    """Under --json it is type, message and fields."""
    assert run(["checkpoint", "show", "nowhere", "--json"]) == 4
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["type"] == "NoCheckpoint"
    assert error["fields"]["path"] == "nowhere"


def test_debug_shows_the_traceback(capsys):
    """With --debug, wherever it stands, the same failure shows where it came from."""
    assert run(["checkpoint", "show", "nowhere", "--debug"]) == 4
    assert "Traceback" in capsys.readouterr().err


def test_version(capsys):
    """CX-11.1: The version and nothing else."""
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["--version"]], ids=" ".join)
def test_asking_costs_no_torch(words):
    """Help and version come without the heavy imports."""
    probe = f"""
import sys
from meristem.cli import run
code = run({words!r})
heavy = sorted({{"torch", "numpy", "tokenizers", "safetensors"}} & set(sys.modules))
assert (code, heavy) == (0, []), (code, heavy)
"""
    subprocess.run([sys.executable, "-c", probe], check=True, capture_output=True, timeout=60)


def test_the_package_is_light():
    """CX-11.1: ``import meristem`` knows load and Session and imports neither torch nor numpy for it."""
    probe = (
        "import meristem, sys; assert {'load', 'Session'} <= set(meristem.__all__); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", probe], check=True, capture_output=True, timeout=60)


def test_exit_code_reaches_the_process():
    """The installed program ends with the code of ``run``."""
    done = subprocess.run(
        [sys.executable, "-c", "from meristem.cli import main; main()", "trian"],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
