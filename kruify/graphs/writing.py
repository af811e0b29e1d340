"""The user's graph with small weights: everything else stays as it is, byte for byte."""

from __future__ import annotations

import glob
import hashlib
import os
import tempfile
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from kruify.checkpoint import LazyTensor
from kruify.checkpoint.gates import ONNX_PARTS, ORDER, onnx_from_torch
from kruify.checkpoint.onnx_file import OnnxFile, Weight, read_onnx
from kruify.checkpoint.onnx_in_place import DATA, Content, Made, OnnxCopy, dense, dense_weight
from kruify.checkpoint.stored import SCALE, decode, encode
from kruify.checkpoint.wrapper import strip
from kruify.checkpoint.writing import as_bytes, tensor_bytes
from kruify.errors import CorruptError, UsageError
from kruify.factors import Structure
from kruify.graphs.folded import ELEMENTS, Folder, Stored
from kruify.graphs.nodes import Graph
from kruify.layers import KroneckerMatrix
from kruify.layers.matrix import exact

T = TypeVar("T")
LARGE = 1024
"""Numbers of a constant from which on Cast, Mul and scales take less than eight bits save."""
TOLERANCE = 1e-5
"""Of a weight that a runtime works out in float32, relative to its largest entry."""


@dataclass(frozen=True)
class Written:
    """A graph that was written.

    Attributes:
        path: the file.
        bytes_before, bytes_after: of the whole files.
        max_error: largest difference of a weight that the file computes from the one that it stands for, relative to
            the largest entry of the weight.
    """

    path: Path
    bytes_before: int
    bytes_after: int
    max_error: float


def write_small(
    original: str | os.PathLike[str],
    tensors: Mapping[str, Tensor | LazyTensor],
    structures: Mapping[str, Sequence[Structure]],
    storage: Mapping[str, str],
    output: str | os.PathLike[str],
    *,
    graph: bool = True,
) -> Written:
    """Writes a copy of an ONNX model in which weights are small: constants and standard operators that a runtime folds.

        done = kruify.convert("model.onnx", "stacked:8*(1024x1,1x256)", dtype="int8", output="small.kru.safetensors")
        write_small("model.onnx", done.tensors, done.plan.structures(), done.storage, "small.onnx")

    Args:
        original: the model.
        tensors: by the names that `checkpoint.read(original, graph=graph)` gives; Kronecker matrices by their entries,
            as `Conversion.tensors` has them. What is left out, or equal, stays as it is.
        structures: full name of every Kronecker matrix -> its structures (`Plan.matrices`).
        storage: weight -> dtype, as `Conversion.storage`: "int8", "float16", "bfloat16".
        output: the file to write.
        graph: as for `checkpoint.read`.

    Raises:
        UnsupportedError: an opset that is too old, or weights computed in a function that is called several times.
        CorruptError: the written file does not hold what was asked for.
    """
    original, output = Path(original), Path(output)
    copy = OnnxCopy(original, graph)
    in_file = names_in_file(copy.found)
    contents = Contents(copy.found.tensors, in_file(tensors), in_file(structures), in_file(storage))
    for name, proto in copy.found.protos.items():
        if (content := contents.constant(name, copy.found.tensors[name])) is not None:
            copy.replace(proto, content)
    for group in copy.groups():
        made = [(weight, contents.weight(copy, layer, weight)) for layer, weight in group]
        if any(content is not None for _, content in made):
            copy.replace_weights(
                [(weight, content or dense(weight.constant.tensor.load())) for weight, content in made]
            )
    copy.drop_unread()
    target = Path(os.path.realpath(output))
    before = file_bytes(copy)
    if os.path.realpath(f"{target}{DATA}") in map(os.path.realpath, copy.found.outside):
        raise UsageError("its numbers would be written over those of the original", output, "Give another name")
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name[:100]}.", dir=target.parent) as folder:
            written = Path(folder) / target.name
            copy.save(written)
            error = _largest_error(copy, written, contents, graph)
            files = sorted(Path(folder).iterdir(), key=lambda file: file == written)  # the model itself last
            after = sum(file.stat().st_size for file in files)
            for file in files:
                os.replace(file, target.with_name(file.name))
    except OSError as problem:
        raise UsageError(f"it cannot be written ({problem.strerror})", output, "Check the folder") from None
    return Written(output, before, after, error)


def kept_constants(found: OnnxFile) -> list[str]:
    """Names, as patterns, of the constants beside recurrent nodes that are no large weights of MatMul, Gemm, Einsum,
    Conv or Gather: they stay as they are whatever the weights are stored in."""
    short = strip(list(found.tensors))[1]
    large = {name for name in found.matrices if found.tensors[name].numel >= LARGE}
    return [glob.escape(short[name]) for name in found.protos if name not in large]


class Contents:
    """What the weights of a model become."""

    def __init__(
        self,
        original: Mapping[str, LazyTensor],
        tensors: Mapping[str, Tensor | LazyTensor],
        structures: Mapping[str, Sequence[Structure]],
        storage: Mapping[str, str],
    ) -> None:
        self.structures = structures
        sizes = {name: (sum(s.rows for s in found), found[0].cols) for name, found in structures.items()}
        kept = {name: tensor for name, tensor in original.items() if name not in structures}
        self.stored = encode({**kept, **tensors}, storage, sizes)
        self.rounded = decode(self.stored, storage, sizes, "the converted weights")

    def entries(self, matrix: str) -> dict[str, Tensor]:
        """The stored tensors of a Kronecker matrix by their names in it."""
        dot = f"{matrix}."
        return {name.removeprefix(dot): t.load() for name, t in self.stored.items() if name.startswith(dot)}

    def constant(self, name: str, old: LazyTensor) -> Content | None:
        """Of a constant beside the recurrent nodes; None where it stays. A Kronecker matrix is one that a cell written
        out in MatMul or Gemm has under torch's name, in torch's order."""
        if name in self.structures:
            entries, structures = self._entries(name), self.structures[name]
            places = range(sum(s.gates for s in structures))

            def add(folder: Folder) -> str:
                return folder.reshape(folder.matrix(entries, structures, places), old.shape)

            return _folded((structures, _digest(entries)), old.dtype, add)
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
        found = {name: self._entries(name) for name in names}

        def add(folder: Folder) -> str:
            parts = [
                folder.matrix(entries, self.structures[name], ORDER["onnx", kind])
                if name in self.structures
                else folder.dense(Stored(self.stored[name].load(), entries.get(SCALE[1:])), kind)
                for name, entries in found.items()
            ]
            return folder.graph.concat(parts, 0)

        key = tuple((self.structures.get(name), _digest(entries)) for name, entries in found.items())
        return _folded(key, old.dtype, add)

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


def file_bytes(copy: OnnxCopy) -> int:
    """Bytes of a model's files."""
    return sum(file.stat().st_size for file in (copy.source, *copy.found.outside))


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


def _largest_error(copy: OnnxCopy, path: Path, contents: Contents, graph: bool) -> float:
    """The largest error of a weight as another reader works it out of the written file (`Written.max_error`).

    Raises:
        CorruptError: a weight is missing or another one.
    """
    written, worst = read_onnx(path, graph), 0.0
    if len(written.weights) != len(copy.found.weights):
        raise CorruptError("it has not the recurrent nodes of the original", path, "Report this as a bug")
    pairs = zip(copy.found.weights.items(), written.weights.values(), strict=True)
    for layer, part, weight in [(layer, part, new[part]) for (layer, old), new in pairs for part in old]:
        names = weight_names(copy.found, layer, part)
        kind = str(copy.found.hints[layer].options["mode"]).lower()
        values = {name.removeprefix(f"{layer}."): contents.dense(name) for name in names}
        wanted = onnx_from_torch(kind, part, values, weight.constant.tensor.shape[0]).double()
        found = weight.constant.tensor.load()
        error = float((found.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))
        worst = max(worst, error)
        if not error <= max(TOLERANCE, torch.finfo(found.dtype).eps):
            raise CorruptError(f"its {part} of {layer} is off by {error:.2g}", path, "Report this as a bug")
    return worst
