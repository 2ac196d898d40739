"""Models: tokens and state in, logits and state out."""
