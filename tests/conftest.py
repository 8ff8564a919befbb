"""One thread for all tests: small problems are fastest so, and bits depend on it."""

import torch

torch.set_num_threads(1)
