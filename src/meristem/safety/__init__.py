"""Secrets in text and archives; rules on what a model is asked and what it says."""
