"""A second text after a first: what is learned of it by new parts beside a frozen host, and what is forgotten."""
