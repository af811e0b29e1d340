"""Training for weights that are stored in eight bits: the straight-through estimator, and what the metrics are of."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Batch, LayeredDelay, same
from torch import Tensor, nn

import kruify
from kruify.conversion.storing import store_as
from kruify.errors import CorruptError, UsageError
from kruify.layers.storage import marks
from kruify.quantization import LEVELS
from kruify.training import FinetuneResult, finetune, trainer
from kruify.training.rounding import rounded_weights

SPECS = ["2*(4x4,2x2)+sparse:6%:1", "stacked:2*(24x1,1x8)", "dense"]
CALM: dict[str, Any] = {
    "weight_decay": 0.0,
    "schedule": "constant",
    "warmup": 0.0,
    "clip": 0.0,
    "evaluate_first": False,
}


class Recording(LayeredDelay):
    """LayeredDelay that keeps the weights and the batch of every training step."""

    def __init__(self) -> None:
        super().__init__("gru", dtype=torch.float32, batch=8, count=4)
        self.computed: list[dict[str, Tensor]] = []
        self.seen: list[Batch] = []

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        if model.training:
            self.computed.append(state_of(model))
            self.seen.append(batch)
        return super().forward(model, batch)

    def small(self, spec: str, dtype: str | None = "int8") -> nn.Module:
        model, _ = kruify.convert(self.model(), spec, dtype=dtype)
        return model


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def as_stored(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    other = copy.deepcopy(model)
    other.load_state_dict(state)
    return state_of(store_as(other, marks(model)))


@pytest.mark.parametrize("spec", SPECS)
def test_the_gradient_is_that_of_the_rounded_weights_and_changes_the_exact_ones(
    spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "ROUNDED_FROM", 0.0)
    task = Recording()
    after: list[dict[str, Tensor]] = []
    model = task.small(spec)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    exact, plain = copy.deepcopy(model), copy.deepcopy(model)

    def keep(done: float, total: float, text: str) -> None:
        after.append(state_of(model))

    finetune(model, task, epochs=0.25, lr=1e-2, device="cpu", progress=keep, **CALM)
    assert same(task.computed[0], as_stored(plain, state_of(plain)))
    assert not same(task.computed[0], state_of(plain))
    # By hand: gradients of the rounded network, a step of the exact one.
    plain.load_state_dict(task.computed[0])
    task.loss(plain(task.seen[0][0]), task.seen[0]).backward()
    for parameter, other in zip(exact.parameters(), plain.parameters(), strict=True):
        parameter.grad = other.grad
    torch.optim.AdamW(exact.parameters(), lr=1e-2, weight_decay=0.0).step()
    for name, tensor in exact.state_dict().items():
        torch.testing.assert_close(after[0][name], tensor, msg=name)


def test_only_the_last_quarter_is_rounded() -> None:
    task = Recording()
    model = task.small("dense")
    finetune(model, task, epochs=2, lr=1e-2, device="cpu")
    rounded = [same(state, as_stored(model, state)) for state in task.computed]
    assert len(rounded) == 8
    assert rounded[1:] == [False] * 5 + [True] * 2  # the first step begins with the weights of the file


@pytest.mark.parametrize("spec", SPECS)
def test_metrics_are_those_of_the_file(spec: str, tmp_path: Path) -> None:
    task = Recording()
    seen: list[dict[str, float]] = []

    def measured(model: nn.Module, metrics: dict[str, float]) -> None:
        assert same(state_of(model), as_stored(model, state_of(model)))
        seen.append(metrics)

    result = finetune(task.small(spec), task, epochs=2, lr=1e-2, device="cpu", on_best=measured)
    assert result.metrics == seen[-1] == next(e for e in result.history if e.epoch == result.best_epoch).metrics
    kruify.save(result.model, tmp_path / "a.safetensors")
    again = kruify.load(tmp_path / "a.safetensors", into=task.model())
    assert task.evaluate(again, "valid") == result.metrics


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_run_stopped_among_rounded_steps_goes_on_to_the_same_bits(dtype: str, tmp_path: Path) -> None:
    def run(**options: Any) -> FinetuneResult:
        task = Recording()
        return finetune(task.small(SPECS[0], dtype), task, epochs=2, lr=1e-2, device="cpu", save_seconds=0, **options)

    def stop(done: float, total: float, text: str) -> None:
        if done == 7:
            raise InterruptedError

    whole = run()
    with pytest.raises(InterruptedError):
        run(resume=tmp_path, progress=stop)
    resumed = run(resume=tmp_path)
    assert same(state_of(resumed.model), state_of(whole.model))
    assert resumed.to_json()["history"] == whole.to_json()["history"]


def test_four_bits_keep_the_scales_that_they_are_given() -> None:
    model, scales = Recording().small(SPECS[0], "int4"), dict[str, Tensor]()
    with rounded_weights(model, scales):
        pass
    kept = {name: scale.clone() for name, scale in scales.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * parameter.abs().max() * torch.randn_like(parameter)
    with rounded_weights(model, scales):
        found = dict(model.named_parameters())
        for name, scale in kept.items():
            integers = found[name] / scale.float()
            assert set(integers.flatten().tolist()) <= set(LEVELS.tolist()) and torch.equal(scales[name], scale)
    assert any("factors" in name for name in kept)


def test_scales_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    def go_on() -> None:
        finetune(task.small("dense", "int4"), task, epochs=1, device="cpu", resume=tmp_path)

    task = Recording()
    go_on()
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    scales = saved["state"]["scales"]
    scales[min(scales)] = torch.ones(2, 1, dtype=torch.bfloat16)
    torch.save(saved, tmp_path / "state.pt")
    with pytest.raises(CorruptError, match="cannot be read"):
        go_on()


def test_a_run_is_not_continued_for_another_dtype(tmp_path: Path) -> None:
    task = Recording()
    finetune(task.small("dense"), task, epochs=0.5, device="cpu", resume=tmp_path)
    with pytest.raises(UsageError, match=r"another dtype.*--dtype"):
        finetune(task.small("dense", "bfloat16"), task, epochs=0.5, device="cpu", resume=tmp_path)


def test_nothing_changes_for_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for start in (0.0, 2.0):
        monkeypatch.setattr(trainer, "ROUNDED_FROM", start)
        task = Recording()
        results.append(state_of(finetune(task.small(SPECS[0], None), task, epochs=1, lr=1e-2, device="cpu").model))
    assert same(*results)
