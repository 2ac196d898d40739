"""Checkpoints: named trees of tensors with a JSON header, and the manifest of the run they belong to."""
