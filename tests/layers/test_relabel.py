"""Relabelled units: the layer computes what the dense layer computes, and the outside sees the dense layer's units."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from kruify.conversion import convert_module, densify
from kruify.conversion.locate import describe
from kruify.conversion.plan import Plan, make_plan
from kruify.errors import UsageError
from kruify.layers import KRUGRU, KRULSTM, KRURNN, KRUGRUCell
from kruify.layers.relabel import Relabel, odd_gates, set_relabel
from kruify.ops import has_kernel

F64 = torch.float64
KINDS: dict[str, type[nn.RNNBase]] = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
CELLS: dict[str, type[nn.RNNCellBase]] = {"rnn": nn.RNNCell, "lstm": nn.LSTMCell, "gru": nn.GRUCell}


def random_units(count: int, signs: bool = True) -> tuple[int, ...]:
    units = torch.randperm(count) + 1
    return tuple((units * (2 * torch.randint(2, (count,)) - 1 if signs else 1)).tolist())


def relabelled(dense: nn.Module, spec: str, signs: bool = True, inputs: str | None = None) -> Any:
    """The dense layer converted with random units in every direction."""
    plan = make_plan([describe("", dense)], spec, inputs)
    (item,) = plan.layers
    weights = [weight for weight in item.matrices if weight.startswith("weight_hh")]
    units = {weight: random_units(item.layer.hidden_size, signs) for weight in weights}
    return convert_module(dense, Plan([replace(item, relabelled=units)]))[0]


@pytest.mark.parametrize("backend", ["reference", "dense", "kernel"])
@pytest.mark.parametrize(
    ("kind", "layers", "bidirectional", "bias", "proj"),
    [
        case
        for case in itertools.product(KINDS, (1, 2), (False, True), (False, True), (0, 4))
        if case[0] == "lstm" or not case[4]
    ],
)
def test_equals_the_dense_layer(
    kind: str, layers: int, bidirectional: bool, bias: bool, proj: int, backend: str
) -> None:
    if backend == "kernel" and (proj or not has_kernel("cpu")):
        pytest.skip("no compiled kernel")
    options: dict[str, Any] = {"proj_size": proj} if proj else {}
    sizes = (proj or 8, 8) if kind == "lstm" else (8,)
    for batch_first in (False, True):
        dense = KINDS[kind](
            5, 8, layers, bias=bias, bidirectional=bidirectional, batch_first=batch_first, dtype=F64, **options
        )
        layer = relabelled(dense, "8*(4x2,2x2)" if proj else "16*(4x2,2x4)")
        layer.backend = backend
        state = tuple(torch.randn(layers * (1 + bidirectional), 3, size, dtype=F64) for size in sizes)
        x = torch.randn((3, 6, 5) if batch_first else (6, 3, 5), dtype=F64)
        packed = pack_padded_sequence(x, torch.tensor([6, 2, 4]), batch_first, enforce_sorted=False)
        for hx in (None, state if kind == "lstm" else state[0]):
            torch.testing.assert_close(layer(x, hx), dense(x, hx), rtol=0, atol=1e-12)
            ours, theirs = layer(packed, hx), dense(packed, hx)
            torch.testing.assert_close(ours[0].data, theirs[0].data, rtol=0, atol=1e-12)
            torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=1e-12)
            with torch.no_grad():
                torch.testing.assert_close(layer(x, hx), dense(x, hx), rtol=0, atol=1e-12)
        back = densify(layer)
        for name, parameter in dense.named_parameters():
            exact = not name.startswith("weight_hh")
            torch.testing.assert_close(back.get_parameter(name), parameter, rtol=0, atol=0 if exact else 1e-12)


@pytest.mark.parametrize("backend", ["reference", "dense", "kernel"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_inputs_states_and_weights(kind: str, backend: str) -> None:
    if backend == "kernel" and not has_kernel("cpu"):
        pytest.skip("no compiled kernel")
    dense = KINDS[kind](5, 8, 2, dtype=F64)
    layer = relabelled(dense, "16*(4x2,2x4)")
    layer.backend = backend
    grads = []
    for module in (layer, dense):
        x = torch.linspace(-1, 1, 4 * 2 * 5, dtype=F64).reshape(4, 2, 5).requires_grad_()
        h = torch.linspace(-1, 1, 2 * 2 * 8, dtype=F64).reshape(2, 2, 8).requires_grad_()
        output, final = module(x, (h, h) if kind == "lstm" else h)
        final = torch.stack(final) if kind == "lstm" else final
        (output.sin().sum() + final.square().sum()).backward()
        grads += [x.grad, h.grad]
    torch.testing.assert_close(grads[:2], grads[2:], rtol=1e-10, atol=1e-12)
    relabel = layer.relabel_l1
    for stem in ("weight_ih", "bias_ih", "bias_hh"):
        mine, theirs = (m.get_parameter(f"{stem}_l1").grad for m in (layer, dense))
        torch.testing.assert_close(relabel.weight_outside(stem, mine), theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("derivatives", [True, False])
@pytest.mark.parametrize("kind", CELLS)
def test_cells_and_streaming(kind: str, derivatives: bool) -> None:
    dense = CELLS[kind](5, 8, dtype=F64)
    cell = relabelled(dense, "16*(4x2,2x4)", inputs="8x5" if derivatives else None)
    with torch.set_grad_enabled(derivatives):
        for shape in ((3, 5), (5,)):
            ours = theirs = None
            for _ in range(4):
                x = torch.randn(shape, dtype=F64)
                ours, theirs = cell(x, ours), dense(x, theirs)
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    torch.testing.assert_close(densify(cell)(x), dense(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("kind", "nonlinearity"), [("rnn", "tanh"), ("rnn", "relu"), ("gru", None), ("lstm", None)])
def test_exactly_the_signs_said_to_be_legal_are(kind: str, nonlinearity: str | None) -> None:
    """Units change their sign in the columns of every gate and in the rows of a set of gates: of all sets, only the
    one that `odd_gates` names leaves the function as it was."""
    options = {"nonlinearity": nonlinearity} if nonlinearity else {}
    dense = KINDS[kind](3, 6, dtype=F64, **options)
    gates, signs = dense.weight_hh_l0.shape[0] // 6, torch.tensor([1, -1, 1, -1, -1, 1], dtype=F64)
    x = torch.randn(7, 2, 3, dtype=F64)
    wanted, (*final,) = dense(x)
    legal = []
    for rows in itertools.chain.from_iterable(itertools.combinations(range(gates), n) for n in range(gates + 1)):
        flipped = copy.deepcopy(dense)
        with torch.no_grad():
            flipped.weight_hh_l0 *= signs
            for parameter in flipped.parameters():
                for gate in rows:
                    part = parameter[6 * gate : 6 * gate + 6]
                    part *= signs.reshape(6, *[1] * (part.dim() - 1))
        if torch.allclose(flipped(x)[0] * signs, wanted, atol=1e-9):
            legal.append(rows)
    named = odd_gates(kind, nonlinearity)
    assert legal == ([] if named is None else [named])
    assert final


def test_the_nonlinearity_of_a_state_dict_is_unknown_so_signs_stay() -> None:
    assert odd_gates("rnn", None) is None


def test_weights_kept_for_the_dense_path_see_another_relabelling() -> None:
    layer = relabelled(nn.LSTM(5, 8, dtype=F64), "2*(4x2,2x4)")
    layer.backend = "dense"
    x = torch.randn(4, 2, 5, dtype=F64)
    with torch.no_grad():
        before = layer(x)[0]
        other = Relabel(random_units(8), "lstm")
        layer.load_state_dict({**layer.state_dict(), **other.state_dict(prefix="relabel_l0.")})
        after = layer(x)[0]
        layer.backend = "reference"
        torch.testing.assert_close(after, layer(x)[0], rtol=0, atol=1e-12)
    assert not torch.allclose(before, after)


def test_copies_pickles_and_other_precisions_keep_it() -> None:
    layer = relabelled(nn.GRU(5, 8, 2, dtype=F64), "2*(4x2,2x4)")
    x = torch.randn(4, 2, 5, dtype=F64)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(twin(x), layer(x), rtol=0, atol=0)
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half.relabel_l1.units == layer.relabel_l1.units
    assert half(x.bfloat16())[0].dtype == torch.bfloat16


def test_layers_without_one_have_nothing_of_it() -> None:
    """Not in the state dict, and layers pickled before it existed still run."""
    layer = KRUGRU(5, 8)
    assert not any("relabel" in name for name in layer.state_dict())
    assert "relabelled" not in layer.__dict__


def broken(change: Callable[[dict[str, Tensor]], None]) -> dict[str, Tensor]:
    state = {name: tensor.clone() for name, tensor in relabelled(nn.GRU(5, 8), "2x2").state_dict().items()}
    change(state)
    return state


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s["relabel_l0.permutation"].fill_(3), "no relabelling of 8 units"),
        (lambda s: s["relabel_l0.permutation"].add_(1), "no relabelling of 8 units"),
        (lambda s: s["relabel_l0.signs"].fill_(0), "no relabelling of 8 units"),
        (lambda s: s.update({"relabel_l0.permutation": torch.arange(7)}), "size mismatch"),
        (lambda s: s.pop("relabel_l0.signs"), "Missing key"),
    ],
)
def test_a_damaged_relabelling_is_not_loaded(change: Any, words: str) -> None:
    layer = relabelled(nn.GRU(5, 8), "2x2")
    with pytest.raises(RuntimeError, match=words):
        layer.load_state_dict(broken(change))


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (lambda: set_relabel(KRULSTM(3, 4), "_l0", [1, 2, 3]), "4 hidden units, the relabelling 3"),
        (lambda: set_relabel(KRULSTM(3, 4), "_l0", [1, 2, 3, 3]), "each of 4 units once"),
        (lambda: set_relabel(KRURNN(3, 4, nonlinearity="relu"), "_l0", [1, -2, 3, 4]), "but not change their sign"),
        (lambda: relabelled(nn.GRUCell(3, 4), "2x2")(torch.zeros(2, 3), torch.zeros(2, 5)), "state tensor"),
        (lambda: relabelled(nn.GRU(3, 4), "2x2")(torch.zeros(1, 2, 3), torch.zeros(1, 2, 5)), "initial state of shape"),
    ],
)
def test_refused(action: Callable[[], object], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        action()
    assert words in str(caught.value)


def test_relu_layers_are_renumbered() -> None:
    dense = nn.RNN(5, 8, nonlinearity="relu", dtype=F64)
    layer = relabelled(dense, "16*(4x2,2x4)", signs=False)
    x = torch.randn(4, 2, 5, dtype=F64)
    torch.testing.assert_close(layer(x), dense(x), rtol=0, atol=1e-12)
    signs = layer.state_dict()["relabel_l0.signs"].clone()
    signs[0] = -1
    with pytest.raises(RuntimeError, match="may not change their sign"):
        layer.load_state_dict({**layer.state_dict(), "relabel_l0.signs": signs})


def test_streaming_keeps_its_arguments() -> None:
    """Without derivatives a relabelled cell uses the arguments of its operator call that were put together once."""
    if not has_kernel("cpu"):
        pytest.skip("no compiled kernels")
    cell = relabelled(nn.GRUCell(5, 8), "2x2")
    assert isinstance(cell, KRUGRUCell)
    with torch.no_grad():
        state = cell(torch.randn(1, 5))
        kept = cell.__dict__["_kernel_streaming"]
        cell(torch.randn(1, 5), state)
    assert cell.__dict__["_kernel_streaming"] is kept
