"""Layers that are trained together on the outputs of a graph."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kruify.errors import UnsupportedError, UsageError

onnx = pytest.importorskip("onnx")
from onnx import helper  # noqa: E402

from kruify.graphs.torch_graph import TorchGraph  # noqa: E402
from kruify.training.together import Recorded, recurrent, train_together  # noqa: E402


def graph(path: Path, layer: nn.Module) -> TorchGraph:
    """Two outputs that depend on a GRU, one of whole numbers; the weights are those of `layer`."""
    nodes = [
        helper.make_node("GRU", ["x", "", ""], ["h"], hidden_size=4, linear_before_reset=1),
        helper.make_node("Tanh", ["h"], ["y"]),
        helper.make_node("Cast", ["h"], ["n"], to=7),
    ]
    values = [onnx.ValueInfoProto(name=name) for name in ("x", "y", "n")]
    model = helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:]), ir_version=8)
    onnx.save(model, path)
    return TorchGraph(path, {"h": recurrent(layer, bidirectional=False)})


def test_the_outputs_are_learnt(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = nn.GRU(3, 4)
    layer = copy.deepcopy(dense)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    original, small = graph(tmp_path / "a.onnx", dense), graph(tmp_path / "b.onnx", layer)
    given = [{"x": torch.randn(12, 1, 3)} for _ in range(6)]
    with torch.no_grad():
        targets = original.run({}, given)
    recorded = [Recorded(n == 1, [given[n]], [targets[n]]) for n in range(6)]
    options: dict[str, Any] = {"steps": 40, "lr": 0.05}
    found = train_together([layer], [small], [{}], recorded, tmp_path, **options)
    with torch.no_grad():
        now = small.run({}, [given[1]])[0]["y"]
    error = float((now - targets[1]["y"]).norm() / targets[1]["y"].norm())
    assert found.steps == 40 and found.error_after == pytest.approx(error, rel=1e-4)
    assert found.error_before is not None and error < 0.5 * found.error_before
    with pytest.raises(UsageError, match="nothing is held out"):
        train_together([layer], [small], [{}], recorded[2:], tmp_path, **options)
    silent = [one._replace(targets=[{"y": torch.zeros(1), "n": torch.ones(1).long()}]) for one in recorded]
    with pytest.raises(UnsupportedError, match="no output of real numbers"):
        train_together([layer], [small], [{}], silent, tmp_path, **options)
    infinite = targets[-1] | {"y": torch.full((12, 1, 1, 4), torch.inf)}
    broken = [*recorded[:-1], recorded[-1]._replace(targets=[infinite])]
    with pytest.raises(UnsupportedError, match="NaN or infinite numbers as 'y'"):
        train_together([layer], [small], [{}], broken, tmp_path, **options)
