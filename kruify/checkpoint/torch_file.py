"""Read .pt and .pth: torch.load with weights_only=True, after the checks that it leaves out."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kruify.checkpoint import limits
from kruify.checkpoint.tensors import LazyTensor
from kruify.errors import CorruptError, UnsafeError, UnsupportedError

_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")


def read_torch(path: Path) -> Any:
    """The saved object with every tensor as a LazyTensor.

    Raises:
        UnsafeError: opening it would run something; the sentence names it.
        CorruptError: it is damaged.
        UnsupportedError: quantised or meta tensors.
    """
    if zipfile.is_zipfile(path):
        _check_entries(path)
    try:
        root = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if found := sorted(set(_GLOBAL.findall(str(error)))):
            raise UnsafeError(
                f"opening it would load {', '.join(found)[:300]}", path, "Save model.state_dict() instead of the model"
            ) from error
        raise CorruptError("its pickle is damaged", path, "Copy or download it again") from error
    except Exception as error:  # torch raises nine types here for a damaged file
        raise CorruptError(f"it is damaged ({type(error).__name__})", path, "Copy or download it again") from error
    return _lazy(root, path, 0)


def _check_entries(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if len(names) != len(set(names)):
                raise CorruptError("its archive has an entry twice", path)
            bad = archive.testzip()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError, RuntimeError) as error:
        raise CorruptError(f"its archive is damaged ({error})", path, "Copy or download it again") from error
    if bad:
        raise CorruptError(f"its entry {bad} does not match its checksum", path, "Copy or download it again")


def _lazy(node: Any, path: Path, depth: int) -> Any:
    if depth > limits.DEPTH:
        raise UnsafeError("it is nested too deeply", path)
    if isinstance(node, Tensor):
        _check_tensor(node, path)
        return LazyTensor.of(node)
    if isinstance(node, Mapping):
        return {name: _lazy(value, path, depth + 1) for name, value in node.items()}
    if isinstance(node, list | tuple):
        return [_lazy(value, path, depth + 1) for value in node]
    return node


def _check_tensor(tensor: Tensor, path: Path) -> None:
    if tensor.is_meta:
        raise UnsupportedError("it holds meta tensors, which have no numbers", path, "Save the model with its weights")
    if tensor.is_quantized:
        raise UnsupportedError("it holds quantised tensors", path, "Give the checkpoint from before quantisation")
    if tensor.layout != torch.strided:
        raise UnsupportedError(f"it holds tensors of layout {tensor.layout}", path, "Save them dense")
    size = tensor.numel() * tensor.itemsize
    if size > tensor.untyped_storage().nbytes() + limits.EXPANDED:
        raise UnsafeError(f"a tensor in it asks for {size} bytes and stores {tensor.untyped_storage().nbytes()}", path)
