"""ONNX operators in torch, those that are met around recurrent layers; gradients flow through them.

Semantics: the ONNX operator schemas, https://onnx.ai/onnx/operators. What an operator has as an attribute in one opset
and as an input in another is taken from where it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kruify.checkpoint.onnx_constants import DTYPES
from kruify.errors import UnsupportedError

Attributes = Mapping[str, Any]
Operator = Callable[..., Any]
"""(attributes, inputs ...; None for one that is left out) -> the output, or a tuple of them."""


def _axes(given: Tensor | None, a: Attributes) -> list[int] | None:
    return given.tolist() if given is not None else a.get("axes")


def _slice(a: Attributes, x: Tensor, *places: Tensor | None) -> Tensor:
    starts, ends, axes, steps = ([*(None if p is None else p.tolist() for p in places)] + [None] * 4)[:4]
    starts, ends = starts if starts is not None else a["starts"], ends if ends is not None else a["ends"]
    axes = axes if axes is not None else a.get("axes", range(len(starts)))
    for axis, start, end, step in zip(axes, starts, ends, steps or [1] * len(starts), strict=True):
        size = x.shape[axis]
        index = torch.arange(size)[slice(start, end, step)] if step > 0 else _backwards(size, start, end, step)
        x = x.index_select(axis, index)
    return x


def _backwards(size: int, start: int, end: int, step: int) -> Tensor:
    end = -size - 1 if end < -size else end
    return torch.tensor(range(size)[start:end:step] if end >= -size else range(size)[start::step], dtype=torch.int64)


def _reshape(a: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    keep = not a.get("allowzero", 0)
    return x.reshape([x.shape[at] if not n and keep else n for at, n in enumerate(shape.tolist())])


def _unsqueeze(a: Attributes, x: Tensor, given: Tensor | None = None) -> Tensor:
    axes = _axes(given, a) or []
    rank = x.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _squeeze(a: Attributes, x: Tensor, given: Tensor | None = None) -> Tensor:
    axes = _axes(given, a)
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


def _gather(a: Attributes, x: Tensor, index: Tensor) -> Tensor:
    axis = a.get("axis", 0) % x.ndim
    places = torch.where(index < 0, index + x.shape[axis], index).long()
    found = x.index_select(axis, places.reshape(-1))
    return found.reshape([*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]])


def _pad(a: Attributes, x: Tensor, pads: Tensor | None = None, value: Tensor | None = None, *more: Tensor) -> Tensor:
    if a.get("mode", "constant") != "constant" or more:
        raise UnsupportedError(f"a Pad of mode {a.get('mode')} or along some axes has no form in torch here")
    sizes = a["pads"] if pads is None else pads.tolist()
    pairs = [(sizes[at], sizes[at + x.ndim]) for at in reversed(range(x.ndim))]
    filled = a.get("value", 0.0) if value is None else value.item()
    return functional.pad(x, [n for pair in pairs for n in pair], value=filled)


def _split(a: Attributes, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    axis, given = a.get("axis", 0), a.get("split") if sizes is None else sizes.tolist()
    each = math.ceil(x.shape[axis] / a["outputs"])
    return torch.split(x, each if given is None else given, axis)


def _clip(a: Attributes, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    return x.clamp(a.get("min") if low is None else low.item(), a.get("max") if high is None else high.item())


def _cast(a: Attributes, x: Tensor) -> Tensor:
    if a["to"] not in DTYPES:
        raise UnsupportedError(f"a Cast to ONNX's type {a['to']} has no form in torch here")
    return x.to(DTYPES[a["to"]])


def _gemm(a: Attributes, x: Tensor, y: Tensor, c: Tensor | None = None) -> Tensor:
    product: Tensor = (x.T if a.get("transA") else x) @ (y.T if a.get("transB") else y) * a.get("alpha", 1.0)
    return product if c is None else product + c * a.get("beta", 1.0)


def _softmax(a: Attributes, x: Tensor, log: bool = False) -> Tensor:
    axis = a.get("axis", -1 if a["opset"] >= 13 else 1)
    if a["opset"] < 13 and axis % x.ndim != x.ndim - 1:
        raise UnsupportedError("a Softmax over several axes, as before opset 13, has no form in torch here")
    return x.log_softmax(axis) if log else x.softmax(axis)


def _reduced(reduce: Callable[..., Tensor]) -> Operator:
    def found(a: Attributes, x: Tensor, given: Tensor | None = None) -> Tensor:
        axes = _axes(given, a)
        if not axes and a.get("noop_with_empty_axes"):
            return x
        return reduce(x, axes or list(range(x.ndim)), keepdim=bool(a.get("keepdims", 1)))

    return found


def _layer_norm(a: Attributes, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    axis = a.get("axis", -1)
    return functional.layer_norm(x, x.shape[axis:], scale, bias, a.get("epsilon", 1e-5))


def _batch_norm(a: Attributes, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return functional.batch_norm(x, mean, var, scale, bias, eps=a.get("epsilon", 1e-5))


def _numbers(a: Attributes, name: str, dims: int, default: int) -> list[int]:
    return list(a.get(name, [default] * dims))


def _conv(a: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    dims = x.ndim - 2
    pads = _convolved(a, dims)
    run = (functional.conv1d, functional.conv2d, functional.conv3d)[dims - 1]
    x = functional.pad(x, [n for at in reversed(range(dims)) for n in (pads[at], pads[at + dims])])
    more = _numbers(a, "strides", dims, 1), 0, _numbers(a, "dilations", dims, 1), a.get("group", 1)
    return run(x, weight, bias, *more)


def _conv_transpose(a: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    dims = x.ndim - 2
    pads = _convolved(a, dims)
    if pads[:dims] != pads[dims:] or "output_shape" in a:
        raise UnsupportedError("a ConvTranspose with uneven pads or an output_shape has no form in torch here")
    run = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)[dims - 1]
    out, strides = _numbers(a, "output_padding", dims, 0), _numbers(a, "strides", dims, 1)
    return run(x, weight, bias, strides, pads[:dims], out, a.get("group", 1), _numbers(a, "dilations", dims, 1))


def _convolved(a: Attributes, dims: int) -> list[int]:
    if a.get("auto_pad", "NOTSET") != "NOTSET":
        raise UnsupportedError(f"a convolution with auto_pad={a['auto_pad']} has no form in torch here")
    return _numbers(a, "pads", 2 * dims, 0)


def _constant_of_shape(a: Attributes, shape: Tensor) -> Tensor:
    value: Tensor = a.get("value", torch.zeros(1))
    return value.reshape(()).expand(shape.tolist()).clone()


def _divided(a: Attributes, x: Tensor, y: Tensor) -> Tensor:
    return x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


def _of(function: Callable[..., Any]) -> Operator:
    return lambda a, *inputs: function(*inputs)


def _folded(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    def found(a: Attributes, first: Tensor, *others: Tensor) -> Tensor:
        for other in others:
            first = function(first, other)
        return first

    return found


def _concat(a: Attributes, *parts: Tensor) -> Tensor:
    return torch.cat(parts, a["axis"])


def _transpose(a: Attributes, x: Tensor) -> Tensor:
    return x.permute(a.get("perm", list(reversed(range(x.ndim)))))


def _same(a: Attributes, x: Tensor, *_: Sequence[Any]) -> Tensor:
    return x


OPERATORS: dict[str, Operator] = {
    **{name: _of(getattr(torch, name.lower())) for name in ("Abs", "Erf", "Exp", "Log", "Neg", "Reciprocal", "Relu")},
    **{name: _of(getattr(torch, name.lower())) for name in ("Sigmoid", "Sqrt", "Tanh", "Where")},
    **{"Equal": _of(torch.eq), "Greater": _of(torch.gt), "Less": _of(torch.lt), "MatMul": _of(torch.matmul)},
    **{"Add": _of(torch.add), "Sub": _of(torch.sub), "Mul": _of(torch.mul), "Div": _divided, "Pow": _of(torch.pow)},
    **{"Max": _folded(torch.maximum), "Min": _folded(torch.minimum), "Sum": _folded(torch.add)},
    "Softplus": _of(functional.softplus),
    "LeakyRelu": lambda a, x: functional.leaky_relu(x, a.get("alpha", 0.01)),
    "Elu": lambda a, x: functional.elu(x, a.get("alpha", 1.0)),
    "PRelu": lambda a, x, slope: torch.where(x < 0, slope * x, x),
    **{"Identity": _same, "Dropout": _same, "Cast": _cast, "Clip": _clip, "Gemm": _gemm, "Softmax": _softmax},
    "LogSoftmax": lambda a, x: _softmax(a, x, log=True),
    "Einsum": lambda a, *inputs: torch.einsum(a["equation"], *inputs),
    "Shape": lambda a, x: torch.tensor(x.shape[a.get("start", 0) : a.get("end")]),
    **{"Reshape": _reshape, "Transpose": _transpose, "Squeeze": _squeeze, "Unsqueeze": _unsqueeze},
    **{"Concat": _concat, "Split": _split, "Slice": _slice, "Gather": _gather, "Pad": _pad},
    "Flatten": lambda a, x: x.reshape(math.prod(x.shape[: a.get("axis", 1)]), -1),
    "Expand": lambda a, x, shape: x * torch.ones(shape.tolist(), dtype=x.dtype),
    "ConstantOfShape": _constant_of_shape,
    **{"ReduceMean": _reduced(torch.mean), "ReduceSum": _reduced(torch.sum)},
    **{"LayerNormalization": _layer_norm, "BatchNormalization": _batch_norm},
    **{"Conv": _conv, "ConvTranspose": _conv_transpose},
}
