"""`compress`: one go, the contract, and backing off layer by layer."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from kruify.compress import Attempt, compress
from kruify.errors import PlanError, UsageError
from kruify.finetune import finetune
from kruify.task import Task


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


def test_first_attempt_without_a_contract(trained: nn.Module) -> None:
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
    """A contract that cannot be kept: layer after layer grows, then the nearest attempt is given, and said to be it."""
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


def test_a_contract_that_can_be_kept_ends_at_once(trained: nn.Module) -> None:
    done = compress(trained, Delay(), "2x", max_drop=10.0, epochs=0.25, device="cpu")
    assert done.within
    assert len(done.attempts) == 1


def test_refused(trained: nn.Module) -> None:
    with pytest.raises(PlanError, match="is not a budget"):
        compress(trained, Delay(), "much")
    with pytest.raises(UsageError, match="no RNN, LSTM or GRU"):
        compress(nn.Linear(2, 2), Delay(), "4x")
    with pytest.raises(UsageError, match="at least one attempt"):
        compress(trained, Delay(), "4x", attempts=0)
