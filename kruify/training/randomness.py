"""Randomness that depends on where a run is, not on how it got there.

Every random event is seeded by (seed, phase, epoch, batch). A resumed run therefore draws what an uninterrupted one
draws, whatever validation or a progress bar drew in between, and the batches of two processes see the same dropout as
in one process.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derived_seed(*key: int | str) -> int:
    """A 63-bit number that follows from `key` alone."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1


def seed_all(*key: int | str) -> None:
    """Seed torch (all devices), numpy and random."""
    number = derived_seed(*key)
    torch.manual_seed(number)
    np.random.seed(number % 2**32)
    random.seed(number)


@contextmanager
def isolated_generators() -> Iterator[None]:
    """Put the generators of torch, numpy and random back as they were afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
