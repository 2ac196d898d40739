"""One thread per test process, and none that spins: the workers would wait for each other at every barrier."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
