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

PICKLE = 64 * MIB
"""Bytes of a pickle, without the tensors' storages."""

OPCODES = 10_000_000
"""Instructions of a pickle."""

NODES = 5_000_000
"""Values in a pickled object, counted once for each place that they are in."""

VISITS = 1_000_000
"""Modules and their attributes in a pickled model, counted once for each place that they are in."""

JSON = 64 * MIB
"""Bytes of a JSON file."""

DEPTH = 100
"""Nesting of JSON and of pickled objects."""

DIMENSIONS = 64
"""Of a tensor."""

SHARDS = 10_000
"""Files of a sharded checkpoint."""

EXPANDED = MIB
"""Bytes that a tensor may take beyond its storage: an expanded buffer of a few numbers is ordinary, 16 TB an attack."""

DENSE = 256 * MIB
"""Bytes that the dense matrices which a converted file's factors stand for may take beyond RATIO times the file."""

RATIO = 100
SLACK = 64 * MIB
"""All tensors of a file together, and each entry unpacked, may take RATIO times the file's bytes plus SLACK."""
