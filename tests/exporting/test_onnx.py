"""ONNX files against torch.nn's own layers: the oracle shares no code with the export."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from all_pairs import all_pairs
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import kruify
from kruify.conversion import densify
from kruify.errors import TargetMissedError, UsageError
from kruify.exporting import export_onnx
from kruify.exporting.check import compare
from kruify.graphs.product import application_order

SIZES = ((1, 1), (6, 3), (11, 2))  # (time, batch)


def run_dense(dense: nn.Module, x: Tensor, states: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        output, final = dense(x, states[0] if len(states) == 1 else tuple(states))
    return [output, *(final if isinstance(final, tuple) else (final,))]


def check(path: Path, dense: Any, tolerance: float = 1e-5) -> None:
    """The file, fed by name, computes what the dense layer of torch.nn computes."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    rows = dense.num_layers * (2 if dense.bidirectional else 1)
    dtype = dense.weight_ih_l0.dtype
    for steps, batch in SIZES:
        x = torch.randn(batch, steps, dense.input_size, dtype=dtype)
        x = x if dense.batch_first else x.transpose(0, 1).contiguous()
        states = [torch.randn(rows, batch, dense.proj_size or dense.hidden_size, dtype=dtype)]
        if isinstance(dense, nn.LSTM):
            states.append(torch.randn(rows, batch, dense.hidden_size, dtype=dtype))
        feed = {"input": x, "h_0": states[0]} | ({"c_0": states[1]} if len(states) > 1 else {})
        got = session.run(None, {name: value.numpy() for name, value in feed.items()})
        for a, b in zip(got, run_dense(dense, x, states), strict=True):
            np.testing.assert_allclose(a, b.numpy(), atol=tolerance)


@pytest.mark.parametrize(
    ("kind", "layers", "bidirectional", "batch_first", "bias", "dense_nodes"),
    all_pairs(
        kind=(nn.LSTM, nn.GRU, nn.RNN), layers=(1, 2), bidirectional=(False, True), batch_first=(False, True),
        bias=(False, True), dense_nodes=(False, True),
    ),
)  # fmt: skip
def test_round_trip(
    tmp_path: Path, kind: Any, layers: int, bidirectional: bool, batch_first: bool, bias: bool, dense_nodes: bool
) -> None:
    options = {"num_layers": layers, "bidirectional": bidirectional, "batch_first": batch_first, "bias": bias}
    model, _ = kruify.convert(kind(6, 8, **options), "2*(4x2,2x4)")
    exported = export_onnx(model, tmp_path / "layer.onnx", dense=dense_nodes)
    check(exported.path, densify(model))
    assert exported.difference < 1e-5 and exported.cases == 15
    ops = {node.op_type for node in onnx.load(exported.path).graph.node}
    assert ("Scan" in ops) is not dense_nodes
    assert (kind.__name__ in ops) is dense_nodes


@pytest.mark.parametrize("dense_nodes", [False, True])
def test_projection(tmp_path: Path, dense_nodes: bool) -> None:
    model, _ = kruify.convert(nn.LSTM(5, 8, 2, proj_size=4), "4x2,2x2+diag")
    check(export_onnx(model, tmp_path / "layer.onnx", dense=dense_nodes).path, densify(model))


@pytest.mark.parametrize(
    ("kind", "batch_first", "dense_nodes", "options"),
    [
        (nn.LSTM, True, False, {}),
        (nn.GRU, False, False, {}),
        (nn.RNN, True, False, {"nonlinearity": "relu"}),
        (nn.LSTM, False, True, {}),
        (nn.GRU, True, True, {}),
        (nn.RNN, False, True, {}),
        (nn.LSTM, True, True, {"proj_size": 4}),
    ],
)
def test_padded_sequences(tmp_path: Path, kind: Any, batch_first: bool, dense_nodes: bool, options: dict) -> None:
    """torch's packed sequences are the oracle; what stands in the padding must not matter. A sequence of no steps,
    which torch does not pack, keeps its states."""
    model, _ = kruify.convert(kind(6, 8, 2, bidirectional=True, batch_first=batch_first, **options), "auto")
    exported = export_onnx(model, tmp_path / "layer.onnx", dense=dense_nodes)
    assert exported.optional == ("lengths",) and exported.outputs[0] == "output"
    session = onnxruntime.InferenceSession(str(exported.path), providers=["CPUExecutionProvider"])
    dense, steps, lengths = densify(model), 5, torch.tensor([2, 5, 1, 0])
    x = torch.randn(4, steps, 6)
    for row, length in enumerate(lengths):
        x[row, length:] = float("nan")
    x = x if batch_first else x.transpose(0, 1).contiguous()
    states = [torch.randn(4, 4, options.get("proj_size", 8))] + ([torch.randn(4, 4, 8)] if kind is nn.LSTM else [])
    packed = pack_padded_sequence(x[:3] if batch_first else x[:, :3], lengths[:3], batch_first, enforce_sorted=False)
    with torch.no_grad():
        y, final = dense(packed, tuple(s[:, :3] for s in states) if len(states) > 1 else states[0][:, :3])
    output = pad_packed_sequence(y, batch_first)[0]
    final = final if isinstance(final, tuple) else (final,)
    finals = [torch.cat([a, b[:, 3:]], 1) for a, b in zip(final, states, strict=True)]
    wanted = [F.pad(output, (0, 0, 0, 0, 0, 1) if batch_first else (0, 0, 0, 1)), *finals]
    feed = dict(zip([*exported.inputs, *exported.optional], [x, *states, lengths], strict=True))
    got = session.run(None, {name: value.numpy() for name, value in feed.items()})
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b.numpy(), atol=1e-5)


def test_a_length_beyond_the_steps_is_an_error(tmp_path: Path) -> None:
    exported = export_onnx(nn.GRU(3, 4, bidirectional=True), tmp_path / "layer.onnx")
    session = onnxruntime.InferenceSession(str(exported.path), providers=["CPUExecutionProvider"])
    feed = {"input": np.ones((2, 1, 3), "f4"), "h_0": np.zeros((2, 1, 4), "f4"), "lengths": np.array([3])}
    with pytest.raises(Exception, match="length"):
        session.run(None, feed)


def test_a_layer_that_amplifies_rounding_is_compared_by_what_rounding_does_to_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = nn.RNN(6, 32)
    for parameter in dense.parameters():
        parameter.data *= 8
    model, _ = kruify.convert(dense, "32*(32x1,1x32)")
    x, h = torch.randn(19, 2, 6), torch.randn(1, 2, 32)
    with torch.no_grad():
        exact = copy.deepcopy(dense).double()(x.double(), h.double())[0]
        assert (dense(x, h)[0] - exact).abs().max() > 1e-4  # torch's own layer in float32 is no nearer
    for dense_nodes in (False, True):
        assert export_onnx(model, tmp_path / "a.onnx", dense=dense_nodes).difference < 1e-5
    session = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"), providers=["CPUExecutionProvider"])
    model.weight_hh_l0.terms[0].factors[0].data *= 1 + 1e-3
    wrong = [torch.from_numpy(a) for a in session.run(None, {"input": x[:1].numpy(), "h_0": h.numpy()})]
    exact_model = copy.deepcopy(model).double()
    found, _ = compare(lambda case: wrong, lambda case: model(*case), [[x[:1], h]], lambda case: exact_model(*case))
    assert found > 1e-5


def test_relu(tmp_path: Path) -> None:
    model, _ = kruify.convert(nn.RNN(5, 8, nonlinearity="relu"), "auto")
    check(export_onnx(model, tmp_path / "a.onnx").path, densify(model))
    check(export_onnx(model, tmp_path / "b.onnx", dense=True).path, densify(model))


@pytest.mark.parametrize(
    "spec",
    [
        "2x2",
        "2x4,4x1,1x2",
        "3*(8x1,1x8)",
        "2*(1x8,8x1)",
        "1x8,8x1",
        "8x8",
        "2*(2x2)+3*(8x1,1x8)+diag+sparse:10%",
        "sparse:20%:2",
        "diag",
        "stacked:3*(24x1,1x8)+sparse:10%",
        "stacked:2*(12x2,2x4)",
        "stacked:6x2,2x2,2x2",
    ],
)
def test_every_structure(tmp_path: Path, spec: str) -> None:
    model, _ = kruify.convert(nn.GRU(6, 8), spec)
    check(export_onnx(model, tmp_path / "layer.onnx").path, densify(model))


def test_gates_of_different_structure_and_input_factors(tmp_path: Path) -> None:
    overrides = {"weight_hh_l0.f": "diag", "weight_hh_l0.g": "2*(4x2,2x4)+2x2", "weight_hh_l0.i": "sparse:10%"}
    model, _ = kruify.convert(nn.LSTM(6, 8), "2*(8x1,1x8)", input_factors="4x3,2x2+diag", overrides=overrides)
    check(export_onnx(model, tmp_path / "layer.onnx").path, densify(model))


def test_one_matrix_dense_the_other_factored(tmp_path: Path) -> None:
    model, _ = kruify.convert(nn.LSTM(6, 8, 2), "auto", skip=["weight_hh_l1"])
    exported = export_onnx(model, tmp_path / "layer.onnx")
    check(exported.path, densify(model))
    assert {"Scan", "LSTM"} <= {node.op_type for node in onnx.load(exported.path).graph.node}


def test_float64_keeps_its_precision(tmp_path: Path) -> None:
    model, _ = kruify.convert(nn.LSTM(6, 8).double(), "2*(4x2,2x4)")
    check(export_onnx(model, tmp_path / "layer.onnx").path, densify(model), tolerance=1e-12)


def test_half_precision_is_written_in_float32(tmp_path: Path) -> None:
    model, _ = kruify.convert(nn.GRU(6, 8).to(torch.bfloat16), "auto")
    exported = export_onnx(model, tmp_path / "layer.onnx")
    assert exported.widened == ("bfloat16",)
    check(exported.path, densify(model.float()))


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells_are_one_step(tmp_path: Path, kind: Any) -> None:
    cell = kind(5, 8)
    model, _ = kruify.convert(cell, "8x8")
    exported = export_onnx(model, tmp_path / "cell.onnx")
    session = onnxruntime.InferenceSession(str(exported.path), providers=["CPUExecutionProvider"])
    x, h, c = torch.randn(3, 5), torch.randn(3, 8), torch.randn(3, 8)
    states = [h, c] if kind is nn.LSTMCell else [h]
    feed = {value.name: t.numpy() for value, t in zip(session.get_inputs(), [x, *states], strict=True)}
    with torch.no_grad():
        wanted = cell(x, (h, c) if len(states) == 2 else h)
    for a, b in zip(session.run(None, feed), wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
        np.testing.assert_allclose(a, b.numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "numbers"),
    [("8x8,8x8", 4 * 2 * 64), ("stacked:3*(256x1,1x64)", 3 * (256 + 64)), ("stacked:2*(32x8,8x8)", 2 * (256 + 64))],
)
def test_the_factors_are_what_is_stored(tmp_path: Path, spec: str, numbers: int) -> None:
    """The recurrent matrix must not appear in full, nor a factor once for every gate that shares it."""
    model, _ = kruify.convert(nn.LSTM(4, 64), spec)
    proto = onnx.load(export_onnx(model, tmp_path / "layer.onnx").path)
    sizes = {t.name: int(np.prod(t.dims)) for t in proto.graph.initializer}
    assert sum(size for name, size in sizes.items() if "weight_hh" in name) == numbers
    assert max(sizes.values()) == 4 * 64 * 4  # weight_ih


def test_the_layer_given_is_left_as_it_is(tmp_path: Path) -> None:
    model, _ = kruify.convert(nn.LSTM(4, 8).double(), "auto")
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export_onnx(model, tmp_path / "layer.onnx", dense=True)
    assert model.training and all(torch.equal(before[n], v) for n, v in model.state_dict().items())


def test_a_file_that_differs_is_deleted(tmp_path: Path) -> None:
    model, _ = kruify.convert(nn.LSTM(4, 8), "auto")
    with pytest.raises(TargetMissedError, match="differs"):
        export_onnx(model, tmp_path / "layer.onnx", tolerance=0.0)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_recurrent_layer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Linear"):
        export_onnx(nn.Linear(3, 3), tmp_path / "layer.onnx")
    with pytest.raises(UsageError, match="cannot be written"):
        export_onnx(nn.LSTM(3, 3), tmp_path / "missing" / "layer.onnx")


def test_order_of_factors() -> None:
    assert application_order([(8, 1), (1, 8)]) == [1, 0]
    assert application_order([(1, 8), (8, 1)]) == [0, 1]
    assert application_order([(4, 4), (4, 4), (4, 4)]) == [2, 1, 0]


def test_factors_are_timed_beside_dense_weights(tmp_path: Path) -> None:
    layer = kruify.KRULSTM(8, 16, factors="2*(16x1,1x16)+sparse:10%")
    written = export_onnx(layer, tmp_path / "layer.onnx")
    assert written.beside_dense is not None and written.beside_dense.timing is not None
    assert written.beside_dense.difference < 1e-5  # both are the same layer
    assert written.to_json()["beside_dense"]["run_ms"] == written.beside_dense.timing.run_ms
    for other, dense in ((layer, True), (nn.LSTM(8, 16), False)):
        assert export_onnx(other, tmp_path / "other.onnx", dense=dense).beside_dense is None
