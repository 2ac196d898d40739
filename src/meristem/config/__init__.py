"""Configuration: the base of every section, the layers of a tree, and its text."""

from meristem.config.layers import Loaded, is_preset, load, preset_names, schema, size_names, sized, sources
from meristem.config.section import ConfigSection
from meristem.config.text import canonical, dump_yaml, fingerprint, identity, identity_of_choices, leaves, read_yaml

__all__ = [
    "Loaded",
    "ConfigSection",
    "canonical",
    "dump_yaml",
    "fingerprint",
    "identity",
    "identity_of_choices",
    "is_preset",
    "leaves",
    "load",
    "preset_names",
    "read_yaml",
    "schema",
    "size_names",
    "sized",
    "sources",
]
