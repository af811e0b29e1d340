"""Every kind of file and wrapper of docs/checkpoints.md, made by its real library, through the command line and back.

convert (all terms kept, so nothing is lost) -> verify -> export --to dense: a file of the original kind comes out, with
the original names, wrapper and numbers.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from torch import nn
from torch.nn.utils import parametrizations, prune

from kruify.checkpoint import read
from kruify.cli.main import cli

H = 4
ALL_TERMS = "4*(2x2,2x2)"  # a 4x4 matrix has four terms: the conversion is exact


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, H, 2, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(2 * H, H, bias=False, batch_first=True)
        self.head = nn.Linear(H, 2)

    def forward(self, x):
        return self.head(self.gru(self.rnn(x)[0])[0])


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def state(prefix: str = "") -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in net().state_dict().items()}


def saved(content: object, **options) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        torch.save(content, folder / "model.pt", **options)
        return folder / "model.pt"

    return make


def nested(key: str) -> Callable[[Path], Path]:
    return saved({"epoch": 3, key: state(), "optimizer": {"state": {}}})


def tensors_file(folder: Path) -> Path:
    safetensors.torch.save_file(state(), folder / "model.safetensors", {"format": "pt"})
    return folder / "model.safetensors"


def sharded(kind: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        names = list(state())
        table = {name: f"part-{i % 2}.{kind}" for i, name in enumerate(names)}
        for file in set(table.values()):
            content = {name: state()[name] for name in names if table[name] == file}
            (safetensors.torch.save_file if kind == "safetensors" else torch.save)(content, folder / file)
        (folder / f"model.{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
        return folder / f"model.{kind}.index.json"

    return make


def arrays(folder: Path) -> Path:
    np.savez(folder / "model.npz", **{name: tensor.numpy() for name, tensor in state().items()})
    return folder / "model.npz"


def script(how: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        compiled = torch.jit.script(net()) if how == "script" else torch.jit.trace(net(), torch.zeros(2, 5, 3))
        compiled.save(folder / "model.pt")
        return folder / "model.pt"

    return make


def onnx_file(folder: Path) -> Path:
    pytest.importorskip("onnx")
    layers = nn.Sequential(nn.GRU(3, H, 2, bidirectional=True)).eval()
    torch.onnx.export(layers, (torch.zeros(5, 2, 3),), folder / "model.onnx", dynamo=False)
    return folder / "model.onnx"


def keras_file(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        os.environ["KERAS_BACKEND"] = "torch"
        keras = pytest.importorskip("keras")
        layers = keras.layers
        stack = [layers.Bidirectional(layers.LSTM(H, return_sequences=True)), layers.GRU(H), layers.Dense(2)]
        model = keras.Sequential([layers.Input((5, 3)), *stack])
        (model.save_weights if "weights" in name else model.save)(str(folder / name))
        return folder / name

    return make


def with_weight(change: Callable[[nn.Module, str], nn.Module]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        model = net()
        change(model.rnn, "weight_hh_l0")
        torch.save(model.state_dict(), folder / "model.pt")
        return folder / "model.pt"

    return make


def weight_drop(folder: Path) -> Path:
    content = {name.replace("rnn.", "rnn.module."): tensor for name, tensor in state().items()}
    content["rnn.weight_hh_l0_raw"] = content["rnn.module.weight_hh_l0"].clone()
    torch.save(content, folder / "model.pt")
    return folder / "model.pt"


def one_storage(folder: Path) -> Path:
    """As on a GPU: all the weights of a layer are views of one storage."""
    flat = torch.cat([tensor.flatten() for tensor in state().values()])
    sizes = [tensor.numel() for tensor in state().values()]
    parts = flat.split(sizes)
    torch.save(
        {n: part.view(t.shape) for (n, t), part in zip(state().items(), parts, strict=True)}, folder / "model.pt"
    )
    return folder / "model.pt"


def layers(**modules: nn.Module) -> Callable[[Path], Path]:
    return saved(nn.ModuleDict(modules).state_dict())


KINDS: dict[str, Callable[[Path], Path]] = {
    "torch": saved(state()),
    "torch-legacy": saved(state(), _use_new_zipfile_serialization=False),
    "torch-module": saved(net()),
    "torch-module-legacy": saved(net(), _use_new_zipfile_serialization=False),
    "torch-module-nested": saved({"model": nn.DataParallel(net()), "epoch": 1}),
    "torchscript-script": script("script"),
    "torchscript-trace": script("trace"),
    "safetensors": tensors_file,
    "safetensors-sharded": sharded("safetensors"),
    "torch-sharded": sharded("bin"),
    "npz": arrays,
    "onnx": onnx_file,
    "keras": keras_file("model.keras"),
    "keras-h5": keras_file("model.h5"),
    "keras-weights": keras_file("model.weights.h5"),
    "lightning": saved({"state_dict": state("model."), "pytorch-lightning_version": "2.4", "optimizer_states": []}),
    **{f"nested-{key}": nested(key) for key in ("state_dict", "model", "model_state_dict", "net", "ema")},
    "wrapper-module": saved(state("module.")),
    "wrapper-orig-mod": saved(state("_orig_mod.")),
    "wrapper-fsdp": saved(state("_fsdp_wrapped_module.")),
    "wrapper-model": saved(state("model.")),
    "wrapper-three": saved(state("module._orig_mod.model.")),
    "weight-norm": with_weight(parametrizations.weight_norm),
    "weight-norm-old": with_weight(torch.nn.utils.weight_norm),
    "spectral-norm": with_weight(parametrizations.spectral_norm),
    "spectral-norm-old": with_weight(torch.nn.utils.spectral_norm),
    "pruning": with_weight(lambda module, name: prune.l1_unstructured(module, name, amount=0.3)),
    "weight-drop": weight_drop,
    "one-storage": one_storage,
    "half": saved({name: tensor.half() for name, tensor in state().items()}),
    "bfloat16": saved({name: tensor.bfloat16() for name, tensor in state().items()}),
    "bias-free": layers(a=nn.LSTM(3, H, bias=False), b=nn.GRU(3, H, 2, bias=False)),
    "projection": layers(a=nn.LSTM(3, H, 2, proj_size=2, bidirectional=True), b=nn.GRU(2, H)),
    "cells": layers(a=nn.LSTMCell(3, H), b=nn.GRUCell(3, H), c=nn.RNNCell(3, H, nonlinearity="relu")),
    "rnn": layers(a=nn.RNN(3, H, 2)),
}


def run(*arguments: object) -> dict:
    result = CliRunner().invoke(cli, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", list(KINDS))
def test_there_and_back(tmp_path: Path, kind: str) -> None:
    path = KINDS[kind](tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    dense = read(path)
    inspected = run("inspect", path)
    assert inspected["layers"] and inspected["format"] == dense.format
    kru = tmp_path / "out" / "a.kru.safetensors"
    kru.parent.mkdir()
    if kind == "projection":  # its recurrent matrices are 4x2
        run("convert", path, "--factors", "2*(2x2,2x1)", "--only", "a", "-o", kru)
    else:
        run("convert", path, "--factors", ALL_TERMS, "-o", kru)
    run("verify", kru)
    back = kru.with_name(path.name)
    run("export", kru, "--to", "dense", "-o", back, "--original", path)
    found = read(back)
    assert (found.format, found.key, found.prefix, dict(found.names)) == (
        dense.format,
        dense.key,
        dense.prefix,
        dict(dense.names),
    )
    assert list(found.tensors) == list(dense.tensors) and found.computed == dense.computed and found.ties == dense.ties
    for name, tensor in dense.tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        slack = {torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(tensor.dtype, 2e-6)
        torch.testing.assert_close(found.tensors[name], tensor, rtol=slack, atol=slack)
    assert all(file.read_bytes() == content for file, content in before.items())


def test_the_docs_name_every_kind() -> None:
    page = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
    named = set(re.findall(r"^\|.*\| `([\w-]+)` \|$", page, re.MULTILINE))
    assert set(KINDS) <= named
