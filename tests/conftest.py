"""Fixtures that several rooms share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))  # all_pairs, which several rooms import


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
