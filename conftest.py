"""Fixtures of tests and benchmarks."""

import pytest


@pytest.fixture
def one_thread():
    """For networks that are too small for two."""
    import torch  # after the settings of tests/conftest.py

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
