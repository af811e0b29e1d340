"""Modules that were pickled whole, or compiled to TorchScript: their state dict and what their classes remember.

A state dict does not say batch_first, dropout or the nonlinearity; a whole module does.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kruify.checkpoint import limits
from kruify.checkpoint.safe_unpickler import OtherDict, Record
from kruify.checkpoint.tensors import LazyTensor
from kruify.errors import UnsafeError, UnsupportedError

TORCH_RNN = "torch.nn.modules.rnn."
_PACKED = ("_packed_params", "_all_weight_values")


@dataclass(frozen=True)
class ModuleHint:
    """What a recurrent module in a file says about itself beyond its weights.

    cls: dotted class name in the file ("torch.nn.modules.rnn.LSTM").
    options: its plain attributes by torch's names (mode, input_size, hidden_size, num_layers, bias, batch_first,
        dropout, bidirectional, proj_size, nonlinearity).
    """

    cls: str
    options: Mapping[str, bool | int | float | str] = field(default_factory=dict)

    @property
    def is_subclass(self) -> bool:
        """Whether the class is not torch's own: its forward may do something else with the weights."""
        return not self.cls.startswith((TORCH_RNN, "onnx.", "keras."))


class ModuleTree(dict[str, Any]):
    """The state dict of a whole module, with hints by module name."""

    def __init__(self, cls: str) -> None:
        super().__init__()
        self.cls = cls
        self.hints: dict[str, ModuleHint] = {}


def resolve(root: Any, where: object, code: Mapping[str, str] | None = None) -> Any:
    """Replace every whole module in an object by its ModuleTree; what is left of Records stays.

    Args:
        code: the sources of a TorchScript archive; with it, every object of a class is a module.

    Raises:
        UnsafeError: modules contain each other, or are visited too often. UnsupportedError: quantised modules.
    """
    return _Resolver(where, code).resolve(root, 0)


def is_module(node: Record) -> bool:
    """Whether a record is an nn.Module: its state has the three tables that every one has."""
    return isinstance(node.state, dict) and all(
        isinstance(node.state.get(table), dict) for table in ("_parameters", "_buffers", "_modules")
    )


class _Resolver:
    def __init__(self, where: object, code: Mapping[str, str] | None) -> None:
        self.where, self.code = where, code
        self.resolved: dict[int, Any] = {}
        self.visits = limits.VISITS  # of modules and their attributes: one module may stand in many places

    def resolve(self, node: Any, depth: int) -> Any:
        if isinstance(node, Record) and (is_module(node) or self.code is not None):
            tree = ModuleTree(str(node.cls))
            self.walk(node, "", 0, tree)
            return tree
        if depth > limits.DEPTH:
            raise UnsafeError("it is nested too deeply", self.where)
        if id(node) not in self.resolved:  # what stands in two places is one
            if isinstance(node, dict) and type(node) in (dict, OrderedDict, OtherDict):
                found: Any = type(node)((name, self.resolve(value, depth + 1)) for name, value in node.items())
            elif type(node) in (list, tuple):
                found = type(node)(self.resolve(value, depth + 1) for value in node)
            else:
                return node
            self.resolved[id(node)] = found
        return self.resolved[id(node)]

    def walk(self, node: Record, path: str, depth: int, tree: ModuleTree) -> None:
        """Put the tensors and the hint of a module, and of the modules in it, into `tree`."""
        state = node.state if isinstance(node.state, dict) else {}
        own, children = state, {name: value for name, value in state.items() if isinstance(value, Record)}
        if is_module(node):
            skipped = state.get("_non_persistent_buffers_set") or ()
            own = {**state["_parameters"], **{n: t for n, t in state["_buffers"].items() if n not in skipped}}
            children = state["_modules"]
        self.visits -= 1 + len(state) + len(own) + len(children)
        if depth > limits.DEPTH or self.visits < 0:
            raise UnsafeError("its modules contain each other, or too many", self.where)
        cls = re.sub(r"^__torch__\.|___torch_mangle_\d+\.", "", str(node.cls))
        if "quantized" in cls.split(".") or any(name in state for name in _PACKED):
            hint = "Give the checkpoint from before quantisation"
            raise UnsupportedError(f"{path or 'it'} is a quantised module ({cls[:80]})", self.where, hint)
        before = f"{path}." if path else ""
        tensors = {f"{before}{name}": value for name, value in own.items() if isinstance(value, LazyTensor)}
        options = {n: v for n, v in state.items() if isinstance(n, str) and isinstance(v, bool | int | float | str)}
        if self.code:
            options.update(_options_in_code(str(node.cls), self.code))
        if "hidden_size" in options or any(re.search(r"weight_hh(_l\d+)?$", name) for name in tensors):
            public = {name: value for name, value in options.items() if name != "training" and name[:1] != "_"}
            tree.hints[path] = ModuleHint(cls, public)
        tree.update(tensors)
        if len(tree) > limits.ENTRIES:
            raise UnsafeError(f"its modules name more than {limits.ENTRIES} tensors", self.where)
        for name, child in children.items():
            if isinstance(child, Record) and isinstance(name, str):
                self.walk(child, f"{before}{name}", depth + 1, tree)


_CALL = re.compile(
    r"torch\.(lstm|gru|rnn_tanh|rnn_relu)\([^\n]*?, (True|False), (\d+), ([\d.e+-]+), [\w.]+, "
    r"(True|False), (True|False)\)"
)
_CELL = re.compile(r"torch\.(lstm_cell|gru_cell|rnn_tanh_cell|rnn_relu_cell)\(")


def _options_in_code(cls: str, code: Mapping[str, str]) -> dict[str, bool | int | float | str]:
    """What a TorchScript class passes to torch.lstm and friends, read from its source as text; nothing is run."""
    module, _, name = cls.rpartition(".")
    source = code.get(module.replace(".", "/") + ".py", "")
    start = source.find(f"class {name}(")
    if start < 0:
        return {}
    end = source.find("\nclass ", start)
    body = source[start : end if end > 0 else None]
    calls = {match.groups() for match in _CALL.finditer(body)}
    # A call on packed data has no batch_first and does not match.
    if calls and len({call[:5] for call in calls}) == 1:
        kind, bias, layers, dropout, bidirectional, _ = next(iter(calls))
        options: dict[str, bool | int | float | str] = {
            "mode": kind.upper(),
            "bias": bias == "True",
            "num_layers": int(layers),
            "dropout": float(dropout),
            "bidirectional": bidirectional == "True",
        }
        if len({call[5] for call in calls}) == 1:
            options["batch_first"] = next(iter(calls))[5] == "True"
        return options
    if cell := _CELL.search(body):
        kind = cell.group(1)
        return {"nonlinearity": kind.split("_")[1]} if kind.startswith("rnn") else {}
    return {}
