"""From the description of a layer to the layer, dense or of Kronecker sums, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kruify.conversion.locate import BESIDE, DTYPES, EMBEDDING, KRU_KINDS, LINEAR, MODULES, RecurrentLayer, beside
from kruify.conversion.plan import LayerPlan, Plan, Structures, plan_from
from kruify.errors import PlanError
from kruify.layers import (
    KRU,
    KRUGRU,
    KRULSTM,
    KRURNN,
    KroneckerEmbedding,
    KroneckerLinear,
    KroneckerMatrix,
    KRUGRUCell,
    KRULSTMCell,
    KRURNNCell,
)
from kruify.layers.base import KRUBase
from kruify.layers.cells import KRUCellBase

KRU_CLASSES: dict[tuple[str, bool], type[KRUBase] | type[KRUCellBase]] = {
    ("rnn", False): KRURNN,
    ("lstm", False): KRULSTM,
    ("gru", False): KRUGRU,
    ("rnn", True): KRURNNCell,
    ("lstm", True): KRULSTMCell,
    ("gru", True): KRUGRUCell,
}
Factored = KRUBase | KRUCellBase | KRU | KroneckerLinear | KroneckerEmbedding


def build_layer(
    item: LayerPlan, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Factored:
    """The KRU layer of one entry of a plan, its numbers still random."""
    layer = item.layer
    if layer.kind in KRU_KINDS:
        specs = {str(structure) for structures in item.matrices.values() for structure in structures}
        if len(specs) != 1:
            raise PlanError(f"all layers of a KRU have the same factors, got {len(specs)} specs", layer.name)
        return build_kru(layer, specs.pop(), device, dtype)
    if layer.kind in BESIDE:
        dtype, structures = dtype or DTYPES[layer.dtype], item.matrices["weight"]
        if layer.kind == EMBEDDING:
            return KroneckerEmbedding(structures, device=device, dtype=dtype)
        return KroneckerLinear(structures, layer.bias, device, dtype)
    kru = KRU_CLASSES[layer.kind, layer.cell]
    return kru(layer.input_size, layer.hidden_size, factors=item.matrices, **_options(layer, device, dtype))


def build_kru(
    layer: RecurrentLayer, spec: str, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> KRU:
    """The `KRU` of a description, its numbers still random."""
    return KRU(
        layer.input_size,
        layer.hidden_size,
        layer.num_layers,
        layer.bias,
        bool(layer.batch_first),
        layer.dropout or 0.0,
        factors=spec,
        complex_state=layer.kind == "kru",
        nonlinearity=layer.nonlinearity or "modrelu",
        device=device,
        dtype=(dtype or DTYPES[layer.dtype]).to_real(),
    )


def build_dense(
    layer: RecurrentLayer, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """The torch.nn layer of a description, its numbers still random."""
    if layer.kind in BESIDE:
        rows, cols, dtype = layer.hidden_size, layer.input_size, dtype or DTYPES[layer.dtype]
        if layer.kind == EMBEDDING:
            return nn.Embedding(rows, cols, device=device, dtype=dtype)
        return nn.Linear(cols, rows, layer.bias, device=device, dtype=dtype)
    dense = next(cls for cls, key in MODULES.items() if key == (layer.kind, layer.cell))
    return dense(layer.input_size, layer.hidden_size, **_options(layer, device, dtype))


def _options(layer: RecurrentLayer, device: torch.device | str | None, dtype: torch.dtype | None) -> dict[str, Any]:
    """Constructor options that torch.nn's layers and kruify's share; what is not known gets torch's default."""
    options: dict[str, Any] = {"bias": layer.bias, "device": device, "dtype": dtype or DTYPES[layer.dtype]}
    if layer.kind == "rnn":
        options["nonlinearity"] = layer.nonlinearity or "tanh"
    if not layer.cell:
        options |= {
            "num_layers": layer.num_layers,
            "bidirectional": layer.bidirectional,
            "batch_first": bool(layer.batch_first),
            "dropout": (layer.dropout or 0.0) if layer.num_layers > 1 else 0.0,
        }
        if layer.kind == "lstm":
            options["proj_size"] = layer.proj_size
    return options


def plan_of(model: nn.Module) -> Plan:
    """The plan that the converted layers of a module embody."""
    plans = []
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Factored):
            plans.append(LayerPlan(describe_kru(name, module), matrices_of(module)))
    return plan_from(plans)


def matrices_of(module: Factored) -> dict[str, Structures]:
    """Name within the layer -> structures of the gates, as in `LayerPlan.matrices`."""
    return {n: child.structures for n, child in module._modules.items() if isinstance(child, KroneckerMatrix)}


def describe_kru(name: str, module: Factored) -> RecurrentLayer:
    """The description of a KRU layer, that of the dense layer it stands for where there is one."""
    if isinstance(module, KRU):
        dtype = str(module.state_dtype.to_real()).removeprefix("torch.")
        return RecurrentLayer(
            name, "kru" if module.complex_state else "kru-real", False, module.input_size, module.hidden_size,
            module.num_layers, bias=module.bias, batch_first=module.batch_first, dropout=module.dropout,
            nonlinearity=module.nonlinearity, dtype=dtype,
        )  # fmt: skip
    if isinstance(module, KroneckerLinear):
        return beside(name, LINEAR, module.weight, module.bias is not None)
    if isinstance(module, KroneckerEmbedding):
        return beside(name, EMBEDDING, module.weight, False)
    cell = isinstance(module, KRUCellBase)
    nonlinearity = module.nonlinearity if module.kind == "rnn" else None
    dtype = str(next(module.parameters()).dtype).removeprefix("torch.")
    layer = RecurrentLayer(
        name, module.kind, cell, module.input_size, module.hidden_size, bias=module.bias,
        nonlinearity=nonlinearity, dtype=dtype,
    )  # fmt: skip
    if isinstance(module, KRUBase):
        fields = ("num_layers", "bidirectional", "proj_size", "batch_first", "dropout")
        layer = RecurrentLayer(**{**layer.__dict__, **{f: getattr(module, f) for f in fields}})
    return layer
