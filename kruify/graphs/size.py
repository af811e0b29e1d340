"""Bytes of a small graph before any of its factors is known."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from kruify.checkpoint import LazyTensor
from kruify.checkpoint.onnx_file import INPUTS, Weight
from kruify.checkpoint.onnx_graph import Proto
from kruify.checkpoint.onnx_in_place import Content, OnnxCopy, dense, starts_of
from kruify.checkpoint.sparse_index import INDEX
from kruify.factors import Structure
from kruify.graphs.contents import Contents, names_in_file, weight_names
from kruify.graphs.scan_nodes import refusal, scan_nodes
from kruify.graphs.writing import file_bytes

FRAME = 6
"""Bytes around a field of a protobuf: its tag and its length."""


class GraphBytes:
    """Counts the bytes of what `write_small` would write.

    Args:
        original: the model.
        graph: as for `checkpoint.read`.
        scan: count every recurrent node that can be a Scan in the larger of its two forms.

    Attributes:
        owners: layer -> that whose weights it shares, where others that share a tensor with it come apart.
    """

    def __init__(self, original: str | os.PathLike[str], *, graph: bool = True, scan: bool = False) -> None:
        self.scan, self.owners = scan, dict[str, str]()
        self.copy = OnnxCopy(Path(original), graph)
        self.before = file_bytes(self.copy)
        self._whole = int(self.copy.model.ByteSize())
        self._gains: dict[Hashable, int | None] = {}  # None: it stays as it is
        self._scans: dict[Hashable, int] = {}
        self._outside = self.copy.outside()
        self._sources = self._found_sources()

    def of(
        self,
        planned: Mapping[str, LazyTensor],
        structures: Mapping[str, Sequence[Structure]],
        storage: Mapping[str, str],
    ) -> int:
        """Bytes of the file, or a few more: shapes and dtypes are enough.

        Args: as of `write_small`; the tensors need no numbers.
        """
        in_file = names_in_file(self.copy.found)
        structures, storage = in_file(structures), in_file(storage)
        contents = Contents(self.copy.found.tensors, _zeros(in_file(planned), structures), structures, storage)
        total, gone, small = self._whole, set[int](), set[int]()
        for name, proto in self.copy.found.protos.items():
            if name in storage or name in structures:
                key: Hashable = name, structures.get(name), storage.get(name)
                if key not in self._gains:
                    content = contents.constant(name, self.copy.found.tensors[name])
                    self._gains[key] = None if content is None else _bytes(content, name) - _size(proto)
                if (gain := self._gains[key]) is not None:
                    total += gain
                    gone.add(id(proto))
        for group in self.copy.groups():
            forms = [self._form(layer, weight, structures, storage) for layer, weight in group]
            apart = len(set(forms)) > 1
            name = max((self._name(weight, apart) for _, weight in group), key=len)
            made = dict[Hashable, int]()
            for (layer, weight), form in zip(group, forms, strict=True):
                if not (apart or form[1]):
                    continue
                key = (id(weight.node.proto), weight.part, form, apart)
                if key not in self._gains:
                    content = contents.weight(self.copy, layer, weight)
                    if content is None and apart:
                        content = dense(torch.zeros(weight.constant.tensor.shape, dtype=weight.constant.tensor.dtype))
                    self._gains[key] = None if content is None else _bytes(content, name)
                if (gain := self._gains[key]) is not None:
                    made.setdefault(form, gain)
                    small.add(id(weight))
                    total += len(name) - len(weight.node.proto.input[INPUTS[weight.part]])
            total += sum(made.values())
        for source, weights in self._sources:
            if weights <= small:
                total -= _size(source)
                gone.add(id(source))
        starts = starts_of(place for proto, place in self._outside if id(proto) not in gone)
        total += sum(self._scan_gain(layer, contents) for layer in self.copy.found.weights if self.scan)
        return total + max((start + place.length for place, start in starts.items()), default=0)

    def _scan_gain(self, layer: str, contents: Contents) -> int:
        """By how many bytes a node is larger as a Scan."""
        found = self.copy.found
        if refusal(found, layer, contents.structures) is not None:
            return 0
        names = [name for part in "WR" for name in weight_names(found, layer, part)]
        key = (layer, *((contents.structures.get(name), contents.storage.get(name)) for name in names))
        if key not in self._scans:
            folded = 0
            for part in "WR":
                weight = found.weights[layer][part]
                content, proto = contents.weight(self.copy, layer, weight), weight.constant.proto
                if content is not None:
                    folded += _bytes(content, self._name(weight))
                elif proto is not None and weight.own:
                    folded += _size(proto)
            made = scan_nodes(found, layer, contents, _fresh())
            self._scans[key] = max(0, sum(map(_size, (*made.constants, *made.nodes))) - folded)
        return self._scans[key]

    def _form(
        self, layer: str, weight: Weight, structures: Mapping[str, Sequence[Structure]], storage: Mapping[str, str]
    ) -> tuple[str | None, tuple[Hashable, ...]]:
        """Equal for weights that stay one if they were one; the second part is empty where it stays as it is."""
        names = weight_names(self.copy.found, layer, weight.part)
        form = tuple((structures.get(name), storage.get(name)) for name in names)
        return self.owners.get(layer), () if form == ((None, None),) * len(names) else form

    def _found_sources(self) -> list[tuple[Proto, set[int]]]:
        """Constants and nodes that only weights of recurrent nodes are made of, each with the ids of those weights."""
        found: dict[int, tuple[Proto, set[int]]] = {}
        for weight in (weight for group in self.copy.groups() for _, weight in group):
            constant = weight.constant
            protos = [constant.proto, *(source.made_by for source in constant.leaves)]
            taken = [proto for proto in protos if id(proto) in self.copy.found.taken]
            nodes = [node.proto for node in constant.nodes if node.key in self.copy.found.computing]
            for proto in (*taken, *nodes):
                found.setdefault(id(proto), (proto, set()))[1].add(id(weight))
        return list(found.values())

    def _name(self, weight: Weight, apart: bool = False) -> str:
        """What the weight is called, or a name as long as it may get.

        Args: apart: from others that it was one tensor with.
        """
        proto = weight.constant.proto
        return (
            self.copy.home(proto)[1]
            if proto is not None and weight.own and not apart
            else f"{weight.node.path}.{weight.part}"
        )


def _bytes(content: Content, name: str) -> int:
    made = content.make(name, 1 << 20, _fresh())
    return sum(map(_size, (*made.constants, *made.nodes)))


def _fresh() -> Callable[[str], str]:
    names: Counter[str] = Counter()

    def fresh(stem: str) -> str:
        names[stem] += 1
        return f"{stem}_{names[stem]}" if names[stem] > 1 else stem

    return fresh


def _size(proto: Proto) -> int:
    return int(proto.ByteSize()) + FRAME


def _zeros(tensors: Mapping[str, LazyTensor], structures: Mapping[str, Sequence[Structure]]) -> dict[str, LazyTensor]:
    """The tensors with zeros for numbers; blocks of a sparse residual lie where their places take the most bytes."""

    def of(name: str, tensor: LazyTensor) -> LazyTensor:
        if name.endswith(INDEX) and (found := structures.get(name.removesuffix(INDEX))):
            height = max(s.block for s in found if s.sparse_blocks)
            cells = sum(s.rows for s in found) // height * found[0].cols
            return replace(tensor, load=lambda: _last_cells(tensor.shape[0], cells, found[0].cols, height))
        return replace(tensor, load=lambda: torch.zeros(tensor.shape, dtype=tensor.dtype))

    return {name: of(name, tensor) for name, tensor in tensors.items()}


def _last_cells(blocks: int, cells: int, cols: int, height: int) -> Tensor:
    cell = torch.arange(cells - blocks, cells)
    return torch.stack([cell // cols * height, cell % cols], 1).int()
