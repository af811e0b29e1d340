"""What the weights of a graph become: constants, and operators that compute them of what is stored."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from kruify.checkpoint import LazyTensor
from kruify.checkpoint.gates import ONNX_PARTS, ORDER
from kruify.checkpoint.integers import SCALE
from kruify.checkpoint.onnx_file import OnnxFile, Weight
from kruify.checkpoint.onnx_in_place import Content, Made, OnnxCopy, dense, dense_weight
from kruify.checkpoint.stored import decode, encode
from kruify.checkpoint.summed_biases import in_full
from kruify.checkpoint.wrapper import strip
from kruify.checkpoint.writing import as_bytes, tensor_bytes
from kruify.factors import Structure
from kruify.graphs.folded import ELEMENTS, Folder, Matrix, Stored
from kruify.graphs.nodes import Graph
from kruify.layers import KroneckerMatrix
from kruify.layers.matrix import exact

T = TypeVar("T")


class Contents:
    """What the weights of a model become."""

    def __init__(
        self,
        original: Mapping[str, LazyTensor],
        tensors: Mapping[str, Tensor | LazyTensor],
        structures: Mapping[str, Sequence[Structure]],
        storage: Mapping[str, str],
    ) -> None:
        storage = in_full(storage)  # a node's B holds both biases
        self.structures, self.storage = structures, storage
        sizes = {name: (sum(s.rows for s in found), found[0].cols) for name, found in structures.items()}
        kept = {name: tensor for name, tensor in original.items() if name not in structures}
        self.stored = encode({**kept, **tensors}, storage, sizes, packed=False)
        self.rounded = decode(self.stored, storage, sizes, "the converted weights")

    def constant(self, name: str, old: LazyTensor) -> Content | None:
        """Of a constant beside the recurrent nodes; None where it stays. A Kronecker matrix is one that a cell written
        out in MatMul or Gemm has under torch's name, in torch's order."""
        if name in self.structures:
            matrix = self.held(name)
            assert isinstance(matrix, Matrix)
            places = range(sum(s.gates for s in matrix.structures))

            def add(folder: Folder) -> str:
                return folder.reshape(folder.matrix(matrix, places), old.shape)

            return _folded((matrix.structures, _digest(matrix.entries)), old.dtype, add)
        scale = self.stored.get(name + SCALE)
        if scale is None:
            return self._constant(self.stored[name].load(), old)
        stored = Stored(self.stored[name].load(), scale.load())
        return _folded(name, old.dtype, lambda folder: folder.value(stored))

    def weight(self, copy: OnnxCopy, layer: str, weight: Weight) -> Content | None:
        """Of a weight of a recurrent node; None where it stays."""
        names = weight_names(copy.found, layer, weight.part)
        old = weight.constant.tensor
        if not any(name in self.structures or name + SCALE in self.stored for name in names):
            new = dense_weight(copy.found, layer, weight, {name: self.stored[name] for name in names})
            return self._constant(new, old)
        kind = str(copy.found.hints[layer].options["mode"]).lower()

        def add(folder: Folder) -> str:
            held = map(self.held, names)
            parts = [
                folder.matrix(one, ORDER["onnx", kind]) if isinstance(one, Matrix) else folder.dense(one, kind)
                for one in held
            ]
            return folder.graph.concat(parts, 0)

        key = tuple((self.structures.get(name), _digest(self._entries(name))) for name in names)
        return _folded(key, old.dtype, add)

    def held(self, name: str) -> Matrix | Stored:
        """A weight as it is stored, the gates in torch's order; a dense one is (gates * rows, cols)."""
        entries = self._entries(name)
        if name in self.structures:
            return Matrix(self.structures[name], entries)
        return Stored(entries[""], entries.get(SCALE[1:]))

    def dense(self, name: str) -> Tensor:
        """A weight as one matrix, as it is stored; a Kronecker matrix worked out in float64."""
        if name not in self.structures:
            return self.rounded[name].load()
        dot = f"{name}."
        matrix = KroneckerMatrix(self.structures[name], dtype=torch.float64)
        matrix.load_state_dict({n.removeprefix(dot): t.load() for n, t in self.rounded.items() if n.startswith(dot)})
        return exact(matrix)

    def _constant(self, new: Tensor, old: LazyTensor) -> Content | None:
        """Numbers without scales, in a narrower dtype or in that of the old ones; None where they are the old ones."""
        if new.dtype.itemsize < old.dtype.itemsize:
            return _folded(dense(new).key, old.dtype, lambda folder: folder.value(Stored(new)))
        new = new.to(old.dtype)
        return None if torch.equal(as_bytes(new), as_bytes(old.load())) else dense(new)

    def _entries(self, weight: str) -> dict[str, Tensor]:
        """The stored tensors of a weight by their names in it, "" for a dense one itself."""
        dot = f"{weight}."
        return {
            name[len(dot) :]: tensor.load()
            for name, tensor in self.stored.items()
            if name == weight or name.startswith(dot)
        }


def names_in_file(found: OnnxFile) -> Callable[[Mapping[str, T]], dict[str, T]]:
    """A function that puts the names in the file in the place of those that `checkpoint.read` gives."""
    full = {short: name for name, short in strip(list(found.tensors))[1].items()}

    def rename(name: str) -> str:
        weight = name
        while weight and weight not in full:
            weight = weight.rpartition(".")[0]
        return full.get(weight, weight) + name[len(weight) :]

    return lambda by_name: {rename(name): value for name, value in by_name.items()}


def names_as_read(found: OnnxFile) -> dict[str, str]:
    """Recurrent layers in the file -> what `checkpoint.read` calls them."""
    short, weight = strip(list(found.tensors))[1], ".weight_hh_l0"
    return {layer: short[layer + weight].removesuffix(weight) for layer in found.weights}


def weight_names(found: OnnxFile, layer: str, part: str) -> list[str]:
    """torch's names of what is in the W, R or B of a recurrent node, one direction after the other."""
    directions = ("_l0", "_l0_reverse")[: 1 + bool(found.hints[layer].options["bidirectional"])]
    return [f"{layer}.{stem}{suffix}" for stem in ONNX_PARTS[part] for suffix in directions]


def _folded(key: Hashable, dtype: torch.dtype, add: Callable[[Folder], str]) -> Content:
    """A content of what `add` adds."""

    def make(name: str, opset: int, fresh: Callable[[str], str]) -> Made:
        graph = Graph(fresh=lambda stem: fresh(f"{name}/{stem}"))
        folder = Folder(graph, opset, torch.float64 if dtype == torch.float64 else torch.float32)
        value = add(folder)
        if dtype != folder.work:
            value = folder.add("Cast", value, to=ELEMENTS[dtype])
        if not graph.nodes:
            graph.rename(value, name)
        graph.nodes[-1].output[0] = name  # the last node computes the value
        return Made(list(graph.constants.values()), graph.nodes)

    return Content(key, make)


def _digest(entries: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in entries.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
