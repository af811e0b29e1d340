"""Counts, latency and matrix health against figures worked out by hand or by numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from kruify import convert, save
from kruify.analysis.counts import count_parameters, multiply_adds
from kruify.analysis.latency import measure_latency
from kruify.analysis.layers import layers_of
from kruify.analysis.matrices import matrix_health
from kruify.checkpoint import Checkpoint, read, write_safetensors
from kruify.conversion import densify

CLASSES = {
    "rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU, "rnncell": nn.RNNCell, "lstmcell": nn.LSTMCell,
    "grucell": nn.GRUCell,
}  # fmt: skip


def saved(module: nn.Module, path: Path) -> Checkpoint:
    write_safetensors(path, module.state_dict())
    return read(path)


def converted(module: nn.Module, path: Path, factors: str, **options: str) -> Checkpoint:
    save(convert(module, factors, **options)[0], path)
    return read(path)


class Net(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 3)
        self.rnn = layer
        self.register_buffer("steps", torch.tensor(5))


def test_parameters_and_multiply_adds_of_a_dense_lstm(tmp_path):
    layers = layers_of(saved(Net(nn.LSTM(3, 8, num_layers=2, bidirectional=True, proj_size=4)), tmp_path / "x"))
    recurrent = 4 * 4 * 8 * 4  # (layers * directions) * gates * rows * columns
    inputs = 2 * 4 * 8 * 3 + 2 * 4 * 8 * 8
    projections, biases = 4 * 4 * 8, 4 * 2 * 32
    assert vars(count_parameters(layers)) == {
        "recurrent": recurrent,
        "input": inputs,
        "other": projections + biases + 21,  # the integer buffer is no parameter
        "total": recurrent + inputs + projections + biases + 21,
    }
    assert multiply_adds(layers) == recurrent + inputs + projections


def test_parameters_and_multiply_adds_of_a_converted_gru(tmp_path):
    spec = "2*(8x1,1x8)+diag+sparse:12.5%"  # 12.5 % of 64 entries: one block of 8 rows
    file = converted(Net(nn.GRU(3, 8)), tmp_path / "x", spec, input_factors="8x1,1x3")
    layers = layers_of(file)
    gate = 2 * (8 + 8) + 8 + 8
    counts = count_parameters(layers)
    assert (counts.recurrent, counts.input) == (3 * gate, 3 * 11)
    assert multiply_adds(layers) == 3 * gate + 3 * 11  # every number of such a matrix is used once


def test_tied_tensors_count_once(tmp_path):
    net = Net(nn.GRU(3, 8))
    state = net.state_dict()
    torch.save({**state, "tied.weight": state["embedding.weight"]}, tmp_path / "x.pt")
    assert count_parameters(layers_of(read(tmp_path / "x.pt"))).other == 21 + 48


@pytest.mark.parametrize("kind", CLASSES)
def test_modules_of_a_file_compute_what_the_source_did(kind, tmp_path):
    source = CLASSES[kind](3, 4)
    x = torch.randn(5, 3)
    (dense,) = layers_of(saved(source, tmp_path / "dense")).modules()
    torch.testing.assert_close(dense(x), source(x))
    (kru,) = layers_of(converted(source, tmp_path / "kru", "4*(2x2,2x2)")).modules()
    torch.testing.assert_close(kru(x), source(x), rtol=1e-4, atol=1e-5)
    assert type(kru).__name__.startswith("KRU")


def test_layers_come_in_the_order_of_the_file(tmp_path):
    net = nn.ModuleDict({"z": nn.GRU(3, 4), "a": nn.LSTM(3, 4), "m": nn.GRU(3, 4)})
    model, _ = convert(net, "2x2", only=["a"])
    save(model, tmp_path / "x")
    items = layers_of(read(tmp_path / "x")).items
    assert [(layer.name, bool(matrices)) for layer, matrices in items] == [("z", False), ("a", True), ("m", False)]


@pytest.mark.parametrize("factors", [None, "4x4,2x2", "2x2+diag", "stacked:8*(24x1,1x8)"])
def test_matrix_health_equals_numpy(factors, tmp_path):
    net = Net(nn.GRU(3, 8, bidirectional=True))
    if factors:
        net = convert(net, factors)[0]
        save(net, tmp_path / "x")
        checkpoint = read(tmp_path / "x")
    else:
        checkpoint = saved(net, tmp_path / "x")
    health = matrix_health(layers_of(checkpoint))
    assert [(h.name, h.gate) for h in health] == [
        (f"rnn.weight_hh_l0{suffix}", gate) for suffix in ("", "_reverse") for gate in "rzn"
    ]
    weight = densify(net).rnn.weight_hh_l0_reverse.detach().double().numpy()[8:16]
    entry = health[4]
    assert entry.condition_number == pytest.approx(np.linalg.cond(weight), rel=1e-4)
    assert entry.spectral_norm == pytest.approx(np.linalg.norm(weight, 2), rel=1e-5)
    defect = np.linalg.norm(weight.T @ weight - np.eye(8)) / 8**0.5
    assert entry.unitarity_defect == pytest.approx(defect, rel=1e-5)
    matrices = sum(p.numel() for n, p in net.named_parameters() if "weight_hh" in n)
    assert sum(h.parameters for h in health) == matrices - matrices % 3


def test_health_of_special_matrices(tmp_path):
    layer = nn.LSTM(2, 4, bias=False)
    with torch.no_grad():
        orthogonal = torch.linalg.qr(torch.randn(4, 4))[0]
        low_rank = torch.outer(torch.arange(4.0), torch.ones(4))
        layer.weight_hh_l0.copy_(torch.cat([orthogonal, 3 * orthogonal, low_rank, torch.eye(4)]))
    first, second, third, fourth = matrix_health(layers_of(saved(layer, tmp_path / "x")))
    assert first.unitarity_defect == pytest.approx(0, abs=1e-6)
    assert first.condition_number == pytest.approx(1, rel=1e-5)
    assert second.spectral_norm == pytest.approx(3, rel=1e-5)
    assert second.unitarity_defect == pytest.approx(8, rel=1e-5)  # sqrt(4 * (9 - 1)^2) / sqrt(4)
    assert third.condition_number == float("inf")
    assert fourth.unitarity_defect == 0


def test_latency_covers_every_model_and_batch_and_restores_the_threads(tmp_path):
    models = [
        layers_of(saved(nn.GRU(3, 4), tmp_path / "a")),
        layers_of(converted(nn.LSTMCell(3, 4), tmp_path / "b", "2x2")),
    ]
    before = torch.get_num_threads()
    latency = measure_latency(models, batches=(1, 3), steps=4, threads=2, seconds=0.0)
    assert torch.get_num_threads() == before
    assert (latency.steps, latency.threads) == (4, 2)
    assert [set(median) for median in latency.median] == [{1, 3}, {1, 3}]
    assert all(ms > 0 for median in latency.median for ms in median.values())
