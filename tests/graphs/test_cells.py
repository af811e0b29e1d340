"""Cells written out in MatMul and Gemm, their weights under names that are not torch's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kruify
from kruify.conversion.storing import write_converted
from kruify.errors import CorruptError, UsageError
from kruify.search.graph_compression import compress_graph
from kruify.search.recording import NOT_RECORDED

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from small_graphs import BATCH, IN, H, lstm_step, node, run, save, weights  # noqa: E402

make = onnx.helper.make_node
EXACT = {"Wx": f"{IN}*({IN}x1,1x{4 * H})", "Wh": f"{H}*({H}x1,1x{4 * H})", "U": f"{H}*({3 * H}x1,1x{H})"}
"""Low rank of full rank, in the layout of the file."""


def cells(path: Path, *more: Any, first: str = "X", change: str = "", hidden: int = H, **constants: np.ndarray) -> Path:
    """Two steps of an LSTM by MatMul and Split that share their weights, then one of a GRU by Gemm and Slice."""
    numbers = np.random.default_rng(0)
    shapes = {"Wx": (IN, 4 * hidden), "Wh": (hidden, 4 * hidden), "b": (4 * hidden,), "U": (3 * hidden, hidden)}
    held = {name: numbers.normal(0, 0.5, shape).astype("f4") for name, shape in shapes.items()}
    held |= {"h0": np.zeros((BATCH, hidden), "f4"), "axis": np.array([0]), "last": np.array([1])}
    held |= {f"at{n}": np.array(n) for n in range(2)} | {f"to{n}": np.array([n * hidden]) for n in range(4)}
    nodes, h, c = list(more), "h0", "h0"
    for t in range(2):
        nodes += [
            make("Gather", [first, f"at{t}"], [f"x{t}"]),
            make("MatMul", [f"x{t}", "Wx"], [f"a{t}"]),
            make("MatMul", [h, "Wh"], [f"b{t}"]),
            make("Add", [f"a{t}", f"b{t}"], [f"p{t}"]),
            make("Add", [f"p{t}", "b"], [f"g{t}"]),
            *lstm_step(t, c, candidate="Relu" if change == "part" else "Tanh"),
        ]
        h, c = f"h{t + 1}", f"c{t}"
    nodes += [
        make("Gemm", [h, "U"], ["u"], transB=1),
        *(make("Slice", ["u", f"to{n}", f"to{n + 1}", "last"], [f"u{n}"]) for n in range(3)),
        make("Sigmoid", ["u0"], ["r"]),
        make("Sigmoid", ["u1"], ["z"]),
        make("Mul", ["r", "u2"], ["ru"]),
        make("Add", ["ru", h], ["rh"]),
        make("Tanh", ["rh"], ["n"]),
        make("Mul", ["z", "n"], ["zn"]),
        make("Unsqueeze", ["zn", "axis"], ["Y"]),
    ]
    if change == "read":
        nodes.append(make("Relu", ["U"], ["other"]))
    return save(path, nodes, {**held, **constants}, check=False)


@pytest.mark.parametrize(("dtype", "error"), [(None, 1e-5), ("int8", 0.05)])
def test_matrices_of_cells_become_small_under_their_own_names(tmp_path: Path, dtype: str | None, error: float) -> None:
    path, target = cells(tmp_path / "a.onnx"), tmp_path / "b.onnx"
    done = kruify.convert(path, overrides=EXACT, dtype=dtype, output=target)
    assert {m.name: m.factors for m in done.matrices} == EXACT
    onnx.checker.check_model(onnx.load(target), full_check=True)
    assert not {"Wx", "Wh", "U"} & {tensor.name for tensor in onnx.load(target).graph.initializer}
    assert done.bytes.after == target.stat().st_size
    np.testing.assert_allclose(run(target)[0], run(path)[0], atol=error)


@pytest.mark.parametrize(("change", "left"), [("", {"Wx", "Wh", "U"}), ("part", {"U"}), ("read", {"Wx", "Wh"})])
def test_a_matrix_is_of_a_cell_where_all_parts_of_its_only_products_are_activated(
    tmp_path: Path, change: str, left: set[str]
) -> None:
    path = cells(tmp_path / "a.onnx", change=change)
    assert {item.name for item in kruify.inspect(path).skipped} == left
    with pytest.raises(UsageError, match="written out in MatMul"):
        kruify.convert(path, "auto", output=tmp_path / "b.safetensors")


def test_samples_train_the_nodes_beside_and_the_matrices_of_cells_are_named(tmp_path: Path) -> None:
    layer = node("GRU", output="G", name="rnn", linear_before_reset=1)
    nodes = layer, make("Squeeze", ["G", "last"], ["S"])
    wide = np.random.default_rng(3).normal(0, 0.5, (H, 4 * 64)).astype("f4")
    path = cells(tmp_path / "a.onnx", *nodes, first="S", hidden=64, **weights("GRU"), Wx=wide)
    feeds = [{"X": np.random.default_rng(n).normal(0, 1, (5, BATCH, IN)).astype("f4")} for n in range(4)]
    found = compress_graph(path, lambda: iter(feeds), "size=5x", tmp_path / "b.onnx", steps=2)
    assert found.planned.untrained["Wh"] == found.planned.untrained["U"] == NOT_RECORDED
    assert (tmp_path / "b.onnx").stat().st_size <= path.stat().st_size / 5
    run(tmp_path / "b.onnx")


def test_a_stored_plan_with_a_matrix_of_a_graph_is_refused(tmp_path: Path) -> None:
    done = kruify.convert(cells(tmp_path / "a.onnx"), "auto", output=tmp_path / "b.onnx")
    write_converted(tmp_path / "a.safetensors", done.tensors, done.plan, {})
    with pytest.raises(CorruptError, match="matrix that no layer has"):
        kruify.load(tmp_path / "a.safetensors")
