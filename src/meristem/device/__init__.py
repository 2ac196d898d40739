"""What runs the arithmetic: device, dtype, random streams, determinism, description."""
