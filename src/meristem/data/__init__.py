"""From a text to batches: sources, tokenizers, prepared corpora, sequences and the stream of batches."""
