"""Conversion of state dicts and modules: exact with all terms, right counts, nothing else touched."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from all_pairs import all_pairs
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import kruify
from kruify.checkpoint import read
from kruify.conversion import convert_tensors, densify_tensors, expected, plan_of
from kruify.conversion.locate import locate, locate_checkpoint
from kruify.conversion.pipeline import default_output
from kruify.conversion.plan import make_plan
from kruify.errors import CorruptError, PlanError, UnsupportedError, UsageError
from kruify.layers import KRULSTM, KRURNNCell
from kruify.tasks.base import Task

F64 = torch.float64
CLASSES = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
ALL_TERMS = "16*(4x4,2x2)"  # an 8x8 matrix rearranged is 16x4: 4 terms are enough, 16 more than enough


class Net(nn.Module):
    """An embedding, a recurrent layer, an output: the usual."""

    def __init__(self, layer: nn.Module, features: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 5, dtype=F64)
        self.rnn = layer
        self.out = nn.Linear(features, 3, dtype=F64)


@pytest.mark.parametrize(
    ("kind", "layers", "bidirectional", "bias", "proj", "batch_first"),
    all_pairs(
        lambda kind, proj, **_: kind == "lstm" or not proj,
        kind=tuple(CLASSES), layers=(1, 2), bidirectional=(False, True), bias=(False, True), proj=(0, 4),
        batch_first=(False, True),
    ),
)  # fmt: skip
def test_all_terms_kept_equals_the_dense_layer(
    kind: str, layers: int, bidirectional: bool, bias: bool, proj: int, batch_first: bool
) -> None:
    options = {"proj_size": proj} if proj else {}
    spec = "8*(4x2,2x2)" if proj else ALL_TERMS
    sizes = (proj or 8, 8) if kind == "lstm" else (8,)
    dense = CLASSES[kind](
        5, 8, layers, bias=bias, bidirectional=bidirectional, batch_first=batch_first, dtype=F64, **options
    )
    converted, _ = kruify.convert(dense, spec)
    assert converted.batch_first == batch_first
    state = tuple(torch.randn(layers * (1 + bidirectional), 3, size, dtype=F64) for size in sizes)
    x = torch.randn((3, 6, 5) if batch_first else (6, 3, 5), dtype=F64)
    packed = pack_padded_sequence(x, torch.tensor([6, 2, 4]), batch_first, enforce_sorted=False)
    for hx in (None, state if kind == "lstm" else state[0]):
        torch.testing.assert_close(converted(x, hx), dense(x, hx), rtol=0, atol=1e-12)
        ours, theirs = converted(packed, hx), dense(packed, hx)
        torch.testing.assert_close(ours[0].data, theirs[0].data, rtol=0, atol=1e-12)
        torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("cell", [nn.RNNCell, nn.LSTMCell, nn.GRUCell])
def test_all_terms_kept_equals_the_dense_cell(cell: type[nn.Module]) -> None:
    dense = cell(5, 8, dtype=F64)
    converted, _ = kruify.convert(dense, ALL_TERMS, input_factors="8x5")
    x = torch.randn(3, 5, dtype=F64)
    torch.testing.assert_close(converted(x, converted(x)), dense(x, dense(x)), rtol=0, atol=1e-12)


def test_module_conversion_leaves_the_original_and_the_rest_alone() -> None:
    net = Net(nn.LSTM(5, 8, 2, dropout=0.3, batch_first=True, dtype=F64).eval(), 8)
    before = copy.deepcopy(net.state_dict())
    converted, report = kruify.convert(net, "4x4,2x2")
    assert isinstance(net.rnn, nn.LSTM)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert isinstance(converted.rnn, KRULSTM)
    assert (converted.rnn.dropout, converted.rnn.batch_first, converted.rnn.training) == (0.3, True, False)
    for name in ("embedding.weight", "out.bias", "rnn.weight_ih_l1", "rnn.bias_hh_l0"):
        assert torch.equal(converted.state_dict()[name], before[name])
    assert report.parameters.recurrent_before == 2 * 4 * 64
    assert report.parameters.recurrent_after == 2 * 4 * (16 + 4)
    total = sum(p.numel() for p in net.parameters())
    assert report.parameters.total_before == total
    assert report.parameters.total_after == sum(p.numel() for p in converted.parameters())


def test_state_dict_and_module_conversion_agree() -> None:
    net = Net(nn.GRU(5, 8, bidirectional=True, dtype=F64), 16)
    converted, report = kruify.convert(net, "2*(4x4,2x2)+diag", seed=3)
    located = locate(net.state_dict())
    plan = make_plan(located.layers, "2*(4x4,2x2)+diag")
    from_tensors = convert_tensors(net.state_dict(), plan, located, seed=3)
    assert list(from_tensors.tensors)[:3] == ["embedding.weight", "rnn.weight_ih_l0", "rnn.weight_hh_l0.diagonal"]
    torch.testing.assert_close(dict(from_tensors.tensors), dict(converted.state_dict()), rtol=0, atol=0)
    assert from_tensors.matrices == report.matrices
    assert [(m.name, m.gate, m.shape, m.terms) for m in report.matrices][:3] == [
        ("rnn.weight_hh_l0", gate, (8, 8), 2) for gate in "rzn"
    ]


def test_the_account_is_exact() -> None:
    net = nn.LSTM(5, 8, dtype=F64)
    converted, report = kruify.convert(net, "4x4,2x2")
    dense = converted.weight_hh_l0.to_dense()
    for i, gate in enumerate(report.matrices):
        w, k = net.weight_hh_l0.detach()[8 * i : 8 * i + 8], dense.detach()[8 * i : 8 * i + 8]
        kept = 1 - float((w - k).square().sum() / w.square().sum())
        assert gate.energy == pytest.approx(kept, abs=1e-12)
        assert gate.relative_error == pytest.approx((1 - kept) ** 0.5, abs=1e-12)
        assert 0 < gate.energy_null < 1
        assert (gate.parameters_before, gate.parameters_after) == (64, 20)


class States(Task):
    """Random inputs to a bare layer: something to calibrate on."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def model(self) -> nn.Module:
        return self.layer

    def batches(self, split: str, *, seed: int = 0) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [2 * torch.randn(12, 16, 5, dtype=F64, generator=generator) + 1 for _ in range(4)]

    def forward(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return model(batch)[0]

    def loss(self, outputs: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        return outputs.square().mean()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", CLASSES)
def test_a_calibrated_conversion_errs_less_where_it_matters(kind: str, bias: bool) -> None:
    """E||(W - K) h + b - b'||^2 over the states that the dense layer really takes is lower than without weights."""
    dense = CLASSES[kind](5, 8, bias=bias, dtype=F64)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.mul_(3)  # states far from isotropic
    task = States(dense)
    h = torch.cat([dense(x)[0][:-1].reshape(-1, 8) for x in task.batches("train")]).detach()

    def output_error(**options: Task) -> float:
        converted, _ = kruify.convert(dense, "4x4,2x2", **options)
        error = h @ (dense.weight_hh_l0 - converted.weight_hh_l0.to_dense()).T
        if bias:
            error = error + dense.bias_hh_l0 - converted.bias_hh_l0
        return error.square().sum().item()

    assert output_error(task=task) < 0.97 * output_error()


def test_a_trained_rnn_keeps_its_norm_in_a_separate_scale() -> None:
    net = nn.RNN(5, 8, dtype=F64)
    converted, _ = kruify.convert(net, "4x4,2x2")
    term = converted.weight_hh_l0.terms[0]
    assert term.scale is not None
    for factor in term.factors:
        assert factor.square().sum().item() == pytest.approx(factor.shape[-1])


def test_save_load_and_densify(tmp_path: Path) -> None:
    net = Net(nn.LSTM(5, 8, 2, dtype=F64), 8)
    converted, _ = kruify.convert(net, "2*(4x4,2x2)+sparse:10%")
    kruify.save(converted, tmp_path / "net.kru.safetensors")
    into = Net(nn.LSTM(5, 8, 2, dtype=F64), 8)
    loaded = kruify.load(tmp_path / "net.kru.safetensors", into=into)
    assert loaded is into
    x = torch.randn(4, 3, 5, dtype=F64)
    torch.testing.assert_close(loaded.rnn(x), converted.rnn(x), rtol=0, atol=0)
    again = kruify.load(tmp_path / "net.kru.safetensors", into=converted)  # swapped already
    assert again is converted
    bare = kruify.densify(converted)
    assert type(bare.rnn) is nn.LSTM
    torch.testing.assert_close(bare.rnn(x), converted.rnn(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        densify_tensors(converted.state_dict(), plan_of(converted)), dict(bare.state_dict()), rtol=0, atol=1e-12
    )
    inspection = kruify.inspect(tmp_path / "net.kru.safetensors")
    assert inspection.plan is not None
    # The file speaks of what it holds, the module of what it is.
    assert inspection.plan == plan_of(converted)


def test_recurrent_layers_alone_when_the_code_is_lost(tmp_path: Path) -> None:
    """A whole module, pickled: without its class the layers come out by name, with what the module knew of itself."""
    net = nn.ModuleDict({"a": nn.LSTM(5, 8, 2, batch_first=True), "b": nn.GRU(8, 4), "c": nn.Linear(4, 2)})
    torch.save(net, tmp_path / "whole.pt")
    layers = kruify.load(tmp_path / "whole.pt")
    assert {name: type(layer) for name, layer in layers.items()} == {"a": nn.LSTM, "b": nn.GRU}
    x = torch.randn(3, 6, 5)
    torch.testing.assert_close(layers["a"](x), net["a"](x))
    converted, _ = kruify.convert(net, "auto", only=["a"])
    kruify.save(converted, tmp_path / "small.kru.safetensors")
    layers = kruify.load(tmp_path / "small.kru.safetensors")
    assert {name: type(layer) for name, layer in layers.items()} == {"a": KRULSTM, "b": nn.GRU}
    torch.testing.assert_close(layers["a"](x), converted["a"](x))


def test_bare_layers() -> None:
    converted, _ = kruify.convert(nn.RNNCell(3, 4), "2x2")
    assert isinstance(converted, KRURNNCell)


@pytest.mark.parametrize(
    ("action", "error", "words"),
    [
        (lambda: kruify.convert(nn.Linear(2, 2)), UsageError, "no RNN, LSTM or GRU layer"),
        (
            lambda: kruify.convert(nn.LSTM(4, 8), plan=plan_of(kruify.convert(nn.LSTM(4, 4), "2x2")[0])),
            PlanError,
            "weight_hh_l0: the plan is made for 4x4 gates",
        ),
        (lambda: kruify.save(nn.LSTM(2, 2), "never-written"), UsageError, "no KRU layer"),
    ],
)
def test_refused(action: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        action()  # type: ignore[operator]
    assert words in str(caught.value)


def test_loading_into_the_wrong_model(tmp_path: Path) -> None:
    path = tmp_path / "m.kru.safetensors"
    kruify.save(kruify.convert(Net(nn.LSTM(5, 8, dtype=F64), 8), "2x2")[0], path)
    with pytest.raises(PlanError, match="has 16x16"):
        kruify.load(path, into=Net(nn.LSTM(5, 16, dtype=F64), 16))
    with pytest.raises(PlanError, match="does not fit the gru"):
        kruify.load(path, into=Net(nn.GRU(5, 8, dtype=F64), 8))
    with pytest.raises(PlanError, match="no layer 'rnn'"):
        kruify.load(path, into=nn.Linear(2, 2))
    with pytest.raises(CorruptError, match="do not fit Net"):
        kruify.load(path, into=Net(nn.LSTM(5, 8, dtype=F64), 9))


class Twice(nn.Module):
    """One layer in two places, and one matrix for embedding and output."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 16)
        self.rnn = nn.GRU(16, 16)
        self.again = nn.ModuleDict({"rnn": self.rnn})
        self.out = nn.Linear(16, 7)
        self.out.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.again["rnn"](self.rnn(self.embedding(x))[0])[0])


def test_a_layer_in_two_places_stays_one_and_counts_once(tmp_path):
    model, x = Twice(), torch.randint(7, (5, 3))
    exact, _ = kruify.convert(model, "16*(4x4,4x4)")
    torch.testing.assert_close(exact(x), model(x), atol=1e-5, rtol=0)

    small, report = kruify.convert(model, "4x4")
    assert isinstance(small, Twice)
    assert small.again["rnn"] is small.rnn
    before = sum(p.numel() for p in model.parameters())
    after = sum(p.numel() for p in small.parameters())
    assert report.parameters.total_before == before
    assert report.parameters.total_after == after == before - 3 * (256 - 32)
    assert (report.parameters.recurrent_before, report.parameters.recurrent_after) == (768, 96)

    kruify.save(small, tmp_path / "small.kru.safetensors")
    loaded = kruify.load(tmp_path / "small.kru.safetensors", into=Twice())
    assert loaded.again["rnn"] is loaded.rnn
    assert torch.equal(loaded(x), small(x))
    dense = kruify.densify(small)
    assert dense.again["rnn"] is dense.rnn
    assert type(dense.rnn) is nn.GRU
    torch.testing.assert_close(dense(x), small(x), atol=1e-5, rtol=0)

    torch.save(model.state_dict(), tmp_path / "model.pt")
    checkpoint = read(tmp_path / "model.pt")
    located = locate_checkpoint(checkpoint)
    plan = make_plan(located.layers, "4x4")
    from_file = convert_tensors(checkpoint.tensors.lazy, plan, located)
    assert from_file.parameters == report.parameters == expected(checkpoint.tensors.lazy, plan, located).parameters
    unlike = make_plan(located.layers, "4x4", overrides={"again.*": "2x2"})
    assert convert_tensors(checkpoint.tensors.lazy, unlike, located).parameters.recurrent_after == 96 + 3 * 16
    assert expected(checkpoint.tensors.lazy, unlike, located).parameters.recurrent_after == 96 + 3 * 16


def test_a_file_of_another_network_says_what_differs(tmp_path):
    net = nn.ModuleDict({"rnn": nn.GRU(3, 8), "out": nn.Linear(8, 2)})
    torch.save({f"net.{name}": tensor for name, tensor in net.state_dict().items()}, tmp_path / "a.pt")
    with pytest.raises(CorruptError) as wrapped:
        kruify.load(tmp_path / "a.pt", into=net)
    assert "rnn.weight_ih_l0 and 5 more are missing; net.rnn.weight_ih_l0 and 5 more are not known to it" in str(
        wrapped.value
    )
    assert "The names of the file begin with 'net.'" in str(wrapped.value)
    torch.save({**net.state_dict(), "out.weight": torch.zeros(3, 8)}, tmp_path / "b.pt")
    with pytest.raises(CorruptError, match=r"out\.weight is 3x8, not 2x8"):
        kruify.load(tmp_path / "b.pt", into=net)


def test_broken_numbers_are_named():
    net = Net(nn.LSTM(5, 8), 8)
    net.rnn.weight_hh_l0.data[3, 2] = float("nan")
    with pytest.raises(UnsupportedError, match=r"rnn\.weight_hh_l0: it has 1 entry that is NaN or infinite"):
        kruify.convert(net, "2x2")


@pytest.mark.parametrize("cell", [False, True])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_stacked_gates(kind: str, cell: bool, tmp_path: Path) -> None:
    gates = {"lstm": 4, "gru": 3}[kind]
    layer = (nn.LSTMCell if kind == "lstm" else nn.GRUCell)(5, 8, dtype=F64) if cell else CLASSES[kind](5, 8, dtype=F64)
    net = Net(layer, 8)
    exact, report = kruify.convert(net, f"stacked:8*({8 * gates}x1,1x8)")
    torch.testing.assert_close(dict(kruify.densify(exact).state_dict()), dict(net.state_dict()), rtol=0, atol=1e-12)
    (row,) = report.matrices
    assert (row.gate, row.shape, row.terms) == ("all", (8 * gates, 8), 8)
    assert row.energy == pytest.approx(1, abs=1e-12)

    spec = f"stacked:2*({8 * gates}x1,1x8)+sparse:12.5%:2"
    small, report = kruify.convert(net, spec)
    held = sum(p.numel() for n, p in small.rnn.named_parameters() if n.startswith("weight_hh"))
    assert report.matrices[0].parameters_after == held == report.parameters.recurrent_after
    assert report.parameters.total_after == sum(p.numel() for p in small.parameters())
    weight = net.rnn.weight_hh if cell else net.rnn.weight_hh_l0
    matrix = small.rnn.weight_hh if cell else small.rnn.weight_hh_l0
    error = float((matrix.to_dense() - weight).detach().norm() / weight.detach().norm())
    assert report.matrices[0].relative_error == pytest.approx(error, abs=1e-9)
    by_gate, _ = kruify.convert(net, "2*(8x1,1x8)+sparse:12.5%:2")
    assert sum(p.numel() for p in by_gate.parameters()) > sum(p.numel() for p in small.parameters())

    kruify.save(small, tmp_path / "net.kru.safetensors")
    loaded = kruify.load(tmp_path / "net.kru.safetensors", into=Net(copy.deepcopy(layer), 8))
    x = torch.randn(4, 5, dtype=F64) if cell else torch.randn(4, 3, 5, dtype=F64)
    torch.testing.assert_close(loaded.rnn(x), small.rnn(x), rtol=0, atol=0)
    assert plan_of(loaded) == plan_of(small)
    back = densify_tensors(small.state_dict(), plan_of(small))
    torch.testing.assert_close(back, dict(kruify.densify(small).state_dict()), rtol=0, atol=1e-12)
    plan = make_plan(locate(net).layers, spec)
    dry = expected(net.state_dict(), plan, locate(net))
    assert dry.parameters == report.parameters


def test_stacked_input_gates(tmp_path: Path) -> None:
    net = nn.LSTM(6, 8, dtype=F64)
    exact, _ = kruify.convert(net, "auto", input_factors="stacked:6*(32x1,1x6)")
    torch.testing.assert_close(exact.weight_ih_l0.to_dense(), net.weight_ih_l0, rtol=0, atol=1e-12)
    x = torch.randn(4, 3, 6, dtype=F64)
    torch.testing.assert_close(exact(x), kruify.densify(exact)(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("model.pt", "model"),
        ("epoch=1-val_loss=0.25.ckpt", "epoch=1-val_loss=0.25"),
        ("epoch=1-val_loss=0.25", "epoch=1-val_loss=0.25"),
        ("v1.2.safetensors", "v1.2"),
        ("best.pth.tar", "best"),
        ("pytorch_model.bin.index.json", "pytorch_model"),
    ],
)
def test_default_output_keeps_dots_that_begin_no_known_ending(name, written):
    assert str(default_output(f"folder/{name}")) == f"folder/{written}.kru.safetensors"
