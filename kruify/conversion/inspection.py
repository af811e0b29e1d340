"""What is inside a module or a file: recurrent layers, what was passed over and why, the plan of a converted one."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from kruify.checkpoint import Checkpoint, LazyTensor, read
from kruify.conversion.build import plan_of
from kruify.conversion.check import dense_layers, stored_plan
from kruify.conversion.locate import RecurrentLayer, Skipped, locate
from kruify.conversion.plan import LayerPlan, Plan, by_gate


@dataclass(frozen=True)
class FileFacts:
    """A file beside its layers.

    Attributes:
        sha256: of its bytes.
        bytes: its size.
        key: the nested entry that holds the state dict, None where it is the whole file.
        prefix: what all names began with ("module."); it is put back in what is written.
        ties: second name of a tensor -> first name.
        computed: tensors that were computed from a parametrisation.
        globals: code that its pickle names; none of it was run.
        nonfinite: tensor -> number of its entries that are NaN or infinite.
        assumed: layer -> what the file does not say of it and was taken for granted.
        storage: weight that is stored in fewer bits -> dtype.
    """

    sha256: str
    bytes: int
    key: str | None
    prefix: str
    ties: dict[str, str]
    computed: list[str]
    globals: list[str]
    nonfinite: dict[str, int]
    assumed: dict[str, str]
    storage: dict[str, str]


@dataclass(frozen=True)
class LayerSummary:
    """One recurrent layer, dense or converted.

    Attributes:
        recurrent_parameters, input_parameters: real numbers in W_hh and W_ih of all its directions and layers.
        factors: weight -> gate -> spec; empty for a dense layer.
    """

    layer: RecurrentLayer
    recurrent_parameters: int
    input_parameters: int
    factors: dict[str, dict[str, str]]

    def to_json(self) -> dict[str, Any]:
        """All fields, those of the layer beside the others."""
        return {**asdict(self.layer), **{name: value for name, value in vars(self).items() if name != "layer"}}


@dataclass(frozen=True)
class Inspection:
    """What is inside a model.

    Attributes:
        layers: dense recurrent layers, which can be converted.
        skipped: what looks recurrent and cannot be converted, with the reason.
        parameters: real numbers of the whole model; tied tensors count once.
        format: "module", or the format of the file.
        plan: of a converted model; None for a dense one.
        file: None for a module.
    """

    layers: list[RecurrentLayer]
    skipped: list[Skipped]
    parameters: int
    format: str
    plan: Plan | None = None
    file: FileFacts | None = None

    @property
    def summaries(self) -> list[LayerSummary]:
        """All recurrent layers with their sizes, the dense ones first."""
        dense = [LayerSummary(layer, layer.recurrent_parameters, layer.input_parameters, {}) for layer in self.layers]
        return dense + [_summary(item) for item in (self.plan.layers if self.plan else [])]

    @property
    def beside(self) -> list[dict[str, Any]]:
        """Factored linear layers and embeddings: name, kind, sizes of the weight, its spec."""
        return [
            {"name": layer.name, "kind": layer.kind, "rows": s.rows, "columns": s.cols, "factors": str(s)}
            for item in (self.plan.beside if self.plan else [])
            for layer, (s,) in [(item.layer, item.matrices["weight"])]
        ]

    def to_json(self) -> dict[str, Any]:
        """The object that `kruify inspect --json` prints."""
        return {
            "layers": [summary.to_json() for summary in self.summaries],
            "beside": self.beside,
            "skipped": [item._asdict() for item in self.skipped],
            "parameters": self.parameters,
            "format": self.format,
            **(asdict(self.file) if self.file else {}),
        }


def _summary(item: LayerPlan) -> LayerSummary:
    layer, counts = item.layer, {"weight_hh": 0, "weight_ih": 0}
    for weight in (f"{stem}{suffix}" for suffix in layer.suffixes for stem in counts):
        rows, cols = layer.shape(weight)
        structures = item.matrices.get(weight)
        size = sum(s.parameters for s in structures) if structures else len(layer.gates) * rows * cols
        counts[weight[:9]] += layer.reals * size
    factors = {
        weight: {gate: str(s) for gate, s in by_gate(layer, structures).items()}
        for weight, structures in item.matrices.items()
    }
    return LayerSummary(layer, counts["weight_hh"], counts["weight_ih"], factors)


def inspect(source: nn.Module | Checkpoint | str | os.PathLike[str], key: str | None = None) -> Inspection:
    """Looks into a module or a checkpoint without changing or running it.

    Args:
        key: the nested entry that holds the state dict, where a file has several.

    Raises:
        UsageError, UnsafeError, CorruptError, UnsupportedError: the file cannot be read; the text says why.
    """
    if isinstance(source, nn.Module):
        located, plan = locate(source), plan_of(source)
        parameters = sum(LazyTensor.of(p).reals for p in source.parameters())
        return Inspection(located.layers, located.skipped, parameters, "module", plan if plan.layers else None)
    checkpoint = source if isinstance(source, Checkpoint) else read(source, key=key)
    stored = stored_plan(checkpoint) if checkpoint.is_kruify else None
    located = dense_layers(checkpoint, stored or Plan())
    return Inspection(
        located.layers,
        located.skipped,
        sum(t.reals for name, t in checkpoint.tensors.lazy.items() if name not in checkpoint.ties),
        checkpoint.format,
        stored,
        FileFacts(
            checkpoint.sha256,
            checkpoint.size,
            checkpoint.key,
            checkpoint.prefix,
            dict(checkpoint.ties),
            list(checkpoint.computed),
            sorted(checkpoint.globals),
            checkpoint.nonfinite(),
            dict(checkpoint.assumed),
            dict(checkpoint.storage),
        ),
    )
