"""verify finds what is wrong with a converted file, and nothing in a sound one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from kruify import convert, save
from kruify.analysis.verify import verify
from kruify.checkpoint import read, write_safetensors
from kruify.conversion.locate import describe, locate
from kruify.conversion.plan import make_plan
from kruify.errors import CorruptError, PlanError, TargetMissedError
from kruify.layers import int8, linear
from kruify.ops import has_kernel


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    net = nn.ModuleDict({"rnn": nn.LSTM(3, 8, num_layers=2, bidirectional=True), "out": nn.Linear(16, 2)})
    torch.save(net.state_dict(), tmp_path / "dense.pt")
    source = read(tmp_path / "dense.pt")
    save(convert(net, "2*(4x4,2x2)+diag")[0], tmp_path / "x.kru.safetensors", source_sha256=source.sha256)
    return tmp_path / "dense.pt", tmp_path / "x.kru.safetensors"


def rewritten(path: Path, **changes: torch.Tensor | None) -> Path:
    """The same file, validly written, with other tensors (None leaves one out)."""
    checkpoint = read(path)
    tensors = dict(checkpoint.tensors)
    for name, value in changes.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    write_safetensors(path, tensors, checkpoint.metadata)
    return path


@pytest.mark.parametrize(
    "layer", [nn.GRU(3, 8), nn.RNN(3, 8, batch_first=True), nn.LSTMCell(3, 8), nn.LSTM(3, 8, proj_size=4)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sound_files_of_every_kind(layer, dtype, tmp_path):
    save(convert(nn.ModuleDict({"rnn": layer}).to(dtype), "auto")[0], tmp_path / "x")
    told: list[tuple[float, float, str]] = []
    checks = verify(tmp_path / "x", progress=lambda *now: told.append(now))
    assert [c.name for c in checks] == ["file", "plan", "numbers", "layer rnn"]
    assert told == [(0, 1, "running layers: rnn")]


def test_source(files, tmp_path):
    dense, kru = files
    assert verify(kru, dense)[-1].name == "source"
    torch.save(nn.LSTM(3, 8).state_dict(), tmp_path / "other.pt")
    with pytest.raises(CorruptError, match="not made from"):
        verify(kru, tmp_path / "other.pt")


def test_not_a_converted_file(files, tmp_path):
    with pytest.raises(PlanError, match="no plan"):
        verify(files[0])
    strings = {name: text for name, text in read(files[1]).metadata.items() if name != "kruify.schema"}
    write_safetensors(tmp_path / "no_schema.safetensors", read(files[1]).tensors, strings)
    with pytest.raises(PlanError, match="no plan"):
        verify(tmp_path / "no_schema.safetensors")


def test_damage(files):
    _, kru = files
    data = bytearray(kru.read_bytes())
    data[-5] ^= 1
    kru.write_bytes(data)
    with pytest.raises(CorruptError, match="checksum"):
        verify(kru)


def test_missing_factor(files):
    with pytest.raises(CorruptError, match=r"factors\.1"):
        verify(rewritten(files[1], **{"rnn.weight_hh_l0.terms.0.factors.1": None}))


def test_nan(files):
    with pytest.raises(CorruptError, match=r"out\.weight"):
        verify(rewritten(files[1], **{"out.weight": torch.full((2, 16), float("nan"))}))


def test_layer_that_computes_something_else(files, monkeypatch):
    from kruify.layers import dense

    original = dense.flat_weights

    def wrong(layer: nn.Module) -> list[torch.Tensor]:
        return [w * 1.01 for w in original(layer)]

    monkeypatch.setattr(dense, "flat_weights", wrong)
    monkeypatch.setattr("kruify.layers.dispatch.pick", lambda *a, **k: "dense")
    with pytest.raises(TargetMissedError, match="differs by"):
        verify(files[1])


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_layers_beside_are_run_too(dtype, tmp_path, monkeypatch):
    parts = {"embedding": nn.Embedding(20, 8), "rnn": nn.GRU(8, 8), "out": nn.Linear(8, 20), "last": nn.Linear(8, 6)}
    net, wanted = nn.ModuleDict(parts), {"embedding.weight": "2*(20x1,1x8)", "out.weight": "3*(20x1,1x8)"}
    wanted["last.weight"] = "2*(3x4,2x2)"
    layers = [*locate(net).layers, *(describe(name, parts[name]) for name in ("embedding", "out", "last"))]
    small, _ = convert(net, plan=make_plan(layers, "2x2", overrides=wanted), dtype=dtype)
    save(small, tmp_path / "x")
    checks = verify(tmp_path / "x")[3:]
    assert [check.name for check in checks] == ["layer embedding", "layer rnn", "layer out", "layer last"]
    assert all("from the dense one in float64" in check.detail for check in checks)
    factors, product = linear._low_rank, linear.apply_weight
    monkeypatch.setattr(linear, "apply_weight", lambda *given: 1.01 * product(*given))
    with pytest.raises(TargetMissedError, match="x: last: the layer differs by"):
        verify(tmp_path / "x")
    monkeypatch.setattr(linear, "_low_rank", lambda weight: (found := factors(weight)) and (1.01 * found[0], found[1]))
    with pytest.raises(TargetMissedError, match="x: embedding: the layer differs by"):
        verify(tmp_path / "x")


EIGHT_BITS = [
    (lambda: nn.LSTM(5, 8, num_layers=2, bidirectional=True), "3*(8x1,1x8)+diag", "auto"),
    (lambda: nn.GRU(5, 8, bias=False), "2*(8x1,1x8)+3*(8x1,1x8)+sparse:9%:1", "stacked:2*(24x1,1x5)+sparse:9%:1"),
    (lambda: nn.RNN(5, 8, nonlinearity="relu"), "3*(8x1,1x8)", None),
    (lambda: nn.GRUCell(5, 8), "dense", None),
]


@pytest.mark.parametrize(("layer", "spec", "inputs"), EIGHT_BITS)
def test_eight_bit_layers_compute_what_their_arithmetic_says(layer, spec, inputs, tmp_path, monkeypatch):
    if not has_kernel("cpu"):
        pytest.skip("no compiled kernels")
    net = nn.ModuleDict({"rnn": layer()})
    save(convert(net, spec, input_factors=inputs, dtype="int8")[0], tmp_path / "x")
    assert "the arithmetic of eight bits" in verify(tmp_path / "x")[-1].detail
    pack = int8.matrices

    def wrong(weight, gates):
        first, second, layout = pack(weight, gates)
        second = second.clone()
        second[0] *= 1.01  # one row of one gate
        return first, second, layout

    monkeypatch.setattr(int8, "packed", lambda *given: packed(*wrong(*given)))
    with pytest.raises(TargetMissedError, match="arithmetic of eight bits"):
        verify(tmp_path / "x")


def packed(first, second, layout):
    return torch.ops.kruify.int8_pack(first, second, layout), layout


def test_eight_bit_layers_with_large_weights(tmp_path):
    torch.manual_seed(0)
    net = nn.ModuleDict({"rnn": nn.GRU(32, 64)})
    for parameter in net.parameters():
        parameter.data *= 12  # over 16 steps the rounding of states grows to a quarter of the output
    save(convert(net, "dense", dtype="int8")[0], tmp_path / "x")
    assert verify(tmp_path / "x")[-1].name == "layer rnn"
