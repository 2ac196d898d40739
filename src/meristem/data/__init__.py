"""From a text to batches: sources, tokenizers, prepared corpora, windows and the stream of batches."""
