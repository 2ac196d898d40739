"""Registers the changes of structure that make a model of other weights; imported by whoever opens saved models."""

from meristem.models.topology import changes

changes.register("host", "meristem.adapters.host:host")
changes.register("lora", "meristem.adapters.lora:lora")
changes.register("memories", "meristem.adapters.memory:memories")
