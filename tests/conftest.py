"""One thread per worker: the workers share the cores, and threads that wait for each other take ten times as long."""

import torch

torch.set_num_threads(1)
