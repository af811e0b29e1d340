from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import LayeredDelay, same
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from kruify import convert
from kruify.errors import UsageError
from kruify.layers.matrix import KroneckerMatrix
from kruify.training import finetune
from kruify.training.distillation import Distillation, output_distance
from kruify.training.recipe import Recipe
from kruify.training.recurrent import recorded, recurrent_layers, tensors_of

QUICK: dict[str, Any] = {"epochs": 2, "lr": 1e-2, "device": "cpu"}


def pair(kind: str = "gru", spec: str = "4x4,2x2") -> tuple[LayeredDelay, nn.Module, nn.Module]:
    task = LayeredDelay(kind)
    teacher = task.model()
    student, _ = convert(teacher, spec)
    return task, teacher, student


def test_recorded_is_what_the_layers_gave() -> None:
    task, teacher, student = pair("lstm")
    (batch, *_) = task.batches("valid")
    for model in (teacher, student):
        with recorded(model, list(recurrent_layers(model))) as calls:
            task.forward(model, batch)
        output, (h, c) = model.rnn(batch[0])
        assert list(calls) == ["rnn"] and len(calls["rnn"]) == 1
        for got, expected in zip(calls["rnn"][0].outputs, (output, h, c), strict=True):
            assert torch.equal(got, expected)
        task.forward(model, batch)
        assert len(calls["rnn"]) == 1  # nothing is recorded outside the block


def test_packed_sequences_are_recorded_without_their_bookkeeping() -> None:
    packed = pack_sequence([torch.ones(3, 2), torch.ones(2, 2)])
    assert [t.shape for t in tensors_of((packed, torch.zeros(1, 2, 4)))] == [(5, 2), (1, 2, 4)]


@pytest.mark.parametrize("kind", ["gru", "lstm", "rnn"])
def test_the_teacher_itself_has_nothing_to_learn(kind: str) -> None:
    task, teacher, student = pair(kind, "8x8")
    with torch.no_grad():  # a full-rank student
        for name, matrix in student.named_modules():
            if isinstance(matrix, KroneckerMatrix):
                torch.testing.assert_close(matrix.to_dense(), teacher.state_dict()[name], rtol=1e-12, atol=1e-12)
    distillation = Distillation(student, teacher, task, Recipe(distill_logits=1.0))
    (batch, *_) = task.batches("train")
    assert distillation.loss(batch).item() == pytest.approx(0, abs=1e-12)
    assert distillation.layerwise_loss(batch).item() == pytest.approx(0, abs=1e-12)


def test_losses_are_the_sums_of_their_parts() -> None:
    task, teacher, student = pair()
    (batch, *_) = task.batches("train")
    distillation = Distillation(student, teacher, task, Recipe(distill_logits=0.3))
    loss = distillation.loss(batch)
    ours, theirs = student(batch[0]), teacher(batch[0])
    log_p, log_q = theirs.log_softmax(-1), ours.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert loss.item() == pytest.approx((0.7 * task.loss(ours, batch) + 0.3 * kl).item(), rel=1e-12)
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    distances = [
        ((a - b) ** 2).sum() / (b**2).sum() for a, b in zip(student.rnn(batch[0]), teacher.rnn(batch[0]), strict=True)
    ]
    assert distillation.layerwise_loss(batch).item() == pytest.approx(sum(distances).item() / 2, rel=1e-12)


def test_the_teacher_is_annealed_to_zero() -> None:
    task, teacher, student = pair()
    (batch, *_) = task.batches("train")
    distillation = Distillation(student, teacher, task, Recipe(distill_logits=0.3, distill_until=0.5))
    by_labels = task.loss(task.forward(student, batch), batch)
    start, middle, end = (distillation.loss(batch, progress).item() for progress in (0.0, 0.25, 0.5))
    assert middle == pytest.approx((start + end) / 2, rel=1e-12)
    assert end == distillation.loss(batch, 1.0).item() == by_labels.item() != start
    calls: list[int] = []
    distillation.teacher.register_forward_hook(lambda *_: calls.append(1))
    distillation.loss(batch, 0.5)
    assert not calls  # nor is time spent on it
    constant = Distillation(student, teacher, task, Recipe(distill_logits=0.3, distill_until=None))
    assert constant.loss(batch, 0.9).item() == constant.loss(batch).item() == start


def test_annealing_goes_along_with_the_run() -> None:
    """The task's loss is 1 and the distance from the teacher 0, so that the loss of every step is the labels' share."""
    student = pair()[2]

    class Labels(LayeredDelay):
        def loss(self, outputs: Tensor, batch: Any) -> Tensor:
            return super().loss(outputs, batch) * 0 + 1

    # At this rate the student stays where it is: it is its own teacher.
    result = finetune(student, Labels(), teacher=student, **{**QUICK, "lr": 1e-30, "evaluate_first": False})
    shares = [1 - 0.5 * (1 - step / 12) for step in range(12)]
    assert [entry.loss for entry in result.history] == pytest.approx([sum(shares[:6]) / 6, sum(shares[6:]) / 6])


class Graded(LayeredDelay):
    """The teacher validates at 0.5, a network at what is given for each of its epochs."""

    def __init__(self, teacher: nn.Module, grades: list[float]) -> None:
        super().__init__()
        self.teacher, self.grades, self.taught = teacher, list(grades), 0

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        return {"accuracy": 0.5 if model is self.teacher else self.grades.pop(0)}

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        self.taught += not any(p.requires_grad for p in model.parameters())
        return super().forward(model, batch)


@pytest.mark.parametrize(
    ("grades", "options", "taught_epochs"),
    [
        ([0.4, 0.6, 0.4, 0.4], {}, 2),  # once better than the teacher it goes on alone, whatever comes
        ([0.4, 0.5, 0.4, 0.4], {}, 4),  # as good is not better
        ([0.6, 0.6, 0.6, 0.6], {"distill_logits": 1.0}, 4),  # there may be no labels
    ],
)
def test_a_teacher_that_the_network_has_overtaken_is_left(
    grades: list[float], options: dict[str, Any], taught_epochs: int
) -> None:
    _, teacher, student = pair()
    task = Graded(teacher, grades)
    run = {**QUICK, "epochs": 4, "distill_until": None, "evaluate_first": False, **options}
    finetune(student, task, teacher=teacher, **run)
    assert task.taught == 6 * taught_epochs


def test_a_resumed_run_knows_that_it_left_its_teacher(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def interrupt(done: float, total: float, phase: str) -> None:
        if done == 8:
            raise Stop

    _, teacher, student = pair()
    run = {**QUICK, "epochs": 3, "distill_until": None, "evaluate_first": False, "save_seconds": 0}
    whole = finetune(copy.deepcopy(student), Graded(teacher, [0.6, 0.4, 0.4]), teacher=teacher, **run)
    with pytest.raises(Stop):
        task = Graded(teacher, [0.6, 0.4])
        finetune(copy.deepcopy(student), task, teacher=teacher, resume=tmp_path, progress=interrupt, **run)
    task = Graded(teacher, [0.4, 0.4])
    again = finetune(copy.deepcopy(student), task, teacher=teacher, resume=tmp_path, **run)
    assert task.taught == 0 and [e.loss for e in again.history] == [e.loss for e in whole.history]


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "values"])
def test_output_distance_is_zero_at_the_teacher_and_grows(kind: str) -> None:
    torch.manual_seed(0)
    targets = torch.randn(5, 3, 4, dtype=torch.float64)
    assert output_distance(targets, targets, kind).item() == pytest.approx(0, abs=1e-12)
    noise = torch.randn_like(targets)
    near, far = (output_distance(targets + s * noise, targets, kind).item() for s in (0.1, 0.5))
    assert 0 < near < far


def test_sigmoid_distance_is_the_kl_of_bernoullis() -> None:
    a, b = torch.randn(2, 5, 6, dtype=torch.float64)
    p, q = torch.sigmoid(b), torch.sigmoid(a)
    kl = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(-1).mean()
    assert output_distance(a, b, "sigmoid").item() == pytest.approx(kl.item(), rel=1e-9)


def test_no_distance_calls_what_autocast_on_cuda_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """binary_cross_entropy of probabilities raises there."""
    refused = lambda *_, **__: pytest.fail("binary_cross_entropy was called")  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, "binary_cross_entropy", refused)
    a, b = torch.randn(2, 5, 6)
    for kind in ("softmax", "sigmoid", "values"):
        output_distance(a, b, kind)


def hidden_error(task: LayeredDelay, student: nn.Module, teacher: nn.Module) -> float:
    total = 0.0
    for batch in task.batches("valid"):
        with torch.no_grad():
            a, b = student.rnn(batch[0])[0], teacher.rnn(batch[0])[0]
        total += float((a - b).square().mean())
    return total


def test_layerwise_training_brings_the_layer_back_and_touches_nothing_else() -> None:
    task, teacher, student = pair()
    before, head = hidden_error(task, student, teacher), copy.deepcopy(student.head.state_dict())
    result = finetune(
        student, task, teacher=teacher, epochs=0, heal_epochs=4, heal_lr=2e-2, evaluate_first=False, device="cpu"
    )
    assert [entry.phase for entry in result.history] == ["heal"] * 4
    assert hidden_error(task, student, teacher) < 0.5 * before
    assert same(student.head.state_dict(), head)
    assert all(p.requires_grad for p in student.parameters())


class Unlabelled(LayeredDelay):
    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        if torch.is_grad_enabled():
            raise AssertionError("the labels were used")
        return super().loss(outputs, batch)


def test_without_labels() -> None:
    task, teacher, student = Unlabelled(), *pair()[1:]

    def distance() -> float:
        with torch.no_grad():
            found = [output_distance(student(x), teacher(x), "softmax") for x, _ in task.batches("train")]
        return float(torch.stack(found).mean())

    before = distance()
    finetune(student, task, teacher=teacher, distill_logits=1.0, distill_until=None, **{**QUICK, "epochs": 4})
    assert distance() < 0.8 * before


def test_teacher_of_another_size() -> None:
    task, _, student = pair()
    other = copy.deepcopy(task.model())
    other.rnn = nn.GRU(3, 6, batch_first=True).to(task.dtype)
    other.head = nn.Linear(6, 4).to(task.dtype)
    with pytest.raises(UsageError, match=r"rnn of 6 units, the network rnn of 8 units\. .* heal_epochs=0"):
        finetune(student, task, teacher=other, heal_epochs=1, **QUICK)
    result = finetune(student, task, teacher=other, **QUICK)
    assert result.steps == 12


def test_all_phases_resume_to_the_same_bits(tmp_path: Path) -> None:
    task, teacher, student = pair(spec="2*(4x4,2x2)+sparse:10%")
    options: dict[str, Any] = {**QUICK, "heal_epochs": 0.5, "sparse_start": 1.0}

    class Stop(Exception):
        pass

    whole = finetune(copy.deepcopy(student), task, teacher=teacher, **options)
    assert [e.phase for e in whole.history] == ["start", "heal", "train", "train"]
    for at in (2, 4, 7, 13):

        def interrupt(done: float, total: float, phase: str, at: int = at) -> None:
            if done == at:
                raise Stop

        folder = tmp_path / str(at)
        with pytest.raises(Stop):
            finetune(
                copy.deepcopy(student), task, teacher=teacher, resume=folder, progress=interrupt, save_seconds=0,
                **options
            )  # fmt: skip
        resumed = finetune(copy.deepcopy(student), task, teacher=teacher, resume=folder, **options)
        assert same(resumed.model.state_dict(), whole.model.state_dict())
        assert resumed.history == whole.history


def test_unknown_output_kind() -> None:
    task, teacher, student = pair()
    task.output_kind = "logits"
    with pytest.raises(UsageError, match="output_kind must be one of softmax"):
        finetune(student, task, teacher=teacher, **QUICK)


def test_resume_refuses_to_go_on_without_the_teacher(tmp_path: Path) -> None:
    task, teacher, student = pair(spec="2*(4x4,2x2)+sparse:10%")
    options = {**QUICK, "sparse_start": 1.0}
    finetune(copy.deepcopy(student), task, teacher=teacher, resume=tmp_path, **options)
    with pytest.raises(UsageError, match="Give the same --teacher"):
        finetune(copy.deepcopy(student), task, resume=tmp_path, **options)
