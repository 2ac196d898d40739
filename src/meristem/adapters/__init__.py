"""Models of Hugging Face as hosts, and what is trained beside weights that stay: low-rank adapters and memories."""
