"""What every test of the library shares: double precision and one thread."""

import pytest
import torch


@pytest.fixture(autouse=True)
def double_precision():
    """Checks are in float64; a test of single precision sets it itself, and it ends with the test."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(torch.float32)
