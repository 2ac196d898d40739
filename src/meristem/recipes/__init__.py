"""Whole jobs, each reading top to bottom."""
