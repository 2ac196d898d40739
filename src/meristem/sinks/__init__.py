"""Where records go: files of JSON lines, the console, readings of the machine."""
