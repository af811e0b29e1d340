"""What a report says beside the comparison: energies against the dense matrices, peak memory, how a file was made."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from kruify.analysis.latency import BATCHES, runner
from kruify.analysis.layers import Layers
from kruify.analysis.matrices import MatrixHealth, gate_matrices
from kruify.checkpoint import Checkpoint
from kruify.conversion.locate import RecurrentLayer
from kruify.decomposition import null_energy

METADATA_LABELS = {  # metadata key -> label in a report
    "kruify.version": "kruify",
    "kruify.torch": "torch",
    "kruify.seed": "seed",
    "kruify.schema": "file schema",
    "kruify.recipe": "fine-tuning",
}


def with_energies(health: Sequence[MatrixHealth], layers: Layers, first: Layers) -> list[MatrixHealth]:
    """`health` of a model's gates with their energy against the first model's, and the null level of the structure."""
    if layers is first:
        return list(health)
    dense = {(name, gate): matrix for name, gate, matrix, _ in gate_matrices(first)}
    results = []
    for entry, (name, gate, matrix, structure) in zip(health, gate_matrices(layers), strict=True):
        original = dense.get((name, gate))
        if original is not None and original.shape == matrix.shape and structure is not None:
            norm = float(original.abs().square().sum())
            energy = 1 - float((original - matrix).abs().square().sum()) / norm if norm else 1.0
            entry = replace(entry, energy=energy, energy_null=null_energy(structure))
        results.append(entry)
    return results


def agreeing(layers: Sequence[Layers]) -> list[Layers]:
    """Fills in what one file says of a layer and another does not (batch_first, nonlinearity), so that all of them
    are measured in the same layout: a state dict says less than a fine-tuned file."""
    known: dict[tuple[str, str], Any] = {}
    for layer in (layer for model in layers for layer, _ in model.items):
        for name, value in vars(layer).items():
            if value is not None:
                known.setdefault((layer.name, name), value)

    def filled(layer: RecurrentLayer) -> RecurrentLayer:
        told: dict[str, Any] = {n: known.get((layer.name, n)) for n, value in vars(layer).items() if value is None}
        return replace(layer, **told)

    return [replace(model, items=[(filled(layer), found) for layer, found in model.items]) for model in layers]


def peak_memory(layers: Layers, steps: int) -> dict[int, int]:
    """Batch size -> bytes: the most that one run of the recurrent layers allocates in torch at any moment."""
    peaks = {}
    for batch in BATCHES:
        run = runner(layers, layers.modules(), batch, steps)
        with torch.inference_mode():
            run()  # what is made once stays out
            with (
                _silent(),
                profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler,
            ):
                run()
        now = most = 0
        for event in _memory_events(profiler):
            now += event
            most = max(most, now)
        peaks[batch] = most
    return peaks


@contextmanager
def _silent() -> Iterator[None]:
    """The profiler's library writes lines to the standard error stream of the process, past Python."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def _memory_events(profiler: Any) -> list[int]:
    """Bytes allocated (positive) and freed (negative), in order of time."""
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]


def history(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """The validations of the fine-tuning, as the file records them; empty if it has none or they are unreadable."""
    entries = _list(checkpoint, "kruify.history")
    return [e for e in entries if isinstance(e, dict) and isinstance(e.get("metrics"), dict)]


def sources(checkpoint: Checkpoint) -> list[str]:
    """sha256 of the files that this one was made from, the first one first."""
    source = checkpoint.metadata.get("kruify.source_sha256")
    return [str(item) for item in _list(checkpoint, "kruify.parents")] or ([source] if source else [])


def _list(checkpoint: Checkpoint, key: str) -> list[Any]:
    try:
        found = json.loads(checkpoint.metadata.get(key, "[]"))
    except ValueError:
        return []
    return found if isinstance(found, list) else []


def provenance(checkpoint: Checkpoint) -> dict[str, str]:
    """Versions, seed and recipe, as the file records them; strings of a file are shown, never trusted."""
    return {
        label: checkpoint.metadata[key][:2000] for key, label in METADATA_LABELS.items() if key in checkpoint.metadata
    }
