"""Every test starts from the same random state and leaves torch's defaults as they were."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the networks are tiny, and several test processes share the cores
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)


@pytest.fixture
def double() -> None:
    """float64 everywhere."""
    torch.set_default_dtype(torch.float64)
