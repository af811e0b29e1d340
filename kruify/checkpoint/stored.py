"""Weights as a converted file stores them: 16-bit floats, or eight-bit integers with scales; sparse indices by rows.

`encode` makes that form of the tensors of a model, `decode` the tensors again; both one tensor at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kruify.checkpoint.file_bytes import fits
from kruify.checkpoint.file_format import STORAGE
from kruify.checkpoint.tensors import LazyTensor, derived
from kruify.checkpoint.writing import as_lazy
from kruify.errors import CorruptError, UnsupportedError
from kruify.quantization import DTYPES, SCALES, dequantize, pays, quantize_groups, quantize_rows, row_dims

SCALE = ".scale"
"""What follows the name of an int8 tensor in that of its scales. No parameter of a torch module has a name that begins
with another parameter's and a dot."""
INDEX, COUNTS, COLUMNS, VALUES = (f".overlay.{part}" for part in ("index", "counts", "columns", "values"))
AGAIN = "Convert the source again"
_MOST_SCALE = torch.finfo(torch.float32).max / 128
_NARROW = {torch_dtype: dtype for dtype, torch_dtype in DTYPES.items() if dtype != "float32"}
SUM, SUM_BUT_N = "sum", "sum+n"
SUMS = (SUM, SUM_BUT_N)
"""What `storage` says of a b_hh that stands in b_ih: the file holds b_ih + b_hh in place of b_ih, and nothing more; of
a GRU, whose b_hn is inside of r * (...), that of r and z, b_in, and b_hn alone in place of b_hh. A model gets zeros for
what is in the sum."""

Sizes = Mapping[str, tuple[int, int]]
"""Full names of the Kronecker matrices -> (rows of all gates, columns)."""


def encode(
    tensors: Mapping[str, Tensor | LazyTensor], storage: Mapping[str, str], matrices: Sizes
) -> dict[str, LazyTensor]:
    """The tensors as a file stores them.

    Args:
        tensors: by name.
        storage: weight (a tensor, or a Kronecker matrix with all its entries) -> dtype, a key of `quantization.DTYPES`;
            a b_hh -> one of `SUMS`, where its b_ih has one of 16 bits.
        matrices: the Kronecker matrices among them.

    Raises:
        UnsupportedError: the name of a scale is taken; on loading, a number has no form in the dtype.
    """
    lazy, stored = as_lazy(tensors), dict[str, LazyTensor]()
    summed = _summed(storage)
    for name, tensor in lazy.items():
        matrix = _owner(name, matrices)
        dtype = storage.get(matrix or name, "")
        if dtype in SUMS:
            continue
        if second := summed.get(name):
            stored |= _sum(name, second, lazy, storage)
        elif matrix and name == matrix + INDEX:
            stored |= _compressed(matrix, tensor, lazy[matrix + VALUES], matrices[matrix])
        elif matrix and name == matrix + VALUES and dtype == "int8":
            stored |= _eight_bit_blocks(name, tensor, lazy[matrix + INDEX], matrices[matrix][0])
        elif dtype == "int8" and (dims := eight_bit_dims(name, tensor, matrix, lazy)):
            stored |= _eight_bit(name, tensor, dims)
        elif dtype in ("float16", "bfloat16") and tensor.dtype.is_floating_point:
            stored[name] = _narrow(name, tensor, DTYPES[dtype])
        else:
            stored[name] = tensor
        if name + SCALE in stored and name + SCALE in lazy:
            raise UnsupportedError("its name is that of the scales of another tensor", name + SCALE, "Rename it")
    return stored


def eight_bit_dims(
    name: str, tensor: LazyTensor, matrix: str | None, others: Mapping[str, LazyTensor]
) -> tuple[int, ...]:
    """The dimensions that a row of a tensor runs over if it is stored as int8, () where int8 is not for it: vectors,
    complex and whole numbers, rows of one entry. `matrix` is the Kronecker matrix that it is an entry of, among the
    `others` are the factors beside it."""
    if not tensor.dtype.is_floating_point or len(tensor.shape) < 2 or (matrix and len(tensor.shape) != 4):
        return ()  # of a Kronecker matrix, diagonal and scales have one vector a gate
    dims = row_dims(tensor.shape, matrix is not None, matrix is not None and _shares(name, tensor, others))
    return dims if pays(tensor.shape, dims) else ()


def _shares(name: str, factor: LazyTensor, others: Mapping[str, LazyTensor]) -> bool:
    """Whether the gates of a factor share another one of their term."""
    term = name.rpartition(".")[0]
    beside = (others.get(f"{term}.{f}") for f in range(2))
    return any(other is not None and other.shape[0] < factor.shape[0] for other in beside)


def first_bias(second: str) -> str:
    """The full name of the b_ih beside a b_hh; another name as it is."""
    return _renamed(second, "bias_hh", "bias_ih")


def _renamed(full: str, before: str, after: str) -> str:
    owner, dot, name = full.rpartition(".")
    return owner + dot + after + name.removeprefix(before) if name.startswith(before) else full


def in_full(storage: Mapping[str, str]) -> dict[str, str]:
    """The same for a form that has both biases: a b_hh as its b_ih."""
    return {name: storage[first_bias(name)] if dtype in SUMS else dtype for name, dtype in storage.items()}


def _summed(storage: Mapping[str, str]) -> dict[str, str]:
    """Full name of every b_ih that is a sum -> that of the b_hh in it."""
    return {first_bias(name): name for name, dtype in storage.items() if dtype in SUMS}


def _inside(how: str, size: int) -> int:
    """How many entries of a b_hh of this size are in the sum."""
    return size if how == SUM else size * 2 // 3


def _sum(
    first: str, second: str, tensors: Mapping[str, LazyTensor], storage: Mapping[str, str]
) -> dict[str, LazyTensor]:
    b_ih, b_hh, dtype = tensors[first], tensors[second], DTYPES[storage[first]]
    inside = _inside(storage[second], size := b_hh.numel)

    def total() -> Tensor:
        found = b_ih.load().detach().clone()
        found[:inside] += b_hh.load().detach()[:inside]
        return found

    both = derived("sum", inside, b_ih.identity, b_hh.identity)
    narrow = _narrow(first, LazyTensor(b_ih.shape, b_ih.dtype, total, both), dtype)
    stored = {first: replace(narrow, load=lambda: narrow.load() + 0)}  # a sum with zeros, read again, has no -0 either
    if inside < size:
        identity = derived("rest", inside, b_hh.identity)
        rest = LazyTensor((size - inside,), b_hh.dtype, lambda: b_hh.load()[inside:], identity)
        stored[second] = _narrow(second, rest, dtype)
    return stored


def _narrow(name: str, tensor: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    def load() -> Tensor:
        found = tensor.load().detach()
        narrow = found.to(dtype)
        if bool((found.isfinite() & ~narrow.isfinite()).any()):
            raise UnsupportedError(f"it has numbers beyond {dtype}", name, "Take --dtype bfloat16, or --keep it")
        return narrow

    return LazyTensor(tensor.shape, dtype, load, derived(dtype, tensor.identity))


def _eight_bit(name: str, tensor: LazyTensor, dims: tuple[int, ...]) -> dict[str, LazyTensor]:
    def part(which: int) -> Callable[[], Tensor]:
        return lambda: _named(name, lambda: quantize_rows(tensor.load(), dims))[which]

    scales = tuple(1 if d in dims else n for d, n in enumerate(tensor.shape))
    return {
        name: LazyTensor(tensor.shape, torch.int8, part(0), derived("int8", dims, tensor.identity)),
        name + SCALE: LazyTensor(scales, SCALES, part(1), derived("scale", dims, tensor.identity)),
    }


def _eight_bit_blocks(name: str, values: LazyTensor, index: LazyTensor, rows: int) -> dict[str, LazyTensor]:
    """A sparse residual's values (blocks, height) with one scale for all blocks that begin in one row."""
    height = values.shape[1]

    def part(which: int) -> Callable[[], Tensor]:
        def quantized() -> tuple[Tensor, Tensor]:
            return quantize_groups(values.load(), index.load()[:, 0].long() // height, rows // height)

        return lambda: _named(name, quantized)[which]

    both = values.identity, index.identity
    return {
        name: LazyTensor(values.shape, torch.int8, part(0), derived("int8", *both)),
        name + SCALE: LazyTensor((rows // height, 1), SCALES, part(1), derived("scale", *both)),
    }


def _named(name: str, work: Callable[[], Any]) -> Any:
    try:
        return work()
    except UnsupportedError as error:
        raise UnsupportedError(error.what, name, "Use a checkpoint from before training diverged") from None


def _compressed(matrix: str, index: LazyTensor, values: LazyTensor, size: tuple[int, int]) -> dict[str, LazyTensor]:
    """Row and column of every block -> how many blocks begin in each row that is a multiple of their height, and the
    columns."""
    (blocks, height), (rows, cols) = values.shape, size
    dtype = torch.uint16 if cols < 1 << 16 else torch.int32

    def counts() -> Tensor:
        first = index.load()[:, 0].long()
        if bool((first.diff() < 0).any()):
            raise UnsupportedError(
                "the blocks are not in ascending order of rows", matrix + INDEX, "Sort index and values"
            )
        return torch.bincount(first // height, minlength=rows // height).to(dtype)

    return {
        matrix + COUNTS: LazyTensor((rows // height,), dtype, counts, derived("counts", height, index.identity)),
        matrix + COLUMNS: LazyTensor(
            (blocks,), dtype, lambda: index.load()[:, 1].to(dtype), derived("columns", index.identity)
        ),
    }


def decode(
    stored: Mapping[str, LazyTensor], storage: Mapping[str, str], matrices: Container[str], where: object
) -> dict[str, LazyTensor]:
    """The tensors of a model from those of a file, the weights of `storage` in float32: the inverse of `encode`.

    Raises:
        CorruptError: a tensor has no scale, or is not of the dtype that `storage` says; on loading, scales or counts
            that no weight has.
    """
    found: dict[str, LazyTensor] = {}
    summed = _summed(storage)
    for name, tensor in stored.items():
        matrix = _owner(name, matrices)
        dtype = storage.get(matrix or name, "")
        base = name.removesuffix(SCALE)
        of_int8 = storage.get(_owner(base, matrices) or base) == "int8"
        if of_int8 and base != name and base in stored and stored[base].dtype == torch.int8:
            continue
        spot = f"{where}: {name}"
        if dtype == "int8" and tensor.dtype == torch.int8:
            scale = stored.get(name + SCALE)
            blocks = stored.get(f"{matrix}{COUNTS}") if matrix and name == matrix + VALUES else None
            found[name] = _restored(tensor, scale, blocks, spot)
        elif dtype in SUMS:
            continue
        elif dtype in ("float16", "bfloat16") and tensor.dtype == DTYPES[dtype]:
            found[name] = _widened(tensor)
            if second := summed.get(name):
                found[second] = _second_bias(tensor, stored.get(second), storage[second], f"{where}: {second}")
        elif matrix and name == matrix + COLUMNS and matrix + COUNTS in stored and matrix + VALUES in stored:
            if matrix + INDEX in stored:
                raise CorruptError("its index stands in it twice", spot, AGAIN)
            found[matrix + INDEX] = _index(tensor, stored[matrix + COUNTS], stored[matrix + VALUES], spot)
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


def _second_bias(first: LazyTensor, rest: LazyTensor | None, how: str, where: str) -> LazyTensor:
    """b_hh from the sum that it is in, and what of it stands beside: nothing, or b_hn."""
    inside = _inside(how, size := first.numel)
    beside = None if rest is None else (rest.shape, rest.dtype)
    if len(first.shape) != 1 or beside != (None if how == SUM else ((size - inside,), first.dtype)):
        raise CorruptError("it does not fit the bias that it is added to", where, AGAIN)

    def load() -> Tensor:
        found = torch.zeros_like(first.load(), dtype=torch.float32)
        if rest:
            found[inside:] = rest.load()
        return found

    identity = derived("second", how, first.identity, *([rest.identity] if rest else []))
    return LazyTensor(first.shape, torch.float32, load, identity)


def _widened(tensor: LazyTensor) -> LazyTensor:
    return LazyTensor(tensor.shape, torch.float32, lambda: tensor.load().float(), derived("float32", tensor.identity))


def _restored(values: LazyTensor, scale: LazyTensor | None, counts: LazyTensor | None, where: str) -> LazyTensor:
    if scale is None or scale.dtype not in (SCALES, torch.float32):  # float32 in schema 2
        raise CorruptError("it is int8 and has no scales", where, AGAIN)
    groups = scale.shape if counts is None else (*counts.shape, 1)
    alike = len(groups) == len(values.shape) and all(
        a in (1, b) for a, b in zip(groups[counts is not None :], values.shape[counts is not None :], strict=True)
    )
    if scale.shape != groups or not alike:
        raise CorruptError(f"its scales are of shape {list(scale.shape)}, which does not fit it", where, AGAIN)

    def load() -> Tensor:
        numbers, factor = values.load(), scale.load()
        if not bool(((factor > 0) & (factor < _MOST_SCALE)).all()):
            raise CorruptError("it has scales that are not positive and finite", where, AGAIN)
        if bool((numbers == -128).any()):
            raise CorruptError("it has integers outside of -127 to 127", where, AGAIN)
        if counts is not None:
            factor = factor.repeat_interleave(_checked(counts, values.shape[0], where), dim=0)
        return dequantize(numbers, factor)

    parts = [part.identity for part in (values, scale, counts) if part is not None]
    return LazyTensor(values.shape, torch.float32, load, derived("float32", *parts))


def _index(columns: LazyTensor, counts: LazyTensor, values: LazyTensor, where: str) -> LazyTensor:
    if len(counts.shape) != 1 or len(values.shape) != 2 or columns.shape != values.shape[:1]:
        raise CorruptError("the parts of its index do not fit each other", where, AGAIN)
    if {columns.dtype, counts.dtype} not in ({torch.uint16}, {torch.int32}):
        raise CorruptError("its index is of neither uint16 nor int32", where, AGAIN)
    blocks, height = values.shape

    def load() -> Tensor:
        numbers = _checked(counts, blocks, where)
        rows = torch.arange(len(numbers), dtype=torch.int32, device=numbers.device) * height
        rows = rows.repeat_interleave(numbers)
        return torch.stack([rows, columns.load().to(torch.int32)], dim=1)

    return LazyTensor((blocks, 2), torch.int32, load, derived("index", height, columns.identity, counts.identity))


def _checked(counts: LazyTensor, blocks: int, where: str) -> Tensor:
    """How many blocks begin in each row.

    Raises:
        CorruptError: they are not `blocks` in all.
    """
    found = counts.load().long()
    if bool((found < 0).any()) or int(found.sum()) != blocks:
        raise CorruptError(f"its counts do not add up to its {blocks} blocks", where, AGAIN)
    return found


def told_storage(stored: Mapping[str, LazyTensor], matrices: Container[str]) -> dict[str, str]:
    """What the dtypes of a file's tensors tell of how its weights are stored: those of fewer bits than float32 are
    computed in float32, and what is missing of a b_hh is in the b_ih."""
    found = {}
    for name, tensor in stored.items():
        base = name.removesuffix(SCALE)
        is_scale = base != name and base in stored and stored[base].dtype == torch.int8
        if tensor.dtype in _NARROW and not is_scale:
            found[_owner(name, matrices) or name] = _NARROW[tensor.dtype]
    for first in [name for name, dtype in found.items() if dtype != "int8"]:
        second = _renamed(first, "bias_ih", "bias_hh")
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
        return told_storage(stored, matrix_names(metadata)) if schema > 3 else {}
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
