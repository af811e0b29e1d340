"""Tensors as views of storages in a file: the checks before them, and the reading of one at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from kruify.checkpoint import limits
from kruify.checkpoint.safe_unpickler import Global
from kruify.checkpoint.tensors import LazyTensor
from kruify.errors import CorruptError, UnsafeError, UnsupportedError

DTYPES: dict[str, torch.dtype] = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "UntypedStorage": torch.uint8,
}
"""torch's storage classes, by the last part of their names, on any device."""

TORCH_DTYPES: dict[str, torch.dtype] = {
    str(dtype): dtype
    for dtype in (
        *DTYPES.values(),
        torch.uint16,
        torch.uint32,
        torch.uint64,
        torch.complex32,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2fnuz,
    )
}
"""Dtypes by the names that pickles give them: "torch.float32"."""

Read = Callable[[int, int], bytearray]
"""Reads (start, count) bytes of a storage."""


@dataclass
class Storage:
    """A run of numbers in a file.

    key: equal for equal storages; dtype: of the class that the file names; nbytes: its length; swap: stored big-endian;
    start: its first byte in the file, once that is known.
    """

    key: str
    dtype: torch.dtype
    nbytes: int
    read: Read
    swap: bool = False
    start: int = -1


def storage_dtype(cls: Any, where: object) -> torch.dtype:
    """Dtype of a storage class that a pickle names.

    Raises:
        UnsupportedError: quantised storages. CorruptError: no storage class.
    """
    name = cls.name if isinstance(cls, Global) else ""
    if name.startswith(("QInt", "QUInt")):
        raise _quantised(where)
    if name not in DTYPES:
        raise CorruptError(f"its pickle names a storage of an unknown kind, {name[:80]}", where)
    return DTYPES[name]


def view(
    storage: Any, offset: Any, shape: Any, stride: Any, where: object, dtype: torch.dtype | None = None
) -> LazyTensor:
    """A tensor as a view of a storage, checked before anything is allocated.

    Args: offset and stride in elements, as torch counts them.

    Raises:
        CorruptError: it reaches beyond its storage, or its numbers are no sizes.
        UnsafeError: it asks for much more than its storage holds.
    """
    if not isinstance(storage, Storage):
        raise CorruptError("a tensor in it has no storage", where)
    if len(shape) != len(stride) or len(shape) > 64 or not all(_is_size(n) for n in (offset, *shape, *stride)):
        raise CorruptError("a tensor in it has sizes that are no sizes", where)
    shape, stride = tuple(shape), tuple(stride)
    dtype = dtype or storage.dtype
    item, numel = dtype.itemsize, prod(shape)
    span = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if numel else 0
    if (offset + span) * item > storage.nbytes:
        raise CorruptError(
            f"a tensor of shape {list(shape)} in it reaches beyond its storage of {storage.nbytes} bytes", where
        )
    if numel * item > storage.nbytes + limits.EXPANDED:
        raise UnsafeError(f"a tensor in it asks for {numel * item} bytes and stores {storage.nbytes}", where)

    def load() -> Tensor:
        if not numel:
            return torch.empty(shape, dtype=dtype)
        data = storage.read(offset * item, span * item)
        if storage.swap:
            unit = item // 2 if dtype.is_complex else item
            data = bytearray(torch.frombuffer(data, dtype=torch.uint8).view(-1, unit).flip(1).contiguous().numpy())
        tensor = torch.frombuffer(data, dtype=dtype).as_strided(shape, stride)
        return tensor if tensor.is_contiguous() else tensor.contiguous()

    return LazyTensor(
        shape,
        dtype,
        load,
        (storage.key, dtype, offset, shape, stride) if numel else None,
        (storage, offset * item, stride),
    )


def _is_size(number: Any) -> bool:
    return type(number) is int and 0 <= number < 1 << 62


def _quantised(where: object) -> UnsupportedError:
    return UnsupportedError("it holds quantised tensors", where, "Give the checkpoint from before quantisation")


def rebuilders(where: object) -> dict[str, Callable[[tuple[Any, ...]], Any]]:
    """torch's functions that rebuild tensors in a pickle, by name: they give LazyTensors or refuse.

    Sources: torch/_utils.py, torch/_tensor.py.
    """

    def tensor_v2(args: tuple[Any, ...]) -> LazyTensor:
        storage, offset, shape, stride, *rest = args
        if len(rest) > 2 and rest[2]:  # the conjugate and negative bits
            raise UnsupportedError("it holds a tensor whose sign or conjugate is a lazy bit", where, "Save it resolved")
        return view(storage, offset, shape, stride, where)

    def tensor_v3(args: tuple[Any, ...]) -> LazyTensor:
        storage, offset, shape, stride, _grad, _hooks, dtype, *_rest = args
        named = str(dtype) if isinstance(dtype, Global) else ""
        found = TORCH_DTYPES.get(named)
        if found is None:
            raise UnsupportedError(f"it holds a tensor of the dtype '{named[:40]}', which kruify cannot hold", where)
        return view(storage, offset, shape, stride, where, found)

    def parameter(args: tuple[Any, ...]) -> Any:
        return args[0]

    def from_type(args: tuple[Any, ...]) -> Any:
        function, _cls, inner, _state = args
        if not isinstance(function, Global) or str(function) not in table:
            raise UnsafeError("opening it would call what does not rebuild a tensor", where)
        return table[str(function)](inner)

    def quantised(args: tuple[Any, ...]) -> Any:
        raise _quantised(where)

    def refuse(reason: str, hint: str) -> Callable[[tuple[Any, ...]], Any]:
        def refuser(args: tuple[Any, ...]) -> Any:
            raise UnsupportedError(reason, where, hint)

        return refuser

    sparse = refuse("it holds sparse tensors", "Save them dense")
    device = refuse("it holds tensors of a device that kruify cannot read", "Save it from the CPU: model.cpu()")
    table: dict[str, Callable[[tuple[Any, ...]], Any]] = {
        "torch._utils._rebuild_tensor": lambda args: view(args[0], args[1], args[2], args[3], where),
        "torch._utils._rebuild_tensor_v2": tensor_v2,
        "torch._utils._rebuild_tensor_v3": tensor_v3,
        "torch._utils._rebuild_parameter": parameter,
        "torch._utils._rebuild_parameter_with_state": parameter,
        "torch.nn.parameter.Parameter": parameter,
        "torch.nn.parameter.Buffer": parameter,
        "torch._tensor._rebuild_from_type_v2": from_type,
        "torch._tensor._rebuild_from_type": from_type,
        "torch._utils._rebuild_qtensor": quantised,
        "torch._utils._rebuild_meta_tensor_no_storage": refuse(
            "it holds meta tensors, which have no numbers", "Save the model with its weights"
        ),
        "torch._utils._rebuild_sparse_tensor": sparse,
        "torch._utils._rebuild_sparse_csr_tensor": sparse,
        "torch._utils._rebuild_nested_tensor": refuse("it holds nested tensors", "Save them padded"),
        "torch._utils._rebuild_wrapper_subclass": refuse("it holds a tensor subclass without storage", "Save it dense"),
        "torch._utils._rebuild_device_tensor_from_numpy": device,
        "torch._utils._rebuild_device_tensor_from_cpu_tensor": device,
        "torch._utils._rebuild_xla_tensor": device,
        "torch.jit._pickle.restore_type_tag": lambda args: args[0],
        "torch.jit._pickle.build_intlist": lambda args: args[0],
        "torch.jit._pickle.build_tensorlist": lambda args: args[0],
        "torch.jit._pickle.build_doublelist": lambda args: args[0],
        "torch.jit._pickle.build_boollist": lambda args: args[0],
        "torch.serialization._get_layout": lambda args: args[0],
        "torch.Size": lambda args: torch.Size(args[0]) if args else torch.Size(),
    }
    return table
