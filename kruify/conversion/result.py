"""What a conversion says of itself: what every gate becomes, and how many parameters that saves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kruify.checkpoint import LazyTensor
from kruify.checkpoint.tensors import ties
from kruify.checkpoint.writing import as_lazy
from kruify.conversion.locate import AnyTensor, Located, RecurrentLayer
from kruify.conversion.plan import Plan, Structures, by_gate
from kruify.decomposition import Fit
from kruify.graphs import Comparison, NodeForm
from kruify.notebook import html_table

if TYPE_CHECKING:
    from kruify.conversion.budget import Slack
    from kruify.conversion.latency import LatencyPlan


@dataclass(frozen=True)
class GateResult:
    """What one gate of one matrix becomes, or all gates stacked.

    Attributes:
        name: full name of the matrix, such as "rnn.weight_hh_l0".
        layer: name of its layer.
        gate: "i", "f", ...; "all" for stacked gates.
        shape: (rows, columns) of the gate.
        factors: the spec (kruify.factors).
        terms: number of Kronecker products.
        parameters_before, parameters_after: real numbers.
        energy: 1 - ||W - K||^2 / ||W||^2; NaN in a dry run, as the next two.
        energy_null: the energy that an unstructured matrix of this size keeps.
        relative_error: ||W - K|| / ||W||.
        energy_weighted: 1 - E||(W - K) h||^2 / E||W h||^2; None without calibration.
    """

    name: str
    layer: str
    gate: str
    shape: tuple[int, int]
    factors: str
    terms: int
    parameters_before: int
    parameters_after: int
    energy: float = math.nan
    energy_null: float = math.nan
    relative_error: float = math.nan
    energy_weighted: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields by name; NaN is None."""
        return {name: None if value != value else value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class ParameterCounts:
    """Real numbers of the recurrent matrices W_hh and of the whole model, before and after; tied tensors count once."""

    recurrent_before: int
    recurrent_after: int
    total_before: int
    total_after: int

    @property
    def recurrent_ratio(self) -> float:
        """How many times smaller the recurrent matrices are."""
        return self.recurrent_before / max(1, self.recurrent_after)

    @property
    def total_ratio(self) -> float:
        """How many times smaller the model is."""
        return self.total_before / max(1, self.total_after)

    def to_json(self) -> dict[str, float]:
        """The fields and ratios by name."""
        names = [f"{part}_{key}" for part in ("recurrent", "total") for key in ("before", "after", "ratio")]
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class ByteCounts:
    """Bytes of the weights as their files hold them, indices and scales included; of a whole ONNX graph, of its files.

    Attributes:
        before: of the source's tensors, tied ones once.
        after: of the converted network's.
        beside: what else the source holds (optimizer state, a module's code, a header); 0 for a module.
        file: of the whole file of the converted network, header included; None but for a graph or under a budget of
            bytes.
        allowed: what that budget allows.
    """

    before: int
    after: int
    beside: int = 0
    file: int | None = None
    allowed: int | None = None

    @property
    def ratio(self) -> float:
        """How many times smaller the weights are."""
        return self.before / max(1, self.after)

    def to_json(self) -> dict[str, float]:
        """The fields and the ratio by name."""
        return {n: v for n, v in asdict(self).items() if v is not None} | {"ratio": self.ratio}


@dataclass(frozen=True)
class Conversion:
    """What a conversion made.

    Attributes:
        plan: the factors of every converted matrix.
        matrices: one entry per gate.
        parameters: counts before and after.
        bytes: of the weights, before and after; None where no tensors were given.
        tensors: the state dict of the converted model, in the numbers that its file keeps; empty in a dry run.
        storage: weights that are stored in fewer bits -> dtype.
        output: the file that was written, if one was.
        latency: what was timed under a budget of time.
        slack: what the limits of a budget of matrices allow, and how much of it is taken.
        notes: sentences on what the source had and the converted model has not.
        graph: of a whole ONNX graph that was written, how it compares with the original in onnxruntime.
        forms: of its recurrent nodes with factors, where a form was asked for.
    """

    plan: Plan
    matrices: list[GateResult]
    parameters: ParameterCounts
    tensors: dict[str, AnyTensor] = field(default_factory=dict, repr=False)
    output: Path | None = None
    bytes: ByteCounts | None = None
    storage: dict[str, str] = field(default_factory=dict)
    latency: LatencyPlan | None = None
    slack: list[Slack] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    graph: Comparison | None = None
    forms: list[NodeForm] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The object that `kruify convert --json` prints."""
        return {
            "output": None if self.output is None else str(self.output),
            "matrices": [gate.to_json() for gate in self.matrices],
            "parameters": self.parameters.to_json(),
            "bytes": None if self.bytes is None else self.bytes.to_json(),
            **({} if self.latency is None else {"latency": self.latency.to_json()}),
            "budget": [asdict(slack) for slack in self.slack],
            "notes": self.notes,
            **({} if self.graph is None else {"graph": self.graph.to_json()}),
            **({"forms": [asdict(form) for form in self.forms]} if self.forms else {}),
        }

    def _repr_html_(self) -> str:
        """What a notebook shows: a row a gate, then the sums."""
        rows = [
            (
                *(gate.name, gate.gate, "x".join(map(str, gate.shape)), gate.factors),
                *(f"{gate.parameters_before:,}", f"{gate.parameters_after:,}"),
                "" if math.isnan(gate.energy) else f"{gate.energy:.3f}",
            )
            for gate in self.matrices
        ]
        p, size = self.parameters, self.bytes
        sums = [
            f"{what}: {before:,} → {after:,} {unit}, {before / max(1, after):.1f} times smaller"
            for what, before, after, unit in (
                ("Recurrent matrices", p.recurrent_before, p.recurrent_after, "parameters"),
                ("Whole model", p.total_before, p.total_after, "parameters"),
                *([] if size is None else [("Weights", size.before, size.after, "bytes")]),
            )
        ]
        columns = ("matrix", "gate", "size", "factors", "parameters", "now", "energy kept")
        return html_table(columns, rows, *sums, *self.notes)


def expected(tensors: Mapping[str, AnyTensor], plan: Plan, located: Located) -> Conversion:
    """The conversion of `tensors` by `plan` as far as it can be told without decomposing anything (a dry run)."""
    matrices = [gate for layer, weight, s in plan.matrices() for gate in gates_of(layer, weight, s)]
    return summed_up(tensors, plan, matrices, located)


def summed_up(tensors: Mapping[str, AnyTensor], plan: Plan, matrices: list[GateResult], located: Located) -> Conversion:
    """The conversion of the dense `tensors` to `matrices`, without its own tensors."""
    notes = _parted(ties(as_lazy(tensors)), matrices)
    return Conversion(plan, matrices, count_parameters(tensors, matrices, located), notes=notes)


def _parted(tied: Mapping[str, str], matrices: list[GateResult]) -> list[str]:
    """What is said of names of one tensor that become different things."""
    becomes = _factors(matrices)
    parted = [f"{first} and {name}" for name, first in tied.items() if becomes.get(name) != becomes.get(first)]
    more = f" (and {len(parted) - 1} more like them)" if len(parted) > 1 else ""
    return [f"{parted[0]} are one tensor and become two{more}: convert them alike to keep one"] if parted else []


def _factors(matrices: list[GateResult]) -> dict[str, list[str]]:
    """Name of a matrix -> the specs of its gates."""
    found: dict[str, list[str]] = {}
    for gate in matrices:
        found.setdefault(gate.name, []).append(gate.factors)
    return found


def count_parameters(tensors: Mapping[str, AnyTensor], matrices: list[GateResult], located: Located) -> ParameterCounts:
    """The counts of the dense `tensors` and of what `matrices` makes of them. Of tied matrices that become the same
    factors one is counted."""
    recurrent = {layer.full_name("weight_hh" + suffix) for layer in located.layers for suffix in layer.suffixes}
    tied, factors = ties(as_lazy(tensors)), _factors(matrices)
    numbers: dict[str, int] = {}
    for gate in matrices:
        numbers[gate.name] = numbers.get(gate.name, 0) + gate.parameters_after
    before, after = {True: 0, False: 0}, {True: 0, False: 0}  # recurrent matrices, all others
    counted = set()
    for name, tensor in tensors.items():
        count, what = _reals(tensor), (tied.get(name, name), tuple(factors.get(name, ())))
        before[name in recurrent] += 0 if name in tied else count
        after[name in recurrent] += 0 if what in counted else numbers.get(name, count)
        counted.add(what)
    return ParameterCounts(before[True], after[True], sum(before.values()), sum(after.values()))


def gates_of(
    layer: RecurrentLayer, weight: str, structures: Structures, fits: list[Fit] | None = None
) -> list[GateResult]:
    """What the structures make of the gates of one matrix; with `fits`, one each, also how well."""
    found = []
    for number, (gate, s) in enumerate(by_gate(layer, structures).items()):
        known: dict[str, Any] = {}
        if fits is not None:
            f = fits[number]
            known = {"energy": f.energy, "energy_null": f.energy_null, "relative_error": f.relative_error}
            known["energy_weighted"] = None if math.isnan(f.energy_weighted) else f.energy_weighted
        found.append(
            GateResult(
                name=layer.full_name(weight),
                layer=layer.name,
                gate=gate,
                shape=(s.rows, s.cols),
                factors=str(s),
                terms=sum(term.rank for term in s.terms),
                parameters_before=s.dense_parameters,
                parameters_after=s.parameters,
                **known,
            )
        )
    return found


def _reals(tensor: AnyTensor) -> int:
    return (tensor if isinstance(tensor, LazyTensor) else LazyTensor.of(tensor)).reals
