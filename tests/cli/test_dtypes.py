"""Tensors of every dtype beside the layers: carried through every command to the bit, or refused in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from kruify.checkpoint import read
from kruify.checkpoint.storage import TORCH_DTYPES
from kruify.checkpoint.writing import DTYPES

KNOWN = sorted(set(TORCH_DTYPES.values()), key=str)
UNKNOWN = ("bits8", "bits16", "float8_e8m0fnu", "float4_e2m1fn_x2")
IN_NUMPY = [dtype for dtype in KNOWN if dtype.itemsize > 1 and dtype not in (torch.bfloat16, torch.complex32)]
IN_NUMPY += [torch.bool, torch.int8, torch.uint8]


def side(dtype: torch.dtype) -> Tensor:
    """Numbers of any dtype, not a zero or a NaN among them."""
    return torch.tensor([1] * 2 * dtype.itemsize, dtype=torch.uint8).view(dtype)


def with_layer(extra: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**{f"rnn.{name}": tensor for name, tensor in nn.GRU(3, 8).state_dict().items()}, **extra}


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.contiguous().view(torch.uint8).equal(b.contiguous().view(torch.uint8))


def carried(run: Callable, source: str, target: str, dense: str, wanted: dict[str, Tensor]) -> None:
    """Convert, verify, inspect, report, write dense again: `wanted` is in every file."""
    for command in (
        ("convert", source, "--factors", "2x2", "-o", target),
        ("verify", target),
        ("inspect", target),
        ("report", source, target),
        ("export", target, "--to", "dense", "-o", dense),
    ):
        result = run(*command)
        assert result.exit_code == 0, (command, result.stderr)
    for file in (target, dense):
        found = read(file).tensors
        assert [name for name, tensor in wanted.items() if not same(found[name], tensor)] == []


def test_every_dtype_of_torch_through_pt(folder, run):
    extra = {f"side.{dtype}": side(dtype) for dtype in KNOWN}
    torch.save(with_layer(extra), "a.pt")
    carried(run, "a.pt", "b.pt", "c.pt", extra)


def test_every_dtype_of_safetensors(folder, run):
    extra = {f"side.{dtype}": side(dtype) for dtype in DTYPES}
    safetensors.torch.save_file(with_layer(extra), "a.safetensors")
    carried(run, "a.safetensors", "b.safetensors", "c.safetensors", extra)


def test_every_dtype_of_numpy(folder, run):
    extra = {f"side.{dtype}": side(dtype) for dtype in IN_NUMPY}
    np.savez("a.npz", **{name: tensor.numpy() for name, tensor in with_layer(extra).items()})
    carried(run, "a.npz", "b.pt", "c.npz", extra)


@pytest.mark.parametrize("dtype", sorted(set(KNOWN) - set(DTYPES), key=str))
def test_what_safetensors_lacks_is_refused_by_name(dtype, folder, run):
    torch.save(with_layer({"side": side(dtype)}), "a.pt")
    result = run("convert", "a.pt", "--factors", "2x2")
    assert result.exit_code == 5 and f"safetensors cannot hold side of {dtype}" in result.stderr
    assert not Path("a.kru.safetensors").exists()


@pytest.mark.parametrize("name", UNKNOWN)
def test_dtypes_that_kruify_does_not_know(name, folder, run):
    torch.save(with_layer({"side": torch.ones(16, dtype=torch.uint8).view(getattr(torch, name))}), "a.pt")
    result = run("inspect", "a.pt")
    assert result.exit_code == 5 and f"torch.{name}" in result.stderr


@pytest.mark.parametrize("values", [["a", "b"], np.zeros(2, "M8[s]"), np.zeros(2, "f4,i4"), np.zeros(2, "g")])
def test_arrays_that_torch_cannot_hold(values, folder, run):
    np.savez("a.npz", **{"rnn.weight_hh_l0": np.zeros((24, 8), "f4"), "side": np.array(values)})
    result = run("inspect", "a.npz")
    assert result.exit_code in (4, 5) and "side" in result.stderr


def test_numbers_that_are_not_finite_are_found_in_any_dtype(folder, run):
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.complex64, torch.complex32):
        torch.save(with_layer({"side": torch.full((2,), 255, dtype=torch.uint8).repeat(8).view(dtype)}), "a.pt")
        run("convert", "a.pt", "--factors", "2x2", "-o", "b.pt")
        result = run("verify", "b.pt")
        assert result.exit_code == 4 and "NaN" in result.stderr, (dtype, result.stderr)


@pytest.mark.parametrize("kind", [16, 17, 18, 21, 22, 14, 15, 8], ids=lambda kind: f"onnx-{kind}")
def test_initializers_of_every_kind(kind, folder, run):
    """bfloat16 is read; float8, int4, complex and text stay in the graph, and in a copy of it with other numbers."""
    onnx = pytest.importorskip("onnx")
    parts = {"W": (1, 24, 3), "R": (1, 24, 8)}
    weights = [onnx.numpy_helper.from_array(np.random.rand(*shape).astype("f4"), n) for n, shape in parts.items()]
    data = {"string_data": [b"a"]} if kind == 8 else {"raw_data": bytes({14: 8, 15: 16, 16: 2}.get(kind, 1))}
    weights.append(onnx.TensorProto(name="side", data_type=kind, dims=[1], **data))
    options = {"hidden_size": 8, "linear_before_reset": 1}
    node = onnx.helper.make_node("GRU", ["X", "W", "R"], ["Y"], name="rnn", **options)
    Path("a.onnx").write_bytes(
        onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], [], weights)).SerializeToString()
    )
    result = run("convert", "a.onnx", "--factors", "2x2", "-o", "b.pt")
    assert result.exit_code == 0, result.stderr
    assert ("side" in read("b.pt").tensors) == (kind == 16)
    result = run("export", "b.pt", "--to", "dense", "-o", "c.onnx", "--original", "a.onnx")
    assert result.exit_code == 0, result.stderr
    assert onnx.load("c.onnx").graph.initializer[2] == onnx.load("a.onnx").graph.initializer[2]
