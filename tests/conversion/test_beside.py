"""Linear layers and embeddings beside the recurrent ones, which a budget of the whole file factors, too."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import weight_norm

import kruify
from kruify.conversion.beside import layers_beside
from kruify.conversion.calibration import calibrate
from kruify.conversion.plan import Plan
from kruify.errors import PlanError, TaskError, UsageError
from kruify.search.candidate_search import CandidateSearch
from kruify.tasks.base import Task

WORDS = 96


class Words(nn.Module):
    def __init__(self, outputs: int = WORDS, tied: bool = False, direct: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 48, padding_idx=0)
        self.rnn = nn.GRU(48, 32, batch_first=True)
        self.out = nn.Linear(32, outputs)
        self.direct = direct
        if tied:
            self.out.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.rnn(self.embedding(x))[0]
        return F.linear(h, self.out.weight * 2) if self.direct else self.out(h)


class Echo(Task):
    """Say each word again."""

    def __init__(self, made: Callable[[], nn.Module] = Words) -> None:
        self.made = made

    def model(self) -> nn.Module:
        return self.made()

    def batches(self, split: str, *, seed: int = 0) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(4):
            yield torch.randint(WORDS, (8, 12), generator=generator)

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        found: Tensor = model(batch)
        return found

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), batch.flatten())


def names(net: nn.Module) -> list[str]:
    return [layer.name for layer in layers_beside(net, Echo())]


def test_what_only_a_call_uses_can_be_factored() -> None:
    assert names(Words()) == ["embedding", "out"]
    assert names(Words(tied=True)) == []
    assert names(Words(outputs=10)) == ["embedding"]
    letters = Words()  # fewer of them than columns
    letters.embedding, letters.rnn = nn.Embedding(WORDS, 128), nn.GRU(128, 32, batch_first=True)
    assert names(letters) == ["out"]
    normed = Words()
    weight_norm(normed.out)
    assert names(normed) == ["embedding"]
    weight_norm(normed.embedding)
    assert names(normed) == []
    assert names(Words(direct=True)) == ["embedding"]


def test_not_inside_of_a_layer_of_torch() -> None:
    class Attending(Words):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.TransformerEncoderLayer(32, 2, 32, batch_first=True), nn.Linear(32, 32))

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.out(self.layers(self.rnn(self.embedding(x))[0]))
            return found

    assert names(Attending()) == ["embedding", "out", "layers.1"]


def test_a_noisy_data_set_and_masked_outputs_hide_none() -> None:
    class Noisy(Echo):
        def batches(self, split: str, *, seed: int = 0) -> Iterator[Tensor]:
            yield torch.randint(WORDS, (8, 12))

        def forward(self, model: nn.Module, batch: Any) -> Tensor:
            return super().forward(model, batch).masked_fill(torch.arange(WORDS) == 0, -torch.inf)

    assert [layer.name for layer in layers_beside(Words(), Noisy())] == ["embedding", "out"]
    assert [layer.name for layer in layers_beside(Words(direct=True), Noisy())] == ["embedding"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Words, nn.Module, Plan, Path]:
    """A dense network, the same under a budget of its file, the plan of that, and the file; not to be changed."""
    torch.manual_seed(0)
    dense, file = Words(), tmp_path_factory.mktemp("small") / "small.safetensors"
    model, conversion = kruify.convert(dense, budget="size=9x", task=Echo())
    kruify.save(model, file)
    return dense, model, conversion.plan, file


def test_a_budget_of_the_file_factors_them_and_every_form_of_it_computes_the_same(
    small: tuple[Words, nn.Module, Plan, Path], tmp_path: Path
) -> None:
    dense, model, plan, file = small
    assert [item.layer.name for item in plan.beside] == ["embedding", "out"]
    assert file.stat().st_size <= sum(4 * p.numel() for p in dense.parameters()) / 9
    x = next(Echo().batches("test"))
    loaded = kruify.load(file, into=Words())
    assert isinstance(loaded.embedding, nn.Module) and loaded.embedding.padding_idx == 0
    plain = kruify.densify(loaded)
    assert type(plain.out) is nn.Linear and type(plain.embedding) is nn.Embedding and plain.embedding.padding_idx == 0
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x))
        torch.testing.assert_close(plain(x), model(x), atol=5e-3, rtol=0)  # which rounds activations, too
    assert kruify.unitary_penalty(model).isfinite()
    written = tmp_path / "dense.safetensors"
    kruify.export(file, "dense", written)
    again = kruify.load(written, into=Words())
    torch.testing.assert_close(again(x), plain(x), atol=1e-4, rtol=1e-3)


def test_their_plan_can_be_read_edited_and_used_without_the_task(
    small: tuple[Words, nn.Module, Plan, Path], tmp_path: Path
) -> None:
    dense, _, plan, _ = small
    assert Plan.from_json(plan.to_json()) == plan
    empty = json.loads(plan.to_json())
    empty["layers"][-1]["matrices"] = {}
    with pytest.raises(PlanError, match="'out' needs the factors of its weight"):
        Plan.from_json(json.dumps(empty))
    torch.save(dense.state_dict(), tmp_path / "dense.pt")
    found = kruify.convert(tmp_path / "dense.pt", plan=plan, output=tmp_path / "again.safetensors", dtype="int8")
    assert found.output is not None and found.plan.structures() == plan.structures()
    torch.save({"rnn." + n: t for n, t in dense.rnn.state_dict().items()}, tmp_path / "alone.pt")
    with pytest.raises(PlanError, match="'embedding', which the model does not have"):
        kruify.convert(tmp_path / "alone.pt", plan=plan, output=tmp_path / "no.safetensors")


def test_their_plan_with_the_task_gives_what_the_budget_gave(small: tuple[Words, nn.Module, Plan, Path]) -> None:
    dense, model, plan, _ = small
    again, _ = kruify.convert(dense, plan=plan, task=Echo(), dtype="int8")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


class Held(nn.Module):
    """All its names begin with one that wrappers put there, too."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Words()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.model(x)
        return found


@pytest.mark.parametrize("made", [lambda: nn.DataParallel(Words()), Held])
@pytest.mark.parametrize("by_plan", [False, True])
def test_a_task_whose_network_is_wrapped_weighs_what_the_plain_one_weighs(
    small: tuple[Words, nn.Module, Plan, Path], made: Callable[[], nn.Module], by_plan: bool, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"plan": small[2]} if by_plan else {"factors": "stacked:4*(96x1,1x32)"}
    torch.save(small[0].state_dict(), tmp_path / "dense.pt")
    files = []
    for model in (made, Words):
        found = kruify.convert(tmp_path / "dense.pt", task=Echo(model), output=tmp_path / "new.safetensors", **options)
        assert all(gate.energy_weighted is not None for gate in found.matrices)
        files.append((tmp_path / "new.safetensors").read_bytes())
    assert files[0] == files[1]


def test_under_a_budget_of_the_file_a_wrapped_network_is_planned_whole(
    small: tuple[Words, nn.Module, Plan, Path], tmp_path: Path
) -> None:
    torch.save(nn.DataParallel(small[0]).state_dict(), tmp_path / "dense.pt")
    task = Echo(lambda: nn.DataParallel(Words()))
    found = kruify.convert(tmp_path / "dense.pt", budget="size=9x", task=task, output=tmp_path / "new.safetensors")
    assert [item.layer.name for item in found.plan.beside] == ["embedding", "out"]
    assert all(gate.energy_weighted is not None for gate in found.matrices)


def test_moments_and_tasks_that_weigh_nothing_are_refused(tmp_path: Path) -> None:
    class Unheard(Echo):
        def forward(self, model: nn.Module, batch: Any) -> Tensor:
            found: Tensor = model.out(model.embedding(batch)[..., :32])
            return found

    dense, wrapped = Words(), nn.DataParallel(Words())
    with pytest.raises(UsageError, match="moments name none"):
        kruify.convert(dense, "2x2", moments=calibrate(wrapped, Echo()))
    with pytest.raises(TaskError, match="calls none of the recurrent layers"):
        kruify.convert(dense, "2x2", task=Unheard())


def test_a_plan_cannot_name_what_computes_something_else(small: tuple[Words, nn.Module, Plan, Path]) -> None:
    class Doubling(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(2 * x)

    net = Words()
    net.out = Doubling(32, WORDS)
    with pytest.raises(PlanError, match="'out' is a Doubling, not a linear layer"):
        kruify.convert(net, plan=small[2])
    net = Words()
    net.embedding.max_norm = 1.0
    with pytest.raises(PlanError, match="'embedding' has max_norm"):
        kruify.load(small[3], into=net)


def test_a_plan_of_them_alone_needs_a_dtype(small: tuple[Words, nn.Module, Plan, Path]) -> None:
    dense, _, plan, _ = small
    alone = Plan(beside=plan.beside)
    with pytest.raises(UsageError, match=r"names no recurrent layer.*Give --dtype float32"):
        kruify.convert(dense, plan=alone)
    found, _ = kruify.convert(dense, plan=alone, dtype="float32")
    assert {"out.weight.terms.0.factors.0", "rnn.weight_hh_l0"} <= found.state_dict().keys()


def test_they_can_be_left_out_or_set(small: tuple[Words, nn.Module, Plan, Path]) -> None:
    _, conversion = kruify.convert(
        small[0], budget="size=5x", task=Echo(), skip=["embedding"], overrides={"out": "2*(96x1,1x32)"}
    )
    assert [item.layer.name for item in conversion.plan.beside] == ["out"]
    assert str(conversion.plan.structures()["out.weight"][0]) == "2*(96x1,1x32)"


def test_what_stays_dense_anyway_may_be_skipped_and_not_factored() -> None:
    dense = Words()

    def plan(**options: Any) -> Plan:
        return kruify.convert(dense, "2x2", dry_run=True, **options)[1].plan

    for options in ({"skip": ["out", "embed*"]}, {"skip": ["out.weight"]}, {"overrides": {"embedding": "dense"}}):
        assert plan(**options) == plan()
    for options in ({"only": ["out"]}, {"overrides": {"out": "2x2"}}):
        with pytest.raises(PlanError, match=r"'out' means out\.weight \(96x32\), which stays dense"):
            plan(**options)
    foreign = nn.ModuleDict({"rnn": nn.GRU(4, 8), "own": type("Own", (nn.GRU,), {})(4, 8)})
    with pytest.raises(PlanError, match=r"'own' means own\.weight_ih_l0 \(24x4\), which stays dense.*'kruify inspect'"):
        kruify.convert(foreign, "2x2", only=["own"])
    for pattern in ("outt", "rnn.bias_hh_l0"):
        with pytest.raises(PlanError, match="matches no layer, matrix or gate"):
            plan(skip=[pattern])


def test_fine_tuning_trains_them(small: tuple[Words, nn.Module, Plan, Path]) -> None:
    dense, model = small[0], copy.deepcopy(small[1])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    kruify.finetune(model, Echo(), teacher=dense, epochs=1)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {"embedding.weight.terms.0.factors.0", "out.weight.terms.0.factors.1"} <= moved


def test_candidates_in_eight_and_four_bits_factor_them() -> None:
    torch.manual_seed(0)
    found = CandidateSearch(Words(), Echo(), device="cpu").candidates("size=8x")
    assert [candidate.dtype for candidate in found] == ["int8", "int4"]
    assert all(candidate.plan.beside for candidate in found)
