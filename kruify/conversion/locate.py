"""Finds the recurrent layers in a state dict or a module."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from kruify.checkpoint import Checkpoint, LazyTensor
from kruify.checkpoint.parametrised import compute_weights
from kruify.layers.base import GATES
from kruify.layers.matrix import KroneckerMatrix

AnyTensor = Tensor | LazyTensor  # shape and dtype are all that is asked of it
_KIND_OF_GATES = {len(names): kind for kind, names in GATES.items()}
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)
}
"""The dtypes that a layer can have, by name."""
KRU_KINDS = ("kru", "kru-real")
"""The unit as published (kruify.layers.KRU), its state complex or real. torch.nn has no counterpart."""
MATRIX = "matrix"
"""A matrix of a cell that an ONNX graph writes out in MatMul or Gemm, in the layout of the file: its gates are not told
apart. It stays in its graph; no module is built of it. In a plan it is the weight_hh of a layer of its own name."""
LINEAR, EMBEDDING = "linear", "embedding"
BESIDE = (LINEAR, EMBEDDING)
"""An nn.Linear or nn.Embedding beside the recurrent layers, whose weight counts where the bytes of the whole file do
(conversion.beside); `hidden_size` and `input_size` are the rows and columns of its weight."""
KINDS = (*GATES, *KRU_KINDS, MATRIX, *BESIDE)
MODULES: dict[type[nn.Module], tuple[str, bool]] = {
    nn.RNN: ("rnn", False),
    nn.LSTM: ("lstm", False),
    nn.GRU: ("gru", False),
    nn.RNNCell: ("rnn", True),
    nn.LSTMCell: ("lstm", True),
    nn.GRUCell: ("gru", True),
}


@dataclass(frozen=True)
class RecurrentLayer:
    """One nn.RNN, LSTM or GRU, or a cell, or in a plan a layer of `BESIDE` or a `MATRIX`; None marks what the source
    cannot tell (a state dict has no batch_first)."""

    name: str  # module path, "" for a bare layer
    kind: str  # "rnn", "lstm" or "gru"; in a plan any of KINDS
    cell: bool
    input_size: int
    hidden_size: int
    num_layers: int = 1
    bidirectional: bool = False
    bias: bool = True
    proj_size: int = 0
    batch_first: bool | None = None
    dropout: float | None = None
    nonlinearity: str | None = None
    dtype: str = "float32"

    @property
    def gates(self) -> tuple[str, ...]:
        if self.kind in (MATRIX, *BESIDE):
            return ("all",)
        return GATES["rnn" if self.kind in KRU_KINDS else self.kind]

    @property
    def reals(self) -> int:
        """Real numbers in one entry of its matrices and of its state."""
        return 2 if self.kind == "kru" else 1

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Ends of the weight names, in torch's order: "" for a cell, else `_l0`, `_l0_reverse`, `_l1`, ..."""
        if self.cell:
            return ("",)
        directions = ("", "_reverse") if self.bidirectional else ("",)
        return tuple(f"_l{k}{d}" for k in range(self.num_layers) for d in directions)

    @property
    def output_size(self) -> int:
        return self.proj_size or self.hidden_size

    def shape(self, weight: str) -> tuple[int, int]:
        """(rows, cols) of one gate of `weight_ih...` or `weight_hh...`, or of `weight`."""
        if weight.startswith("weight_hh") and self.kind != MATRIX:
            return self.hidden_size, self.output_size
        first = self.cell or weight.startswith("weight_ih_l0")
        inputs = self.input_size if first else self.output_size * self.reals * (2 if self.bidirectional else 1)
        return self.hidden_size, inputs

    @property
    def weights(self) -> list[str]:
        """Names of its matrices within it."""
        if self.kind in BESIDE:
            return ["weight"]
        parts = ("hh",) if self.kind == MATRIX else ("ih", "hh")
        return [f"weight_{part}{suffix}" for suffix in self.suffixes for part in parts]

    def full_name(self, weight: str) -> str:
        if self.kind == MATRIX and weight in self.weights:
            return self.name
        return f"{self.name}.{weight}" if self.name else weight

    @property
    def recurrent_parameters(self) -> int:
        return self._count("weight_hh")

    @property
    def input_parameters(self) -> int:
        return self._count("weight_ih")

    def _count(self, stem: str) -> int:
        sizes = [self.shape(stem + suffix) for suffix in self.suffixes]
        return self.reals * len(self.gates) * sum(rows * cols for rows, cols in sizes)


class Skipped(NamedTuple):
    """What looks recurrent and cannot be converted."""

    name: str
    reason: str


@dataclass(frozen=True)
class Located:
    """What was found, and what looks recurrent but cannot be converted, with the reason."""

    layers: list[RecurrentLayer]
    skipped: list[Skipped]

    def modules(self) -> Located:
        """Those that a module can be built of."""
        return Located([layer for layer in self.layers if layer.kind != MATRIX], self.skipped)

    def with_beside(self, beside: Iterable[RecurrentLayer]) -> Located:
        """Those, and layers beside them."""
        return Located([*self.layers, *beside], self.skipped)

    def in_float32(self) -> Located:
        """The same layers, their numbers in float32."""
        return Located([replace(layer, dtype="float32") for layer in self.layers], self.skipped)


Hints = Mapping[str, Mapping[str, Any]]  # layer name -> what its tensors cannot tell


def locate(
    source: Mapping[str, AnyTensor] | nn.Module, hints: Hints | None = None, *, subclasses: bool = False
) -> Located:
    """The recurrent layers of a state dict (names and shapes decide) or of a module (its classes decide).

    Args:
        hints: for a state dict: layer name -> known `batch_first`, `dropout`, `nonlinearity`, read from elsewhere.
        subclasses: in a module, take subclasses of torch's layers for what they derive from; else they are skipped.
    """
    if isinstance(source, nn.Module):
        return _locate_modules(source, subclasses)
    return _locate_tensors(source, hints or {})


def locate_checkpoint(checkpoint: Checkpoint, *, subclasses: bool = False) -> Located:
    """`locate` for an open checkpoint, with what a whole module in it says beyond its weights.

    Skipped with a reason: what the reader could not make out, and subclasses of torch's layers unless asked for.
    """
    hints: dict[str, dict[str, Any]] = {}
    foreign: dict[str, str] = {}
    for name, hint in checkpoint.module_hints.items():
        if hint.is_subclass and not subclasses:
            foreign[name] = hint.cls
        told = {key: hint.options[key] for key in ("batch_first", "dropout", "nonlinearity") if key in hint.options}
        if hint.options.get("mode") in ("RNN_TANH", "RNN_RELU"):
            told["nonlinearity"] = str(hint.options["mode"]).removeprefix("RNN_").lower()
        hints[name] = told
    found = locate(checkpoint.tensors.lazy, hints)
    skipped = [*found.skipped, *map(Skipped._make, checkpoint.skipped.items())]
    for layer in found.layers:
        if layer.name in foreign:
            reason = f"{foreign[layer.name]} is not torch's own: it may compute something else"
            skipped.append(Skipped(layer.name, reason))
    matrices = [
        _matrix(name, checkpoint.tensors.lazy[name])
        for name, hint in checkpoint.module_hints.items()
        if hint.options.get("mode") == MATRIX.upper()
    ]
    return Located([*(layer for layer in found.layers if layer.name not in foreign), *matrices], skipped)


def _matrix(name: str, tensor: LazyTensor) -> RecurrentLayer:
    rows, cols = tensor.shape
    return RecurrentLayer(name, MATRIX, True, cols, rows, bias=False, dtype=_dtype_name(tensor))


_WEIGHT_HH = re.compile(r"(?:(?P<prefix>.+)\.)?weight_hh(?P<suffix>_l0)?", re.DOTALL)


def _locate_tensors(tensors: Mapping[str, AnyTensor], hints: Hints) -> Located:
    found = Located([], [])
    for name in tensors:
        match = _WEIGHT_HH.fullmatch(name)
        if not match:
            continue
        prefix, cell = match["prefix"] or "", match["suffix"] is None
        layer = _read_layer(tensors, prefix, cell, hints.get(prefix, {}))
        if isinstance(layer, str):
            found.skipped.append(Skipped(prefix or name, layer))
        else:
            found.layers.append(layer)
    return found


def _read_layer(
    tensors: Mapping[str, AnyTensor], prefix: str, cell: bool, hints: Mapping[str, Any]
) -> RecurrentLayer | str:
    """The layer, or the reason why it is not one."""
    dot = f"{prefix}." if prefix else ""
    first = "" if cell else "_l0"
    weight_hh, weight_ih = tensors[f"{dot}weight_hh{first}"], tensors.get(f"{dot}weight_ih{first}")
    if weight_ih is None:
        return f"weight_hh{first} has no weight_ih{first} beside it"
    if len(weight_hh.shape) != 2 or len(weight_ih.shape) != 2:
        return f"weight_hh{first} is no matrix but has shape {tuple(weight_hh.shape)}"
    if not weight_hh.dtype.is_floating_point or weight_hh.dtype.itemsize == 1:
        return f"weights are {_dtype_name(weight_hh)}, which no layer of torch.nn computes in"
    w_hr = None if cell else tensors.get(f"{dot}weight_hr{first}")
    hidden = weight_hh.shape[1] if w_hr is None else w_hr.shape[-1]
    gates, rest = divmod(weight_hh.shape[0], hidden) if hidden else (0, 1)
    if rest or gates not in _KIND_OF_GATES:
        return f"weight_hh{first} has {weight_hh.shape[0]} rows for hidden size {hidden}: not 1, 3 or 4 gates"
    count = 1
    while not cell and f"{dot}weight_hh_l{count}" in tensors:
        count += 1
    layer = RecurrentLayer(
        name=prefix,
        kind=_KIND_OF_GATES[gates],
        cell=cell,
        input_size=weight_ih.shape[1],
        hidden_size=hidden,
        num_layers=count,
        bidirectional=not cell and f"{dot}weight_hh_l0_reverse" in tensors,
        bias=any(f"{dot}bias_{part}{first}" in tensors for part in ("ih", "hh")),
        proj_size=0 if w_hr is None else w_hr.shape[0],
        batch_first=hints.get("batch_first"),
        dropout=hints.get("dropout"),
        nonlinearity=hints.get("nonlinearity"),
        dtype=_dtype_name(weight_hh),
    )
    return _mismatch(tensors, layer) or layer


def _mismatch(tensors: Mapping[str, AnyTensor], layer: RecurrentLayer) -> str | None:
    """The first weight that is missing or does not have the shape that the layer implies."""
    rows = len(layer.gates) * layer.hidden_size
    for suffix in layer.suffixes:
        expected: dict[str, tuple[int, ...]] = {
            f"weight_{part}{suffix}": (rows, layer.shape(f"weight_{part}{suffix}")[1]) for part in ("ih", "hh")
        }
        if layer.bias:
            expected |= {f"bias_{part}{suffix}": (rows,) for part in ("ih", "hh")}
        if layer.proj_size:
            expected[f"weight_hr{suffix}"] = (layer.proj_size, layer.hidden_size)
        for weight, shape in expected.items():
            tensor = tensors.get(layer.full_name(weight))
            if tensor is None:
                return f"{weight} is missing"
            if tuple(tensor.shape) != shape:
                return f"{weight} has shape {tuple(tensor.shape)}, expected {shape}"
    return None


def _locate_modules(module: nn.Module, subclasses: bool) -> Located:
    found = Located([], [])
    # A layer that stands in several places has all their names, as in the state dict.
    for name, child in module.named_modules(remove_duplicate=False):
        cls = type(child).__bases__[0] if is_parametrized(child) else type(child)
        if cls in MODULES or (subclasses and isinstance(child, tuple(MODULES))):
            layer = describe(name, child)
            known = compute_weights({n: LazyTensor.of(tensor) for n, tensor in child.state_dict().items()})[0]
            if unknown := sorted(set(layer.weights) - set(known)):
                reason = f"{unknown[0]} is computed from other parameters in a way that kruify does not know"
                found.skipped.append(Skipped(name, reason))
            else:
                found.layers.append(layer)
        elif isinstance(child, tuple(MODULES)):
            base = next(b.__name__ for b in MODULES if isinstance(child, b))
            reason = f"{type(child).__name__} is a subclass of torch.nn.{base}: it may compute something else"
            found.skipped.append(Skipped(name, reason))
    return found


def describe(name: str, module: nn.Module) -> RecurrentLayer:
    """The description of a torch.nn recurrent module, or of one of `BESIDE`."""
    if isinstance(module, nn.Linear | nn.Embedding):
        kind = LINEAR if isinstance(module, nn.Linear) else EMBEDDING
        return beside(name, kind, module.weight, getattr(module, "bias", None) is not None)
    kind, cell = next(value for base, value in MODULES.items() if isinstance(module, base))
    get = module.__dict__.get
    weight = next(module.parameters())
    nonlinearity = None
    if kind == "rnn":
        nonlinearity = get("nonlinearity") or ("relu" if get("mode") == "RNN_RELU" else "tanh")
    return RecurrentLayer(
        name=name,
        kind=kind,
        cell=cell,
        input_size=get("input_size", 0),
        hidden_size=get("hidden_size", 0),
        num_layers=get("num_layers", 1),
        bidirectional=get("bidirectional", False),
        bias=bool(get("bias", True)),
        proj_size=get("proj_size", 0),
        batch_first=None if cell else get("batch_first", False),
        dropout=None if cell else get("dropout", 0.0),
        nonlinearity=nonlinearity,
        dtype=_dtype_name(weight),
    )


def beside(name: str, kind: str, weight: AnyTensor | KroneckerMatrix, bias: bool) -> RecurrentLayer:
    """The description of a layer of `BESIDE`, dense or factored."""
    rows, cols = weight.shape
    return RecurrentLayer(name, kind, True, cols, rows, bias=bias, dtype=_dtype_name(weight))


def _dtype_name(tensor: AnyTensor | KroneckerMatrix) -> str:
    return str(tensor.dtype).removeprefix("torch.")
