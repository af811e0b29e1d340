"""The trade-off curve: what it holds, that it goes on where it stopped, where its knee is."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic

import kruify
from kruify.analysis.latency import measure_latency
from kruify.checkpoint import read
from kruify.checkpoint.remote import exists, fetch_file, send_file
from kruify.cli.main import cli
from kruify.errors import CorruptError, UnsafeError, UsageError
from kruify.search.trade_off import Point, Sweep, knee, sweep
from kruify.tasks.base import Task


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(3, 8, batch_first=True)
        self.out = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.rnn(x)[0])
        return y


class Toy(Task):
    evaluations = 0

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return Network()

    def batches(self, split: str, *, seed: int = 0) -> Iterator[Tensor]:
        yield torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(seed))

    def forward(self, model: nn.Module, batch: Tensor) -> Tensor:
        y: Tensor = model(batch)
        return y

    def loss(self, outputs: Tensor, batch: Tensor) -> Tensor:
        return (outputs - batch[..., :2]).square().mean()

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        self.evaluations += split == "test"
        return super().evaluate(model, split)


def test_sizes_and_shares_in_one_sweep(tmp_path: Path) -> None:
    """A size is in int8 if nothing else is said, and kept by the file as it lies there; a share stays as it was."""
    done = sweep(Toy().model(), Toy(), ["size=2kB", "2x"], tmp_path / "s", epochs=1)
    dense, small, share = done.points
    assert small.bytes == Path(small.file or "").stat().st_size <= 2000
    assert dense.bytes == 4 * dense.total_parameters
    assert read(small.file or "").storage and not read(share.file or "").storage
    again = sweep(Toy().model(), Toy(), ["size=2kB", "2x"], tmp_path / "s", epochs=1)
    assert again.to_json() == done.to_json()


def test_sweep_and_going_on(tmp_path: Path) -> None:
    task = Toy()
    first = sweep(task.model(), task, ["2x"], tmp_path / "s", epochs=1)
    assert [p.budget for p in first.points] == ["dense", "2x"] and first.knee is None
    assert first.points[1].recurrent_parameters <= 32 and first.points[0].recurrent_parameters == 64
    loaded = kruify.load(first.points[1].file or "", into=Network())
    assert task.evaluate(loaded, "test") == first.points[1].metrics
    rival, file = quantize_dynamic(task.model(), {nn.Linear}), io.BytesIO()  # torch has no eight-bit RNN
    torch.save(rival.state_dict(), file)
    assert first.int8 is not None and first.int8.metrics == task.evaluate(rival, "test")
    assert first.int8.bytes == len(file.getvalue())
    done = task.evaluations
    both = sweep(task.model(), task, ["2x", "params=25%"], tmp_path / "s", epochs=1)
    assert both.points[:2] == first.points and both.int8 == first.int8 and both.knee is not None
    assert task.evaluations == done + 1  # only the new network
    with pytest.raises(UsageError, match="other recipe"):
        sweep(task.model(), task, ["2x"], tmp_path / "s", epochs=2)
    other = task.model()
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    with pytest.raises(UsageError, match="other model"):
        sweep(other, task, ["2x"], tmp_path / "s", epochs=1)


def test_the_folder_may_be_an_address(tmp_path: Path) -> None:
    """The same networks, and the same going on, in a file system of fsspec."""
    address, task = f"memory://{tmp_path}/curve", Toy()
    here = sweep(Toy().model(), Toy(), ["2x", "4x"], tmp_path / "s", epochs=1)
    there = sweep(Toy().model(), Toy(), ["2x"], address, epochs=1)
    assert there.points[1].file == f"{address}/2x.kru.safetensors"
    there = sweep(task.model(), task, ["2x", "4x"], f"{address}/", epochs=1)
    assert task.evaluations == 1  # of 4x alone
    assert json.dumps(there.to_json()) == json.dumps(here.to_json()).replace(str(tmp_path / "s"), address)
    for name in ("2x", "4x"):
        size = (tmp_path / "s" / f"{name}.kru.safetensors").stat().st_size
        assert fetch_file(f"{address}/{name}.kru.safetensors", tmp_path / name, size)
        assert (tmp_path / name).read_bytes() == (tmp_path / "s" / f"{name}.kru.safetensors").read_bytes()
    with pytest.raises(UsageError, match=r"holds another sweep \(other recipe\)"):
        sweep(Toy().model(), Toy(), ["2x"], address, epochs=2)
    with pytest.raises(UsageError, match=r"nowhere://a/sweep\.json: it cannot be reached"):
        sweep(Toy().model(), Toy(), ["2x"], "nowhere://a", epochs=1)
    with pytest.raises(UnsafeError, match="it takes more than 9 bytes"):
        fetch_file(f"{address}/sweep.json", tmp_path / "a", 9)
    with pytest.raises(UsageError, match="/nowhere/a: it cannot be written"):  # not the address
        fetch_file(f"{address}/sweep.json", tmp_path / "nowhere" / "a", 10**6)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        send_file(tmp_path / "nowhere", f"{address}/a")
    assert not exists(f"{address}/a")


def test_a_state_of_another_version_or_of_any_size(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text('{"settings": {"model": "0"}, "points": []}')
    with pytest.raises(UsageError, match="holds a sweep of another version of kruify"):
        sweep(Toy().model(), Toy(), ["2x"], tmp_path)
    with (tmp_path / "sweep.json").open("wb") as file:
        file.truncate(1 << 40)  # a terabyte of nothing
    with pytest.raises(UnsafeError, match="its state takes 1099511627776 bytes"):
        sweep(Toy().model(), Toy(), ["2x"], tmp_path)


def test_refusals(tmp_path: Path) -> None:
    task = Toy()
    with pytest.raises(UsageError, match="different budgets"):
        sweep(task.model(), task, ["2x", "2x"], tmp_path / "s")
    with pytest.raises(UsageError, match="no RNN"):
        sweep(nn.Linear(2, 2), task, ["2x"], tmp_path / "s")


@pytest.mark.parametrize(
    "change",
    [
        lambda state: [],
        lambda state: {**state, "points": [{}]},
        lambda state: {**state, "points": 3},
        lambda state: {**state, "settings": [1]},
        lambda state: {**state, "points": [{**state["points"][0], "metrics": {"other": 1.0}}]},
        lambda state: {**state, "points": [{**state["points"][0], "metrics": [1.0]}]},
        lambda state: {**state, "points": [{**state["points"][0], "recurrent_parameters": "many"}]},
        lambda state: {**state, "points": [{**state["points"][0], "file": 3}]},
        lambda state: {**state, "points": [{**state["points"][0], "trials": [[]]}]},
        lambda state: {
            **state,
            "points": [{**state["points"][0], "trials": [{"factors": 3, "metrics": {}, "lr": 0.1}]}],
        },
    ],
)
def test_a_damaged_state_is_refused_and_kept(change, tmp_path: Path) -> None:
    task = Toy()
    model, file = task.model(), tmp_path / "sweep.json"
    sweep(model, task, ["2x"], tmp_path, epochs=0, share=0)
    damaged = json.dumps(change(json.loads(file.read_text())))
    file.write_text(damaged)
    with pytest.raises(CorruptError, match="not the state of a sweep"):
        sweep(model, task, ["2x"], tmp_path, epochs=0, share=0)
    assert file.read_text() == damaged


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"settings": ' * 200 + "1" + "}" * 200, "{", "\xff", '{"a": 1, "a": 2}']
)
def test_a_state_that_is_no_json(text, tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_bytes(text.encode("latin1"))
    with pytest.raises((CorruptError, UnsafeError), match=r"sweep\.json"):
        sweep(Toy().model(), Toy(), ["2x"], tmp_path)


def points(*pairs: tuple[int, float]) -> list[Point]:
    return [Point(str(i), None, size, size, {"m": value}) for i, (size, value) in enumerate(pairs)]


def test_knee_is_where_the_curve_bends() -> None:
    bend = points((1024, 0.10), (512, 0.11), (256, 0.12), (128, 0.13), (64, 0.30), (32, 0.60))
    assert knee(bend, "m", False) == 3
    better = [Point(p.budget, None, p.recurrent_parameters, 0, {"m": -p.metrics["m"]}) for p in bend]
    assert knee(better, "m", True) == 3
    assert knee(bend[:2], "m", False) is None
    assert knee(points((4, 1.0), (2, float("nan")), (1, 2.0)), "m", False) is None
    in_bytes = [Point(p.budget, None, 7, 0, p.metrics, p.recurrent_parameters) for p in bend]
    assert knee(in_bytes, "m", False, of_file=True) == 3


def test_under_a_budget_of_bytes_these_say_how_much_smaller_a_network_is() -> None:
    dense, small = Point("dense", None, 100, 400, {"m": 0.1}, 1600), Point("size=4x", "f", 50, 200, {"m": 0.2}, 400)
    assert Sweep([dense, small], "m", False, "test", None).smaller(small) == 2
    assert Sweep([dense, small], "m", False, "test", None, of_file=True).smaller(small) == 4


def test_command_line_and_marked_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(__file__).read_text(encoding="utf-8").split("def test_")[0]
    (tmp_path / "toy.py").write_text(source, encoding="utf-8")
    torch.save(Toy().model().state_dict(), tmp_path / "net.pt")
    monkeypatch.setattr(
        "kruify.reporting.build.measure_latency", lambda layers, **_: measure_latency(layers, seconds=0.0)
    )
    arguments = [
        "sweep", str(tmp_path / "net.pt"), "--task", f"{tmp_path}/toy.py:Toy", "--budgets", "2x,params=4x,macs=60%",
        "--epochs", "1", "--html", str(tmp_path / "page.html"), "--json",
    ]  # fmt: skip
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    value = json.loads(result.stdout)
    assert [p["budget"] for p in value["points"]] == ["dense", "2x", "params=4x,macs=60%"]
    assert value["knee"] in ("dense", "2x", "params=4x,macs=60%")
    assert (tmp_path / "net.pt.sweep" / "sweep.json").exists()
    assert value["int8"]["budget"] == "int8" and value["int8"]["file"] is None
    again = CliRunner().invoke(cli, [a for a in arguments if a != "--json"][:-2])
    assert again.exit_code == 0 and " int8 " in again.stdout
    assert ">knee<" in (tmp_path / "page.html").read_text(encoding="utf-8")
