from __future__ import annotations

import copy

import pytest
import torch
from tiny import same
from torch import nn

from kruify.layers.base import KRUBase
from kruify.ops import has_kernel
from kruify.training import teacher as room
from kruify.training.teacher import frozen_teacher

CPU = torch.device("cpu")
LAYERS = {
    "gru": lambda: nn.GRU(6, 8, 2, bidirectional=True),
    "lstm": lambda: nn.LSTM(6, 8, proj_size=3),
    "rnn": lambda: nn.RNN(6, 9, bias=False, nonlinearity="relu"),
}


@pytest.mark.skipif(not has_kernel("cpu"), reason="the kernels are not compiled here")
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", ["", "0"])
def test_the_same_function_on_the_kernels(kind: str, name: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[kind]().double()
    dense = nn.Sequential(layer) if name else layer
    before = copy.deepcopy(dense.state_dict())
    teacher = frozen_teacher(dense, CPU, [name])
    assert isinstance(teacher.get_submodule(name), KRUBase)
    x = torch.randn(5, 3, 6, dtype=torch.float64)
    for ours, theirs in zip(teacher(x), dense(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert dense.training and same(dense.state_dict(), before)


def test_what_was_not_converted_stays_as_it_is() -> None:
    dense = nn.ModuleDict({"a": nn.GRU(3, 4), "b": nn.Linear(4, 2)})
    for names in ([], ["c"]):
        teacher = frozen_teacher(dense, CPU, names)
        assert isinstance(teacher["a"], nn.GRU) and teacher["a"] is not dense["a"]


def test_without_kernels_it_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "has_kernel", lambda device: False)
    assert isinstance(frozen_teacher(nn.GRU(3, 4), CPU, [""]), nn.GRU)
