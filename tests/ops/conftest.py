from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kruify.ops import has_kernel

sys.path.insert(0, str(Path(__file__).parent))  # ops_cases and ops_fuzz, shared by the tests here


@pytest.fixture(autouse=True)
def one_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_buffers() -> Iterator[None]:
    """Every buffer that torch hands out uninitialised is full of NaN, so that reading one before writing it shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def compiled() -> None:
    if not has_kernel("cpu"):
        pytest.skip("the kernels are not compiled here")
