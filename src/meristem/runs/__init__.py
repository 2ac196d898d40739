"""A run: its directory, its configuration, how it resumes, recovers, is logged and described."""
