"""Layers whose weights are computed from others (pruning, weight norm, spectral norm) are converted as they compute,
live and from files; what computes a weight that stays dense stays, too."""

from __future__ import annotations

import pytest
import torch
from all_pairs import all_pairs
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import kruify
from kruify.layers import KRUGRU

F64 = torch.float64
WAYS = {
    "pruning": lambda module, name: prune.random_unstructured(module, name, 0.5),
    "pruned twice": lambda m, n: prune.random_unstructured(prune.l1_unstructured(m, n, 0.3), n, 0.3),
    "weight norm": weight_norm,
    "spectral norm": spectral_norm,
    "new weight norm": parametrizations.weight_norm,
    "new spectral norm": parametrizations.spectral_norm,
}


class Net(nn.Module):
    def __init__(self, cls, way=None, part=None):
        super().__init__()
        self.rnn = cls(4, 8, dtype=F64)
        if way is not None:
            name = f"weight_{part}" + ("" if isinstance(self.rnn, nn.RNNCellBase) else "_l0")
            WAYS[way](self.rnn, name)

    def forward(self, x):
        found = self.rnn(x)
        return found[0] if isinstance(found, tuple) else found


def bias_of(net):
    return "bias_hh" if isinstance(net.rnn, nn.RNNCellBase) else "bias_hh_l0"


def whole(net):
    """A spec of full rank: the converted layer computes what the dense one does."""
    rows = net.rnn.get_parameter(bias_of(net)).shape[0]
    return f"stacked:8*({rows}x1,1x8)" if rows > 8 else "8*(8x1,1x8)"


CASES = all_pairs(cls=(nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell), part=("hh", "ih"), way=tuple(WAYS))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("cls", "part", "way"), CASES)
def test_the_weight_that_is_computed_is_converted(cls, part, way, tmp_path):
    torch.manual_seed(0)
    net, x = Net(cls, way, part).eval(), torch.randn(5, 4, dtype=F64)
    net(x)
    with torch.no_grad():
        for parameter in net.parameters():  # what hooks computed for the last call is old now
            parameter.mul_(1.1)
    small, conversion = kruify.convert(net, whole(net))
    dense = kruify.densify(small)
    wanted = net(x).detach()
    assert (
        conversion.parameters.recurrent_before
        == len(net.rnn.bias_hh_l0 if hasattr(net.rnn, "bias_hh_l0") else net.rnn.bias_hh) * 8
    )

    kruify.save(small, tmp_path / "live.pt")
    kruify.verify(tmp_path / "live.pt")
    torch.save(net.state_dict(), tmp_path / "net.pt")
    kruify.convert(tmp_path / "net.pt", whole(net), output=tmp_path / "file.pt")
    into = [kruify.load(tmp_path / f, into=Net(cls, *how)) for f in ("live.pt", "file.pt") for how in ((), (way, part))]
    for made in (small, dense, *into):
        torch.testing.assert_close(made.eval()(x), wanted, rtol=1e-7, atol=1e-9)
    small.train()(x).sum().backward()
    stays = {n for n, _ in net.named_parameters() if f"weight_{part}" in n}
    if part == "ih":
        assert stays <= {n for n, _ in small.named_parameters()} and stays <= {n for n, _ in dense.named_parameters()}
    else:
        assert not stays & {n for n, _ in small.named_parameters()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ["weight norm", "spectral norm", "new weight norm"])
def test_an_epoch_goes_on_after_conversion(way):
    """The state dict of a layer that keeps a hook loads, also where another hook went."""
    net = Net(nn.GRU, way, "ih")
    WAYS[way](net.rnn, "weight_hh_l0")
    small, _ = kruify.convert(net, "2x2")
    twin, _ = kruify.convert(net, "2x2")
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    x = torch.randn(5, 4, dtype=F64)
    small(x).sum().backward()
    optimizer.step()
    twin.load_state_dict(small.state_dict())
    torch.testing.assert_close(twin.eval()(x), small.eval()(x))


def test_a_file_holds_pruned_factors_as_they_compute(tmp_path):
    layer, x = KRUGRU(3, 8, factors="2*(2x4,4x2)+sparse:10%"), torch.randn(2, 5, 3)
    nn.init.normal_(layer.weight_hh_l0.overlay.values)
    prune.l1_unstructured(layer.weight_hh_l0.terms[0].factors, "0", 0.5)
    prune.l1_unstructured(layer.weight_hh_l0.overlay, "values", 0.5)
    prune.l1_unstructured(layer, "weight_ih_l0", 0.5)
    kruify.save(layer, tmp_path / "a.pt")
    kruify.verify(tmp_path / "a.pt")
    plain = kruify.load(tmp_path / "a.pt", into=nn.GRU(3, 8))
    for made in (plain, kruify.densify(layer), kruify.load(tmp_path / "a.pt")[""]):
        torch.testing.assert_close(made(x)[0], layer(x)[0])


def test_a_parametrization_that_is_not_known_is_named():
    net = Net(nn.LSTM)
    parametrizations.orthogonal(net.rnn, "weight_hh_l0")
    with pytest.raises(kruify.KruifyError, match="rnn: weight_hh_l0 is computed from other parameters in a way"):
        kruify.convert(net, "2x2")
