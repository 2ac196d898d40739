"""What a shell offers when a word is half typed. Nothing heavy is imported: completion must be fast."""

from collections.abc import Iterable
from pathlib import Path


def presets(incomplete: str) -> list[str]:
    """Presets, those in sizes among them, and YAML files."""
    from meristem.config import preset_names, size_names, sized

    names = [*preset_names(), *(f"{name}-{size}" for name in sized() for size in size_names())]
    return [*_starting(names, incomplete), *files(incomplete)]


def settings(incomplete: str) -> list[str]:
    """Keys up to their ``=``, and YAML files."""
    from meristem.config.mistakes import known_paths
    from meristem.runs.config import Config

    keys = [f"{key}=" for key, inside in known_paths(Config).items() if not inside]
    return [*_starting(keys, incomplete), *files(incomplete)]


def presets_and_settings(incomplete: str) -> list[str]:
    """Either."""
    return list(dict.fromkeys((*presets(incomplete), *settings(incomplete))))


def keys(incomplete: str) -> list[str]:
    """Keys and sections, as `config explain` takes them."""
    from meristem.config.mistakes import known_paths
    from meristem.runs.config import Config

    return _starting(known_paths(Config), incomplete)


def run_directories(incomplete: str) -> list[str]:
    """Runs in the directory that is typed so far; where none is, those here and below ``runs``."""
    folder, _, _ = incomplete.rpartition("/")
    places = [Path(folder or "/")] if "/" in incomplete else [Path(), Path("runs")]
    found = [_typed(manifest.parent, incomplete) for place in places for manifest in place.glob("*/run.json")]
    return _starting(sorted(found), incomplete)


def files(incomplete: str) -> list[str]:
    """YAML files whose path begins so."""
    folder, _, _ = incomplete.rpartition("/")
    place = Path(folder or "/") if "/" in incomplete else Path()
    return _starting(sorted(_typed(path, incomplete) for path in place.glob("*.y*ml")), incomplete)


def _starting(words: Iterable[str], incomplete: str) -> list[str]:
    return [word for word in words if word.startswith(incomplete)]


def _typed(path: Path, incomplete: str) -> str:
    """A path as it was begun: ``./`` is kept."""
    return f"./{path}" if incomplete.startswith("./") else str(path)
