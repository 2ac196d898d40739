"""Saved models, grown or not, for whoever opens them: a grown one is built by changes that the room of growth knows."""

import meristem.growth.topology  # noqa: F401 - registers them
from meristem.models.load import Loaded as Loaded
from meristem.models.load import load as load
from meristem.models.load import load_opened as load_opened
