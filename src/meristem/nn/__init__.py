"""Layers: modules whose forward takes a state and gives it back."""
