"""Exports of whole checkpoints: dense state dicts, layers by themselves, a task's network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import kruify
from kruify.checkpoint import read, write_torch
from kruify.cli.main import cli
from kruify.conversion import densify
from kruify.errors import UnsupportedError, UsageError
from kruify.exporting import export_dense, export_layers, export_network
from kruify.tasks.base import Task


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.encoder = nn.GRU(6, 8, batch_first=True)
        self.decoder = nn.LSTM(8, 8, batch_first=True)
        self.out = nn.Linear(8, 7)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.decoder(self.encoder(self.embedding(x))[0])[0])
        return y


class Letters(Task):
    def model(self) -> nn.Module:
        return Network()

    def batches(self, split: str, *, seed: int = 0) -> Iterator[Tensor]:
        for shape in ((3, 5), (2, 9), (1, 2)):
            yield torch.arange(shape[0] * shape[1]).reshape(shape) % 7

    def forward(self, model: nn.Module, batch: Tensor) -> Tensor:
        y: Tensor = model(batch)
        return y

    def loss(self, outputs: Tensor, batch: Tensor) -> Tensor:
        return outputs.square().mean()


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return kruify.convert(Network(), "2*(4x2,2x4)")[0]


@pytest.fixture
def file(tmp_path: Path, model: nn.Module) -> Path:
    kruify.save(model, tmp_path / "small.kru.safetensors")
    return tmp_path / "small.kru.safetensors"


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_dense_state_dict(tmp_path: Path, model: nn.Module, file: Path, ending: str) -> None:
    exported = export_dense(read(file), tmp_path / f"dense{ending}")
    network = Network()
    network.load_state_dict(dict(read(exported.path).tensors))
    x = torch.arange(10).reshape(2, 5) % 7
    torch.testing.assert_close(network(x), densify(model)(x))
    assert exported.cases == 30 and exported.difference < 1e-6


def test_dense_file_of_the_kind_that_was_converted(tmp_path: Path) -> None:
    """Wrapper, prefix and extras come back, so that the code that wrote the file can read it."""
    state = {f"module.{name}": value for name, value in nn.GRU(3, 4).state_dict().items()}
    torch.save({"model": state, "epoch": 3}, tmp_path / "wrapped.pt")
    converted, dense = tmp_path / "wrapped.kru.safetensors", tmp_path / "dense.pt"
    run = CliRunner().invoke
    assert run(cli, ["convert", str(tmp_path / "wrapped.pt"), "--factors", "4x4"]).exit_code == 0
    result = run(cli, ["export", str(converted), "--to", "dense", "-o", str(dense)])
    assert result.exit_code == 0, result.output
    again = torch.load(dense, weights_only=True)
    assert again["epoch"] == 3 and list(again["model"]) == list(state)
    torch.testing.assert_close(again["model"], state)


def test_dense_refuses_what_is_dense_and_unknown_endings(tmp_path: Path, file: Path) -> None:
    write_torch(tmp_path / "plain.pt", nn.LSTM(3, 4).state_dict())
    with pytest.raises(UsageError, match="dense already"):
        export_dense(read(tmp_path / "plain.pt"), tmp_path / "out.pt")
    with pytest.raises(UsageError, match="ending"):
        export_dense(read(file), tmp_path / "out.xyz")


def test_each_layer_of_a_state_dict_gets_its_own_file(tmp_path: Path, file: Path) -> None:
    exported = export_layers(read(file), "onnx", tmp_path / "net.onnx")
    assert [item.path.name for item in exported] == ["net.encoder.onnx", "net.decoder.onnx"]
    assert exported[0].inputs == ("input", "h_0") and exported[1].inputs == ("input", "h_0", "c_0")
    assert max(item.difference for item in exported) < 1e-5


def test_layers_of_a_dense_file_can_be_exported_too(tmp_path: Path) -> None:
    write_torch(tmp_path / "plain.pt", nn.LSTM(3, 4).state_dict())
    (exported,) = export_layers(read(tmp_path / "plain.pt"), "onnx", tmp_path / "out.onnx", batch_first=True)
    assert exported.path == tmp_path / "out.onnx"


@pytest.mark.parametrize("nonlinearity", [None, "relu"])
@pytest.mark.parametrize("converted", [False, True])
def test_what_a_state_dict_does_not_tell_is_said_and_can_be_given(
    tmp_path: Path, converted: bool, nonlinearity: str | None
) -> None:
    torch.manual_seed(0)
    rnn = nn.RNN(3, 4, nonlinearity=nonlinearity or "tanh")
    file = tmp_path / "rnn.pt"
    write_torch(file, rnn.state_dict())
    if converted:
        arguments = ["convert", str(file), "--factors", "4*(2x2,2x2)", "-o", str(tmp_path / "rnn.safetensors")]
        assert CliRunner().invoke(cli, arguments).exit_code == 0
        file = tmp_path / "rnn.safetensors"
    (exported,) = export_layers(read(file), "onnx", tmp_path / "rnn.onnx", nonlinearity=nonlinearity)
    assert exported.assumed == (("tanh", "time before batch") if nonlinearity is None else ("time before batch",))
    session = onnxruntime.InferenceSession(str(exported.path), providers=["CPUExecutionProvider"])
    x, h = 3 * torch.randn(5, 2, 3), torch.randn(1, 2, 4)
    got = session.run(None, {"input": x.numpy(), "h_0": h.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(got), rnn(x, h)[0], atol=1e-5, rtol=0)


def test_a_nonlinearity_that_cannot_be_is_refused(tmp_path: Path, file: Path) -> None:
    with pytest.raises(UsageError, match="no plain RNN"):
        export_layers(read(file), "onnx", tmp_path / "out.onnx", nonlinearity="relu")
    kruify.save(kruify.convert(nn.RNN(3, 4), "2x2")[0], tmp_path / "rnn.safetensors")  # a module tells
    with pytest.raises(UsageError, match="RNN with tanh"):
        export_layers(read(tmp_path / "rnn.safetensors"), "onnx", tmp_path / "out.onnx", nonlinearity="relu")
    (exported,) = export_layers(read(tmp_path / "rnn.safetensors"), "onnx", tmp_path / "out.onnx")
    assert exported.assumed == ()


def test_whole_network_with_dynamic_batch_and_time(tmp_path: Path, model: nn.Module) -> None:
    model.decoder = Passing()  # one loop is enough: tracing takes seconds for each
    model = kruify.quantize(model, "int8")
    exported = export_network(model, Letters(), "torch", tmp_path / "net.pt2")
    assert exported.cases == 3 and exported.difference < 1e-5 and exported.widened == ("float16", "int8")
    program = torch.export.load(exported.path).module()
    x = torch.arange(44).reshape(4, 11) % 7
    torch.testing.assert_close(program(x)[0], densify(model)(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dense", [False, True])
def test_whole_network_as_onnx(tmp_path: Path, model: nn.Module, dense: bool) -> None:
    pytest.importorskip("onnxscript")
    exported = export_network(model, Shifted(), "onnx", tmp_path / "net.onnx", dense=dense)
    assert exported.cases == 3 and exported.difference < 1e-5
    session = onnxruntime.InferenceSession(str(exported.path), providers=["CPUExecutionProvider"])
    ops = {node.op_type for node in onnx.load(exported.path).graph.node}
    assert ({"GRU", "LSTM"} <= ops) if dense else ("Scan" in ops)
    x = torch.arange(44).reshape(4, 11) % 7
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), densify(model)(x), atol=1e-5, rtol=0)


class Passing(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x, None


class Shifted(Letters):
    """The network gets a part of the batch, as a language model does that is to say the next letter."""

    def forward(self, model: nn.Module, batch: Tensor) -> Tensor:
        y: Tensor = model(batch[:, :-1])
        return y


class Branching(Letters):
    def forward(self, model: nn.Module, batch: Tensor) -> Tensor:
        y: Tensor = model.out(torch.zeros(1, 8))  # type: ignore[operator]
        return y


def test_a_network_that_is_not_called_as_a_whole_is_unsupported(tmp_path: Path, model: nn.Module) -> None:
    with pytest.raises(UnsupportedError, match="as a whole"):
        export_network(model, Branching(), "torch", tmp_path / "net.pt2")
    assert not (tmp_path / "net.pt2").exists()


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 30 else x


class Operator(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvals(x.float() @ x.float().transpose(0, 1)).real


class Loop(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return sum(x[:, step : step + 1] for step in range(x.shape[1]))


@pytest.mark.parametrize(
    ("network", "said"),
    [
        (Branch(), r"^Branch: torch cannot trace .*\(GuardOnDataDependentSymNode: Could not guard"),
        (Operator(), r"^Operator: torch cannot trace .*\(DispatchError: No ONNX function found for .*aten.linalg_eig"),
        (Loop(), r"^Loop: what torch wrote does not run on the first batches \("),  # of another length than the example
    ],
)
def test_a_network_that_cannot_be_traced_is_told_the_innermost_cause(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], network: nn.Module, said: str
) -> None:
    pytest.importorskip("onnxscript")
    with pytest.raises(UnsupportedError, match=said):
        export_network(network, Letters(), "onnx", tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().err  # where torch prints its graph


def test_command_line(tmp_path: Path, file: Path) -> None:
    run = CliRunner().invoke
    arguments = ["export", str(file), "--to", "onnx", "-o", str(tmp_path / "net.onnx"), "--json"]
    result = run(cli, arguments)
    assert result.exit_code == 0, result.output
    outputs = json.loads(result.stdout)["outputs"]
    assert [Path(o["output"]).exists() for o in outputs] == [True, True]
    assert "time" not in result.stderr  # the file tells the layout
    missed = run(cli, [*arguments[:-3], "-o", str(tmp_path / "never.onnx"), "--tolerance", "0"])
    assert missed.exit_code == 6 and not list(tmp_path.glob("never*")), missed.output
    for wrong in (["--to", "dense", "--dense"], ["--to", "onnx", "--task", "x", "--nonlinearity", "relu"]):
        assert run(cli, ["export", str(file), *wrong, "-o", "x.pt"]).exit_code == 2
    write_torch(tmp_path / "plain.pt", nn.RNN(3, 4).state_dict())
    told = run(cli, ["export", str(tmp_path / "plain.pt"), "--to", "onnx", "-o", str(tmp_path / "plain.onnx")])
    assert told.exit_code == 0 and "--nonlinearity relu" in told.stderr and "--batch-first" in told.stderr


@pytest.mark.parametrize("to", ["dense", "onnx", "c"])
def test_weights_of_fewer_bits_that_are_written_in_full_are_named(tmp_path: Path, to: str) -> None:
    write_torch(tmp_path / "model.pt", nn.LSTM(8, 8).state_dict())
    file = tmp_path / "small.safetensors"
    kruify.convert(tmp_path / "model.pt", "2*(4x2,2x4)", output=file, dtype="int8")
    command = ["export", str(file), "--to", to, "-o", str(tmp_path / "new.pt")]
    said = [CliRunner().invoke(cli, command), CliRunner().invoke(cli, [*command, "--json"])]
    assert ("int8 are written in full, as float32" in said[0].stdout) is (to != "c"), said[0].output
    (written,) = json.loads(said[1].stdout)["outputs"]
    assert written["widened"] == ([] if to == "c" else ["float16", "int8"])


def test_what_keras_weights_leave_open_is_named_by_export(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.weights.h5", "w") as weights:
        for part, shape in enumerate(((3, 16), (4, 16), (16,))):
            weights.create_dataset(f"layers/lstm/cell/vars/{part}", data=torch.randn(shape).numpy())
        weights["layers/lstm/cell/vars"].attrs["name"] = "lstm_cell"
    kruify.convert(tmp_path / "a.weights.h5", "2x2", output=tmp_path / "a.kru.safetensors")
    for to, name in (("onnx", "a.onnx"), ("dense", "b.safetensors")):
        result = CliRunner().invoke(
            cli, ["export", str(tmp_path / "a.kru.safetensors"), "--to", to, "-o", str(tmp_path / name)]
        )
        assert result.exit_code == 0 and "lstm: it runs forward, with the activations tanh" in " ".join(
            result.output.split()
        )
