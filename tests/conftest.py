"""One thread for all tests: small problems are fastest so, and bits depend on it. No settings of accelerate between them."""

import sys

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_accelerator_at_a_time():
    """accelerate shares its settings within a process, and refuses others."""
    _forget_accelerator()
    yield
    _forget_accelerator()


def _forget_accelerator():
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
