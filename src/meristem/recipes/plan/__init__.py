"""The dry run: what a configuration costs, and whether it can work, before anything is allocated."""
