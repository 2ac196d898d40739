"""Train the model in the box, put its checkpoint into the package (src/meristem/models/shipped), and ask it.

python scripts/train_shipped.py [--run-dir runs/shipped] [a.b=c ...]
python scripts/train_shipped.py --ask

Three quarters of an hour of one core; the same command goes on where it was interrupted. The second only asks, for the
table of its card.
"""

import argparse
import re
from pathlib import Path

import torch

from meristem.checkpoint import store
from meristem.checkpoint.store import Checkpoint
from meristem.data.chat import END_OF_REPLY
from meristem.data.notebook import ANSWER, Dice, paragraphs, wordings
from meristem.data.notebook_names import IN_USE
from meristem.data.notebook_words import ATTRIBUTES, Attribute
from meristem.events import silent
from meristem.models.generate import Sampling
from meristem.models.load import Loaded, load
from meristem.models.shipped import DIRECTORY
from meristem.recipes.pretrain import pretrain
from meristem.runs.config import load_config
from meristem.serve.session import Session
from meristem.sinks.console import Console

SETTINGS = Path(__file__).with_name("shipped.yaml")
KEPT = ("run", "tokens", "config_sha256", "code", "tokenizer_fingerprint", "dataset_fingerprint", "metrics")
"""Fields of the manifest that say where the weights are from."""

HALF = ("embedding.weight", "head.weight")
"""Tensors that are kept in bfloat16, so that all fits into eight megabytes; a reader has them in float32 again."""

N_FACTS = 72
"""Facts that one figure is the mean of."""


def put(trained: Checkpoint, directory: Path) -> Path:
    """Write what a reader needs of a checkpoint, without what only a training goes on from."""
    for entry in store.entries(directory):
        store.delete(entry.path)
    weights = trained.tree("model")
    weights |= {name: weights[name].to(torch.bfloat16) for name in HALF}
    return store.save(
        directory,
        step=trained.step,
        trees={"model": weights},
        values={name: trained.value(name) for name in ("learn", "device") if trained.has(name)},
        files={name: trained.file(name) for name in ("config.yaml", "tokenizer.json")},
        header={name: trained.manifest[name] for name in KEPT} | {"reason": "final"},
    )


def asked(loaded: Loaded, n_facts: int, n_paragraphs: int, *, is_new: bool) -> float:
    """Share of facts that a chat gives back: each told in a line, then paragraphs of the manual, then each asked.

    is_new: in wordings that no training text has. One name in eight is held out, no value is; the likeliest token is
    taken. A question leaves the conversation as it was.
    """
    n_right = 0
    prose = [" ".join(text.split()) for text in paragraphs(is_held_out=True, validation=0.1)]
    for number in range(N_FACTS // n_facts):
        dice = Dice(f"asked/{n_facts}/{n_paragraphs}/{number}")
        told: dict[str, tuple[Attribute, str]] = {}
        session = Session(*loaded, sampling=Sampling(temperature=0))

        def say(session: Session, line: str) -> str:
            session.feed(line + "\n")
            return session.generate(40, until=END_OF_REPLY)

        while len(told) < n_facts:
            person, attribute = dice.pick(IN_USE), dice.pick(ATTRIBUTES)
            if person not in told:
                told[person] = attribute, dice.pick(attribute.values or IN_USE)
                statement = dice.pick(wordings(attribute.statements, is_new))
                say(session, statement.format(s=person, v=told[person][1]))
        for _ in range(n_paragraphs):
            say(session, dice.pick(prose))
        for person, (attribute, value) in told.items():
            wording = dice.pick(wordings(attribute.questions, is_new)).format(s=person, v=value)
            reply = say(session.fork(), ANSWER.split(wording, maxsplit=1)[0])
            n_right += bool(re.search(rf"\b{value}\b", reply))
    return n_right / (N_FACTS // n_facts * n_facts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="settings that differ from scripts/shipped.yaml")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/shipped"))
    parser.add_argument("--ask", action="store_true", help="do not train; ask the model that is there")
    told = parser.parse_args()
    if not told.ask:
        config = load_config(str(SETTINGS), told.overrides).tree
        result = pretrain(config, run_dir=told.run_dir, view=Console(json=False))
        if result.status != "finished":
            raise SystemExit(result.exit_code)
        print(put(store.find(told.run_dir, silent), DIRECTORY))
    loaded = load()
    print("| facts told | paragraphs of the manual read since | wordings of training | wordings held out |")
    print("|---|---|---|---|")
    for n_facts, n_paragraphs in ((1, 0), (1, 5), (3, 5), (8, 5), (3, 20)):
        shares = [f"{asked(loaded, n_facts, n_paragraphs, is_new=is_new):.2f}" for is_new in (False, True)]
        print(f"| {n_facts} | {n_paragraphs} | {' | '.join(shares)} |")


if __name__ == "__main__":
    main()
