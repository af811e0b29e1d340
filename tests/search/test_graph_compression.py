"""ONNX graphs made small from samples alone; the outputs are compared by onnxruntime itself."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from kruify.cli.main import cli
from kruify.conversion.plan import Plan, make_plan
from kruify.errors import CorruptError, PlanError, TaskError, UsageError

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from kruify.graphs.operators import OPERATORS  # noqa: E402
from kruify.search.graph_compression import compress_graph  # noqa: E402
from kruify.search.graph_job import GraphJob  # noqa: E402
from kruify.search.graph_ranks import stacked_low_rank  # noqa: E402
from kruify.search.recording import recording_chain  # noqa: E402
from kruify.search.samples import Samples  # noqa: E402
from kruify.search.whole_graph import distil  # noqa: E402


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.GRU(24, 32), nn.LSTM(32, 32)
        self.head = nn.Linear(32, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)[0])[0])


BASIS = np.random.default_rng(0).standard_normal((3, 24))


def samples(count: int = 6, seed: int = 1) -> Iterator[dict[str, Any]]:
    """Of which three directions are used."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield {"x": rng.standard_normal((30, 4, 3)) @ BASIS}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    example = torch.from_numpy(next(samples())["x"]).float()
    torch.onnx.export(
        Net().eval(), (example,), str(path), input_names=["x"], output_names=["y"], dynamic_axes={"x": {0: "time"}},
        dynamo=False,
    )  # fmt: skip
    return path


def error(model: Path, small: Path) -> float:
    """On samples that `compress_graph` never saw."""
    runs = [onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]) for path in (model, small)]
    wrong = whole = 0.0
    for sample in samples(4, seed=7):
        a, b = (run.run(None, {"x": sample["x"].astype(np.float32)})[0] for run in runs)
        wrong, whole = wrong + np.square(a - b).sum(), whole + np.square(a).sum()
    return float(np.sqrt(wrong / whole))


def test_training_brings_the_graph_back(model: Path, tmp_path: Path) -> None:
    """One call without training and a bound that cannot be met, one with training, resumed."""
    small = [tmp_path / f"{name}.onnx" for name in "ab"]
    rounds = compress_graph(model, samples, "size=5x", small[0], steps=0, max_drop=0.0, attempts=2)
    options: dict[str, Any] = {"steps": 40, "lr": 1e-2, "resume": tmp_path / "state"}
    found = compress_graph(model, samples, "size=5x", small[1], **options)
    (trained,) = found.attempts
    converted, grown = rounds.attempts
    size = model.stat().st_size
    assert small[1].stat().st_size == trained.bytes and 0.9 * size < 5 * trained.bytes <= size  # no rank is left open
    onnx.checker.check_model(str(small[1]), full_check=True)
    assert [layer.name for layer in trained.layers] == ["first.GRU", "second.LSTM"]
    assert all(layer.steps == 40 and layer.error_after < layer.error_before for layer in trained.layers)
    assert trained.outputs["y"].relative_error < converted.outputs["y"].relative_error < 0.2  # 0.31 with even ranks
    together = trained.together
    assert together.steps == 10 and together.error_after <= together.error_before
    assert trained.outputs["y"].relative_error == pytest.approx(together.error_after, rel=1e-3)  # torch and onnxruntime
    truth = error(model, small[1])
    assert truth == pytest.approx(trained.outputs["y"].relative_error, rel=0.2)  # by onnxruntime, on other samples

    assert (rounds.within, rounds.best, found.within) == (False, 1, True)
    assert small[0].stat().st_size == grown.bytes > converted.bytes  # the worse layer got more numbers
    assert grown.drop < converted.drop

    told: list[str] = []
    again = compress_graph(
        model, samples, "size=5x", small[0], progress=lambda done, total, phase: told.append(phase), **options
    )
    assert again.attempts == found.attempts and small[0].read_bytes() == small[1].read_bytes()
    assert not any(phase.startswith("layer") for phase in told)  # nothing was trained again
    others = list(samples())
    others[1] = {"x": 2 * others[1]["x"]}  # held out: what the layers learn from is the same
    with pytest.raises(UsageError, match=r"another run \(other samples\)"):
        compress_graph(model, others, "size=5x", small[0], **options)
    with pytest.raises(UsageError, match="/proc/self: the folder cannot be written to"):
        compress_graph(model, others, "size=5x", small[0], **options | {"resume": "/proc/self"})


def test_a_plan_is_told_before_it_is_carried_out(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By `--dry-run`, as by `convert`; what is written then is what was planned."""
    monkeypatch.chdir(tmp_path)
    Path("samples").mkdir()
    for number, sample in enumerate(samples(3)):
        np.savez(f"samples/{number}.npz", **sample)
    command = ["compress", str(model), "--inputs", "samples", "--budget", "size=3.5x", "--steps", "20", "-o", "a.onnx"]
    dry = CliRunner().invoke(cli, [*command, "--json", "--dry-run", "--resume", "state"])
    assert dry.exit_code == 0, dry.output
    assert [*Path().iterdir()] == [Path("samples")]
    plan = json.loads(dry.stdout)
    assert plan["output"] is None and plan["attempts"] == [] and plan["seconds"] > 0
    stacked = re.compile(r"stacked:\d+\*\(\d+x1,1x\d+\)")
    assert plan["matrices"] and all(stacked.fullmatch(gate["factors"]) for gate in plan["matrices"])
    dense = {entry["name"]: entry["reason"] for entry in plan["skipped"]}
    every = [f"{layer}.weight_{part}_l0" for layer in ("first.GRU", "second.LSTM") for part in ("ih", "hh")]
    assert sorted([*dense, *(gate["name"] for gate in plan["matrices"])]) == sorted(every)
    shown = CliRunner().invoke(cli, command)
    assert "the training takes about 0:00:0" in shown.stderr
    told = json.loads(CliRunner().invoke(cli, [*command, "--json"]).stdout)
    assert {key: told[key] for key in ("matrices", "parameters", "skipped")} == {
        key: plan[key] for key in ("matrices", "parameters", "skipped")
    }
    written = Path("a.onnx").stat().st_size
    assert plan["bytes"]["after"] == told["bytes"]["after"] == written <= plan["bytes"]["allowed"]
    assert f"the budget allows {plan['bytes']['allowed']:,} bytes" in shown.stderr
    refused = CliRunner().invoke(cli, ["compress", str(model), "--task", "x", "--budget", "2x", "--dry-run", "-o", "b"])
    assert refused.exit_code == 2 and "--dry-run goes with --inputs" in refused.stderr


def test_a_dense_layer_behind_a_small_one_is_trained_through(model: Path, tmp_path: Path) -> None:
    job = GraphJob([model], Samples(samples), "int8", 0, None, tmp_path)
    (graph,) = job.graphs
    graph.convert(make_plan([graph.layers["first.GRU"]], "stacked:4*(96x1,1x32)"), None)
    graph.write(job.small(graph))
    found = distil(job, 40, 1e-2, None)
    assert (found.steps, found.reason) == (10, "") and found.error_after < found.error_before
    assert job.differences()["y"].relative_error == pytest.approx(found.error_after, rel=1e-3)


def with_a_small_lstm(model: Path, folder: Path) -> GraphJob:
    job = GraphJob([model], Samples(samples), "int8", 0, None, folder)
    (graph,) = job.graphs
    graph.convert(make_plan([graph.layers["second.LSTM"]], "stacked:4*(128x1,1x32)"), None)
    graph.write(job.small(graph))
    return job


def test_what_torch_does_not_take_is_said_and_a_bug_is_none_of_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = with_a_small_lstm(model, tmp_path)

    def fails(error: Exception) -> Any:
        def operator(*_: Any) -> Tensor:
            raise error

        return operator

    monkeypatch.setitem(OPERATORS, "MatMul", fails(RuntimeError("sizes of tensors must match")))
    assert "torch cannot run it (sizes of tensors must match)" in distil(job, 40, 1e-2, None).reason
    monkeypatch.setitem(OPERATORS, "MatMul", fails(KeyError("a bug")))
    with pytest.raises(KeyError, match="a bug"):
        distil(job, 40, 1e-2, None)


def test_torch_is_compared_with_onnxruntime_on_several_samples(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = with_a_small_lstm(model, tmp_path)
    multiply, calls = OPERATORS["MatMul"], count()
    monkeypatch.setitem(OPERATORS, "MatMul", lambda *given: multiply(*given) * (1 if next(calls) == 0 else 1.1))
    assert "torch computes something else for 'y'" in distil(job, 40, 1e-2, None).reason  # but not for the first


@pytest.mark.parametrize("times", [2.8, 3.5, 4.5])  # the first above half the rank
def test_the_file_fills_its_budget(model: Path, tmp_path: Path, times: float) -> None:
    found = compress_graph(model, samples, f"size={times}x", tmp_path / "small.onnx", steps=0)
    limit = model.stat().st_size / times
    assert 0.9 * limit < found.attempts[0].bytes <= limit


def test_nodes_as_scans_within_the_budget(model: Path, tmp_path: Path) -> None:
    found = compress_graph(model, samples, "size=2.8x", tmp_path / "small.onnx", steps=0, form="scan")
    (attempt,) = found.attempts
    assert [(one.name, one.form) for one in found.forms] == [("first.GRU", "scan"), ("second.LSTM", "scan")]
    assert all(one.ms is not None for one in found.forms)
    assert attempt.bytes == (tmp_path / "small.onnx").stat().st_size <= model.stat().st_size / 2.8
    assert error(model, tmp_path / "small.onnx") == pytest.approx(attempt.outputs["y"].relative_error, rel=0.2)


def test_a_graph_that_fits_in_eight_bits_keeps_its_matrices(model: Path, tmp_path: Path) -> None:
    found = compress_graph(model, samples, "size=2x", tmp_path / "small.onnx")
    assert found.attempts[0].layers == [] and found.attempts[0].outputs["y"].relative_error < 0.02
    assert found.attempts[0].bytes < model.stat().st_size / 2.5


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(24, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(32, 32), nn.Linear(24, 32)

    def forward(self, code: Tensor, x: Tensor) -> Tensor:
        return self.rnn(code + self.head(x))[0]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """An encoder, and a decoder of its output `code` and of the input `x` of both."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pair")
    x = torch.from_numpy(next(samples())["x"]).float()
    encoder, decoder = Encoder().eval(), Decoder().eval()
    for name, module, given, inputs in (
        ("encoder", encoder, (x,), ["x"]),
        ("decoder", decoder, (encoder(x), x), ["code", "x"]),
    ):
        torch.onnx.export(
            module, given, str(folder / f"{name}.onnx"), input_names=inputs,
            output_names=["code" if name == "encoder" else "y"], dynamo=False,
        )  # fmt: skip
    return [folder / "encoder.onnx", folder / "decoder.onnx"]


def test_graphs_that_run_one_after_the_other(pair: list[Path], tmp_path: Path) -> None:
    """They share a budget, and the layer of the second is trained on what the small first one gives."""
    found = compress_graph(pair, samples, "size=3x", tmp_path / "small", steps=40, lr=1e-2)
    files = [tmp_path / "small" / path.name for path in pair]
    before, after = (sum(file.stat().st_size for file in paths) for paths in (pair, files))
    assert found.files == files and sorted((tmp_path / "small").iterdir()) == sorted(files)
    assert (found.before, found.attempts[0].bytes) == (before, after) and 0.9 * before < 3 * after <= before
    assert [layer.name for layer in found.attempts[0].layers] == ["encoder: rnn.GRU", "decoder: rnn.LSTM"]
    together = found.attempts[0].together
    assert together.steps == 10 and together.error_after <= together.error_before
    assert found.attempts[0].outputs["decoder: y"].relative_error == pytest.approx(together.error_after, rel=1e-3)
    wrong = whole = 0.0
    for sample in list(samples())[1:2]:  # the one that is held out
        x = sample["x"].astype(np.float32)
        ys = []
        for paths in (pair, files):
            runs = [onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]) for path in paths]
            (code,) = runs[0].run(None, {"x": x})
            ys += runs[1].run(None, {"code": code, "x": x})
        wrong, whole = wrong + np.square(ys[0] - ys[1]).sum(), whole + np.square(ys[0]).sum()
    assert found.attempts[0].outputs["decoder: y"].relative_error == pytest.approx(np.sqrt(wrong / whole), rel=1e-3)
    assert found.timing is not None and min(*found.timing.load_ms, *found.timing.run_ms) > 0


def test_only_graphs_that_a_layer_depends_on_are_run(pair: list[Path], tmp_path: Path) -> None:
    job = GraphJob(pair, Samples(samples), "int8", 0, None, tmp_path)
    encoder, decoder = job.graphs
    files = {graph: graph.path for graph in job.graphs}
    nodes = {graph: graph.recorded_nodes() for graph in job.graphs}
    assert [*recording_chain(files, {encoder: nodes[encoder]})] == [encoder]
    assert [*recording_chain(files, {decoder: nodes[decoder]})] == [encoder, decoder]
    assert [*recording_chain({decoder: decoder.path, encoder: encoder.path}, {encoder: nodes[encoder]})] == [encoder]


def test_a_graph_that_torch_cannot_run_is_trained_layer_by_layer(model: Path, tmp_path: Path) -> None:
    graph = onnx.load(model)
    graph.graph.output[0].name = "last"
    graph.graph.node.append(onnx.helper.make_node("Acosh", ["y"], ["last"]))
    onnx.save(graph, tmp_path / "model.onnx")
    found = compress_graph(tmp_path / "model.onnx", samples, "size=5x", tmp_path / "small.onnx", steps=4)
    assert found.attempts[0].layers[0].steps == 4
    assert found.attempts[0].together.steps == 0 and "the operator Acosh" in found.attempts[0].together.reason
    assert "/" not in found.attempts[0].together.reason  # of a copy that is gone


@pytest.fixture
def branches(tmp_path: Path) -> Path:
    """As torch scripts a network with several modes: an LSTM in two branches, whose weights each makes of the same
    tensors by constants of its own, and a GRU in a third."""
    make, value, numbers = onnx.helper.make_node, onnx.helper.make_tensor_value_info, np.random.default_rng(3)

    def branch(kind: str, number: int) -> Any:
        axis = make("Constant", [], [f"axis{number}"], value_ints=[0])
        parts = [make("Unsqueeze", [f"{part}{kind}", f"axis{number}"], [f"{part}{number}"]) for part in "wr"]
        node = make(kind, ["x", f"w{number}", f"r{number}"], [f"y{number}"], name="rnn", hidden_size=32)
        attributes = {"linear_before_reset": 1} if kind == "GRU" else {}
        node.attribute.extend(onnx.helper.make_attribute(*item) for item in attributes.items())
        output = value(f"y{number}", onnx.TensorProto.FLOAT, ["time", 1, 4, 32])
        return onnx.helper.make_graph([axis, *parts, node], "branch", [], [output])

    inner = branch("GRU", 3)
    choice = make("If", ["second"], ["y23"], name="inner", then_branch=branch("LSTM", 2), else_branch=inner)
    other = onnx.helper.make_graph([choice], "branch", [], [value("y23", onnx.TensorProto.FLOAT, None)])
    node = make("If", ["first"], ["y"], name="outer", then_branch=branch("LSTM", 1), else_branch=other)
    flags = [value(name, onnx.TensorProto.BOOL, []) for name in ("first", "second")]
    shapes = {"wLSTM": (128, 24), "rLSTM": (128, 32), "wGRU": (96, 24), "rGRU": (96, 32)}
    weights = {name: numbers.normal(0, 0.3, shape).astype("f4") for name, shape in shapes.items()}
    graph = onnx.helper.make_graph(
        [node], "g", [value("x", onnx.TensorProto.FLOAT, ["time", 4, 24]), *flags],
        [value("y", onnx.TensorProto.FLOAT, None)], [onnx.numpy_helper.from_array(w, n) for n, w in weights.items()],
    )  # fmt: skip
    path = tmp_path / "branches.onnx"
    onnx.save(onnx.helper.make_model(graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 17)]), path)
    return path


def test_layers_in_branches_are_trained_on_what_reaches_them(branches: Path, tmp_path: Path) -> None:
    flags = [(n % 2 == 0, True) for n in range(8)]
    feeds = [
        {**sample, "first": np.array(a), "second": np.array(b)}
        for sample, (a, b) in zip(samples(8), flags, strict=True)
    ]
    small = tmp_path / "small.onnx"
    found = compress_graph(branches, feeds, "size=8x", small, steps=20, lr=1e-2)
    (attempt,) = found.attempts
    (layer,) = attempt.layers
    assert layer.error_after < layer.error_before and layer.recorded == 7 * 4 * 30  # of both nodes
    assert attempt.outputs["y"].relative_error == pytest.approx(layer.error_after, rel=0.05)
    assert {name.split(".")[-1]: why for name, why in found.planned.untrained.items()} == {
        "rnn": "no sample reaches it"
    }
    assert "else_branch.inner.else_branch" in next(iter(found.planned.untrained))
    assert small.stat().st_size == attempt.bytes <= branches.stat().st_size / 8
    outer = onnx.load(small).graph.node[-1]
    bodies = {attribute.name: attribute.g for attribute in outer.attribute}
    inner = {attribute.name: attribute.g for attribute in bodies["else_branch"].node[-1].attribute}
    nodes = [bodies["then_branch"].node[-1], inner["then_branch"].node[-1], inner["else_branch"].node[-1]]
    assert nodes[0].input[1:] == nodes[1].input[1:] != nodes[2].input[1:]  # one weight, as before
    (tmp_path / "job").mkdir()
    job = GraphJob([branches], Samples(feeds), "int8", 0, None, tmp_path / "job")
    job.plan("size=8x")
    assert job.trained() and job.more() == 0  # nothing is trained together, and no time is told for it


def test_sequences_of_no_steps_and_a_node_that_torch_has_no_layer_for(tmp_path: Path) -> None:
    make, value, numbers = onnx.helper.make_node, onnx.helper.make_tensor_value_info, np.random.default_rng(4)
    inputs = [value("x", onnx.TensorProto.FLOAT, [5, 3, 24]), value("n", onnx.TensorProto.INT32, [3])]
    weights = {"w": (2, 128, 24), "r": (2, 128, 32), "w2": (1, 96, 24), "r2": (1, 96, 32)}
    other = make("GRU", ["x", "w2", "r2"], ["z"], name="other", hidden_size=32)  # which resets before the matmul
    graph = onnx.helper.make_graph(
        [make("LSTM", ["x", "w", "r", "", "n"], ["y"], hidden_size=32, direction="bidirectional"), other], "g", inputs,
        [value(name, onnx.TensorProto.FLOAT, None) for name in "yz"],
        [onnx.numpy_helper.from_array(numbers.normal(0, 0.3, shape).astype("f4"), n) for n, shape in weights.items()],
    )  # fmt: skip
    onnx.save(
        onnx.helper.make_model(graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 17)]),
        tmp_path / "a.onnx",
    )
    feeds = [{"x": numbers.standard_normal((5, 3, 24)), "n": np.array([5, 0, 3])} for _ in range(3)]
    found = compress_graph(tmp_path / "a.onnx", feeds, "size=5x", tmp_path / "b.onnx", steps=8)
    (attempt,) = found.attempts
    assert attempt.together.steps == 2 and attempt.layers[0].recorded == 2 * (5 + 3)
    assert "resets before the matmul" in found.planned.skipped["other"] and attempt.outputs["z"].relative_error < 0.02
    stored = {
        proto.data_type for proto in onnx.load(tmp_path / "b.onnx").graph.initializer if np.prod(proto.dims) > 999
    }
    assert stored == {onnx.TensorProto.INT8}


def test_graphs_that_do_not_go_together(pair: list[Path], model: Path, tmp_path: Path) -> None:
    for models, output, message in (
        ([*pair, model], "small", "stand in one folder"),
        (pair, "file", "this is a file"),
        (pair[::-1], "small", "lacks the input 'code'"),
        (pair, "nowhere/small", "no folder"),
        ([model], "small.pt", "the ending is not .onnx"),
    ):
        (tmp_path / "file").touch()
        with pytest.raises(UsageError, match=message):
            compress_graph(models, samples, "size=3x", tmp_path / output, steps=0)
        assert not (tmp_path / "small").exists()


def test_the_command(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("samples").mkdir()
    for number, sample in enumerate(samples(3)):
        np.savez(f"samples/{number}.npz", **sample)
    Path("measure.py").write_text("from pathlib import Path\ndef size(path): return Path(path).stat().st_size\n")
    command = ["compress", str(model), "--inputs", "samples", "--budget", "size=2x", "-o", "small.onnx", "--json"]
    result = CliRunner().invoke(cli, [*command, "--task", "measure.py:size", "--max-drop", "1", "--card", "card.md"])
    assert result.exit_code == 6, result.output  # a smaller file is worse by this metric
    assert "bytes: metric worse by" in result.stderr
    found = json.loads(result.stdout)
    assert found["output"] == "small.onnx" and found["bytes"]["after"] == Path("small.onnx").stat().st_size
    assert found["baseline"] == found["bytes"]["before"] and found["attempts"][0]["metric"] == found["bytes"]["after"]
    assert set(found["attempts"][0]["outputs"]["y"]) == {"relative_error", "snr_db", "agreement"}
    assert found["files"] == ["small.onnx"] and set(found["timing"]) == {"load_ms", "run_ms"}
    card, sizes = Path("card.md").read_text(), found["bytes"]
    assert card.startswith("---\nlibrary_name:") and f"{sizes['before']:,} -> {sizes['after']:,} bytes" in card
    assert f"| `y` | {found['attempts'][0]['outputs']['y']['relative_error']:.4f} | " in card
    refused = CliRunner().invoke(cli, [*command, "--epochs", "3"])
    assert refused.exit_code == 2 and "--epochs does not go with --inputs" in refused.stderr
    refused = CliRunner().invoke(cli, [*command, "--ray-address", "here"])
    assert refused.exit_code == 2 and "--ray does not go with --inputs" in refused.stderr
    nothing = CliRunner().invoke(cli, ["compress", str(model), "--budget", "size=2x", "-o", "small.onnx"])
    assert nothing.exit_code == 2 and "Give --task TASK or --inputs SAMPLES" in nothing.stderr
    several = CliRunner().invoke(cli, ["compress", "a.pt", "b.pt", "--task", "x", "--budget", "2x", "-o", "small.pt"])
    assert several.exit_code == 2 and "only with --inputs" in several.stderr


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"budget": "8x"}, UsageError, "a budget of bytes"),
        ({"dtype": "int4"}, UsageError, "Take int8 for an ONNX graph"),
        ({"budget": "size=100"}, PlanError, "the smallest file that was found takes"),
        ({"samples": Samples(lambda: iter([]))}, TaskError, "no sample to calibrate on"),
        ({"samples": [3]}, TaskError, "sample 0 is a int, not a dict"),
        ({"metric": lambda path: np.nan, "max_drop": "1%"}, TaskError, "the metric of the original network is nan"),
        ({"model": "other.pt"}, UsageError, "samples go with an ONNX graph"),
    ],
)
def test_what_cannot_be_done_is_said(
    model: Path, tmp_path: Path, change: dict[str, Any], kind: type[Exception], message: str
) -> None:
    options = {"model": model, "samples": samples, "budget": "size=5x", "output": tmp_path / "small.onnx"} | change
    if options["model"] == "other.pt":
        options["model"] = tmp_path / "other.pt"
        torch.save(nn.GRU(2, 2).state_dict(), options["model"])
    with pytest.raises(kind, match=message):
        compress_graph(**options)


def test_samples_are_read_from_a_folder_or_a_function(tmp_path: Path) -> None:
    for name in ("b", "a"):
        np.savez(tmp_path / f"{name}.npz", x=np.full(2, ord(name)))
    assert [sample["x"][0] for sample in Samples(tmp_path)] == [ord("a"), ord("b")]
    (tmp_path / "made.py").write_text("def make():\n    yield {'x': 1}\n    raise ValueError('no more')\n")
    made = Samples(f"{tmp_path}/made.py:make")
    with pytest.raises(TaskError, match="ValueError: no more"):
        list(made)
    with pytest.raises(UsageError, match="no such folder"):
        Samples(tmp_path / "nowhere")
    (tmp_path / "c.npz").write_bytes(b"no archive")
    with pytest.raises(CorruptError, match="cannot be read"):
        list(Samples(tmp_path))


def test_ranks_go_where_they_keep_the_most_of_what_the_matrices_give(model: Path, tmp_path: Path) -> None:
    ranks = GraphJob([model], Samples(samples), "int8", 0, None, tmp_path).ranks
    (chosen,) = ranks.plans(0.3)
    even = stacked_low_rank(list(ranks.graphs[0].layers.values()), 0.3)
    assert even is not None
    spectra = {stack.name: energies for stack, energies in ranks.spectra.items()}

    def of(plan: Plan) -> tuple[int, float]:
        found = [(layer.full_name(weight), s) for layer, weight, (s,) in plan.matrices()]
        return sum(s.parameters for _, s in found), sum(float(spectra[n][: s.terms[0].rank].sum()) for n, s in found)

    assert of(chosen)[0] <= 0.3 * sum(s.rows * s.cols for s in ranks.spectra)
    assert of(chosen)[1] > of(even)[1]
