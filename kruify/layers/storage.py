"""Marks of the dtype in which a weight is stored. In memory weights are float32, on the grid of that dtype."""

from __future__ import annotations

from collections.abc import Container, Mapping

from torch import Tensor, nn

from kruify.layers.matrix import KroneckerMatrix

MARKS = "_kruify_storage"  # of a module: name of its dense parameter -> dtype


def storage_of(module: nn.Module, name: str) -> str:
    """Dtype in which `name` of a module is stored, a dense parameter or a `KroneckerMatrix`: a key of
    `quantization.DTYPES`, "float32" where nothing is marked."""
    matrix = module._modules.get(name)
    if isinstance(matrix, KroneckerMatrix):
        return matrix.storage
    found: dict[str, str] = vars(module).get(MARKS, {})
    return found.get(name, "float32")


def dense_stored_as(module: nn.Module, dtypes: Container[str]) -> list[Tensor]:
    """The dense parameters of a module that are marked with one of these dtypes. Asked in every call of a layer."""
    found: dict[str, str] = vars(module).get(MARKS, {})
    return [p for n, p in module._parameters.items() if p is not None and found.get(n) in dtypes] if found else []


def mark(model: nn.Module, storage: Mapping[str, str]) -> None:
    """Marks the weights of `storage`, full name of a dense parameter or a `KroneckerMatrix` -> dtype, and no others."""
    for module in model.modules():
        vars(module).pop(MARKS, None)
        if isinstance(module, KroneckerMatrix):
            module.storage = "float32"
    for full, dtype in storage.items():
        owner, _, name = full.rpartition(".")
        module = model.get_submodule(owner)
        matrix = module._modules.get(name)
        if isinstance(matrix, KroneckerMatrix):
            matrix.storage = dtype
        else:
            vars(module).setdefault(MARKS, {})[name] = dtype


def marks(model: nn.Module) -> dict[str, str]:
    """What `mark` set, by full names."""
    found: dict[str, str] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, KroneckerMatrix) and module.storage != "float32":
            found[prefix] = module.storage
        dot = f"{prefix}." if prefix else ""
        found |= {dot + name: dtype for name, dtype in vars(module).get(MARKS, {}).items()}
    return found


def within(storage: Mapping[str, str], name: str, layer: nn.Module) -> dict[str, str]:
    """The part of `storage` that belongs to the layer of this name, by the names in it. What a subclass of torch's
    layer has beside, such as a linear layer, the layer itself has not."""
    dot = f"{name}." if name else ""
    known = {*layer.state_dict(), *(n for n, module in layer.named_modules() if isinstance(module, KroneckerMatrix))}
    own = {full.removeprefix(dot): dtype for full, dtype in storage.items() if full.startswith(dot)}
    return {full: dtype for full, dtype in own.items() if full in known}
