"""Milliseconds per time step of the recurrent layers of the networks by bytes, those of one task in turns.

Latency needs the structure alone, so networks trained on another machine can be measured here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from grid import METHODS, TASKS, Run
from measurements import Row
from timing import best_times
from torch import nn
from train import build

from kruify import quantize
from kruify.analysis.contender import dynamic_int8, onnxruntime_int8
from kruify.analysis.layers import layers_of
from kruify.checkpoint import read
from kruify.conversion import swap
from kruify.conversion.plan import Plan
from kruify.errors import UnsupportedError
from kruify.tasks.loader import load_task
from kruify.training.recurrent import recurrent_layers

BATCHES = (1, 32)
STEPS, SECONDS = 32, 0.15  # steps of a call, seconds spent on each layer and batch size
OWN, ONNXRUNTIME = "latency_ms_per_step", "onnxruntime_ms_per_step"  # the second in `int8` of a dense row alone
ROUNDED = "rounded"  # the network in kruify's int8, as it is


def measure(rows: Sequence[Row]) -> None:
    """Puts `latency_ms_per_step`, batch size -> milliseconds, into the rows of one task, and into what a dense one says
    of its int8 forms: torch's, ONNX Runtime's beside it, and kruify's."""
    contenders: dict[tuple[str, str], list[nn.Module]] = {}
    inputs: dict[str, list[tuple[int, bool]]] = {}  # features of each layer, which a smaller network has fewer of
    for row in rows:
        model = structure(row)
        contenders[row["run"], ""] = layers = list(recurrent_layers(model).values())
        inputs[row["run"]] = [(layer.input_size, layer.batch_first) for layer in layers]
        if "int8" in row:
            contenders |= {(row["run"], key): found for key, found in int8_layers(model).items()}
        if "rounded" in row:
            contenders[row["run"], ROUNDED] = list(recurrent_layers(quantize(model, "int8")).values())
    found: dict[tuple[str, str], dict[str, float]] = {key: {} for key in contenders}
    for batch in BATCHES:
        for place in range(len(next(iter(inputs.values())))):
            runs = {}
            for (run, form), layers in contenders.items():
                features, batch_first = inputs[run][place]
                x = torch.randn((batch, STEPS, features) if batch_first else (STEPS, batch, features))
                runs[run, form] = partial(layers[place].eval(), x)
            with torch.inference_mode():
                best = best_times(runs, SECONDS * len(runs))
            for key, milliseconds in best.items():
                found[key][str(batch)] = found[key].get(str(batch), 0.0) + milliseconds / STEPS
    for row in rows:
        int8 = row.get("int8")
        for contender, form, key in (
            ("", row, OWN),
            (OWN, int8, OWN),
            (ONNXRUNTIME, int8, ONNXRUNTIME),
            (ROUNDED, row.get("rounded"), OWN),
        ):
            if milliseconds := found.get((row["run"], contender)):
                form[key] = {batch: round(ms, 4) for batch, ms in milliseconds.items()}


def structure(row: Row) -> nn.Module:
    """A network of the row's structure, its weights arbitrary."""
    run = Run(row["task"], row["method"], row["times"], row["seed"], whole=row["whole"])
    task, dtype = load_task(TASKS[run.task].name), row.get("dtype", METHODS[run.method].dtype)
    if "plan" not in row:
        return build(run, task, task.model())[0]
    model = swap(task.model(), Plan.from_json(row["plan"]))
    return quantize(model, dtype) if dtype else model


def int8_layers(dense: nn.Module) -> dict[str, list[nn.Module]]:
    """`OWN` and `ONNXRUNTIME` -> the recurrent layers as torch and that quantise them. Both leave plain RNNs alone, the
    latter GRUs, too."""
    try:
        found = {OWN: [dynamic_int8(layer) for layer in recurrent_layers(dense).values()]}
    except UnsupportedError:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        torch.save(dense.state_dict(), Path(folder) / "dense.pt")
        try:
            layers = onnxruntime_int8(layers_of(read(Path(folder) / "dense.pt"))).layers
        except UnsupportedError:
            return found
    return {**found, ONNXRUNTIME: layers.modules()}
