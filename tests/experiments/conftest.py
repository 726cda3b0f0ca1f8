"""What the tests of the experiments share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    """As in the workers; more only get in each other's way with models this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
