"""Recurrent layers are found by names and shapes in state dicts, by class in modules."""

from __future__ import annotations

import pytest
import torch
from all_pairs import all_pairs
from torch import nn

from kruify.conversion.locate import locate

CLASSES = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
CELLS = {"rnn": nn.RNNCell, "lstm": nn.LSTMCell, "gru": nn.GRUCell}


class Net(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.body = nn.ModuleDict({"layer": layer})
        self.out = nn.Linear(6, 7)


@pytest.mark.parametrize(
    ("kind", "layers", "bidirectional", "bias", "proj"),
    all_pairs(
        lambda kind, proj, **_: kind == "lstm" or not proj,
        kind=tuple(CLASSES), layers=(1, 3), bidirectional=(False, True), bias=(False, True), proj=(0, 3),
    ),
)  # fmt: skip
def test_state_dict_tells_what_the_module_is(
    kind: str, layers: int, bidirectional: bool, bias: bool, proj: int
) -> None:
    options = {"proj_size": proj} if proj else {}
    layer = CLASSES[kind](5, 6, layers, bidirectional=bidirectional, bias=bias, dtype=torch.float64, **options)
    net = Net(layer)
    from_tensors, from_module = locate(net.state_dict()), locate(net)
    assert from_tensors.skipped == from_module.skipped == []
    (found,), (described,) = from_tensors.layers, from_module.layers
    for attribute in ("name", "kind", "cell", "input_size", "hidden_size", "num_layers", "bidirectional", "bias",
                      "proj_size", "dtype"):  # fmt: skip
        assert getattr(found, attribute) == getattr(described, attribute)
    assert (found.name, found.num_layers, found.proj_size) == ("body.layer", layers, proj)
    assert (found.batch_first, found.dropout, found.nonlinearity) == (None, None, None)
    counts = {"hh": 0, "ih": 0}
    for name, parameter in layer.named_parameters():
        if name.startswith("weight") and "_hr_" not in name:
            counts[name[7:9]] += parameter.numel()
    assert (found.recurrent_parameters, found.input_parameters) == (counts["hh"], counts["ih"])


@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind: str) -> None:
    (found,) = locate(Net(CELLS[kind](5, 6)).state_dict()).layers
    assert (found.name, found.kind, found.cell, found.suffixes) == ("body.layer", kind, True, ("",))


def test_hints_fill_what_tensors_cannot_tell() -> None:
    hints = {"": {"batch_first": True, "dropout": 0.5, "nonlinearity": "relu"}}
    (found,) = locate(nn.RNN(2, 3).state_dict(), hints).layers
    assert (found.name, found.batch_first, found.dropout, found.nonlinearity) == ("", True, 0.5, "relu")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight_ih_l0": None}, "no weight_ih_l0 beside it"),
        ({"weight_hh_l0": torch.zeros(10, 5)}, "10 rows for hidden size 5: not 1, 3 or 4 gates"),
        ({"bias_hh_l0": None}, "bias_hh_l0 is missing"),
        ({"bias_ih_l0": None}, "bias_ih_l0 is missing"),
        ({"bias_ih_l0": torch.zeros(3)}, "bias_ih_l0 has shape (3,), expected (20,)"),
        ({"weight_ih_l1": None}, "weight_ih_l1 is missing"),
        ({"weight_hh_l0": torch.zeros(20, 5, dtype=torch.int8)}, "int8, which no layer"),
        ({"weight_hh_l0": torch.zeros(20, 5, dtype=torch.float8_e5m2)}, "float8_e5m2, which no layer"),
        ({"weight_hh_l0": torch.zeros(20, 5, 1)}, "no matrix"),
    ],
)
def test_what_is_passed_over_has_a_reason(change: dict[str, torch.Tensor | None], words: str) -> None:
    tensors = {**nn.LSTM(4, 5, 2).state_dict(), **change}
    located = locate({name: tensor for name, tensor in tensors.items() if tensor is not None})
    assert not located.layers
    ((_, reason),) = located.skipped
    assert words in reason


def test_subclasses_are_skipped_with_a_reason() -> None:
    class Odd(nn.LSTM):
        pass

    located = locate(Net(Odd(5, 6)))
    assert not located.layers
    assert located.skipped[0][0] == "body.layer"
    assert "Odd is a subclass of torch.nn.LSTM" in located.skipped[0][1]


def test_odd_names() -> None:
    def named(prefix: str) -> dict[str, torch.Tensor]:
        return {f"{prefix}{name}": tensor for name, tensor in nn.LSTM(4, 5).state_dict().items()}

    (found,) = locate(named("two\nlines.")).layers
    assert found.name == "two\nlines"
    assert locate(named(".")).layers == []
