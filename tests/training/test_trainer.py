from __future__ import annotations

import builtins
import copy
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Delay, same
from torch import Tensor, nn

from kruify.errors import CorruptError, TaskError, UsageError
from kruify.layers.kru import KRU
from kruify.training import finetune
from kruify.training.finetuning import finetune as finetune_function

QUICK: dict[str, Any] = {"epochs": 3, "lr": 2e-2, "device": "cpu"}


def test_it_learns_and_keeps_the_best_weights() -> None:
    task = Delay(count=10)
    model = task.kronecker()
    result = finetune(model, task, epochs=8, lr=3e-2, device="cpu")
    first, values = result.history[0], [entry.metrics["accuracy"] for entry in result.history]
    assert [entry.epoch for entry in result.history] == list(range(9))
    assert first.phase == "start" and first.loss is None
    assert result.metrics["accuracy"] == max(values) > values[0] + 0.3
    assert result.history[result.best_epoch].metrics == result.metrics
    assert task.evaluate(model, "valid") == result.metrics  # the best weights are the ones in the model
    assert result.model is model
    assert result.steps == 80


def test_loss_entry_is_the_mean_over_the_epoch() -> None:
    task = Delay(count=5)
    model = task.kronecker()
    expected = task_loss(copy.deepcopy(model), task)
    # With a vanishing learning rate every batch sees the first weights.
    result = finetune(model, task, epochs=1, lr=1e-30, unitary_penalty=0.0, device="cpu")
    assert result.history[1].loss == pytest.approx(expected, rel=1e-12)


def task_loss(model: nn.Module, task: Delay) -> float:
    total = count = 0.0
    for batch in task.batches("train"):
        total += float(task.loss(task.forward(model, batch), batch).detach()) * len(batch[1])
        count += len(batch[1])
    return total / count


def test_one_step_is_adamw_with_clipping_and_penalty() -> None:
    from kruify.training import unitary_penalty
    from kruify.training.randomness import derived_seed

    task = Delay(count=1)
    model = task.kronecker()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    mine = copy.deepcopy(model)
    finetune(
        model, task, epochs=1, lr=0.1, schedule="constant", warmup=0.0, clip=0.05, unitary_penalty=0.3,
        weight_decay=0.0, factor_lr=1.0, evaluate_first=False, device="cpu",
    )  # fmt: skip
    (batch,) = task.batches("train", seed=derived_seed(0, "epoch", 0) % 2**31)
    loss = task.loss(task.forward(mine, batch), batch) + 0.3 * unitary_penalty(mine)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(mine.parameters(), 0.05)
    torch.optim.AdamW(mine.parameters(), lr=0.1, weight_decay=0.0).step()
    for a, b in zip(model.parameters(), mine.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_seed_decides_everything() -> None:
    def run(seed: int) -> dict[str, Tensor]:
        task = Delay(dropout=0.3)
        return finetune(task.kronecker(), task, seed=seed, **QUICK).model.state_dict()

    assert same(run(1), run(1))
    assert not same(run(1), run(2))


def test_global_random_state_is_left_alone() -> None:
    task = Delay(dropout=0.3)
    model = task.kronecker()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    finetune(model, task, **QUICK)
    assert torch.equal(torch.rand(3), expected)


def test_accumulating_is_the_larger_batch() -> None:
    # 5 batches of 16: the last group of 2 has one batch only, like the last batch of 32.
    small, large = Delay(batch=16, count=5), Delay(batch=32, count=5)
    large.data = lambda _, seed: Delay.data(small, 80, seed)
    large.batches = lambda split, seed=0: pairs(small.batches(split, seed=seed))
    a = finetune(small.kronecker(), small, accumulate=2, **QUICK)
    b = finetune(large.kronecker(), large, **QUICK)
    assert a.steps == b.steps == 9
    assert a.history[-1].loss == pytest.approx(b.history[-1].loss, rel=1e-9)
    for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)


def pairs(batches: Any) -> Any:
    items = list(batches)
    for i in range(0, len(items), 2):
        group = items[i : i + 2]
        yield tuple(torch.cat(parts) for parts in zip(*group, strict=True))


def test_early_stopping() -> None:
    task = Delay()
    model = task.kronecker()
    before = copy.deepcopy(model.state_dict())
    result = finetune(model, task, epochs=9, lr=1e-12, patience=2, device="cpu")
    assert result.stopped_early and len(result.history) == 3
    assert same(model.state_dict(), before)  # nothing was better than the start


def test_own_rate_for_factors() -> None:
    task = Delay()
    model = task.kronecker()
    before = copy.deepcopy(model.state_dict())
    after = finetune(model, task, factor_lr=0.0, evaluate_first=False, **QUICK).model.state_dict()
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]) == name.startswith("weight_hh"), name


def test_progress_counts_up_to_the_end() -> None:
    seen: list[tuple[float, float, str]] = []
    task = Delay(count=4)
    finetune(
        task.kronecker(), task, epochs=1.5, lr=1e-2, device="cpu", progress=lambda *told: seen.append(told)
    )  # fmt: skip
    assert [done for done, _, _ in seen] == [1, 2, 3, 4, 4, 5, 6, 6]  # after every step, and every validation
    assert {total for _, total, _ in seen} == {6}
    told = re.compile(r"train epoch [12]/2: training loss \d\.\d{3} accuracy 0\.\d{3}")
    assert all(told.fullmatch(text) for _, _, text in seen)
    assert "epoch 1/2" in seen[3][2] and "epoch 2/2" in seen[5][2]


def test_best_callback() -> None:
    best: list[float] = []
    task = Delay(count=10)
    result = finetune(
        task.kronecker(), task, epochs=4, lr=3e-2, device="cpu", on_best=lambda _, m: best.append(m["accuracy"])
    )
    assert best == sorted(best) and best[-1] == result.metrics["accuracy"]


def test_mixed_precision_trains() -> None:
    task = Delay(count=10, dtype=torch.float32)
    result = finetune(task.kronecker(), task, epochs=4, lr=3e-2, device="cpu", mixed_precision="bf16")
    plain = finetune(task.kronecker(), task, epochs=4, lr=3e-2, device="cpu")
    assert result.history[-1].loss < result.history[1].loss
    assert result.history[-1].loss != plain.history[-1].loss


class Unbounded(Delay):
    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return super().loss(outputs, batch) * math.inf


def test_divergence_is_one_sentence() -> None:
    task = Unbounded(count=30)
    with pytest.raises(UsageError, match=r"diverged.*Lower lr"):
        finetune(task.kronecker(), task, **QUICK)


class Empty(Delay):
    def batches(self, split: str, *, seed: int = 0) -> Any:
        return iter(())


def test_task_without_its_metric_or_batches() -> None:
    task = Delay()
    task.metric = "bleu"
    with pytest.raises(TaskError, match="bleu"):
        finetune(task.kronecker(), task, **QUICK)
    with pytest.raises(TaskError, match="no batches"):
        finetune(task.kronecker(), Empty(), **QUICK)


def test_missing_accelerate_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "accelerate":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r"kruify\[finetune\]"):
        finetune_function(Delay().kronecker(), Delay(), device="cpu")


class Stop(Exception):
    pass


@pytest.mark.parametrize("at", [1, 7, 12, 17])
def test_resume_gives_the_same_bits(tmp_path: Path, at: int) -> None:
    options: dict[str, Any] = {**QUICK, "save_seconds": 0}
    task = Delay(dropout=0.3)

    def interrupt(done: float, total: float, phase: str) -> None:
        if done == at:
            raise Stop

    whole = finetune(task.kronecker(), task, **options)
    with pytest.raises(Stop):
        finetune(task.kronecker(), task, resume=tmp_path, progress=interrupt, **options)
    torch.rand(17)  # whatever happens between does not matter
    resumed = finetune(task.kronecker(seed=99), task, resume=tmp_path, **options)
    assert same(resumed.model.state_dict(), whole.model.state_dict())
    assert resumed.history == whole.history
    assert resumed.metrics == whole.metrics and resumed.steps == whole.steps == 18
    # A finished run is not run again.
    again = finetune(task.kronecker(seed=98), task, resume=tmp_path, progress=interrupt, **options)
    assert same(again.model.state_dict(), whole.model.state_dict()) and again.history == whole.history


def test_resume_refuses_another_run(tmp_path: Path) -> None:
    task = Delay()
    finetune(task.kronecker(), task, resume=tmp_path, **QUICK)
    with pytest.raises(UsageError, match=r"began with lr=0\.02, not 0\.01"):
        finetune(task.kronecker(), task, resume=tmp_path, **{**QUICK, "lr": 0.01})
    with pytest.raises(UsageError, match="another network"):
        finetune(task.model(), task, resume=tmp_path, **QUICK)
    with pytest.raises(UsageError, match="batches"):
        finetune(task.kronecker(), Delay(count=7), resume=tmp_path, **QUICK)
    (tmp_path / "state.pt").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(CorruptError, match="start over"):
        finetune(task.kronecker(), task, resume=tmp_path, **QUICK)


class Published(nn.Module):
    """The unit as published, complex, with a head."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = KRU(3, 8, factors="2x2", dtype=torch.float64)
        self.head = nn.Linear(16, 4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x.transpose(0, 1))[0][-1])


def test_complex_unit_trains_with_its_penalty_and_resumes(tmp_path: Path) -> None:
    task = Delay(count=10)

    def model() -> nn.Module:
        torch.manual_seed(0)
        return Published()

    options: dict[str, Any] = {"epochs": 4, "lr": 3e-2, "device": "cpu"}
    whole = finetune(model(), task, **options)
    assert whole.history[-1].loss < 0.9 * whole.history[1].loss
    free = finetune(model(), task, unitary_penalty=0.0, **options)
    assert whole.history[-1].penalty < free.history[-1].penalty

    def interrupt(done: float, total: float, phase: str) -> None:
        if done == 15:
            raise Stop

    with pytest.raises(Stop):
        finetune(model(), task, resume=tmp_path, progress=interrupt, save_seconds=0, **options)
    assert same(finetune(model(), task, resume=tmp_path, **options).model.state_dict(), whole.model.state_dict())


def test_a_gpu_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    task = Delay(count=2)
    with pytest.raises(UsageError, match="no device cuda:2 here"):
        finetune(task.kronecker(), task, **{**QUICK, "device": "cuda:2"})
