"""Networks saved by DataParallel, torch.compile and AveragedModel, or held as `model`, as state dicts or converted,
load into the plain class and into one that is wrapped in another way."""

from __future__ import annotations

import pytest
import torch
from all_pairs import all_pairs
from torch import nn
from torch.optim.swa_utils import AveragedModel

import kruify


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(4, 8)
        self.out = nn.Linear(8, 2)

    def forward(self, x):
        return self.out(self.rnn(x)[0])


def compiled(module):
    return torch.compile(module, backend="eager")


class Held(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.model = net

    def forward(self, x):
        return self.model(x)


def inside(wrap):
    def wrapped(net):
        net.rnn = wrap(net.rnn)
        return net

    return wrapped


WRAPPERS = {
    "plain": lambda net: net,
    "parallel": nn.DataParallel,
    "compiled": compiled,
    "averaged": AveragedModel,
    "averaged compiled": lambda net: AveragedModel(compiled(net)),
    "averaged averaged": lambda net: AveragedModel(AveragedModel(net)),
    "held": Held,
    "held parallel": lambda net: nn.DataParallel(Held(net)),
    "compiled parallel": lambda net: compiled(nn.DataParallel(net)),
    "parallel inside": inside(nn.DataParallel),
    "compiled inside": inside(compiled),
    "averaged, parallel inside": lambda net: AveragedModel(inside(nn.DataParallel)(net)),
}


@pytest.mark.parametrize(
    ("saved", "into", "way"),
    all_pairs(
        saved=tuple(WRAPPERS),
        into=("plain", "parallel", "averaged", "compiled inside", "held", "held parallel"),
        way=("dense", "file", "live"),
    ),
)
def test_what_was_saved_wrapped_loads(saved, into, way, tmp_path):
    torch.manual_seed(0)
    net, path = Net(), tmp_path / "net.pt"
    x = torch.randn(3, 2, 4)
    wanted = net(x)
    wrapped = WRAPPERS[saved](net)
    torch.save(wrapped.state_dict(), path)
    if way == "file":
        kruify.convert(path, "stacked:8*(24x1,1x8)", output=tmp_path / "small.pt")
    if way == "live":
        small, _ = kruify.convert(wrapped, "stacked:8*(24x1,1x8)")
        torch.testing.assert_close(small(x), wanted)
        kruify.save(small, tmp_path / "small.pt")
    loaded = kruify.load(path if way == "dense" else tmp_path / "small.pt", into=WRAPPERS[into](Net()))
    torch.testing.assert_close(loaded(x), wanted)
    assert way == "dense" or any("weight_hh_l0.terms" in name for name, _ in loaded.named_parameters())


def test_inspect_names_the_layer_of_an_averaged_network(tmp_path):
    torch.save(AveragedModel(Net()).state_dict(), tmp_path / "net.pt")
    conversion = kruify.convert(tmp_path / "net.pt", "2x2", dry_run=True)
    assert [item.layer.name for item in conversion.plan.layers] == ["rnn"]


class Twins(nn.Module):
    """Two layers that only the name of a wrapper tells apart."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(4, 8)
        self.module = nn.ModuleDict({"rnn": nn.GRU(4, 8)})


def test_a_name_that_only_looks_like_a_wrapper_is_kept(tmp_path):
    net = Twins()
    small, _ = kruify.convert(net, "2x2")
    kruify.save(small, tmp_path / "small.pt")
    loaded = kruify.load(tmp_path / "small.pt", into=Twins())
    for name, tensor in small.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
