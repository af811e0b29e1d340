from __future__ import annotations

import copy

import pytest
import torch
from tiny import LayeredDelay
from torch import nn

from kruify import convert
from kruify.conversion import plan_of, swap
from kruify.layers.matrix import KroneckerMatrix
from kruify.training import finetune
from kruify.training.pruning import UNTIL, GradualPruning, strongest


def converted(spec: str = "4x4,2x2+sparse:12.5%:2") -> tuple[LayeredDelay, nn.Module, nn.Module]:
    task = LayeredDelay()
    teacher = task.model()
    return task, teacher, convert(teacher, spec)[0]


def blocks(model: nn.Module) -> list[int]:
    return [len(m.overlay.values) for m in model.modules() if isinstance(m, KroneckerMatrix) and m.overlay is not None]


def test_a_full_residual_is_the_dense_network() -> None:
    _, teacher, student = converted()
    pruning = GradualPruning(student, teacher.state_dict(), start=1.0)
    final = blocks(student)
    assert pruning.done
    pruning.grow()
    assert blocks(student) == [3 * 32] * 2 and final == [3 * 4] * 2
    assert not pruning.done
    for name, module in student.named_modules():
        if isinstance(module, KroneckerMatrix):
            torch.testing.assert_close(module.to_dense(), teacher.state_dict()[name], rtol=1e-12, atol=1e-12)


def test_it_begins_with_the_largest_blocks() -> None:
    _, teacher, student = converted()
    matrix = student.rnn.weight_hh_l0
    with torch.no_grad():
        matrix.overlay.values.zero_()
        residual = teacher.rnn.weight_hh_l0 - matrix.to_dense()
    GradualPruning(student, teacher.state_dict(), start=0.25).grow()
    norms = residual.reshape(3, 4, 2, 8).square().sum(2).reshape(3, 32)
    left = (teacher.rnn.weight_hh_l0 - matrix.to_dense()).detach().reshape(3, 4, 2, 8).square().sum(2).reshape(3, 32)
    for gate in range(3):
        largest = norms[gate].sort(descending=True).indices[:8]
        assert left[gate][largest].abs().max().item() == pytest.approx(0, abs=1e-24)
        assert (left[gate] > 1e-20).sum() == 24
    index = matrix.overlay.index.long()
    order = index[:, 0] * 8 + index[:, 1]
    assert torch.equal(order, order.sort().values)  # the layer wants them sorted


def test_pruning_keeps_the_strongest_and_their_moments() -> None:
    _, teacher, student = converted()
    pruning = GradualPruning(student, teacher.state_dict(), start=1.0)
    pruning.grow()
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.0, weight_decay=0.0)
    sum(p.square().sum() for p in student.parameters()).backward()  # the gradient is twice the value
    optimizer.step()
    matrix = student.rnn.weight_hh_l0
    before = matrix.overlay.values.detach().clone()
    pruning.prune(UNTIL / 2, optimizer)
    wanted = 4 + round((1 - 0.5) ** 3 * 28)
    assert len(matrix.overlay.values) == 3 * wanted
    moments = optimizer.state[matrix.overlay.values]["exp_avg"]
    torch.testing.assert_close(moments, 0.2 * matrix.overlay.values.detach())
    gate = before[: 32].square().sum(1).sort(descending=True).values  # fmt: skip
    assert matrix.overlay.values[:wanted].square().sum(1).min().item() == pytest.approx(gate[wanted - 1].item())
    pruning.prune(UNTIL, optimizer)
    assert pruning.done
    assert any(p is matrix.overlay.values for g in optimizer.param_groups for p in g["params"])


def test_strongest_of_equal_blocks_is_the_first() -> None:
    kept = strongest(torch.ones(6, 2), torch.tensor([0, 0, 0, 1, 1, 1]), [2, 1])
    assert kept.tolist() == [0, 1, 3]


def test_the_best_network_has_the_final_size() -> None:
    task, teacher, student = converted()
    sizes = blocks(student)
    shapes = {n: t.shape for n, t in student.state_dict().items()}
    teacher_metrics = task.evaluate(teacher, "valid")
    result = finetune(student, task, teacher=teacher, epochs=4, lr=1e-2, sparse_start=1.0, device="cpu")
    assert result.history[0].metrics == pytest.approx(teacher_metrics)  # it began as the dense network
    assert blocks(result.model) == sizes
    assert {n: t.shape for n, t in result.model.state_dict().items()} == shapes
    assert result.best_epoch >= 2  # in the first of four epochs the residuals are still larger
    assert task.evaluate(result.model, "valid") == result.metrics


def test_without_a_teacher_residuals_are_left_alone() -> None:
    task, _, student = converted()
    index = copy.deepcopy(student.rnn.weight_hh_l0.overlay.index)
    finetune(student, task, epochs=1, lr=1e-2, sparse_start=1.0, device="cpu")
    assert torch.equal(student.rnn.weight_hh_l0.overlay.index, index)


def test_the_residual_of_stacked_gates_is_one() -> None:
    task, teacher, student = converted("stacked:12x4,2x2+sparse:12.5%:2")
    final = blocks(student)
    assert final == [12, 12]
    pruning = GradualPruning(student, teacher.state_dict(), start=1.0)
    pruning.grow()
    assert blocks(student) == [96, 96]
    for name, module in student.named_modules():
        if isinstance(module, KroneckerMatrix):
            torch.testing.assert_close(module.to_dense(), teacher.state_dict()[name], rtol=1e-12, atol=1e-12)
    result = finetune(
        convert(teacher, "stacked:12x4,2x2+sparse:12.5%:2")[0],
        task, teacher=teacher, epochs=2, sparse_start=1.0, device="cpu",
    )  # fmt: skip
    assert blocks(result.model) == final
    rebuilt = swap(task.model(), plan_of(result.model))
    rebuilt.load_state_dict(result.model.state_dict())
    assert task.evaluate(rebuilt, "valid") == result.metrics
