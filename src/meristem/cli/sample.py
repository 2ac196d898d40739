"""`meristem sample`: text from a checkpoint."""

import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from meristem.cli import complete
from meristem.cli.answer import Json, json_line, tell, write_text
from meristem.cli.policy import BypassPolicy, PolicyFile, policy_of
from meristem.errors import WrongValue

if TYPE_CHECKING:
    from meristem.device.resolve import Device
    from meristem.models.config import LearnConfig
    from meristem.serve.session import Session

Checkpoint = Annotated[
    Path,
    typer.Argument(
        metavar="CKPT",
        autocompletion=complete.run_directories,
        help="A checkpoint, or a run directory for its newest one.",
    ),
]
AnyCheckpoint = Annotated[
    Path | None,
    typer.Argument(
        metavar="[CKPT]",
        autocompletion=complete.run_directories,
        help="A checkpoint, or a run directory for its newest one. By default the small model that comes along.",
        show_default=False,
    ),
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="Tokens to write at most.")]
Temperature = Annotated[
    float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token; 1 samples plainly.")
]
TopK = Annotated[int, typer.Option("--top-k", min=0, help="Draw among the K likeliest tokens; 0 for all.")]
TopP = Annotated[
    float, typer.Option("--top-p", min=0.0, max=1.0, help="Draw among the likeliest with this share in all.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Random seed of the sampler.")]
Learn = Annotated[
    Literal["none", "memory", "levels", "weights"],
    typer.Option("--learn", help="What changes while it reads: nothing, its memory, feed-forward levels, or weights."),
]
Which = Annotated[
    Literal["mlp", "last_mlp", "head", "low_rank", "all"],
    typer.Option("--which", help="Weights that learn with --learn weights, as learn.which has it."),
]
LearningRate = Annotated[
    float | None,
    typer.Option(
        "--lr",
        min=0.0,
        help="Learning rate of --learn weights; by default the one found after training, or the usual one.",
        show_default=False,
    ),
]
DeviceName = Annotated[str, typer.Option("--device", help="Where it runs: auto, cpu, mps, cuda or cuda:N.")]


def open_session(
    checkpoint: Path | None,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    learn: Learn = "memory",
    learning: "LearnConfig | None" = None,
    device: str = "cpu",
) -> "Session":
    """A fresh session with the model of a checkpoint, or with the one that comes along."""
    from meristem.models.generate import Sampling
    from meristem.runs.open import load
    from meristem.serve.session import Session

    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    place = device_called(device).device
    loaded = load(checkpoint, tell)
    return Session(
        loaded.model.to(place), loaded.tokenizer, sampling=sampling, random_seed=seed, learn=learn, learning=learning
    )


def learning_of(learn: Learn, which: Which, lr: LearningRate) -> "LearnConfig":
    """How weights learn. WrongValue where an option is given that nothing reads."""
    from meristem.models.config import LearnConfig

    if learn != "weights" and (which != "mlp" or lr is not None):
        raise WrongValue(
            f"--which and --lr say how weights learn, but --learn is {learn}. Add --learn weights, or drop them.",
            key="learn",
            value=learn,
        )
    if lr is not None and not math.isfinite(lr):
        raise WrongValue(f"--lr is {lr}; a learning rate is a finite number of at least 0.", key="learn.lr", value=lr)
    return LearnConfig(which=which, lr=lr)


def device_called(name: str) -> "Device":
    """The device that ``device.device`` names so; it works, or an error says what to name instead."""
    from meristem.config import load
    from meristem.device.resolve import resolve
    from meristem.runs.config import Config

    return resolve(load(Config, overrides=[f"device.device={name}", "device.dtype=fp32"]).tree.device, tell)


def sample(
    checkpoint: AnyCheckpoint = None,
    prompt: Annotated[str, typer.Option("--prompt", help="The text to go on from.", show_default=False)] = "",
    from_stdin: Annotated[bool, typer.Option("--stdin", help="Read the prompt from stdin.")] = False,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.8,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    learn: Learn = "memory",
    which: Which = "mlp",
    lr: LearningRate = None,
    device: DeviceName = "cpu",
    policy: PolicyFile = None,
    bypass_policy: BypassPolicy = None,
    as_json: Json = False,
) -> None:
    """Write on from a prompt; the text appears as it is made.

    With --policy the exit code is 1 where the prompt or the text is blocked.

    \b
    Examples:
      meristem sample --prompt "Ada lives in Oslo. Where does Ada live? In"
      meristem sample runs/latest --prompt "def main(" --max-tokens 200
      head -c 500 book.txt | meristem sample runs/latest --stdin --temperature 0.5
      head -c 9000 code.py | meristem sample runs/latest --stdin --learn weights --which head
      meristem sample --prompt "my ssn is 123-45-6789" --policy default
    """
    if prompt and from_stdin:
        raise WrongValue("both --prompt and --stdin were given. Leave one of them out.")
    from meristem.models.generate import BEGINNING

    rules = policy_of(policy, bypass_policy)
    text = rules.require(sys.stdin.read() if from_stdin else prompt, "prompt", tell)
    session = open_session(
        checkpoint,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        learn=learn,
        learning=learning_of(learn, which, lr),
        device=device,
    )
    started = time.perf_counter()
    n_read = session.feed(text or BEGINNING).n_tokens
    written, judged = "", rules.stream("output", tell)
    for piece in judged.over(session.stream(max_tokens)):
        written += piece
        if not as_json:
            write_text(piece)
    if as_json:
        n_written = session.n_tokens - n_read
        seconds = time.perf_counter() - started
        json_line({"prompt": text, "text": written, "n_read": n_read, "n_written": n_written, "seconds": seconds})
    else:
        typer.echo()
    if judged.blocked is not None:
        raise rules.refusal(judged.blocked, "output")
