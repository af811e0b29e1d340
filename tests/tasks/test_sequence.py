from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from kruify.errors import TaskError
from kruify.tasks._cells import CELLS, recurrent
from kruify.tasks._sequence import SequenceNetwork, shuffled
from kruify.tasks.copy_memory import CopyMemory


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("layers", [1, 2])
def test_every_cell_by_name(cell: str, layers: int) -> None:
    task = CopyMemory(cell=cell, hidden=16, layers=layers, dropout=0.1, factors="4x4")
    model = task.model().eval()
    x = torch.randint(10, (3, 7))
    whole = model(x)
    assert whole.shape == (3, 7, 10)
    first, state = model.run(x[:, :4], None)
    second, _ = model.run(x[:, 4:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    assert model.rnn.num_layers == layers


def test_state_dict_names() -> None:
    model = SequenceNetwork(3, 2, CopyMemory(cell="lstm", hidden=5), last=True)
    assert set(model.state_dict()) == {
        *(f"rnn.{kind}_{end}_l0" for kind in ("weight", "bias") for end in ("ih", "hh")),
        *("fc.weight", "fc.bias"),
    }


@pytest.mark.parametrize("cell", CELLS)
def test_the_last_prediction_alone(cell: str) -> None:
    model = SequenceNetwork(3, 2, CopyMemory(cell=cell, hidden=6, layers=2, factors="auto"), last=True).eval()
    x = torch.randn(4, 6, 3)
    torch.testing.assert_close(model(x), model.fc(model.rnn(x)[0][:, -1]), rtol=0, atol=0)


def test_quantised_dynamically_to_int8() -> None:
    model = CopyMemory(cell="lstm", hidden=16).model().eval()
    x = torch.randint(10, (3, 7))
    int8 = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM, nn.Linear})
    torch.testing.assert_close(int8(x), model(x), atol=0.05, rtol=0)


@pytest.mark.parametrize("cell", ["kru", "kru-real"])
def test_start_reaches_the_unit(cell: str) -> None:
    assert CopyMemory(cell=cell, hidden=8, factors="2x2").model().rnn.start == "linear"
    assert CopyMemory(cell=cell, hidden=8, factors="2x2", start="small").model().rnn.start == "small"


def test_unknown_cell() -> None:
    with pytest.raises(TaskError, match=r'no cell "lstn"\. Cells are rnn, lstm, gru, kru-rnn'):
        recurrent("lstn", 2, 2)


def test_dense_cells_are_torchs_own() -> None:
    types: dict[str, type[Any]] = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
    for name, expected in types.items():
        assert type(recurrent(name, 2, 3, batch_first=True)) is expected


def test_shuffled_covers_everything_once() -> None:
    parts = list(shuffled(10, 4, seed=3))
    assert [len(part) for part in parts] == [4, 4, 2]
    assert sorted(torch.cat(parts).tolist()) == list(range(10))
    assert torch.cat(parts).tolist() == torch.cat(list(shuffled(10, 4, seed=3))).tolist()
    assert torch.cat(parts).tolist() != torch.cat(list(shuffled(10, 4, seed=4))).tolist()
