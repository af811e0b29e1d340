"""Every byte in and out: read checkpoints of any kind without running anything in them, write them all or nothing."""

from kruify.checkpoint.checkpoint import Checkpoint
from kruify.checkpoint.file_format import SCHEMA, metadata_for
from kruify.checkpoint.reading import read
from kruify.checkpoint.tensors import LazyTensor, Tensors
from kruify.checkpoint.writing import atomic_file, write_safetensors, write_torch

__all__ = [
    "SCHEMA",
    "Checkpoint",
    "LazyTensor",
    "Tensors",
    "atomic_file",
    "metadata_for",
    "read",
    "write_safetensors",
    "write_torch",
]
