"""What a file may ask for. A file beyond these is refused before any arithmetic or allocation that it asks for."""

from __future__ import annotations

MIB = 1 << 20

HEADER = 100 * MIB
"""Bytes of a safetensors header, the limit of the safetensors library."""

METADATA = 64 * MIB
"""Bytes of all metadata strings."""

ENTRIES = 200_000
"""Entries of a zip archive, tensors of a file."""

DIRECTORY = 64 * MIB
"""Bytes of a zip archive's central directory."""

NAME = 4096
"""Characters of a name."""

PICKLE = 256 * MIB
"""Bytes of a pickle, without the tensors' storages."""

DEPTH = 100
"""Nesting of JSON and of pickled objects."""

EXPANDED = MIB
"""Bytes that a tensor may take beyond its storage: an expanded buffer of a few numbers is ordinary, 16 TB an attack."""
