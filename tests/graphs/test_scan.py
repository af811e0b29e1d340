"""Recurrent nodes written as a Scan; onnxruntime's own nodes on the original graphs are the oracle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from all_pairs import all_pairs
from click.testing import CliRunner

import kruify
from kruify.cli.main import cli
from kruify.errors import UsageError
from kruify.graphs import GraphBytes, forms, write_small
from kruify.graphs.comparison import Timing

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from small_graphs import BATCH, GATES, IN, STEPS, H, node, run, save, value, weights  # noqa: E402

EXACT = {kind: f"stacked:{H}*({rows * H}x1,1x{H})" for kind, rows in GATES.items()}


def scanned(path: Path, factors: str) -> Path:
    target = path.with_name("scan.onnx")
    done = kruify.convert(path, factors, output=target, form="scan")
    onnx.checker.check_model(onnx.load(target), full_check=True)
    assert {one.form for one in done.forms} == {"scan"}
    return target


@pytest.mark.parametrize(
    ("kind", "direction", "lengths", "states", "bias", "outputs"),
    all_pairs(
        kind=("LSTM", "GRU", "GRU resets first", "RNN", "RNN relu"), direction=("forward", "reverse", "bidirectional"),
        lengths=(False, True), states=(False, True), bias=(False, True), outputs=("all", "first", "last"),
    ),
)  # fmt: skip
def test_a_scan_computes_what_the_node_does(
    tmp_path: Path, kind: str, direction: str, lengths: bool, states: bool, bias: bool, outputs: str
) -> None:
    kind, _, how = kind.partition(" ")
    attributes: dict[str, Any] = {"direction": direction}
    if kind == "GRU":
        attributes["linear_before_reset"] = int(not how)
    if how == "relu":
        attributes["activations"] = ["Relu"] * (2 if direction == "bidirectional" else 1)
    directions = 2 if direction == "bidirectional" else 1
    constants = weights(kind, directions)
    if not bias:
        del constants["B"]
    names = ["H0", "C0"][: 2 if kind == "LSTM" else 1]
    given = ["X", "W", "R", "B" if bias else "", "lengths" if lengths else "", *(names if states else [])]
    results = ["Y", "Yh", "Yc"][: 1 + len(names)]
    kept = {"all": results, "first": results[:1], "last": results[-1:]}[outputs]
    made = node(kind, given, name="rnn", **attributes)
    made.output[:] = [name if name in kept else "" for name in results]
    numbers = np.random.default_rng(3)
    feeds = {name: numbers.normal(0, 1, (directions, BATCH, H)).astype("f4") for name in names if states}
    inputs = [value(name, feed.shape) for name, feed in feeds.items()]
    if lengths:
        feeds["lengths"] = np.array([5, 3], "i4")
        inputs.append(value("lengths", [BATCH], onnx.TensorProto.INT32))
    path = save(tmp_path / "a.onnx", [made], constants, inputs, kept, check=False)
    target = scanned(path, EXACT[kind])
    assert kind not in {one.op_type for one in onnx.load(target).graph.node}
    for found, wanted in zip(run(target, **feeds), run(path, **feeds), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_the_reference_of_onnx_computes_the_same(tmp_path: Path) -> None:
    given = ["X", "W", "R", "B", "lengths"]
    lengths = value("lengths", [BATCH], onnx.TensorProto.INT32)
    path = save(tmp_path / "a.onnx", [node("LSTM", given, direction="bidirectional")], weights("LSTM", 2), [lengths])
    model = pytest.importorskip("onnx.reference").ReferenceEvaluator(str(scanned(path, EXACT["LSTM"])))
    x = np.random.default_rng(1).normal(0, 1, (STEPS, BATCH, IN)).astype("f4")
    feeds = {"lengths": np.array([2, 5], "i4")}
    np.testing.assert_allclose(model.run(None, {"X": x, **feeds})[0], run(path, **feeds)[0], atol=1e-5)


@pytest.mark.parametrize("opset", [13, 24])
@pytest.mark.parametrize("factors", ["2*(2x2,4x4)+1*(8x1,1x8)", "stacked:2*(24x1,1x8)+2*(12x2,2x4)"])
def test_factors_in_eight_bits_in_every_opset(tmp_path: Path, opset: int, factors: str) -> None:
    """As they are folded; the bytes are those that a budget counts."""
    path = save(tmp_path / "a.onnx", [node("GRU", name="rnn")], weights("GRU"), opset=opset, ir_version=8)
    done = kruify.convert(path, factors, dtype="int8", output=tmp_path / "folded.onnx")
    made, target = (done.tensors, done.plan.structures(), done.storage), tmp_path / "scan.onnx"
    write_small(path, *made, target, scan=["rnn"])
    onnx.checker.check_model(onnx.load(target), full_check=True)
    np.testing.assert_allclose(run(target)[0], run(tmp_path / "folded.onnx")[0], atol=1e-5)
    counted = GraphBytes(path, scan=True).of(*made)
    assert target.stat().st_size <= counted <= target.stat().st_size + 600


def test_a_node_in_the_body_of_a_loop(tmp_path: Path) -> None:
    make, integer, truth = onnx.helper.make_node, onnx.TensorProto.INT64, onnx.TensorProto.BOOL
    body = onnx.helper.make_graph(
        [node("LSTM", output="t", name="rnn"), make("Identity", ["c"], ["d"])], "body",
        [value("i", [], integer), value("c", [], truth), value("s")], [value("d", [], truth), value("t")],
    )  # fmt: skip
    nodes = [make("ConstantOfShape", ["shape"], ["s0"]), make("Loop", ["turns", "yes", "s0"], ["Y"], body=body)]
    constants = weights("LSTM") | {"turns": np.array(2), "yes": np.array(True), "shape": np.array([5, 1, BATCH, H])}
    path = save(tmp_path / "a.onnx", nodes, constants)
    np.testing.assert_allclose(run(scanned(path, EXACT["LSTM"]))[0], run(path)[0], atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "attributes", "factors", "reason"),
    [
        ("LSTM", {"clip": 0.5}, EXACT["LSTM"], "clips its cells"),
        ("GRU", {"activations": ["HardSigmoid", "Tanh"]}, EXACT["GRU"], "activations"),
        ("RNN", {}, "8x8+sparse:25%", "single entries"),
        ("RNN", {}, "dense", "are dense"),
        ("RNN", {"opset": 12}, EXACT["RNN"], "opset 12"),
        ("RNN", {"twice": True}, EXACT["RNN"], "shares weights"),
    ],
)
def test_what_stays_folded_is_named(tmp_path: Path, kind: str, attributes: dict, factors: str, reason: str) -> None:
    opset, twice = attributes.pop("opset", 17), attributes.pop("twice", False)
    nodes = [node(kind, name="rnn", **attributes), *([node(kind, name="other", output="Z")] if twice else [])]
    path = save(tmp_path / "a.onnx", nodes, weights(kind), outputs=["Y", "Z"][: len(nodes)], opset=opset)
    more = {"input_factors": f"{IN}*({H}x1,1x{IN})"}
    done = kruify.convert(path, factors, output=tmp_path / "b.onnx", form="scan", **more)
    assert {(one.form, reason in one.reason) for one in done.forms} == {("folded", True)}
    assert kind in {one.op_type for one in onnx.load(tmp_path / "b.onnx").graph.node}
    np.testing.assert_array_equal(run(tmp_path / "b.onnx")[0].shape, run(path)[0].shape)


def test_a_node_stays_folded_where_the_graph_turns_rounding_into_other_outputs(tmp_path: Path) -> None:
    make = onnx.helper.make_node
    nodes = [node("LSTM", output="h", name="rnn"), make("Mul", ["h", "large"], ["z"]), make("Sin", ["z"], ["Y"])]
    path = save(tmp_path / "a.onnx", nodes, weights("LSTM") | {"large": np.array(1e6, "f4")})
    done = kruify.convert(path, EXACT["LSTM"], output=tmp_path / "b.onnx", form="scan")
    assert [(one.form, "change by" in one.reason) for one in done.forms] == [("folded", True)]
    assert "LSTM" in {one.op_type for one in onnx.load(tmp_path / "b.onnx").graph.node}


def test_auto_takes_what_is_faster_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [node("RNN", name="one"), node("RNN", ["X", "W2", "R2"], output="Y2", name="two")]
    constants = weights("RNN") | {f"{part}2": array for part, array in weights("RNN", seed=4).items() if part != "B"}
    path = save(tmp_path / "a.onnx", nodes, constants, outputs=["Y", "Y2"])
    measured = iter([(2.0, 1.0), (1.0, 1.02)])
    whole = forms.compare_graphs

    def compare(*files: Path, feed: Any = None) -> Any:
        return replace(whole(*files, feed=feed), timing=Timing((1.0, 1.0), next(measured)))

    monkeypatch.setattr(forms, "compare_graphs", compare)
    command = ["convert", str(path), "--factors", EXACT["RNN"], "--form", "auto", "-o", str(tmp_path / "b.onnx")]
    text = CliRunner().invoke(cli, command).stdout
    assert "one is a Scan: the graph takes 2 ms with it folded, 1 ms as a Scan" in text
    assert "two is folded into dense weights at load: the graph takes 1 ms with it folded, 1.02 ms as a Scan" in text
    assert [one.op_type for one in onnx.load(tmp_path / "b.onnx").graph.node].count("Scan") == 1
    np.testing.assert_allclose(run(tmp_path / "b.onnx")[1], run(path)[1], atol=1e-5)


def test_forms_are_of_whole_graphs(tmp_path: Path) -> None:
    path = save(tmp_path / "a.onnx", [node("RNN", name="rnn")], weights("RNN"))
    with pytest.raises(UsageError, match="is of an ONNX graph"):
        kruify.convert(path, EXACT["RNN"], output=tmp_path / "a.kru.safetensors", form="scan")
    with pytest.raises(UsageError, match="not 'loop'"):
        kruify.convert(path, EXACT["RNN"], output=tmp_path / "b.onnx", form="loop")
    kruify.convert(path, EXACT["RNN"], output=tmp_path / "a.kru.safetensors")
    [made] = kruify.export(tmp_path / "a.kru.safetensors", "onnx", tmp_path / "c.onnx", original=path, form="scan")
    assert made.to_json()["forms"][0]["form"] == "scan" and made.graph.difference < 1e-5
