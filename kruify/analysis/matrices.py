"""The recurrent matrices of a checkpoint, per gate: their structure and how they treat the state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kruify.analysis.conditioning import conditioning
from kruify.analysis.layers import Layers
from kruify.factors import Structure
from kruify.layers.matrix import exact


@dataclass(frozen=True)
class MatrixHealth:
    """How one gate's recurrent matrix treats the state that it is multiplied with at every step.

    Attributes:
        condition_number: largest over smallest singular value (infinite for a singular matrix).
        spectral_norm: largest singular value.
        unitarity_defect: ||W^H W - I||_F / sqrt(N), 0 for an orthogonal or unitary matrix.
        factors: the structure as a spec, "dense" for a dense matrix.
        parameters: trainable numbers of this gate; of stacked gates an equal share.
        dense_parameters: rows times columns.
        singular_values: descending; at most 64 of them, evenly spread over all.
        energy: 1 - ||W - K||^2 / ||W||^2 against the same gate of the first model of a report, as both stand in their
            files: after fine-tuning it shows how far the network has moved. None for the first model.
        energy_null: what the same structure keeps of a matrix without any structure. None for a dense matrix.
    """

    name: str
    gate: str
    condition_number: float
    spectral_norm: float
    unitarity_defect: float
    factors: str = "dense"
    parameters: int = 0
    dense_parameters: int = 0
    singular_values: tuple[float, ...] = ()
    energy: float | None = None
    energy_null: float | None = None


def matrix_health(layers: Layers) -> list[MatrixHealth]:
    """The health of every gate of every recurrent matrix, in float64."""
    return [_health(*found) for found in gate_matrices(layers)]


def gate_matrices(layers: Layers) -> Iterator[tuple[str, str, Tensor, Structure | None]]:
    """(name of the recurrent matrix, gate, the dense (rows, cols) it stands for, its structure if factored).

    Stacked gates all come with the structure of the stack. In float64, complex128 for a complex matrix.
    """
    for (layer, matrices), module in zip(layers.items, layers.modules(), strict=True):
        for suffix in layer.suffixes:
            weight = getattr(module, f"weight_hh{suffix}")
            dense = exact(weight)
            structures: Sequence[Structure | None] = matrices.get(f"weight_hh{suffix}") or (None,)
            structures = [s for s in structures for _ in range(len(layer.gates) // len(structures))]
            for gate, matrix, structure in zip(
                layer.gates, torch.split(dense, layer.hidden_size), structures, strict=True
            ):
                yield layer.full_name(f"weight_hh{suffix}"), gate, matrix.detach(), structure


def _health(name: str, gate: str, matrix: Tensor, structure: Structure | None) -> MatrixHealth:
    measured = vars(conditioning(matrix))
    reals = 2 if matrix.is_complex() else 1
    return MatrixHealth(
        name=name,
        gate=gate,
        factors="dense" if structure is None else str(structure),
        parameters=reals * (matrix.numel() if structure is None else structure.parameters // structure.gates),
        dense_parameters=reals * matrix.numel(),
        **measured | {"singular_values": _sample(measured["singular_values"])},
    )


def _sample(values: Sequence[float], most: int = 64) -> tuple[float, ...]:
    """At most `most` of the values, the first and the last among them."""
    if len(values) <= most:
        return tuple(values)
    return tuple(values[round(i * (len(values) - 1) / (most - 1))] for i in range(most))
