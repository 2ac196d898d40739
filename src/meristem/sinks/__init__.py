"""Where records go: files of JSON lines, the console, measurements of the machine."""
