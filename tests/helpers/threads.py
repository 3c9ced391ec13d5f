"""How many threads torch has in a test."""

import pytest
import torch


@pytest.fixture(scope="module")
def one_thread():
    """For small models: more threads than free cores wait for each other, and for longer than their matrices take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
