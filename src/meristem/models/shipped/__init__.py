"""The model in the box: a small trained one, for whoever names no checkpoint. ``card.md`` says what it is.

``scripts/train_shipped.py`` trains it and writes the checkpoint that lies here.
"""

from pathlib import Path
from typing import Final

DIRECTORY: Final = Path(__file__).parent
"""Holds one checkpoint, as a run directory does."""
