"""Whole graphs with small weights; onnxruntime runs them and the originals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import kruify
from kruify.checkpoint import LazyTensor, onnx_in_place
from kruify.checkpoint.stored import decode, encode
from kruify.cli.main import cli
from kruify.errors import CorruptError, UnsafeError, UnsupportedError, UsageError
from kruify.factors import parse
from kruify.graphs import GraphBytes, write_small
from kruify.layers import KroneckerMatrix
from kruify.quantization import LEVELS

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from small_graphs import BATCH, IN, STEPS, H, folded, lstm_step, node, run, save, value, weights  # noqa: E402

EXACT = f"{H}*({H}x1,1x{H})", f"{IN}*({H}x1,1x{IN})"
"""Low rank of full rank, of W_hh and of W_ih."""


def small(path: Path, factors: str = EXACT[0], input_factors: str | None = EXACT[1], **options: Any) -> Path:
    target = path.with_name("small.onnx")
    kruify.convert(path, factors, input_factors=input_factors, output=target, **options)
    onnx.checker.check_model(onnx.load(target), full_check=True)
    return target


@pytest.mark.parametrize(
    ("kind", "attributes"),
    [
        ("LSTM", {"direction": "bidirectional"}),
        ("LSTM", {"clip": 0.5, "input_forget": 1}),
        ("GRU", {"linear_before_reset": 0, "direction": "reverse"}),
        ("GRU", {"linear_before_reset": 1, "direction": "bidirectional"}),
        ("RNN", {"activations": ["HardSigmoid"], "activation_alpha": [0.3]}),
    ],
)
def test_every_recurrent_node_computes_the_same_with_all_terms_kept(
    tmp_path: Path, kind: str, attributes: dict
) -> None:
    directions = 2 if attributes.get("direction") == "bidirectional" else 1
    states = ["H0", *(["C0", "P"] if kind == "LSTM" else [])]
    shape = [directions, BATCH, H]
    feeds = {name: np.random.default_rng(2).normal(0, 1, shape).astype("f4") for name in states}
    feeds["lengths"] = np.array([5, 3], "i4")
    inputs = [value(name, shape) for name in states if name != "P"] + [
        value("lengths", [BATCH], onnx.TensorProto.INT32)
    ]
    constants = weights(kind, directions)
    if kind == "LSTM":
        constants["P"] = np.random.default_rng(3).normal(0, 1, (directions, 3 * H)).astype("f4")
        del feeds["P"]
    made = node(kind, ["X", "W", "R", "B", "lengths", *states], name="rnn", **attributes)
    path = save(tmp_path / "a.onnx", [made], constants, inputs)
    target = small(path)
    np.testing.assert_allclose(run(target, **feeds)[0], run(path, **feeds)[0], atol=1e-5)
    assert folded(target) == [kind]
    before, after = onnx.load(path), onnx.load(target)
    kept = {"B", "P"} & set(constants)
    assert {p.name: p for p in after.graph.initializer if p.name in kept} == {
        p.name: p for p in before.graph.initializer if p.name in kept
    }
    assert after.graph.node[-1] == before.graph.node[-1]
    for field in ("opset_import", "metadata_props", "producer_name", "ir_version"):
        assert getattr(after, field) == getattr(before, field)
    assert (after.graph.input, after.graph.output) == (before.graph.input, before.graph.output)


SPECS = {
    "low rank": ["2*(8x1,1x8)"] * 4,
    "Kronecker": ["2*(2x2,4x4)+2*(8x1,1x8)"] * 4,
    "three factors": ["2*(2x2,2x1,2x4)"] * 4,
    "one factor": ["8x8"] * 4,
    "diagonal": ["1*(4x4,2x2)+diag"] * 4,
    "sparse": ["1*(8x1,1x8)+sparse:25%:1"] * 4,
    "blocks": ["1*(8x1,1x8)+sparse:25%:4"] * 4,
    "gates that differ": ["1*(8x1,1x8)", "2x2+diag", "2*(4x4,2x2)+1*(8x1,1x8)", "diag+sparse:25%:2"],
    "stacked": ["stacked:2*(32x1,1x8)+3*(16x2,2x4)+sparse:25%:2"],
}


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [*((spec, "int8") for spec in SPECS), *(("gates that differ", d) for d in ("float32", "float16", "bfloat16"))],
)
def test_every_structure_computes_what_its_dense_matrix_does(tmp_path: Path, spec: str, dtype: str) -> None:
    """Random factors; onnxruntime runs the same graph with numpy's dense matrix."""
    constants = weights("LSTM", 2)
    path = save(tmp_path / "a.onnx", [node("LSTM", name="rnn", direction="bidirectional")], constants)
    rows = 4 * H if len(SPECS[spec]) == 1 else H
    structures = tuple(parse(one).resolve(rows, H, rows // H) for one in SPECS[spec])
    if spec == "Kronecker":
        structures = tuple(replace(one, scaled=True) for one in structures)
    name, matrix = "rnn.weight_hh_l0_reverse", KroneckerMatrix(structures)
    for parameter in matrix.parameters():
        torch.nn.init.normal_(parameter, 0, 0.5)
    storage = {} if dtype == "float32" else {name: dtype}
    tensors = {f"{name}.{entry}": LazyTensor.of(tensor) for entry, tensor in matrix.state_dict().items()}
    tensors = decode(encode(tensors, storage, {name: matrix.shape}), storage, {name}, "")
    matrix.load_state_dict({entry: tensors[f"{name}.{entry}"].load() for entry in matrix.state_dict()})
    written = write_small(path, tensors, {name: structures}, storage, tmp_path / "small.onnx")
    onnx.checker.check_model(onnx.load(written.path), full_check=True)
    counted = GraphBytes(path).of(tensors, {name: structures}, storage)
    assert written.bytes_after <= counted <= written.bytes_after + (600 if "sparse" in str(SPECS[spec]) else 300)
    gates = matrix.to_dense().detach().numpy().reshape(4, H, H)
    constants["R"][1] = gates[[0, 3, 1, 2]].reshape(4 * H, H)  # torch's gates i, f, g, o as ONNX's i, o, f, c
    twin = save(tmp_path / "twin.onnx", [node("LSTM", name="rnn", direction="bidirectional")], constants)
    np.testing.assert_allclose(run(written.path)[0], run(twin)[0], atol=2e-6)
    assert folded(written.path) == ["LSTM"]


def test_nodes_that_share_a_weight_share_its_factors(tmp_path: Path) -> None:
    nodes = [node("GRU", name="one"), node("GRU", name="two", output="Y2")]
    path = save(tmp_path / "a.onnx", nodes, weights("GRU"), outputs=["Y", "Y2"])
    target = small(path, "1*(8x1,1x8)", None)
    assert [one.op_type for one in onnx.load(target).graph.node].count("MatMul") == 1
    apart = small(path, "1*(8x1,1x8)", None, only=["one*"])
    np.testing.assert_array_equal(run(apart)[1], run(path)[1])
    np.testing.assert_array_equal(run(apart)[0], run(target)[0])


@pytest.mark.parametrize("per_channel", [False, True])
def test_lstm_nodes_of_onnxruntimes_quantisation_become_lstm_nodes(tmp_path: Path, per_channel: bool) -> None:
    quantization = pytest.importorskip("onnxruntime.quantization")
    constants = weights("LSTM", 2)
    path = save(tmp_path / "a.onnx", [node("LSTM", name="rnn", direction="bidirectional")], constants)
    quantized = tmp_path / "q.onnx"
    quantization.quantize_dynamic(str(path), str(quantized), per_channel=per_channel)
    target = small(quantized)
    assert folded(target) == ["LSTM"]
    np.testing.assert_allclose(run(target)[0], run(quantized)[0], atol=0.05)  # whose steps round h and x, too
    held = {proto.name: onnx.numpy_helper.to_array(proto) for proto in onnx.load(quantized).graph.initializer}
    for part in "WR":
        scale, zero = (held[f"{part}_{what}"].reshape(2, 1, -1) for what in ("scale", "zero_point"))
        constants[part] = ((held[f"{part}_quantized"].astype("f4") - zero) * scale).transpose(0, 2, 1)
    twin = save(tmp_path / "twin.onnx", [node("LSTM", name="rnn", direction="bidirectional")], constants)
    np.testing.assert_allclose(run(target)[0], run(twin)[0], atol=1e-5)
    done = kruify.convert(quantized, "1*(8x1,1x8)", output=target, dtype="int8")
    counted = GraphBytes(quantized).of(done.tensors, done.plan.structures(), done.storage)
    assert target.stat().st_size <= counted <= target.stat().st_size + 300


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_nodes_in_the_bodies_of_an_if_and_a_loop(tmp_path: Path, where: str) -> None:
    constants = weights("LSTM")
    held = [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()]
    inner = onnx.helper.make_graph(
        [node("LSTM", output="y")], "then", [], [value("y")], held if where == "inside" else []
    )
    other = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["s"], ["z"])], "else", [], [value("z")])
    branch = onnx.helper.make_node("If", ["c"], ["t"], then_branch=inner, else_branch=other)
    states = [value("i", [], onnx.TensorProto.INT64), value("c", [], onnx.TensorProto.BOOL), value("s")]
    body = onnx.helper.make_graph(
        [branch, onnx.helper.make_node("Identity", ["c"], ["d"])],
        "body", states, [value("d", [], onnx.TensorProto.BOOL), value("t")],
    )  # fmt: skip
    nodes = [
        onnx.helper.make_node("ConstantOfShape", ["shape"], ["s0"]),
        onnx.helper.make_node("Loop", ["turns", "yes", "s0"], ["Y"], body=body),
    ]
    more = {"turns": np.array(1), "yes": np.array(True), "shape": np.array([5, 1, BATCH, H])}
    path = save(tmp_path / "a.onnx", nodes, more | (constants if where == "outside" else {}))
    target = small(path)
    np.testing.assert_allclose(run(target)[0], run(path)[0], atol=1e-5)
    assert target.stat().st_size != path.stat().st_size and folded(target) == ["Loop"]


@pytest.mark.parametrize("opset", [9, 11, 13, 21])
def test_opsets(tmp_path: Path, opset: int) -> None:
    path = save(tmp_path / "a.onnx", [node("LSTM")], weights("LSTM"), opset=opset, ir_version=3 if opset < 11 else 8)
    np.testing.assert_allclose(run(small(path))[0], run(path)[0], atol=1e-5)
    if opset < 11:
        with pytest.raises(UnsupportedError, match="opset 11, and the model is of opset 9"):
            small(path, "1*(8x1,1x8)+sparse:25%")


def test_what_computed_a_weight_goes(tmp_path: Path) -> None:
    constants = weights("RNN")
    constants |= {"half": constants["W"][:, :4], "rest": constants.pop("W")[:, 4:], "left": np.ones(3, "f4")}
    nodes = [onnx.helper.make_node("Concat", ["half", "rest"], ["W"], axis=1), node("RNN", name="rnn")]
    path = save(tmp_path / "a.onnx", nodes, constants)
    target = small(path, "dense", dtype="int8", input_factors=EXACT[1])
    names = {proto.name for proto in onnx.load(target).graph.initializer}
    assert "left" in names and not names & {"half", "rest"}
    np.testing.assert_allclose(run(target)[0], run(path)[0], atol=0.05)


def test_eight_bits_for_weights_beside_recurrent_nodes_and_nothing_else(tmp_path: Path) -> None:
    numbers = np.random.default_rng(5)
    shapes = {"head": (H, 200), "table": (300, 5), "kernel": (IN, 1, 200), "grouped": (2, H // 2, 300)}
    shapes |= {"other": (40, 30), "read": (IN, 200)}
    constants = {name: numbers.normal(0, 1, shape).astype("f4") for name, shape in shapes.items()}
    make = onnx.helper.make_node
    nodes = [
        node("LSTM", name="rnn"),
        make("MatMul", ["Y", "head"], ["Y1"]),
        make("Gather", ["table", "place"], ["Y2"]),
        make("Conv", ["long", "kernel"], ["Y3"], group=IN),
        make("Reshape", ["Y", "halves"], ["split"]),
        make("Einsum", ["split", "grouped"], ["Y4"], equation="tgi,gih->tgh"),
        make("Add", ["other", "one"], ["Y5"]),
        make("MatMul", ["X", "read"], ["Y6"]),
        make("Neg", ["read"], ["Y7"]),
    ]
    constants |= {"halves": np.array([-1, 2, H // 2])}
    constants |= {"place": np.array(3), "long": numbers.normal(0, 1, (1, IN, 300)).astype("f4")}
    constants |= {"one": np.ones(1, "f4"), **weights("LSTM")}
    outputs = [f"Y{number}" for number in range(1, 8)]
    path = save(tmp_path / "a.onnx", nodes, constants, outputs=outputs, check=False)
    target = small(path, "dense", None, dtype="int8")
    dtypes = {proto.name: proto.data_type for proto in onnx.load(target).graph.initializer}
    assert {name for name in constants if name not in dtypes} == {"W", "R", "B", "head", "table", "kernel", "grouped"}
    for number, (found, wanted) in enumerate(zip(run(target), run(path), strict=True)):
        assert np.abs(found - wanted).max() < (0.03 * np.abs(wanted).max() if number < 4 else 1e-9)
    assert not {"Cast", "Mul"} & set(folded(target))


def test_the_graph_of_a_converted_file(tmp_path: Path) -> None:
    constants = weights("GRU") | {"head": np.random.default_rng(5).normal(0, 1, (H, H)).astype("f4")}
    nodes = [
        node("GRU", name="rnn", output="y", linear_before_reset=1),
        onnx.helper.make_node("MatMul", ["y", "head"], ["Y"]),
    ]
    path = save(tmp_path / "a.onnx", nodes, constants)
    kruify.convert(path, "2*(8x1,1x8)", dtype="int8", output=tmp_path / "a.kru.safetensors")
    [made] = kruify.export(tmp_path / "a.kru.safetensors", "onnx", tmp_path / "b.onnx", original=path)
    kruify.convert(path, "2*(8x1,1x8)", dtype="int8", keep=["head"], output=tmp_path / "c.onnx")
    np.testing.assert_allclose(run(tmp_path / "b.onnx")[0], run(tmp_path / "c.onnx")[0], atol=0.05)
    assert made.bytes == (tmp_path / "b.onnx").stat().st_size and made.graph.difference > 0
    with pytest.raises(UsageError, match="not converted from an ONNX model"):
        kruify.export(path, "onnx", tmp_path / "d.onnx", original=path)


def test_integers_of_four_bits_have_a_byte_each_in_a_graph(tmp_path: Path) -> None:
    path = save(tmp_path / "a.onnx", [node("LSTM")], weights("LSTM"))
    kruify.convert(path, "2*(8x1,1x8)", dtype="int4", output=tmp_path / "a.kru.safetensors")
    kruify.export(tmp_path / "a.kru.safetensors", "onnx", tmp_path / "b.onnx", original=path)
    made = [onnx.numpy_helper.to_array(p) for p in onnx.load(tmp_path / "b.onnx").graph.initializer]
    made = [array for array in made if array.dtype == np.int8]
    assert made and {*np.concatenate([array.ravel() for array in made])} <= {*LEVELS.tolist()}
    [layer] = kruify.load(tmp_path / "a.kru.safetensors").values()
    x = torch.from_numpy(np.random.default_rng(1).normal(0, 1, (STEPS, BATCH, IN)).astype("f4"))
    with torch.no_grad():
        wanted = kruify.densify(layer)(x)[0]
    np.testing.assert_allclose(run(tmp_path / "b.onnx")[0][:, 0], wanted, atol=1e-5)
    with pytest.raises(UsageError, match="Take int8 for an ONNX graph"):
        kruify.convert(path, "2*(8x1,1x8)", dtype="int4", output=tmp_path / "d.onnx")


def test_both_graphs_are_run_and_compared(tmp_path: Path) -> None:
    path = save(tmp_path / "a.onnx", [node("RNN")], weights("RNN"))
    done = kruify.convert(path, EXACT[0], output=tmp_path / "b.onnx")
    assert done.graph.difference < 1e-5 and min(*done.graph.timing.run_ms, *done.graph.timing.load_ms) > 0
    assert kruify.convert(path, "1*(8x1,1x8)", output=tmp_path / "b.onnx").graph.difference > 1e-2
    inputs = [value("names", [2], onnx.TensorProto.STRING)]
    path = save(tmp_path / "a.onnx", [node("RNN")], weights("RNN"), inputs)
    assert "no random tensor(string)" in str(kruify.convert(path, "2x2", output=tmp_path / "b.onnx").graph)


def test_a_budget_is_of_the_whole_graph(tmp_path: Path) -> None:
    numbers = np.random.default_rng(5)
    constants = {
        "W": numbers.normal(0, 1, (1, 192, IN)).astype("f4"),
        "R": numbers.normal(0, 1, (1, 192, 64)).astype("f4"),
    }
    made = onnx.helper.make_node("GRU", ["X", "W", "R"], ["Y"], hidden_size=64)
    path = save(tmp_path / "a.onnx", [made], constants, check=False)
    done = kruify.convert(path, budget="size=6x", output=tmp_path / "b.onnx")
    size = (tmp_path / "b.onnx").stat().st_size
    assert done.bytes.to_json() | {"before": path.stat().st_size, "after": size, "file": size} == done.bytes.to_json()
    assert 0.8 * path.stat().st_size / 6 < size <= path.stat().st_size // 6
    assert kruify.convert(path, budget="size=6x", output=tmp_path / "b.onnx", dry_run=True).bytes.file >= size
    text = CliRunner().invoke(cli, ["convert", str(path), "--budget", "size=6x", "-o", str(tmp_path / "b.onnx")]).stdout
    assert text.count("whole file") == 1
    assert f"kruify compress {path} --inputs SAMPLES --budget size=6x" in text  # the budget that was asked for


@pytest.mark.parametrize("outside", [False, True])
def test_a_budget_counts_what_goes_with_the_weights(tmp_path: Path, outside: bool) -> None:
    """torch's exporter makes weights of its own by Slice and Concat, and puts numbers into a file beside the graph."""
    numbers = np.random.default_rng(5)
    parts = {f"{part}{gate}": (1, 64, size) for part, size in (("W", IN), ("R", 64)) for gate in range(3)}
    shapes = parts | {"B": (1, 384), "head": (64, 40)}
    constants = {name: numbers.normal(0, 1, shape).astype("f4") for name, shape in shapes.items()}
    make = onnx.helper.make_node
    nodes = [make("Concat", [f"{part}{gate}" for gate in range(3)], [part], axis=1) for part in "WR"]
    nodes += [
        make("GRU", ["X", "W", "R", "B"], ["y"], hidden_size=64),
        make("MatMul", ["y", "head"], ["Y"]),
    ]
    path = save(tmp_path / "a.onnx", nodes, constants, check=False)
    if outside:
        onnx.save(onnx.load(path), path, save_as_external_data=True, location="a.data", size_threshold=0)
    done = kruify.convert(path, budget="size=5x", output=tmp_path / "b.onnx")
    before, after = (sum(file.stat().st_size for file in tmp_path.glob(f"{name}.*")) for name in "ab")
    assert (done.bytes.before, done.bytes.after) == (before, after)
    assert 0.8 * before / 5 < after <= before // 5
    counted = GraphBytes(path).of(done.tensors, done.plan.structures(), done.storage)
    assert after <= counted <= after + 700  # a sparse residual is counted with the longest distances


def test_numbers_in_other_files_stay_there(tmp_path: Path) -> None:
    constants = weights("LSTM") | {"head": np.random.default_rng(5).normal(0, 1, (H, H)).astype("f4")}
    nodes = [node("LSTM", name="rnn", output="y"), onnx.helper.make_node("MatMul", ["y", "head"], ["Y"])]
    whole = save(tmp_path / "whole.onnx", nodes, constants)
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "a.onnx"
    onnx.save(onnx.load(whole), path, save_as_external_data=True, location="a.bin", size_threshold=0)
    target = small(path)
    kept = {
        proto.name for proto in onnx.load(target, load_external_data=False).graph.initializer if proto.data_location
    }
    assert kept == {"B", "head"}
    np.testing.assert_allclose(run(target)[0], run(whole)[0], atol=1e-5)
    done = kruify.convert(path, "1*(8x1,1x8)", output=tmp_path / "in" / "b.onnx")
    assert done.bytes.before == path.stat().st_size + (tmp_path / "in" / "a.bin").stat().st_size
    assert done.bytes.after == sum((tmp_path / "in" / name).stat().st_size for name in ("b.onnx", "b.onnx.data"))
    kruify.convert(path, EXACT[0], output=tmp_path / "a.kru.safetensors")
    kruify.export(tmp_path / "a.kru.safetensors", "dense", tmp_path / "dense.onnx", original=path)
    np.testing.assert_allclose(run(tmp_path / "dense.onnx")[0], run(whole)[0], atol=1e-5)
    (tmp_path / "in" / "a.bin").write_bytes(b"short")
    with pytest.raises(CorruptError, match="beyond the end"):
        kruify.convert(path, "2x2", output=target)
    (tmp_path / "in" / "a.bin").unlink()
    with pytest.raises(CorruptError, match="no such file"):
        kruify.convert(path, "2x2", output=target)
    (tmp_path / "in" / "a.bin").symlink_to(whole)
    with pytest.raises(UnsafeError, match="outside of its folder"):
        kruify.convert(path, "2x2", output=target)


def test_a_model_too_large_for_one_file_puts_its_numbers_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = np.random.default_rng(5).normal(0, 1, (H, 1000)).astype("f4")
    nodes = [node("GRU", name="rnn", output="y"), onnx.helper.make_node("MatMul", ["y", "head"], ["Y"])]
    path = save(tmp_path / "a.onnx", nodes, weights("GRU") | {"head": head}, check=False)
    wanted = run(small(path))[0]
    monkeypatch.setattr(onnx_in_place, "MOST", 8000)
    done = kruify.convert(path, EXACT[0], dtype="float16", output=tmp_path / "b.onnx")
    assert (tmp_path / "b.onnx").stat().st_size <= 8000
    assert done.bytes.after == sum((tmp_path / name).stat().st_size for name in ("b.onnx", "b.onnx.data"))
    np.testing.assert_allclose(run(tmp_path / "b.onnx")[0], wanted, atol=0.05)


@pytest.mark.parametrize(
    ("factors", "options"),
    [
        (EXACT[0], {}),
        (f"stacked:{H}*({4 * H}x1,1x{H})", {}),
        (f"{H - 1}*({H}x1,1x{H})+diag+sparse:100%:4", {"dtype": "int8"}),
    ],
)
def test_a_cell_written_out_keeps_its_gates_under_the_names_of_torch(
    tmp_path: Path, factors: str, options: dict
) -> None:
    """As torch's exporter writes an LSTMCell in a loop: Gemm, Split, Sigmoid, Tanh, step by step."""
    cell, make = torch.nn.LSTMCell(IN, H), onnx.helper.make_node
    constants = {f"cell.{name}": tensor.detach().numpy() for name, tensor in cell.named_parameters()}
    constants |= {"h0": np.zeros((BATCH, H), "f4"), "axis": np.array([0])}
    constants |= {f"at{t}": np.array(t) for t in range(2)}
    nodes, h, c = [], "h0", "h0"
    for t in range(2):
        nodes += [
            make("Gather", ["X", f"at{t}"], [f"x{t}"]),
            make("Gemm", [f"x{t}", "cell.weight_ih", "cell.bias_ih"], [f"a{t}"], transB=1),
            make("Gemm", [h, "cell.weight_hh", "cell.bias_hh"], [f"b{t}"], transB=1),
            make("Add", [f"a{t}", f"b{t}"], [f"g{t}"]),
            *lstm_step(t, c),
        ]
        h, c = f"h{t + 1}", f"c{t}"
    nodes.append(make("Unsqueeze", [h, "axis"], ["Y"]))
    path = save(tmp_path / "a.onnx", nodes, constants, check=False)
    done = kruify.convert(path, factors, input_factors=EXACT[1], output=tmp_path / "b.onnx", **options)
    assert {m.name for m in done.matrices} == {"cell.weight_hh", "cell.weight_ih"}
    assert done.bytes.after == (tmp_path / "b.onnx").stat().st_size
    np.testing.assert_allclose(run(tmp_path / "b.onnx")[0], run(path)[0], atol=0.02 if options else 1e-5)
