"""Fixtures of the benchmarks; see bench/common.py."""

import functools
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from common import Bench, copy_bandwidth, skip_reason  # noqa: E402


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(scope="session")
def bandwidth():
    """The copy bandwidth of a device, measured once in this run."""
    return functools.lru_cache(maxsize=None)(copy_bandwidth)


@pytest.fixture
def bench(benchmark, bandwidth, device, direction, dtype, which):
    reason = skip_reason(device, direction, dtype, which)
    if reason:
        pytest.skip(reason)
    torch.manual_seed(0)
    return Bench(benchmark, bandwidth, device, direction, getattr(torch, dtype))
