"""Saved models for whoever opens them, with the rooms that know the changes by which they are built."""

import meristem.adapters.changes
import meristem.growth.topology  # noqa: F401 - registers them
from meristem.models.load import Loaded as Loaded
from meristem.models.load import load as load
from meristem.models.load import load_opened as load_opened
