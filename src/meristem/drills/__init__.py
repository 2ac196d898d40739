"""Fault drills: something is really broken in a tiny run, and what becomes of the run is checked."""
