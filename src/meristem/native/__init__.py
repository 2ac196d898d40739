"""The native core: memories and decoding on a CPU, compiled from ``native/`` and bound by ctypes."""
