"""Every byte in and out: read checkpoints of any kind without running anything in them, write them all or nothing."""

from kruify.checkpoint.checkpoint import Checkpoint
from kruify.checkpoint.file_format import NETWORK, ORIGIN, SCHEMA, metadata_for
from kruify.checkpoint.modules import ModuleHint
from kruify.checkpoint.original import NEEDS_SOURCE, carried, origin, write_original
from kruify.checkpoint.reading import read
from kruify.checkpoint.target import check_model_target, check_target, make_folder, write_model
from kruify.checkpoint.tensors import LazyTensor, Tensors
from kruify.checkpoint.writing import atomic_file, tensor_bytes, write_safetensors, write_torch

__all__ = [
    "NEEDS_SOURCE",
    "NETWORK",
    "ORIGIN",
    "SCHEMA",
    "Checkpoint",
    "LazyTensor",
    "ModuleHint",
    "Tensors",
    "atomic_file",
    "carried",
    "check_model_target",
    "check_target",
    "make_folder",
    "metadata_for",
    "origin",
    "read",
    "tensor_bytes",
    "write_model",
    "write_original",
    "write_safetensors",
    "write_torch",
]
