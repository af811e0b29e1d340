"""A small writer of ONNX graphs: nodes, constants, names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kruify.checkpoint.onnx_constants import tensor_proto


class Graph:
    """Nodes in order of execution. Names of values are strings; every method returns the name of what it computes.

    A body of a Scan is a graph too: it shares the constants of its parent and the supply of names.

    Args:
        fresh: stem -> a name that no other value has, where nodes are added to a model that has names already.
    """

    def __init__(self, parent: Graph | None = None, fresh: Callable[[str], str] | None = None) -> None:
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = parent.constants if parent else {}
        self._names: Counter[str] = parent._names if parent else Counter()
        self._ints: dict[int | tuple[int, ...], str] = parent._ints if parent else {}
        self._fresh: Callable[[str], str] | None = parent._fresh if parent else fresh

    def fresh(self, stem: str) -> str:
        """A name that no other value has."""
        if self._fresh is not None:
            return self._fresh(stem)
        number = self._names[stem]
        self._names[stem] += 1
        return f"{stem}_{number}" if number else stem

    def constant(self, value: Tensor | NDArray[Any], stem: str) -> str:
        """A weight, stored once in the main graph."""
        name = self.fresh(stem)
        tensor = value if isinstance(value, Tensor) else torch.from_numpy(np.ascontiguousarray(value))
        self.constants[name] = tensor_proto(tensor, name)
        return name

    def ints(self, values: Sequence[int]) -> str:
        """A shape or a list of axes; equal ones are stored once."""
        key = tuple(values)
        if key not in self._ints:
            stem = "ints_" + "_".join(map(str, values)).replace("-", "m")
            self._ints[key] = self.constant(np.array(values, dtype=np.int64), stem)
        return self._ints[key]

    def scalar(self, value: int) -> str:
        """A whole number without dimensions; equal ones are stored once."""
        if value not in self._ints:
            self._ints[value] = self.constant(torch.tensor(value), f"index_{value}")
        return self._ints[value]

    def add(self, op: str, *inputs: str, out: str | None = None, **attributes: Any) -> str:
        """A node with one output, named `out` or like the operator."""
        return self.add_many(op, *inputs, outputs=[out or self.fresh(op.lower())], **attributes)[0]

    def add_many(self, op: str, *inputs: str, outputs: Sequence[str], **attributes: Any) -> list[str]:
        from onnx import helper

        self.nodes.append(helper.make_node(op, list(inputs), list(outputs), **attributes))
        return list(outputs)

    def reshape(self, x: str, shape: Sequence[int]) -> str:
        """0 keeps a size, -1 is what is left over."""
        return self.add("Reshape", x, self.ints(shape))

    def split(self, x: str, sizes: Sequence[int], axis: int = -1) -> list[str]:
        names = [self.fresh("part") for _ in sizes]
        return self.add_many("Split", x, self.ints(sizes), outputs=names, axis=axis)

    def concat(self, parts: Sequence[str], axis: int) -> str:
        return parts[0] if len(parts) == 1 else self.add("Concat", *parts, axis=axis)

    def sum(self, parts: Sequence[str]) -> str:
        total = parts[0]
        for part in parts[1:]:
            total = self.add("Add", total, part)
        return total

    def rename(self, value: str, name: str) -> None:
        """Gives a value the name that the outside knows."""
        self.add("Identity", value, out=name)
