"""Files on other machines: any address with a protocol that fsspec knows, such as s3://bucket/folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kruify.checkpoint.writing import atomic_file
from kruify.errors import UnsafeError, UsageError, first_line


def is_remote(path: object) -> bool:
    """Whether it is an address, and not a path on this machine."""
    return "://" in str(path)


def fetch_file(address: str, target: Path, limit: int) -> bool:
    """Copies a file of at most `limit` bytes to this machine; False where there is none.

    Raises:
        UsageError: the protocol is unknown, its package is missing, the server refuses; `target` cannot be written.
        UnsafeError: it is larger.
    """
    with _system(address) as (system, path):
        if not system.exists(path):
            return False
        with system.open(path, "rb") as file:
            data = file.read(limit + 1)
    if len(data) > limit:
        raise UnsafeError(f"it takes more than {limit:,} bytes", address)
    with atomic_file(target) as written:
        written.write(data)
    return True


def send_file(source: Path, address: str) -> None:
    """Copies a file from this machine; folders are made where the protocol has them.

    Raises:
        UsageError: as for `fetch_file`. OSError: `source` cannot be read.
    """
    with source.open("rb") as file, _system(address) as (system, path):
        system.makedirs(path.rpartition("/")[0], exist_ok=True)
        with system.open(path, "wb") as target:
            shutil.copyfileobj(file, target)


def exists(address: str) -> bool:
    """Whether there is a file.

    Raises:
        UsageError: the protocol is unknown, its package is missing, the server refuses.
    """
    with _system(address) as (system, path):
        return bool(system.exists(path))


@contextmanager
def _system(address: str) -> Iterator[tuple[Any, str]]:
    """The file system, and the path in it."""
    from fsspec.core import url_to_fs  # torch needs fsspec, so it is there

    try:
        yield url_to_fs(address)
    except Exception as error:  # those of every protocol, of the network, of packages that are missing
        raise UsageError(f"it cannot be reached ({first_line(error)})", address, "Check the address") from error
