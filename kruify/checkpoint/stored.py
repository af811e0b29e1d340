"""Weights as a converted file stores them: 16-bit floats, or integers with scales; sparse indices by rows.

`encode` makes that form of the tensors of a model, `decode` the tensors again; both one tensor at a time.
"""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, MutableMapping

import torch
from torch import Tensor

from kruify.checkpoint.file_bytes import fits
from kruify.checkpoint.file_format import AGAIN, SCHEMA, STORAGE
from kruify.checkpoint.integers import HELD, SCALE, integer_blocks, integer_dims, integers, restored
from kruify.checkpoint.narrow import narrow, widened
from kruify.checkpoint.sparse_index import COLUMNS, COUNTS, INDEX, VALUES, compressed, index_of
from kruify.checkpoint.summed_biases import SUM, SUM_BUT_N, SUMS, first_bias, renamed, second_from_sum, sum_of, summed
from kruify.checkpoint.tensors import LazyTensor
from kruify.checkpoint.writing import as_lazy
from kruify.errors import CorruptError, UnsupportedError
from kruify.quantization import DTYPES, INTEGERS, SCALES

_DTYPE = {torch_dtype: dtype for dtype, torch_dtype in DTYPES.items() if dtype != "float32"}

Sizes = Mapping[str, tuple[int, int]]
"""Full names of the Kronecker matrices -> (rows of all gates, columns)."""


def encode(
    tensors: Mapping[str, Tensor | LazyTensor],
    storage: Mapping[str, str],
    matrices: Sizes,
    packed: bool = True,
    scales: MutableMapping[str, Tensor] | None = None,
) -> dict[str, LazyTensor]:
    """The tensors as a file stores them.

    Args:
        tensors: by name.
        storage: weight (a tensor, or a Kronecker matrix with all its entries) -> dtype, a key of `quantization.DTYPES`;
            a b_hh -> one of `SUMS`, where its b_ih has one of 16 bits.
        matrices: the Kronecker matrices among them.
        packed: two integers of four bits share a byte, as in a file; else each has its own.
        scales: tensor -> the scales to take for its integers of four bits; where there are none, those that are found
            are added.

    Raises:
        UnsupportedError: the name of a scale is taken; on loading, a number has no form in the dtype.
    """
    lazy, stored = as_lazy(tensors), dict[str, LazyTensor]()
    sums, scales = summed(storage), {} if scales is None else scales
    for name, tensor in lazy.items():
        matrix = _owner(name, matrices)
        dtype = storage.get(matrix or name, "")
        if dtype in SUMS:
            continue
        if second := sums.get(name):
            stored |= sum_of(name, second, lazy, storage)
        elif matrix and name == matrix + INDEX:
            stored |= compressed(matrix, tensor, lazy[matrix + VALUES], matrices[matrix])
        elif matrix and name == matrix + VALUES and dtype in INTEGERS:
            stored |= integer_blocks(name, tensor, lazy[matrix + INDEX], matrices[matrix][0])
        elif dtype in INTEGERS and (dims := integer_dims(name, tensor, matrix, lazy)):
            stored |= integers(name, tensor, dims, dtype, packed, scales)
        elif dtype in ("float16", "bfloat16") and tensor.dtype.is_floating_point:
            stored[name] = narrow(name, tensor, DTYPES[dtype])
        else:
            stored[name] = tensor
        if name + SCALE in stored and name + SCALE in lazy:
            raise UnsupportedError("its name is that of the scales of another tensor", name + SCALE, "Rename it")
    return stored


def decode(
    stored: Mapping[str, LazyTensor],
    storage: Mapping[str, str],
    matrices: Container[str],
    where: object,
    schema: int = SCHEMA,
) -> dict[str, LazyTensor]:
    """The tensors of a model from those of a file, the weights of `storage` in float32: the inverse of `encode`.

    Raises:
        CorruptError: a tensor has no scale, or is not of the dtype that `storage` says; on loading, scales or counts
            that no weight has.
    """
    found: dict[str, LazyTensor] = {}
    sums = summed(storage)
    for name, tensor in stored.items():
        matrix = _owner(name, matrices)
        dtype = storage.get(matrix or name, "")
        base = name.removesuffix(SCALE)
        of_integers = storage.get(_owner(base, matrices) or base) in INTEGERS
        if of_integers and base != name and base in stored and stored[base].dtype in HELD:
            continue
        spot = f"{where}: {name}"
        if (tensor.dtype == torch.int8 and dtype in INTEGERS) or (tensor.dtype == torch.uint8 and dtype == "int4"):
            scale = stored.get(name + SCALE)
            blocks = stored.get(f"{matrix}{COUNTS}") if matrix and name == matrix + VALUES else None
            found[name] = restored(tensor, scale, blocks, spot, equal=schema < 6)
        elif dtype in SUMS:
            continue
        elif dtype in ("float16", "bfloat16") and tensor.dtype == DTYPES[dtype]:
            found[name] = widened(tensor)
            if second := sums.get(name):
                found[second] = second_from_sum(tensor, stored.get(second), storage[second], f"{where}: {second}")
        elif matrix and name == matrix + COLUMNS and matrix + COUNTS in stored and matrix + VALUES in stored:
            if matrix + INDEX in stored:
                raise CorruptError("its index stands in it twice", spot, AGAIN)
            found[matrix + INDEX] = index_of(tensor, stored[matrix + COUNTS], stored[matrix + VALUES], spot)
        elif matrix and name == matrix + COUNTS and matrix + COLUMNS in stored:
            continue
        elif dtype and not matrix:
            raise CorruptError(f"it is {tensor.dtype} where the file says {dtype}", spot, AGAIN)
        else:
            found[name] = tensor
    weights = {_owner(name, matrices) or name for name in found}
    if missing := sorted(set(storage) - weights):
        raise CorruptError(f"the weight '{missing[0][:80]}' is missing", where, AGAIN)
    return found


def told_storage(stored: Mapping[str, LazyTensor], matrices: Container[str], schema: int = SCHEMA) -> dict[str, str]:
    """What the dtypes of a file's tensors tell of how its weights are stored: those of fewer bits than float32 are
    computed in float32, and what is missing of a b_hh is in the b_ih."""
    found: dict[str, str] = {}
    held = HELD if schema > 4 else HELD[:1]
    for name, tensor in stored.items():
        weight, base, scale = _owner(name, matrices) or name, name.removesuffix(SCALE), stored.get(name + SCALE)
        if base != name and base in stored and stored[base].dtype in held:
            continue
        if tensor.dtype == torch.uint8 and (tensor.dtype not in held or scale is None or scale.dtype != SCALES):
            continue  # bytes of the network's own
        if tensor.dtype in _DTYPE and found.get(weight) != "int4":  # some of its factors have eight bits
            found[weight] = _DTYPE[tensor.dtype]
    for first in [name for name, dtype in found.items() if dtype not in INTEGERS]:
        second = renamed(first, "bias_ih", "bias_hh")
        if second == first:
            continue
        if second not in stored:
            found[second] = SUM
        elif stored[second].shape != stored[first].shape:
            found[second] = SUM_BUT_N
    return found


def read_storage(
    metadata: Mapping[str, str], stored: Mapping[str, LazyTensor], schema: int, where: object
) -> dict[str, str]:
    """The weights that are stored in fewer bits, with their dtypes: those that checked metadata name in `STORAGE`, or
    from schema 4 on `told_storage`.

    Raises:
        UnsupportedError: a dtype that this kruify does not know.
        CorruptError: a sum that no bias is in.
    """
    if STORAGE not in metadata:
        return told_storage(stored, matrix_names(metadata), schema) if schema > 3 else {}
    table: dict[str, str] = json.loads(metadata[STORAGE])
    for name, dtype in table.items():
        if dtype in SUMS and (first_bias(name) == name or table.get(first_bias(name)) not in ("float16", "bfloat16")):
            raise CorruptError(f"it has no sum that {name[:80]} is in", where, AGAIN)
        if dtype not in DTYPES and dtype not in SUMS:
            raise UnsupportedError(f"it stores {name[:80]} as '{dtype[:20]}'", where, "Update kruify")
    return table


def matrix_names(metadata: Mapping[str, str]) -> set[str]:
    """Full names of the Kronecker matrices in checked metadata, as far as their plan makes sense: it is read later."""
    layers = json.loads(metadata.get("kruify.plan", "{}")).get("layers")
    found = set()
    for layer in layers if fits(layers, [{str: object}]) else []:
        name, matrices = layer.get("name"), layer.get("matrices")
        if isinstance(name, str) and isinstance(matrices, dict):
            found |= {f"{name}.{weight}" if name else weight for weight in matrices}
    return found


def _owner(name: str, weights: Container[str]) -> str | None:
    """The weight that a tensor is an entry of: itself, or what its name begins with."""
    while name and name not in weights:
        name = name.rpartition(".")[0]
    return name or None
