"""The command line: one function per verb. Nothing heavy is imported before a verb runs."""

import functools
import io
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from meristem import __version__
from meristem.cli import (
    answer,
    bench,
    chat,
    checkpoint,
    config,
    data,
    doctor,
    evaluate,
    export,
    finetune,
    grow,
    keys,
    plugins,
    policy,
    runs,
    sample,
    scan,
    serve,
    sweep,
    train,
    watch,
)
from meristem.errors import MeristemError, WrongValue

app = typer.Typer(rich_markup_mode="rich", context_settings={"help_option_names": ["-h", "--help"]})


@app.callback(invoke_without_command=True)
def meristem(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, with any verb.")] = False,
) -> None:
    """Train, grow and talk to language models that keep learning.

    \b
    Examples:
      meristem train default data.source=book.txt
      meristem chat runs/book
      meristem doctor
      meristem --install-completion
    """
    if version:
        typer.echo(__version__)
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.command("train")(train.train)
app.command("finetune")(finetune.finetune)
app.command("plan")(train.plan)
app.command("sample")(sample.sample)
app.command("chat")(chat.chat)
app.command("serve")(serve.serve)
app.command("watch")(watch.watch)
app.add_typer(keys.app, name="keys")
app.command("eval")(evaluate.evaluate)
app.add_typer(grow.app, name="grow")
app.add_typer(data.app, name="data")
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(runs.app, name="runs")
app.add_typer(config.app, name="config")
app.add_typer(plugins.app, name="plugins")
app.add_typer(export.app, name="export")
app.command("sweep")(sweep.sweep)
app.command("scan")(scan.scan)
app.add_typer(policy.app, name="policy")
app.command("doctor")(doctor.doctor)
app.add_typer(bench.app, name="bench")


@functools.cache
def _commands() -> Any:
    """All verbs with their options: made once, as it takes longer than many a verb."""
    return typer.main.get_command(app)


def run(arguments: Sequence[str]) -> int:
    """Run one command line and give its exit code."""
    flags = arguments[: arguments.index("--")] if "--" in arguments else arguments
    debug, as_json = "--debug" in flags, "--json" in flags
    words = [word for word in arguments if word != "--debug"]
    streams = sys.stdout, sys.stderr
    try:
        if any("\0" in word for word in words):
            raise WrongValue("a word of the command line holds the character NUL, which no name can have. Remove it.")
        code = _commands().main(words, prog_name="meristem", standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except (BrokenPipeError, SystemExit) as ended:  # typer makes the second of the first
        if isinstance(ended, SystemExit) and not ended.code:  # the completion of a shell
            return 0
        sys.stdout, sys.stderr = streams
        return answer.NOBODY_READS
    except (MeristemError, typer.TyperException) as error:
        return answer.report_error(error, as_json, debug)
    except Exception as error:  # noqa: BLE001 - the last place where it can become a sentence
        return answer.report_unexpected(error, as_json, debug)
    return code if isinstance(code, int) else 0


def main() -> None:
    """The entry point of the installed program. No character that a model writes, or a pipe holds, may end it."""
    # Threads wait for each other at every operation. Spinning for long wastes a busy machine, where the other thread is
    # not even running; sleeping at once wastes an idle one. libgomp reads the limit when torch is loaded (dev/LOG.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    # A stream that was closed, as by `>&-`, is None.
    sys.stdin, sys.stdout, sys.stderr = (
        stream or open(os.devnull, mode) for stream, mode in ((sys.stdin, "r"), (sys.stdout, "w"), (sys.stderr, "w"))
    )
    for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    if isinstance(sys.stdin, io.TextIOWrapper):
        # Every byte of a pipe goes to the tokenizer unchanged, a carriage return and half a character too.
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape", newline="\n")
    code = run(sys.argv[1:])
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except OSError:  # Python flushes once more when it ends, and would say that it cannot
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    sys.exit(code)
