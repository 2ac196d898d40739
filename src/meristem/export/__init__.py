"""Exports: a trained model in the form that other programs load."""
