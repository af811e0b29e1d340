"""The user's graph with small weights: everything else stays as it is, byte for byte."""

from __future__ import annotations

import glob
import os
import tempfile
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kruify.checkpoint import LazyTensor
from kruify.checkpoint.gates import onnx_from_torch
from kruify.checkpoint.onnx_file import OnnxFile, read_onnx
from kruify.checkpoint.onnx_in_place import DATA, OnnxCopy, dense
from kruify.checkpoint.wrapper import strip
from kruify.checkpoint.writing import move_files
from kruify.errors import CorruptError, UsageError
from kruify.factors import Structure
from kruify.graphs.contents import Contents, names_in_file, weight_names
from kruify.graphs.scan_nodes import scan_nodes

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
    scan: Container[str] = (),
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
        scan: recurrent nodes, by the names of their layers in the file, that are written as a Scan which applies their
            factors step by step; only those that `scan_nodes.refusal` has nothing against.

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
        kept = [(layer, weight) for layer, weight in group if layer not in scan or weight.part == "B"]
        made = [(weight, contents.weight(copy, layer, weight)) for layer, weight in kept]
        if any(content is not None for _, content in made):
            copy.replace_weights(
                [(weight, content or dense(weight.constant.tensor.load())) for weight, content in made]
            )
    for layer, weights in copy.found.weights.items():
        if layer in scan:
            copy.replace_node(weights["W"].node, scan_nodes(copy.found, layer, contents, copy.fresh))
    copy.drop_unread()
    target = Path(os.path.realpath(output))
    before = file_bytes(copy)
    if os.path.realpath(f"{target}{DATA}") in map(os.path.realpath, copy.found.outside):
        raise UsageError("its numbers would be written over those of the original", output, "Give another name")
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name[:100]}.", dir=target.parent) as folder:
            written = Path(folder) / target.name
            copy.save(written)
            error = _largest_error(copy, written, contents, graph, scan)
            files = sorted(Path(folder).iterdir(), key=lambda file: file == written)  # the model itself last
            after = sum(file.stat().st_size for file in files)
            move_files(files, target.parent)
    except OSError as problem:
        raise UsageError(f"it cannot be written ({problem.strerror})", output, "Check the folder") from None
    return Written(output, before, after, error)


def kept_constants(found: OnnxFile) -> list[str]:
    """Names, as patterns, of the constants beside recurrent nodes that are no large weights of MatMul, Gemm, Einsum,
    Conv or Gather: they stay as they are whatever the weights are stored in."""
    short = strip(list(found.tensors))[1]
    large = {name for name in found.matrices if found.tensors[name].numel >= LARGE}
    return [glob.escape(short[name]) for name in found.protos if name not in large]


def file_bytes(copy: OnnxCopy) -> int:
    """Bytes of a model's files."""
    return sum(file.stat().st_size for file in (copy.source, *copy.found.outside))


def _largest_error(copy: OnnxCopy, path: Path, contents: Contents, graph: bool, scan: Container[str]) -> float:
    """The largest error of a weight as another reader works it out of the written file (`Written.max_error`).

    Raises:
        CorruptError: a weight is missing or another one.
    """
    written, worst = read_onnx(path, graph), 0.0
    nodes = [(layer, weights) for layer, weights in copy.found.weights.items() if layer not in scan]
    if len(written.weights) != len(nodes):
        raise CorruptError("it has not the recurrent nodes of the original", path, "Report this as a bug")
    pairs = zip(nodes, written.weights.values(), strict=True)
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
