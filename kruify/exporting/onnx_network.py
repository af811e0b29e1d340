"""A whole network as ONNX: torch's exporter writes everything but the recurrent layers, and leaves a gap for each.

torch 2.13 can neither write its own scan operator as ONNX nor keep the length of nn.LSTM dynamic. So each recurrent
layer is traced as one operator without an inside, and the ONNX nodes of the layer (`onnx_layer`) take its place.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from kruify.conversion.locate import MODULES
from kruify.errors import UnsupportedError
from kruify.exporting.onnx_layer import layer_model
from kruify.exporting.scan_layer import StepCell
from kruify.exporting.shapes import Interface, interface_of
from kruify.layers.base import KRUBase
from kruify.layers.cells import KRUCellBase

DOMAIN, OPERATOR, OPSET = "kruify", "Layer", 18


class Gap(nn.Module):
    """Stands in for a recurrent layer while a network is traced, with its interface but for packed sequences."""

    def __init__(self, index: int, interface: Interface) -> None:
        super().__init__()
        self.index, self.interface = index, interface

    def forward(self, input: Any, hx: Any = None) -> tuple[Tensor, Any]:
        if isinstance(input, PackedSequence):
            raise UnsupportedError("a packed sequence cannot be traced", "ONNX", "Export the layer alone")
        if not isinstance(input, Tensor) or input.dim() != 3:
            raise UnsupportedError("only (batch, time, features) and (time, batch, features) can be traced", "ONNX")
        layer = self.interface.layer
        x = input.transpose(0, 1) if layer.batch_first else input
        rows = layer.num_layers * self.interface.directions
        if hx is None:
            hx = tuple(x.new_zeros(rows, x.shape[1], size) for size in self.interface.state_sizes)
        states = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        features = layer.output_size * self.interface.directions
        results = _operator()(x, states[0], states[-1], self.index, features)
        output = results[0].transpose(0, 1) if layer.batch_first else results[0]
        return output, (results[1] if len(states) == 1 else (results[1], results[2]))


def with_gaps(model: nn.Module, layers: list[nn.Module]) -> nn.Module:
    """`model` with a `Gap` for every recurrent layer, in place; the layers are appended to `layers`."""
    if isinstance(model, KRUBase) or (type(model) in MODULES and not interface_of(model).cell):
        layers.append(model)
        return Gap(len(layers) - 1, interface_of(model))
    if isinstance(model, KRUCellBase):
        return StepCell(model)
    for name, child in list(model.named_children()):
        setattr(model, name, with_gaps(child, layers))
    return model


def network_model(network: nn.Module, layers: Sequence[nn.Module], example: Sequence[Tensor]) -> onnx.ModelProto:
    """The ONNX model of a network with gaps, the layers filled in; every size that tracing does not fix is dynamic."""
    dynamic = tuple({axis: torch.export.Dim.AUTO for axis in range(tensor.dim())} for tensor in example)
    program = torch.export.export(network, tuple(example), dynamic_shapes=(dynamic,), strict=False)
    translations: Any = {_operator().default: _translation()}
    written: Any = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        custom_translation_table=translations,
        opset_version=OPSET,
        optimize=False,
    )
    model: onnx.ModelProto = written.model_proto
    nodes = []
    for node in model.graph.node:
        if node.domain != DOMAIN:
            nodes.append(node)
            continue
        index = next(a.i for a in node.attribute if a.name == "index")
        nodes += _fill(model.graph, node, layers[index], f"layer{index}/")
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    kept = [entry for entry in model.opset_import if entry.domain != DOMAIN]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    onnx.checker.check_model(model)
    return model


def _fill(graph: Any, node: Any, layer: nn.Module, prefix: str) -> list[Any]:
    """The nodes of a layer between the inputs and outputs of `node`; its constants go into `graph`."""
    layer = copy.deepcopy(layer)
    setattr(layer, "batch_first", False)  # noqa: B010  # nn.Module's attributes are not typed
    interface = interface_of(layer)
    inside = layer_model(layer, interface).graph
    states = len(interface.states)
    names = dict(zip(interface.inputs, node.input[: 1 + states], strict=True))
    outputs = zip(interface.outputs, node.output[: 1 + states], strict=False)
    names |= {ours: theirs for ours, theirs in outputs if theirs}
    for constant in inside.initializer:
        constant.name = prefix + constant.name
        graph.initializer.append(constant)
    return _renamed(inside.node, names, prefix)


def _renamed(nodes: Any, names: dict[str, str], prefix: str) -> list[Any]:
    def new(name: str) -> str:
        return names.get(name, prefix + name) if name else name

    for node in nodes:
        node.input[:] = map(new, node.input)
        node.output[:] = map(new, node.output)
        for attribute in node.attribute:
            if attribute.HasField("g"):
                for value in (*attribute.g.input, *attribute.g.output):
                    value.name = new(value.name)
                _renamed(attribute.g.node, names, prefix)
    return list(nodes)


@cache
def _operator() -> Any:
    """`kruify_export::layer`, registered when first needed: it has shapes, and nothing that computes."""

    def layer(x: Tensor, h: Tensor, c: Tensor, index: int, features: int) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError("it is there to be traced")

    layer.__annotations__ = {
        "x": Tensor, "h": Tensor, "c": Tensor, "index": int, "features": int, "return": tuple[Tensor, Tensor, Tensor]
    }  # fmt: skip  # torch reads the types themselves, not their names
    operator = torch.library.custom_op("kruify_export::layer", layer, mutates_args=())
    operator.register_fake(
        lambda x, h, c, index, features: (
            x.new_empty(x.shape[0], x.shape[1], features),
            torch.empty_like(h),
            torch.empty_like(c),
        )
    )
    return torch.ops.kruify_export.layer


@cache
def _translation() -> Any:
    """How torch's exporter writes the operator: as a node of a domain of its own, which is then replaced."""
    import onnxscript

    schema = onnx.defs.OpSchema
    values = {name: schema.FormalParameter(name, "T") for name in ("x", "h", "c", "y", "h_n", "c_n")}
    onnx.defs.register_schema(
        schema(
            OPERATOR,
            DOMAIN,
            1,
            inputs=[values[name] for name in ("x", "h", "c")],
            outputs=[values[name] for name in ("y", "h_n", "c_n")],
            type_constraints=[("T", ["tensor(float)", "tensor(double)"], "")],
            attributes=[schema.Attribute("index", schema.AttrType.INT, required=True)],
        )
    )
    domain: Any = onnxscript.values.Opset(DOMAIN, 1)

    def translate(x: Any, h: Any, c: Any, index: int, features: int) -> Any:
        return domain.Layer(x, h, c, index=index)

    return translate
