"""meristem: train, grow and serve language models that keep learning."""

__version__ = "0.1.0"
