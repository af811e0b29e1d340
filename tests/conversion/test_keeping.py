"""What stays when a layer is replaced: hooks, attributes, frozen weights, weights that several layers share."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import kruify
from kruify.layers import KRU

F64 = torch.float64
LAYERS = {
    "rnn": lambda: nn.RNN(4, 8, 2, dtype=F64),
    "lstm": lambda: nn.LSTM(4, 8, bidirectional=True, dtype=F64),
    "gru": lambda: nn.GRU(4, 8, dtype=F64),
    "cell": lambda: nn.GRUCell(4, 8, dtype=F64),
}
WHOLE = "stacked:8*({0}x1,1x8)"  # full rank: the converted layer computes what the dense one does


def whole(layer):
    return WHOLE.format(layer.weight_hh_l0.shape[0] if hasattr(layer, "weight_hh_l0") else layer.weight_hh.shape[0])


def first(output):
    return output[0] if isinstance(output, tuple) else output


def doubled(module, args, output):
    return (2 * output[0], output[1]) if isinstance(output, tuple) else 2 * output


@pytest.mark.parametrize("kind", LAYERS)
def test_hooks_attributes_buffers_and_children_stay(kind):
    layer = LAYERS[kind]()
    x = torch.randn(3, 4, dtype=F64)
    plain = first(layer(x)).detach()
    layer.register_forward_hook(doubled)
    layer.register_forward_pre_hook(lambda module, args, kwargs: ((-args[0],), kwargs), with_kwargs=True)
    layer.note, layer.extra = {"of": "mine"}, nn.Linear(2, 2)
    layer.register_buffer("seen", torch.ones(1, dtype=F64))
    wanted = first(layer(x)).detach()
    assert not torch.allclose(wanted, plain)
    net = nn.ModuleDict({"a": layer})
    small, _ = kruify.convert(net, whole(layer))
    for made in (small, kruify.densify(small)):
        torch.testing.assert_close(first(made["a"](x)), wanted, rtol=0, atol=1e-12)
        assert made["a"].note == {"of": "mine"} and made["a"].seen.item() == 1
        assert isinstance(made["a"].extra, nn.Linear)
    assert type(kruify.densify(small)["a"]) is type(layer)
    small["a"].register_full_backward_hook(lambda *_: None)
    first(small["a"](x)).sum().backward()


@pytest.mark.parametrize("kind", LAYERS)
def test_frozen_weights_stay_frozen(kind):
    layer = LAYERS[kind]()
    names = [name for name, _ in layer.named_parameters()]
    frozen = {name for name in names if "weight_hh" in name or name.startswith("bias_ih")}
    for name in frozen:
        layer.get_parameter(name).requires_grad_(False)
    small, _ = kruify.convert(layer, whole(layer))
    for name, parameter in small.named_parameters():
        assert parameter.requires_grad == (name.partition(".")[0] not in frozen)
    dense = kruify.densify(small)
    assert {name for name, parameter in dense.named_parameters() if not parameter.requires_grad} == frozen


def test_what_cannot_be_kept_is_refused_by_name():
    for change, words in (
        (lambda layer: setattr(layer, "forward", lambda x: x), "enc: its forward"),
        (lambda layer: setattr(layer, "proj_size_of", layer.flatten_parameters), "enc: its proj_size_of"),
        (lambda layer: setattr(layer, "kind", "mine"), "enc: its attribute 'kind'"),
        (lambda layer: nn.utils.parametrizations.orthogonal(layer, "weight_hh_l0"), "enc: weight_hh_l0 is computed"),
    ):
        net = nn.ModuleDict({"enc": nn.LSTM(4, 8)})
        change(net["enc"])
        with pytest.raises(kruify.KruifyError, match=words):
            kruify.convert(net, "2x2")
    small, _ = kruify.convert(nn.GRU(4, 8), "2x2")
    small.forward = lambda x: x
    with pytest.raises(kruify.KruifyError, match="its forward"):
        kruify.densify(small)


@pytest.mark.parametrize("kind", LAYERS)
def test_attributes_and_hooks_of_parameters_stay_or_are_refused_by_name(kind):
    net = nn.ModuleDict({"enc": LAYERS[kind](), "out": nn.Linear(8, 2)})
    end = "" if kind == "cell" else "_l0"
    kept, replaced = (net["enc"].get_parameter(name + end) for name in ("weight_ih", "weight_hh"))
    for parameter in (kept, replaced, net["out"].weight):
        parameter.group = ["mine"]
    kept.register_hook(lambda gradient: 0 * gradient)
    small, _ = kruify.convert(net, "2x2")
    for made in (small, kruify.densify(small)):
        for weight in (made["out"].weight, *(getattr(made["enc"], name + end) for name in ("weight_ih", "weight_hh"))):
            assert weight.group == ["mine"]
        first(made["enc"](torch.randn(3, 4, dtype=F64))).sum().backward()
        assert not made["enc"].get_parameter("weight_ih" + end).grad.any()
    assert all(factor.group == ["mine"] for factor in getattr(small["enc"], "weight_hh" + end).parameters())
    getattr(small["enc"], "weight_hh" + end).terms[0].factors[0].group = "another"
    with pytest.raises(kruify.KruifyError, match=f"enc.weight_hh{end}: its factors differ in their attribute 'group'"):
        kruify.densify(small)
    for register in (replaced.register_hook, replaced.register_post_accumulate_grad_hook):
        handle = register(lambda gradient: None)
        with pytest.raises(kruify.KruifyError, match=f"enc.weight_hh{end}: it has a hook on its gradient"):
            kruify.convert(net, "2x2")
        handle.remove()


def test_a_refusal_leaves_the_model_as_it_was(tmp_path):
    net = nn.Sequential(nn.RNN(4, 8), nn.RNN(8, 8))
    kruify.save(kruify.convert(net, "4x2,2x4")[0], tmp_path / "small.pt")
    net[1].forward = lambda x: x
    with pytest.raises(kruify.KruifyError, match="1: its forward"):
        kruify.load(tmp_path / "small.pt", into=net)
    assert [type(layer) for layer in net] == [nn.RNN, nn.RNN]


def test_hooks_of_a_state_dict_get_the_layer_that_they_are_on():
    net, seen = nn.ModuleDict({"enc": nn.LSTM(4, 8)}), []
    net["enc"].register_load_state_dict_pre_hook(lambda layer, *_: seen.append(layer))
    small, _ = kruify.convert(net, "2x2")
    seen.clear()
    small.load_state_dict(small.state_dict())
    assert seen == [small["enc"]]
    net["enc"].register_load_state_dict_pre_hook(
        lambda layer, state, prefix, *_: state[prefix + "weight_hh_l0"].add_(1)
    )
    with pytest.raises(kruify.KruifyError, match="ends in KeyError: 'enc"):
        kruify.convert(net, "2x2")


def test_densify_keeps_what_is_on_a_kru():
    net = nn.ModuleDict({"enc": KRU(4, 8, factors="2x2")})
    net["enc"].register_forward_hook(doubled)
    net["enc"].note = "mine"
    net["enc"].weight_hh_l0.requires_grad_(False)
    dense = kruify.densify(net)
    x = torch.randn(5, 3, 4)
    torch.testing.assert_close(dense["enc"](x)[0], net["enc"](x)[0])
    assert dense["enc"].note == "mine" and not dense["enc"].weight_hh_l0.requires_grad


class Tied(nn.Module):
    """Two LSTMs with one W_hh, whose directions share W_ih; a Linear that is tied to a bias-free W_ih."""

    def __init__(self):
        super().__init__()
        self.a = nn.LSTM(4, 8, bidirectional=True, dtype=F64)
        self.b = nn.LSTM(16, 8, dtype=F64)
        self.out = nn.Linear(16, 32, dtype=F64)
        self.b.weight_hh_l0 = self.a.weight_hh_l0_reverse = self.a.weight_hh_l0
        self.a.weight_ih_l0_reverse = self.a.weight_ih_l0
        self.out.weight = self.b.weight_ih_l0

    def forward(self, x):
        return self.out(torch.cat([self.b(self.a(x)[0])[0]] * 2, dim=-1))


@pytest.mark.parametrize("options", [{"factors": "4x4,2x2"}, {"budget": "3x"}])
def test_shared_weights_stay_shared_and_are_counted_once(options, tmp_path):
    net = Tied()
    small, conversion = kruify.convert(net, **options)
    assert small.a.weight_hh_l0 is small.a.weight_hh_l0_reverse is small.b.weight_hh_l0
    assert small.a.weight_ih_l0 is small.a.weight_ih_l0_reverse and small.out.weight is small.b.weight_ih_l0
    assert conversion.parameters.total_after == sum(p.numel() for p in small.parameters())
    assert conversion.parameters.recurrent_before == 4 * 8 * 8
    assert conversion.parameters.recurrent_after == sum(p.numel() for p in small.a.weight_hh_l0.parameters())
    dense = kruify.densify(small)
    assert dense.a.weight_hh_l0 is dense.b.weight_hh_l0 and dense.out.weight is dense.b.weight_ih_l0
    x = torch.randn(5, 2, 4, dtype=F64)
    torch.testing.assert_close(dense(x), small(x), rtol=0, atol=1e-12)
    kruify.save(small, tmp_path / "small.pt")
    loaded = kruify.load(tmp_path / "small.pt", into=copy.deepcopy(net))
    assert loaded.a.weight_hh_l0 is loaded.b.weight_hh_l0
    torch.testing.assert_close(loaded(x), small(x), rtol=0, atol=0)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    of_file = kruify.convert(tmp_path / "net.pt", output=tmp_path / "file.pt", **options)
    assert of_file.parameters == conversion.parameters
    torch.testing.assert_close(kruify.load(tmp_path / "file.pt", into=copy.deepcopy(net))(x), small(x), rtol=0, atol=0)


def test_a_shared_weight_that_becomes_two_things_is_counted_twice():
    small, conversion = kruify.convert(Tied(), "4x4,2x2", overrides={"b": "2x2"})
    assert small.b.weight_hh_l0 is not small.a.weight_hh_l0
    assert conversion.parameters.total_after == sum(p.numel() for p in small.parameters())
