"""A run that ends within a second: a short text, a tiny model, few steps, and everything that a run does."""

from pathlib import Path

from meristem.runs.config import Config, load_config

TEXT = "".join(f"{number} times {number} is {number * number}, they say.\n" for number in range(500))


def write_text(place: Path) -> Path:
    """The text as a file."""
    path = place / "text.txt"
    path.write_text(TEXT)
    return path


def write_documents(place: Path) -> Path:
    """The text as files of one line to nine."""
    folder = place / "texts"
    folder.mkdir(exist_ok=True)
    lines = TEXT.splitlines(keepends=True)
    for number in range(90):
        (folder / f"{number:02}.txt").write_text("".join(lines[5 * number : 5 * number + 1 + number % 9]))
    return folder


def overrides(text: Path, *more: str) -> list[str]:
    """Settings of a small run over ``text``; ``more`` wins."""
    return [
        f"data.source={text}",
        f"data.root={text.parent}",
        "data.seq_len=17",
        "data.batch_size=3",
        "data.order=shuffled",
        "device.device=cpu",
        "device.dtype=fp32",
        "device.threads=1",
        "model.dim=12",
        "model.n_layers=2",
        "train.steps=30",
        "train.max_time=null",
        "train.log_every=1",
        "eval.every=8",
        "eval.every_s=null",
        "eval.n_windows=5",
        "eval.n_windows_end=7",
        "eval.n_samples=1",
        "eval.sample_tokens=5",
        "checkpoint.every=4",
        "checkpoint.every_s=null",
        *more,
    ]


def config(text: Path, *more: str, preset: str = "charrnn") -> Config:
    """The tree of a small run."""
    return load_config(preset, overrides(text, *more), {}).tree
