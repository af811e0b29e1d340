"""Budgets of bytes: of the file that is written, met from below, shared out by what the matrices give."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import kruify
from kruify.checkpoint import read
from kruify.conversion.budget import Searches
from kruify.conversion.calibration import Moments
from kruify.conversion.locate import locate
from kruify.conversion.plan import Plan, make_plan
from kruify.conversion.size import FileSize, plan_size
from kruify.errors import PlanError, UsageError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 12)
        self.rnn = nn.GRU(12, 24)
        self.out = nn.Linear(24, 4)


@pytest.fixture(scope="module")
def net() -> Net:
    """W_hh of rank 2 in every gate but for noise, W_ih of full rank."""
    generator = torch.Generator().manual_seed(0)
    model = Net()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))
        left, right = torch.randn(72, 2, generator=generator), torch.randn(2, 24, generator=generator)
        model.rnn.weight_hh_l0.copy_(left @ right / 10 + 0.001 * torch.randn(72, 24, generator=generator))
    return model


@pytest.fixture(scope="module")
def source(net: Net, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("size") / "net.pt"
    torch.save(net.state_dict(), path)
    return path


def counted(net: nn.Module, **options: object) -> FileSize:
    return FileSize(net.state_dict(), locate(net).layers, **options)  # type: ignore[arg-type]


def weights(net: nn.Module) -> int:
    return sum(4 * p.numel() for p in net.parameters())


SPECS = ["dense", "2*(6x4,4x6)+diag+sparse:2%", "stacked:3*(72x1,1x24)+sparse:4%:8", "4*(24x1,1x24)+sparse:3%:1"]


@pytest.mark.parametrize(("spec", "dtype"), [*itertools.product(SPECS, ["int8"]), (SPECS[1], "float16")])
def test_the_bytes_of_a_file_are_known_before_it_is_written(
    source: Path, net: Net, spec: str, dtype: str, tmp_path: Path
) -> None:
    plain = counted(net, source_sha256="", dtype=dtype, keep=["out"])
    _, conversion = kruify.convert(net, spec, dtype=dtype, keep=["out"], output=tmp_path / "small.safetensors")
    assert plain.of(conversion.plan) == (tmp_path / "small.safetensors").stat().st_size


@pytest.fixture(scope="module")
def file(net: Net) -> FileSize:
    return counted(net)


@pytest.fixture(scope="module")
def plan(net: Net, file: FileSize) -> Callable[..., Plan]:
    """Plans of several sizes, relative to the file with every matrix dense in int8; fits in common are made once."""
    searches: Searches = {}

    def plan(share: float, **options: object) -> Plan:
        return plan_size(file, f"size={int(share * file.of(Plan()))}", searches=searches, **options)  # type: ignore[arg-type]

    return plan


@pytest.mark.parametrize("budget", ["size=3.1x", "size=4kB"])
def test_the_file_is_within_the_budget(source: Path, net: Net, budget: str, tmp_path: Path) -> None:
    allowed = 4000 if "k" in budget else int(weights(net) / 3.1)
    conversion = kruify.convert(source, budget=budget, output=tmp_path / "small.safetensors")
    written, found = (tmp_path / "small.safetensors").stat().st_size, conversion.bytes
    assert 0.95 * allowed < written <= allowed
    assert found is not None
    assert (found.before, found.file, found.allowed) == (weights(net), written, allowed)
    assert set(read(tmp_path / "small.safetensors").storage) >= {"embedding.weight", "rnn.weight_ih_l0"}
    small = kruify.load(tmp_path / "small.safetensors", into=Net())
    assert isinstance(small, Net)
    assert small.rnn(small.embedding(torch.arange(12)))[0].isfinite().all()


def test_where_storage_is_enough_every_matrix_stays_dense(net: Net, file: FileSize, plan: Callable[..., Plan]) -> None:
    """A ratio that plain int8 nearly comes to is met from below, too."""
    ratio = weights(net) / file.of(Plan())
    assert [plan_size(file, f"size={x * ratio:.4f}x") for x in (0.5, 0.999)] == 2 * [Plan()]
    assert file.of(plan_size(file, f"size={1.04 * ratio:.4f}x")) <= file.of(Plan()) / 1.0399
    assert plan(1.0) == Plan()
    assert plan(0.95) != Plan()
    with pytest.raises(PlanError, match="stands alone"):
        plan_size(file, "size=4x,macs=2x")


def lost(net: nn.Module, plan: Plan) -> float:
    """Of the squared entries of the matrices."""
    back = kruify.densify(kruify.convert(net, plan=plan)[0]) if plan.layers else net
    names = ("weight_ih_l0", "weight_hh_l0")
    return sum(float((getattr(back.rnn, name) - getattr(net.rnn, name)).detach().square().sum()) for name in names)


def test_the_bytes_go_where_they_keep_the_most(net: Net, file: FileSize, plan: Callable[..., Plan]) -> None:
    """A matrix of rank 2 needs little, so that the other one gets the rest: more is kept than by any one rank."""
    found = plan(0.8)
    numbers = {weight: sum(s.parameters for s in found) for _, weight, found in found.matrices()}
    assert numbers["weight_hh_l0"] / (72 * 24) < 0.7 * numbers.get("weight_ih_l0", 72 * 12) / (72 * 12)
    for spec in ("stacked:{}*(72x1,1x{})", "{}*(24x1,1x{})"):
        ranks = (make_plan(file.layers, spec.format(r, 24), spec.format(r, 12)) for r in range(12, 0, -1))
        even = next(p for p in ranks if file.of(p) <= 0.8 * file.of(Plan()))
        assert lost(net, found) < 0.5 * lost(net, even)


def test_more_bytes_keep_no_less(net: Net, plan: Callable[..., Plan]) -> None:
    found = [lost(net, plan(share)) for share in (0.75, 0.8, 0.9, 1.0)]
    assert found == sorted(found, reverse=True)
    assert found[-1] == 0


def test_a_calibrated_plan_counts_what_the_matrices_give() -> None:
    """Of two matrices alike, that of the larger inputs gets the bytes."""
    torch.manual_seed(0)
    file = counted(nn.ModuleDict({"rnn": nn.GRU(32, 32)}))
    moments = {f"rnn.weight_{part}_l0": Moments.empty(32) for part in ("ih", "hh")}
    for size, each in zip((10.0, 0.1), moments.values(), strict=True):
        each.add(size * torch.randn(100, 32))
    plan = plan_size(file, f"size={int(0.85 * file.of(Plan()))}", moments=moments)
    numbers = {weight: sum(s.parameters for s in found) for _, weight, found in plan.matrices()}
    assert numbers.get("weight_ih_l0", 96 * 32) > 1.5 * numbers["weight_hh_l0"]


def test_a_budget_below_the_smallest_file_says_how_small_that_is(file: FileSize, plan: Callable[..., Plan]) -> None:
    with pytest.raises(PlanError, match="the smallest file that was found takes") as error:
        plan(0.1)
    smallest = int(error.value.hint.split("size=")[1].split(",")[0])
    assert 0.5 * file.of(Plan()) < smallest < 0.75 * file.of(Plan())  # most of it is vectors and header
    assert file.of(plan((smallest + 0.5) / file.of(Plan()))) <= smallest


def test_patterns_that_leave_nothing_to_factor(file: FileSize) -> None:
    with pytest.raises(PlanError, match=f"size={file.of(Plan())}"):
        plan_size(file, "size=20x", skip=["*"])


def test_patterns_and_kept_weights(net: Net) -> None:
    file = counted(net, keep=["embedding"])
    limit = int(0.9 * file.of(Plan()))
    plan = plan_size(file, f"size={limit}", skip=["*weight_ih*"], overrides={"*.n": "dense"})
    ((_, weight, structures),) = plan.matrices()
    assert weight == "weight_hh_l0"
    assert structures[2].parameters == 24 * 24
    assert file.of(plan) <= limit


@pytest.mark.parametrize("kind", ["rnn", "tied"])
def test_other_networks(kind: str) -> None:
    """A plain RNN keeps scales beside its factors, and has one gate; a matrix of several names stands in the file
    under each, and is the same under each."""
    net = nn.ModuleDict({"a": nn.RNN(32, 32, 1, bidirectional=True)})
    if kind == "tied":
        net = nn.ModuleDict({"a": nn.GRU(16, 16), "b": nn.GRU(16, 16)})
        net["b"].weight_hh_l0 = net["a"].weight_hh_l0
    file = counted(net)
    limit = int(0.9 * file.of(Plan()))
    plan = plan_size(file, f"size={limit}")
    assert 0.9 * limit < file.of(plan) <= limit
    if kind == "tied":
        found = {layer.name: structures for layer, weight, structures in plan.matrices() if weight == "weight_hh_l0"}
        assert found.get("a") == found.get("b")


@pytest.mark.parametrize("options", [{"input_budget": "4x"}, {"max_error": 0.5}])
def test_a_size_stands_alone(net: Net, options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="a size or a latency covers"):
        kruify.convert(net, budget="size=8x", **options)  # type: ignore[call-overload]


def test_a_size_is_of_a_safetensors_file(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="safetensors"):
        kruify.convert(source, budget="size=8x", output=tmp_path / "small.pt")
