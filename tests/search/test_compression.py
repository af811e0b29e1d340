"""`compress`: one go, `max_drop`, and backing off layer by layer."""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kruify
from kruify.conversion.locate import describe, locate
from kruify.conversion.modules import convert_module
from kruify.conversion.plan import Plan, make_plan
from kruify.conversion.size import FileSize
from kruify.errors import CorruptError, PlanError, TaskError, UsageError
from kruify.search.candidate_search import CandidateSearch
from kruify.search.candidates import (
    HALVED,
    Candidate,
    CandidateResult,
    Choice,
    Selection,
    first_of_the_best,
    half_and_half,
    make_candidates,
    make_size_candidates,
)
from kruify.search.compression import Attempt, Compression, compress
from kruify.search.max_drop import allowed_drop, drop_from
from kruify.tasks.base import Task
from kruify.training import finetune


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.GRU(2, 16)
        self.second = nn.GRU(16, 16)
        self.out = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.second(self.first(x)[0])[0])


class Delay(Task):
    """Say what was said three steps ago: not to be done without the recurrent matrices."""

    metric = "loss"

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return Net()

    def batches(self, split: str, *, seed: int = 0) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed if split == "train" else 1000)
        return [torch.randn(12, 16, 2, generator=generator) for _ in range(12 if split == "train" else 2)]

    def forward(self, model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch)

    def loss(self, outputs: Tensor, batch: Tensor) -> Tensor:
        return (outputs[3:] - batch[:-3]).square().mean()


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    model = Delay().model()
    finetune(model, Delay(), epochs=15, lr=1e-2, device="cpu")
    return model


def test_without_max_drop_the_first_attempt_is_taken(trained: nn.Module) -> None:
    before = copy.deepcopy(trained.state_dict())
    done = compress(trained, Delay(), "4x", epochs=1, device="cpu")
    torch.testing.assert_close(trained.state_dict(), before, rtol=0, atol=0)
    (attempt,) = done.attempts
    assert done.within
    assert attempt.recurrent_ratio >= 4
    held = sum(p.numel() for n, p in done.model.named_parameters() if "weight_hh" in n)
    assert held == attempt.recurrent_after
    assert Delay().evaluate(done.model, "valid")["loss"] == pytest.approx(attempt.metrics["loss"])
    assert attempt.drop == pytest.approx(attempt.metrics["loss"] - done.baseline["loss"])


def test_backs_off_until_nothing_is_left_to_give(trained: nn.Module) -> None:
    """A drop that cannot be reached: layer after layer grows, then the nearest attempt is given, and said to be it."""
    seen: list[Attempt] = []
    done = compress(
        trained, Delay(), "16x", max_drop=-1.0, attempts=3, epochs=0.25, device="cpu", on_attempt=seen.append
    )
    assert not done.within
    assert done.attempts == seen
    assert len(seen) == 3
    for before, after in itertools.pairwise(seen):
        grown = [name for name in before.shares if after.shares[name] > before.shares[name]]
        assert len(grown) == 1  # one layer at a time
        assert after.recurrent_after > before.recurrent_after
    assert done.attempts[done.best].drop == min(a.drop for a in seen)


def test_a_drop_within_max_drop_ends_at_once(trained: nn.Module) -> None:
    done = compress(trained, Delay(), "2x", max_drop=10.0, epochs=0.25, device="cpu")
    assert done.within
    assert len(done.attempts) == 1


def test_what_is_nan_is_infinitely_worse_and_never_the_nearest() -> None:
    assert drop_from(0.5, math.nan, True) == drop_from(0.5, math.nan, False) == math.inf
    assert (drop_from(3.0, 1.0, True), drop_from(3.0, 1.0, False)) == (2.0, -2.0)
    with pytest.raises(TaskError, match="the metric of the original network is nan"):
        allowed_drop(0.1, math.nan)


def test_refused(trained: nn.Module) -> None:
    with pytest.raises(PlanError, match="is not a budget"):
        compress(trained, Delay(), "much")
    with pytest.raises(UsageError, match="no RNN, LSTM or GRU"):
        compress(nn.Linear(2, 2), Delay(), "4x")
    with pytest.raises(UsageError, match="at least one attempt"):
        compress(trained, Delay(), "4x", attempts=0)


# --- Candidates: which structure a task recovers from best is found by training each for a short while.


def numbers(plan: Plan) -> int:
    return sum(s.parameters for _, _, structures in plan.matrices() for s in structures)


@pytest.mark.parametrize(("budget", "limit"), [("4x", 0.25), ("params=25%,macs=50%", 0.25), ("macs=40%", 0.4)])
def test_candidates_keep_within_the_budget(trained: nn.Module, budget: str, limit: float) -> None:
    planned, mixed = [c.plan for c in make_candidates(trained.state_dict(), locate(trained).layers, budget)]
    dense = 2 * 3 * 16 * 16
    if budget != "macs=40%":
        assert numbers(planned) <= limit * dense
    assert limit * dense - 6 <= numbers(mixed) <= limit * dense
    for structure in (s for _, _, structures in mixed.matrices() for s in structures):
        (term,) = structure.terms
        assert term.factors == ((16, 1), (1, 16)) and structure.block == 1
        # Half and half, but that low rank comes in whole products of 32 numbers.
        assert 0 <= structure.sparse_blocks - term.parameters <= 2 * 32


@pytest.mark.parametrize("budget", ["2x", "4x", "8x"])
def test_the_scales_of_a_plain_rnn_count(budget: str) -> None:
    torch.manual_seed(0)
    net = nn.RNN(3, 16, num_layers=2)
    found = make_candidates(net.state_dict(), locate(net).layers, budget)
    assert len(found) == (2 if budget == "2x" else 1)
    for candidate in found:
        assert numbers(candidate.plan) <= 2 * 16 * 16 / float(budget[:-1])


def test_where_not_even_rank_one_fits_there_is_nothing_to_try(trained: nn.Module) -> None:
    assert half_and_half(16, 16, 0.2) is None
    assert half_and_half(16, 16, 0.25) == "1*(16x1,1x16)+sparse:12.50000000%:1"
    assert len(make_candidates(trained.state_dict(), locate(trained).layers, "params=20%")) == 1


@pytest.mark.parametrize("higher", [False, True])
def test_the_plan_that_validates_best_is_taken(trained: nn.Module, higher: bool) -> None:
    class Either(Delay):
        higher_is_better = higher

    layers = locate(trained).layers
    found = [Candidate(make_plan(layers, spec)) for spec in ("16x1,1x16", "16*(16x1,1x16)", "2x2")]
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    choice = CandidateSearch(trained, Either(), share=0.2, epochs=2.0, lr=6e-3, device="cpu").choose(found)
    torch.testing.assert_close(dict(trained.state_dict()), before, rtol=0, atol=0)
    losses = [result.metrics["loss"] for result in choice.results]
    assert [result.factors for result in choice.results] == [["16x1,1x16"], ["16*(16x1,1x16)"], ["2x2,2x2,2x2,2x2"]]
    assert choice.candidate is found[losses.index((max if higher else min)(losses))]
    assert losses[1] == min(losses)  # nothing was lost
    alone = CandidateSearch(trained, Either(), lr=6e-3).choose(found[:1])
    assert alone.candidate is found[0] and alone.results == []


@pytest.mark.parametrize("rates", [[1.0, 1e-3], [1e-3, 1.0]])
def test_the_rate_that_validates_best_is_taken(trained: nn.Module, rates: list[float]) -> None:
    search = CandidateSearch(trained, Delay(), share=0.2, epochs=2.0, device="cpu")
    assert search.rates == [6e-3, 2e-3]
    search.rates = rates
    choice = search.choose([Candidate(make_plan(search.layers, "16*(16x1,1x16)"), lr=rates[0])])
    assert [result.lr for result in choice.results] == rates
    assert choice.candidate.lr == 1e-3
    assert Choice.from_json(json.loads(json.dumps(choice.to_json())), {}) == choice


def test_a_small_lead_is_none() -> None:
    nan, inf = float("nan"), float("inf")
    assert first_of_the_best([2.00, 1.98], dense=1.5) == 0  # 0.02 of 0.48
    assert first_of_the_best([2.00, 1.90], dense=1.5) == 1
    assert first_of_the_best([1.90, 2.00], dense=1.5) == 0
    assert first_of_the_best([2.00, 1.98], dense=2.5) == 1  # both are better than the dense network
    assert first_of_the_best([-0.88, -0.90], dense=-0.91) == 1  # accuracies
    assert first_of_the_best([2.00, 1.80], dense=1.5, lead=HALVED) == 0  # a lower rate has to halve what is lacking
    assert first_of_the_best([2.00, 1.74], dense=1.5, lead=HALVED) == 1
    assert first_of_the_best([nan, 1.0, nan], dense=0.5) == 1
    assert first_of_the_best([nan, inf], dense=nan) == 0


def test_compress_tries_before_it_trains(trained: nn.Module) -> None:
    told: list[CandidateResult] = []
    done = compress(trained, Delay(), "4x", epochs=1, device="cpu", on_candidate=told.append)
    assert [result.lr for result in done.candidates] == [6e-3, 6e-3, 2e-3] and told == done.candidates
    losses = [result.metrics["loss"] for result in done.candidates]
    best = first_of_the_best(losses[:2], done.baseline["loss"])
    assert done.candidates[2].factors == done.candidates[best].factors
    built = {str(s) for m in done.model.modules() for s in getattr(m, "structures", ())}
    assert built == set(done.candidates[best].factors)
    slower = first_of_the_best([losses[best], losses[2]], done.baseline["loss"], HALVED)
    assert done.lr == json.loads(done.notes["kruify.recipe"])["lr"] == [6e-3, 2e-3][slower]
    assert compress(trained, Delay(), "4x", epochs=0.5, share=0, device="cpu").candidates == []
    with pytest.raises(UsageError, match="share of the epochs"):
        compress(trained, Delay(), "4x", share=2)


# --- Going on where it stopped.


class Stop(Exception):
    pass


def test_resumed_it_ends_with_the_same_bits(trained: nn.Module, tmp_path: Path) -> None:
    def run(stop: int | None = None, resume: Path | None = tmp_path) -> tuple[Compression, int]:
        seen = 0

        def count(done: float, total: float, phase: str) -> None:
            nonlocal seen
            seen += "train epoch" in phase
            if seen == stop:
                raise Stop

        options = {"max_drop": -1.0, "attempts": 2, "epochs": 2, "device": "cpu"}
        return compress(trained, Delay(), "4x", resume=resume, progress=count, **options), seen

    whole, steps = run(resume=None)
    assert steps == 3 * 3 + 2 * 26  # of two candidates and a rate, of two attempts with two epochs each
    # In candidate 1 before anything is saved, then in candidate 2, the rate, attempt 1, its second epoch, attempt 2:
    # each run goes on where the last epoch or candidate before the stop had ended.
    for stop in (2, 5, 5, 10, 16, 16):
        with pytest.raises(Stop):
            run(stop=stop)
        torch.rand(5)
    resumed, rest = run()
    assert rest <= 26  # attempt 2 alone
    torch.testing.assert_close(resumed.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)
    assert resumed.to_json() == whole.to_json()
    again, none = run()
    assert none == 0 and again.attempts == whole.attempts


def test_a_finished_compression_can_be_given_another_attempt(trained: nn.Module, tmp_path: Path) -> None:
    options = {"max_drop": -1.0, "epochs": 0.25, "device": "cpu", "resume": tmp_path}
    one = compress(trained, Delay(), "16x", attempts=1, **options)
    two = compress(trained, Delay(), "16x", attempts=2, **options)
    assert two.attempts[:1] == one.attempts and len(two.attempts) == 2


def test_the_state_of_another_compression_is_refused(trained: nn.Module, tmp_path: Path) -> None:
    options = {"epochs": 0.25, "device": "cpu", "resume": tmp_path}
    with pytest.raises(PlanError):  # nothing has been done yet: the folder is still free
        compress(trained, Delay(), "10000x", **options)
    compress(trained, Delay(), "4x", **options)
    other = copy.deepcopy(trained)
    with torch.no_grad():
        other.out.bias.add_(1e-3)
    with pytest.raises(UsageError, match="other model"):
        compress(other, Delay(), "4x", **options)
    with pytest.raises(UsageError, match="other budget"):
        compress(trained, Delay(), "8x", **options)
    with pytest.raises(UsageError, match="other share, recipe, rates"):
        compress(trained, Delay(), "4x", share=0, lr=1e-3, **options)
    file = tmp_path / "compression.json"
    good = file.read_text()
    for broken in ("[]", good.replace('"weighted"', '"heavy"'), good.replace('"plan": "', '"plan": "{')):
        file.write_text(broken)
        with pytest.raises(CorruptError, match="not the state of a compression"):
            compress(trained, Delay(), "4x", **options)


def test_candidates_under_a_size(tmp_path: Path) -> None:
    """What keeps the most in eight and in four bits: both within the bytes, of W_ih, too; or all dense."""
    torch.manual_seed(0)
    net = nn.ModuleDict({"first": nn.GRU(2, 32), "second": nn.GRU(32, 32), "out": nn.Linear(32, 2)})
    file, narrow = (FileSize(net.state_dict(), locate(net).layers, dtype) for dtype in ("int8", "int4"))
    limit = int(0.4 * file.of(Plan()))
    found = make_size_candidates([file, narrow], f"size={limit}", moments={})
    assert [candidate.dtype for candidate in found] == ["int8", "int4"]
    numbers = []
    for candidate, size in zip(found, (file, narrow), strict=True):
        assert 0.9 * limit < size.of(candidate.plan) <= limit
        names = {layer.full_name(weight) for layer, weight, _ in candidate.plan.matrices()}
        assert names >= {"second.weight_hh_l0", "second.weight_ih_l0"}
        small, _ = convert_module(net, candidate.plan)
        kruify.save(kruify.quantize(small, candidate.dtype or ""), tmp_path / "a.safetensors")
        assert 0 <= size.of(candidate.plan) - (tmp_path / "a.safetensors").stat().st_size < 200  # of its source's hash
        numbers.append(sum(p.numel() for p in small.parameters()))
    assert numbers[1] > 1.2 * numbers[0]
    (dense,) = make_size_candidates([file, narrow], f"size={file.of(Plan())}")
    assert dense.plan == Plan()


def test_candidates_under_a_size_that_only_four_bits_meet() -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict({"rnn": nn.GRU(64, 64), "out": nn.Linear(64, 512)})
    files = [FileSize(net.state_dict(), locate(net).layers, dtype) for dtype in ("int8", "int4")]
    limit = files[0].of(Plan()) // 2
    with pytest.raises(PlanError, match="smallest file"):
        make_size_candidates(files[:1], f"size={limit}")
    (found,) = make_size_candidates(files, f"size={limit}")
    assert found.dtype == "int4" and files[1].of(found.plan) <= limit
    with pytest.raises(PlanError, match="smallest file") as caught:
        make_size_candidates(files, "size=1000")
    with pytest.raises(PlanError, match=re.escape(caught.value.what)):
        make_size_candidates(files[1:], "size=1000")


def test_layers_beside_alone_are_candidates_in_both_dtypes() -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict({"rnn": nn.GRU(2, 8), "out": nn.Linear(64, 64)})
    layers = [*locate(net).layers, describe("out", net["out"])]
    files = [FileSize(net.state_dict(), layers, dtype) for dtype in ("int8", "int4")]
    budget, options = f"size={files[0].of(Plan()) - 500}", {"selection": Selection(skip=("rnn",))}
    found = make_size_candidates(files, budget, **options)
    assert [candidate.dtype for candidate in found] == ["int8", "int4"]
    assert make_size_candidates(files, budget, first=True, **options) == found[:1]


@pytest.mark.parametrize("share", [0.85, 1.0])
def test_a_network_within_a_size(trained: nn.Module, tmp_path: Path, share: float) -> None:
    limit = int(share * FileSize(trained.state_dict(), locate(trained).layers).of(Plan()))
    options: dict[str, Any] = {"epochs": 0.25, "share": 0, "device": "cpu", "max_drop": -1.0, "attempts": 1}
    done = compress(trained, Delay(), f"size={limit}", resume=tmp_path / "state", **options)
    kruify.save(done.model, tmp_path / "small.safetensors", source_sha256="0" * 64)
    assert 0.9 * limit < (tmp_path / "small.safetensors").stat().st_size <= limit
    held = sum(p.numel() for n, p in done.model.named_parameters() if "weight_hh" in n)
    assert held == done.attempts[0].recurrent_after
    again = compress(trained, Delay(), f"size={limit}", resume=tmp_path / "state", **options)
    assert again.to_json() == done.to_json()


def test_layers_beside_back_off_where_no_recurrent_layer_can() -> None:
    """One after the other, until all is dense."""

    class Wide(Delay):
        def model(self) -> nn.Module:
            net = super().model()
            net.out = nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 64), nn.Linear(64, 2))
            return net

    dense = Wide().model()
    limit = FileSize(dense.state_dict(), locate(dense).layers).of(Plan()) - 4000
    options: dict[str, Any] = {"skip": ["first", "second"], "max_drop": -1.0, "epochs": 0.1, "device": "cpu"}
    done = compress(dense, Wide(), f"size={limit}", share=0, attempts=9, **options)
    assert not done.within and len(done.attempts) == 2


def test_a_layer_grows_beyond_a_size(trained: nn.Module) -> None:
    """With its input matrices."""
    file = FileSize(trained.state_dict(), locate(trained).layers)
    limit = int(0.85 * file.of(Plan()))
    done = compress(trained, Delay(), f"size={limit}", max_drop=-1.0, attempts=2, epochs=0.1, share=0, device="cpu")
    assert done.attempts[1].recurrent_after >= done.attempts[0].recurrent_after
