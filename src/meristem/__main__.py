"""``python -m meristem``, as ``torchrun -m meristem`` calls it."""

from meristem.cli import main

main()
