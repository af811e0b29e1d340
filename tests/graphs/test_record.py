"""What recurrent nodes of an ONNX graph are called with, and how far outputs are apart; against numpy and torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kruify.errors import UsageError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
import small_graphs  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from kruify.checkpoint.onnx_file import read_onnx  # noqa: E402
from kruify.checkpoint.onnx_session import cpu_session  # noqa: E402
from kruify.graphs.difference import DifferenceSums  # noqa: E402
from kruify.graphs.record import RecordingGraph, recurrent_nodes  # noqa: E402

F, H, D = 3, 4, 2


def write(path: Path) -> Path:
    """An LSTM of two directions on twice its input, with lengths and an initial h, then a GRU without more; the first
    has no sequence output of its own that anything reads."""
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.standard_normal((D, 4 * H, F)),
        "r": rng.standard_normal((D, 4 * H, H)),
        "w2": rng.standard_normal((1, 3 * H, D * H)),
        "r2": rng.standard_normal((1, 3 * H, H)),
        "two": np.array(2.0),
        "h0": rng.standard_normal((D, 2, H)),
    }
    axes = numpy_helper.from_array(np.array([0, 0, D * H]), "shape")
    nodes = [
        helper.make_node("Mul", ["x", "two"], ["doubled"]),
        helper.make_node(
            "LSTM",
            ["doubled", "w", "r", "", "lengths", "h0"],
            ["y"],
            name="first",
            hidden_size=H,
            direction="bidirectional",
        ),
        helper.make_node("Transpose", ["y"], ["turned"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["turned", "shape"], ["flat"]),
        helper.make_node(
            "GRU", ["flat", "w2", "r2"], ["", "last"], name="second", hidden_size=H, linear_before_reset=1
        ),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["time", 2, F]),
            helper.make_tensor_value_info("lengths", TensorProto.INT32, [2]),
        ],
        [helper.make_tensor_value_info("last", TensorProto.FLOAT, [1, 2, H])],
        [*(numpy_helper.from_array(v.astype(np.float32), n) for n, v in weights.items()), axes],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))
    return path


def test_calls_are_recorded_beside_the_outputs(tmp_path: Path) -> None:
    path = write(tmp_path / "model.onnx")
    nodes = recurrent_nodes(read_onnx(path))
    assert nodes == {"first": "y", "second": "last"}
    feed = {"x": np.random.default_rng(1).standard_normal((5, 2, F)), "lengths": np.array([3, 5])}  # float64, int64
    _, outputs, calls, values = RecordingGraph(path, nodes.values(), values=["turned"]).run(feed)
    assert list(outputs) == ["last"] and outputs["last"].shape == (1, 2, H)
    assert list(values) == ["turned"] and values["turned"].shape == (5, 2, D, H)
    (first,), (second,) = calls["y"], calls["last"]
    np.testing.assert_allclose(first.input.numpy(), 2 * feed["x"], rtol=1e-6)
    assert first.lengths.tolist() == [3, 5] and second.lengths.tolist() == [5, 5]
    h, c = first.states
    assert h is not None and h.shape == (D, 2, H) and c is None and second.states == (None,)
    assert second.input.shape == (5, 2, D * H) and not second.input[3:, 0].any()  # padding gives zeros
    _, again, calls, _ = RecordingGraph(path, ["y"], outputs=False).run(feed)
    assert again == {} and calls["y"][0].input.equal(first.input)


@pytest.mark.parametrize(
    ("feed", "message"),
    [
        ({"x": np.zeros((5, 2, F))}, "lacks the input 'lengths' \\(it has x\\)"),
        (
            {"x": np.zeros((5, 2, F)), "lengths": np.array([1.5, 2.0])},
            "'lengths' takes int32, and a sample has float64",
        ),
        ({"x": np.zeros((5, 2, F + 1)), "lengths": np.array([5, 5])}, "cannot be run on the sample"),
    ],
)
def test_a_sample_that_does_not_fit_is_refused(tmp_path: Path, feed: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RecordingGraph(write(tmp_path / "model.onnx")).run(feed)


def test_differences_are_added_up_over_samples() -> None:
    comparison = DifferenceSums()
    comparison.add({"y": np.array([[3.0, 1.0], [0.0, 2.0]])}, {"y": np.array([[3.0, 1.5], [0.0, 2.0]])})
    comparison.add({"y": np.array([[1.0, 0.0]])}, {"y": np.array([[0.0, 1.0]])})
    found = comparison.differences()["y"]
    assert found.relative_error == pytest.approx((2.25 / 15) ** 0.5)
    assert found.snr_db == pytest.approx(10 * np.log10(15 / 2.25))
    assert found.agreement == pytest.approx(2 / 3)


def test_a_node_that_is_given_nothing_but_inputs_of_the_graph(tmp_path: Path) -> None:
    path = small_graphs.save(tmp_path / "a.onnx", [small_graphs.node("LSTM")], small_graphs.weights("LSTM"))
    x = np.ones((5, 2, small_graphs.IN), "f4")
    run = RecordingGraph(path, ["Y"], outputs=False).run({"X": x})
    assert run.outputs == {} and np.array_equal(run.calls["Y"][0].input.numpy(), x)


def test_nodes_in_branches_and_turns_of_a_loop_are_called_as_often_as_they_are_reached(tmp_path: Path) -> None:
    """The state of turn i is filled with i; an LSTM runs in the second turn of three, a GRU in the others."""
    lstm = small_graphs.node("LSTM", ["X", "W", "R", "B", "", "state"], "y")
    gru = small_graphs.node("GRU", ["X", "W2", "R2", "B2", "lengths", "state"], "y")
    branches = [helper.make_graph([one], "branch", [], [small_graphs.value("y")]) for one in (lstm, gru)]
    body = helper.make_graph(
        [
            helper.make_node("Cast", ["i"], ["number"], to=TensorProto.FLOAT),
            helper.make_node("Expand", ["number", "shape"], ["state"]),
            helper.make_node("Equal", ["i", "one"], ["second"]),
            helper.make_node("If", ["second"], ["z"], then_branch=branches[0], else_branch=branches[1]),
            helper.make_node("Identity", ["go"], ["on"]),
        ],
        "body",
        [small_graphs.value("i", [], TensorProto.INT64), small_graphs.value("go", [], TensorProto.BOOL)],
        [small_graphs.value("on", [], TensorProto.BOOL), small_graphs.value("z")],
    )
    shape = [1, 2, small_graphs.H]
    constants = {"turns": np.array(3), "yes": np.array(True), "one": np.array(1), "shape": np.array(shape)}
    constants |= {"lengths": np.array([5, 3], "i4")} | small_graphs.weights("LSTM")
    constants |= {f"{name}2": array for name, array in small_graphs.weights("GRU").items()}
    loop = helper.make_node("Loop", ["turns", "yes"], ["Y"], body=body)
    path = small_graphs.save(tmp_path / "a.onnx", [loop], constants, check=False)
    nodes = recurrent_nodes(read_onnx(path, graph=True)).values()
    run = RecordingGraph(path, nodes).run({"X": np.ones((5, 2, small_graphs.IN))})
    assert run.outputs["Y"].shape == (3, 5, 1, 2, small_graphs.H)
    gru_calls, lstm_calls = (run.calls[node] for node in nodes)  # else_branch before then_branch
    assert [float(call.states[0].mean()) for call in lstm_calls] == [1] and lstm_calls[0].states[1] is None
    assert [float(call.states[0].mean()) for call in gru_calls] == [0, 2]
    assert [call.lengths.tolist() for call in (*lstm_calls, *gru_calls)] == [[5, 5], [5, 3], [5, 3]]


def test_the_outputs_are_those_of_the_file_as_it_is(tmp_path: Path) -> None:
    """Not those of what its nodes of dynamic quantisation are read as."""
    quantization = pytest.importorskip("onnxruntime.quantization")
    path = small_graphs.save(tmp_path / "a.onnx", [small_graphs.node("LSTM")], small_graphs.weights("LSTM"))
    quantized = tmp_path / "q.onnx"
    quantization.quantize_dynamic(str(path), str(quantized))
    x = np.random.default_rng(0).normal(0, 1, (5, 2, small_graphs.IN)).astype("f4")
    found = RecordingGraph(quantized).run({"X": x}).outputs["Y"]
    session = cpu_session(quantized, torch.get_num_threads())  # the node's rounding depends on the threads
    np.testing.assert_array_equal(found, session.run(None, {"X": x})[0])
