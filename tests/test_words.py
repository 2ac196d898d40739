"""Words that those of the field replaced do not come back: identifiers, configuration keys, module paths."""

import io
import re
import subprocess
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

NAMES = {
    "Outer": "MultiPeriodOptimizer",
    "recall_of": "build_memory",
    "KeptRecall": "MemoryCache",
    "LevelReader": "OnlineLearner",
    "Shelter": "Recovery",
    "sheltered": "recovering",
    "shelter": "recovery",
    "go_back": "roll_back",
    "spares": "should_skip_eval",
    "Ring": "SnapshotBuffer",
    "ring": "buffer",
    "Teaching": "GradientSource",
    "Taught": "BackwardResult",
    "taught": "result",
    "Alarm": "Interval",
    "Outbox": "SinkQueue",
    "Told": "SinkRecord",
    "Pace": "RateLimit",
    "Sight": "History",
    "sight": "history",
    "Usual": "Baseline",
    "flowing": "decay",
    "turned": "rotated",
    "turned_by": "apply_rope",
    "hope_speaks": "hope_decoding",
    "draw_speeds": "plot_speeds",
    "as_it_was": "from_checkpoint",
    "n_parts": "n_micro_batches",
    "linearise": "vjp",
}
KEYS = (
    "optim.rate optim.clip optim.kind data.batch data.window train.accumulate train.budget run.random_seed run.root "
    "device.name device.compute device.parameters model.width model.heads model.hidden model.span model.window "
    "model.n_persistent model.join memory.head_width memory.write memory.kept"
).split()
MODULES = (
    "memory.door models.doors memory.value memory.forms.flow memory.kernels.outer_flow nn.kept nn.pool nn.levels "
    "nn.chain nn.recall models.draws models.join models.reader optim.outer optim.skip optim.clock checkpoint.ring "
    "checkpoint.retention checkpoint.files sinks.lines sinks.outbox recipes.shelter recipes.watch recipes.bench "
    "recipes.drill"
).split()
PROSE = {
    "roll back": r"(?:go|goes|went|going|gone) back(?: to the system)?|way back",
    "freeze": r"stands? still",
    "read": r"do(?:es)? not look at|(?:looks?|looked) at|memory answers|answers? to (?:each|every|one|all)",
    "sequence": r"windows? of (?:\d|\{|text)|(?:next|whole) window|to the window",
    "cache": r"kept (?:memor(?:y|ies)|ones)",
    "report, broadcast": r"(?:is|are|was|were) told|tells? of",
    "target, loss": r"taught by|(?:being|is|are) taught",
    "output, decode": r"a session that speaks|lets? speak|speaks (?:for|where)",
    "interleave": r"in turns|take turns",
    "NaN": r"into no number",
    "micro-batch": r"(?:smaller|twice as many) parts",
    "need, require": r"asked for|asks for",
    "decay": r"(?:how writes|the) flow(?:s| of)",
    "recovery": r"shelters?",
}
"""The field's words, and ours that they replaced in docstrings, comments, messages and pages."""
ALLOWED = ("go back to the system",)
EXCUSED = {
    "tests/test_words.py": "the table",
    "src/meristem/checkpoint/migrate.py": "the table by which older files are read",
    "src/meristem/config/mistakes.py": "what others write, and ours for it",
    "scripts/fixtures.py": "it runs with the version before these words",
}
_KEY = re.compile(rf"(?<![\w.])(?:{'|'.join(map(re.escape, KEYS))})(?![\w.(])")
_MODULE = re.compile(rf"(?<=meristem\.)(?:{'|'.join(map(re.escape, MODULES))})\b")
_PROSE = re.compile(rf"\b(?:{'|'.join(PROSE.values())})\b", re.IGNORECASE)


def old_words(name: str, text: str) -> list[str]:
    """The places of old words in a file: identifiers of Python, keys in its strings, module paths anywhere."""
    found, texts = [], list(enumerate(text.splitlines(), start=1))
    if name.endswith(".py"):
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
        texts = [
            (token.start[0], token.string) for token in tokens if token.type in (tokenize.STRING, tokenize.COMMENT)
        ]
        found += [
            f"{name}:{token.start[0]}: {token.string} is {NAMES[token.string]}"
            for token in tokens
            if token.type == tokenize.NAME and token.string in NAMES
        ]
    for pattern, places in ((_KEY, texts), (_MODULE, list(enumerate(text.splitlines(), start=1)))):
        found += [f"{name}:{number}: {word}" for number, line in places for word in pattern.findall(line)]
    if not name.startswith("tests/"):
        found += [
            f"{name}:{number}: {word}"
            for number, line in texts
            for word in _PROSE.findall(line)
            if word.lower() not in ALLOWED and " " in line.strip("\"'")
        ]
    return found


def test_no_old_words() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "src", "tests", "docs/*.md", "scripts", "README.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    found = []
    for name in listed:
        path = ROOT / name
        if (
            path.suffix in (".py", ".md", ".yaml", ".sh")
            and path.is_file()
            and name not in EXCUSED
            and "/fixtures/" not in name
        ):
            found += old_words(name, path.read_text(encoding="utf-8"))
    assert found == []


@pytest.mark.parametrize(
    "text, is_found",
    [
        ("shelter = 1", True),
        ("def f(taught): pass", True),
        ('keys = ["optim.rate=0.1"]', True),
        ("from meristem.nn.recall import x", True),
        ("# a ring of buffers", False),
        ("model.heads(x)", False),
        ("from meristem.evaluate.recall import x", False),
        ("# the run goes back", True),
        ("# blocks go back to the system", False),
        ('"""What the memory answers to each token."""', True),
        ('"""A memory that stands still."""', True),
        ('f"fitted from windows of {n} tokens"', True),
        ("# sliding-window attention over the window", False),
    ],
)
def test_planted_word_is_found(text: str, is_found: bool) -> None:
    assert bool(old_words("planted.py", text)) is is_found
