"""Fixtures of the tests of benchmarks."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Benchmarks take many small steps, in which threads of tests that run at the same time would wait for each
    other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
