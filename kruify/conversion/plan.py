"""The plan: pure data that says for every matrix which factors it becomes.

A dry run prints it, a person can edit its JSON, the converted file carries it, and loading rebuilds the layers from it.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path

from kruify.checkpoint import limits
from kruify.checkpoint.file_bytes import parse_json, to_text
from kruify.conversion.locate import BESIDE, DTYPES, KINDS, RecurrentLayer
from kruify.errors import CorruptError, FactorSpecError, PlanError, UnsafeError, UnsupportedError, UsageError
from kruify.factors import Structure, parse, stacks

SCHEMA = 4  # compact, or with layers beside the recurrent ones; else 3, without stacked gates 1; 2 is no longer read
BOUNDS = {
    "input_size": (1, 1 << 24),
    "hidden_size": (1, 1 << 24),
    "num_layers": (1, 1024),
    "proj_size": (0, 1 << 24),
}
"""The least and the most that the sizes of a layer may be."""
HOW = "Write one with 'kruify convert --plan-out'"
ALL = "all"  # the name of all gates of a matrix, stacked where the spec says so
DEFAULTS = {"cell": False} | {f.name: f.default for f in fields(RecurrentLayer) if f.default is not MISSING}
"""What a layer is where a plan does not say it."""
Structures = tuple[Structure, ...]  # one per gate, or one of all gates stacked


@dataclass(frozen=True)
class LayerPlan:
    """One layer and the matrices of it that become Kronecker sums; matrices that are not named stay dense.

    Attributes:
        matrices: weight name within the layer, such as "weight_hh_l0" -> one structure a gate, or one of all gates
            stacked.
    """

    layer: RecurrentLayer
    matrices: dict[str, Structures]


@dataclass(frozen=True)
class Plan:
    """Recurrent layers, and linear layers and embeddings beside them."""

    layers: list[LayerPlan] = field(default_factory=list)
    beside: list[LayerPlan] = field(default_factory=list)

    @property
    def items(self) -> list[LayerPlan]:
        """Layers of all kinds."""
        return [*self.layers, *self.beside]

    def structures(self) -> dict[str, Structures]:
        """Full name of every matrix -> its structures."""
        return {layer.full_name(weight): structures for layer, weight, structures in self.matrices()}

    def matrices(self) -> Iterator[tuple[RecurrentLayer, str, Structures]]:
        """(layer, weight name within it, its structures), in order."""
        for item in self.items:
            for weight, structures in item.matrices.items():
                yield item.layer, weight, structures

    def renamed(self, name: Callable[[str], str]) -> Plan:
        """The plan for the same layers where they have other names."""
        return plan_from([replace(item, layer=replace(item.layer, name=name(item.layer.name))) for item in self.items])

    def to_json(self, indent: int | None = None) -> str:
        layers = [
            {
                **asdict(item.layer),
                "matrices": {
                    weight: {
                        "scale": structures[0].scaled,
                        "gates": {gate: str(s) for gate, s in by_gate(item.layer, structures).items()},
                    }
                    for weight, structures in item.matrices.items()
                },
            }
            for item in self.items
        ]
        stacked = any(s.gates > 1 for _, _, structures in self.matrices() for s in structures)
        return json.dumps({"schema": 4 if self.beside else 3 if stacked else 1, "layers": layers}, indent=indent)

    def to_compact_json(self) -> str:
        """The form for the header of a file: no field that has its default, and where all gates have one spec, this
        spec in place of theirs."""
        data = json.loads(self.to_json())
        for layer in data["layers"]:
            for name, default in DEFAULTS.items():
                if layer[name] == default:
                    del layer[name]
            for weight, entry in layer["matrices"].items():
                specs = {*entry["gates"].values()}
                gates = {ALL: specs.pop()} if len(specs) == 1 else entry["gates"]
                scaled = {"scale": True} if entry["scale"] else {}
                layer["matrices"][weight] = gates[ALL] if ALL in gates and not scaled else {**scaled, "gates": gates}
        return to_text({**data, "schema": SCHEMA})

    @staticmethod
    def from_json(text: str, where: str = "plan") -> Plan:
        """Reads what `to_json` or `to_compact_json` wrote, or a person edited.

        Raises:
            PlanError: not JSON, a key missing, unknown or twice, a size out of bounds, a layer twice, a spec that does
                not fit.
            UnsupportedError: a schema newer than this kruify, or relabelled hidden units.
        """
        try:
            data = parse_json(text, "it", where)
        except (CorruptError, UnsafeError) as error:
            raise PlanError(f"not valid JSON ({error.what})", where, HOW) from None
        if not isinstance(data, dict) or not isinstance(data.get("layers"), list):
            raise PlanError("a plan is an object with 'schema' and 'layers'", where)
        schema = data.get("schema")
        if not isinstance(schema, int) or schema < 1:
            raise PlanError("'schema' must be a whole number from 1 on", where)
        if schema > SCHEMA:
            raise UnsupportedError(f"plan schema {schema} is newer than this kruify ({SCHEMA})", where, "Update kruify")
        if schema == 2:
            raise _relabelled(where)
        layers = [_read_layer(item, where) for item in data["layers"]]
        if len({item.layer.name for item in layers}) < len(layers):
            raise PlanError("it has a layer twice", where)
        return plan_from(layers)

    @staticmethod
    def read(file: str | os.PathLike[str]) -> Plan:
        """`from_json` of a file.

        Raises:
            UsageError: it is no text file, or not to be read.
        """
        path = Path(file)
        try:
            if path.exists() and not path.is_file():  # a pipe or a device may never end
                raise UsageError("it is not a regular file", file, "Name the JSON file of a plan")
            if path.stat().st_size > limits.JSON:
                raise UsageError(f"a plan of more than {limits.JSON} bytes is none", file, HOW)
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UsageError(f"the plan cannot be read ({error})", file) from None
        return Plan.from_json(text, str(file))


def plan_from(items: Sequence[LayerPlan]) -> Plan:
    """The plan of layers of all kinds."""
    beside = [item for item in items if item.layer.kind in BESIDE]
    return Plan([item for item in items if item.layer.kind not in BESIDE], beside)


def keeps_scales(layer: RecurrentLayer) -> bool:
    """Whether each product keeps a scale beside its factors: a plain RNN carries its state through W alone, and with
    the scale apart the factors can stay near unitary."""
    return layer.kind == "rnn"


def by_gate(layer: RecurrentLayer, structures: Structures) -> dict[str, Structure]:
    """Structures by the names of their gates, one of stacked gates by `ALL`."""
    names = (ALL,) if structures[0].gates > 1 else layer.gates
    return dict(zip(names, structures, strict=True))


def _read_layer(data: object, where: str) -> LayerPlan:
    if not isinstance(data, dict) or not isinstance(data.get("matrices"), dict):
        raise PlanError("each layer is an object with 'name', its sizes and 'matrices'", where)
    values = {key: value for key, value in data.items() if key != "matrices"}
    known = {f.name: f for f in fields(RecurrentLayer)}
    if unknown := set(values) - set(known):
        raise PlanError(f"unknown key '{min(unknown)}' in layer '{values.get('name')}'", where)
    for key, value in values.items():
        wanted = str(known[key].type)
        if not _is_of(value, wanted):
            raise PlanError(f"'{key}' of layer '{values.get('name')}' must be {wanted}, got {value!r}", where)
    values = {**DEFAULTS, **values}
    if missing := [key for key in known if key not in values]:
        raise PlanError(f"layer '{values.get('name')}' has no '{missing[0]}'", where)
    layer = RecurrentLayer(**values)
    if layer.kind not in KINDS:
        raise PlanError(f"layer '{layer.name[:80]}' is of an unknown kind, '{layer.kind[:40]}'", where)
    gates = layer.gates
    for key, (least, most) in BOUNDS.items():
        if not least <= getattr(layer, key) <= most:
            raise PlanError(f"'{key}' of layer '{layer.name}' must be from {least} to {most}", where)
    if layer.dtype not in DTYPES:
        raise PlanError(f"layer '{layer.name[:80]}' has an unknown dtype, '{layer.dtype[:40]}'", where)
    matrices = {}
    for weight, entry in data["matrices"].items():
        if weight not in layer.weights:
            raise PlanError(f"layer '{layer.name}' has no matrix '{weight}'{_nearest(weight, layer.weights)}", where)
        entry = {"gates": {ALL: entry}} if isinstance(entry, str) else entry
        specs = entry.get("gates") if isinstance(entry, dict) else None
        if (
            not isinstance(specs, dict)
            or set(specs) not in ({ALL}, set(gates))
            or not all(isinstance(s, str) for s in specs.values())
        ):
            raise PlanError(
                f"'{layer.full_name(weight)}' needs one spec for each gate, {', '.join(gates)}, or one for '{ALL}'",
                where,
            )
        scaled = bool(entry.get("scale", False))
        matrices[weight] = _resolve([specs[ALL if ALL in specs else g] for g in gates], layer, weight, scaled)
        if "units" in entry:
            raise _relabelled(where)
    if layer.kind in BESIDE and not matrices:
        raise PlanError(f"layer '{layer.name}' needs the factors of its weight; left out it stays dense", where)
    return LayerPlan(layer, matrices)


def _relabelled(where: str) -> UnsupportedError:
    """What earlier versions wrote for `convert --relabel`: schema 2, or "units" beside stacked gates in schema 3."""
    return UnsupportedError(
        "its hidden units are relabelled, which kruify no longer reads", where, "Convert the source again"
    )


def _is_of(value: object, annotation: str) -> bool:
    """Whether a JSON value fits the annotation of a `RecurrentLayer` field, such as "int" or "float | None"."""
    if value is None:
        return annotation.endswith("None")
    kind = annotation.removesuffix(" | None")
    if kind == "float":
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value).__name__ == kind


def make_plan(
    layers: Sequence[RecurrentLayer],
    factors: str = "auto",
    input_factors: str | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    overrides: Mapping[str, str] | None = None,
    chosen: Mapping[str, Sequence[Structure | str]] | None = None,
) -> Plan:
    """A plan from specs and patterns.

    A matrix is named `layer.weight_hh_l0`, one gate of it `layer.weight_hh_l0.r`; a pattern may also name the layer.
    The most exact name wins: gate or matrix or layer written out, then glob, then the default.

    Args:
        factors: spec of every recurrent matrix.
        input_factors: spec of every input matrix; None leaves them dense.
        only: globs; other layers and matrices stay dense.
        skip: globs; these stay dense.
        overrides: pattern -> spec; the spec "dense" leaves a matrix as it is. Input matrices are touched only by
            patterns that say weight_ih.
        chosen: full weight name -> structures or specs, one a gate or one for all, that stand in for the default there
            (a planner's choice).

    Raises:
        PlanError: a pattern matches nothing.
        FactorSpecError: a spec does not fit; the matrix is named.
    """
    overrides = dict(overrides or {})
    _check_patterns(layers, [*only, *skip, *overrides])
    plans = []
    for layer in layers:
        matrices: dict[str, Structures] = {}
        for weight in layer.weights:
            names = _names(layer, weight)
            default = factors if weight.startswith("weight_hh") else input_factors
            if (only and not _any_match(names, only)) or _any_match(names, skip):
                default = None
            given = (chosen or {}).get(layer.full_name(weight)) if default else None
            defaults = [str(s) for s in given] if given else [default]
            defaults *= len(layer.gates) // len(defaults)
            own = _overrides_of(layer, weight, overrides)
            specs = [spec or default for spec, default in zip(own, defaults, strict=True)]
            if all(spec in (None, "dense") for spec in specs):
                continue
            written = [_gate_spec(spec, layer, weight) for spec in specs]
            matrices[weight] = _resolve(written, layer, weight, keeps_scales(layer))
        if matrices:
            plans.append(LayerPlan(layer, matrices))
    return plan_from(plans)


def divided(layers: Sequence[RecurrentLayer], overrides: Mapping[str, str] | None) -> set[str]:
    """Full names of the matrices whose gates the overrides treat differently: they cannot be stacked."""
    return {
        layer.full_name(weight)
        for layer in layers
        for weight in layer.weights
        if len({*_overrides_of(layer, weight, overrides or {})}) > 1
    }


def _overrides_of(layer: RecurrentLayer, weight: str, overrides: Mapping[str, str]) -> list[str | None]:
    """One spec a gate, None where nothing is said."""
    meant = {p: s for p, s in overrides.items() if _means(p, layer, weight)}
    return [_override(_names(layer, weight), gate, meant) for gate in layer.gates]


def _means(pattern: str, layer: RecurrentLayer, weight: str) -> bool:
    """A pattern for a layer means its recurrent matrices; others must be named, as in '*weight_ih*' or 'fc.weight'."""
    if layer.kind in BESIDE:
        return pattern == layer.name or pattern.endswith("weight")
    return weight.startswith("weight_hh") or "weight_ih" in pattern


def _gate_spec(spec: str | None, layer: RecurrentLayer, weight: str) -> str:
    if spec is None or spec == "dense":  # one dense gate among Kronecker ones is a single full-size factor
        rows, cols = layer.shape(weight)
        return f"{rows}x{cols}"
    return spec


def _resolve(specs: Sequence[str], layer: RecurrentLayer, weight: str, scaled: bool) -> Structures:
    """One spec per gate -> structures. A plain RNN's one gate is stacked already."""
    (rows, cols), count = layer.shape(weight), len(layer.gates)
    if count == 1 or not any(map(stacks, specs)):
        return tuple(
            _resolve_one(spec, rows, cols, 1, f"{layer.full_name(weight)} gate {gate}", scaled)
            for gate, spec in zip(layer.gates, specs, strict=True)
        )
    if len(set(specs)) > 1:
        hint = "Give all of them the same spec"
        raise FactorSpecError("gates are stacked all together or not at all", layer.full_name(weight), hint)
    return (_resolve_one(specs[0], count * rows, cols, count, f"{layer.full_name(weight)} stacked gates", scaled),)


def _resolve_one(spec: str, rows: int, cols: int, gates: int, where: str, scaled: bool) -> Structure:
    try:
        structure = parse(spec).resolve(rows, cols, gates)
    except FactorSpecError as error:
        raise FactorSpecError(error.what, f"{where} ({rows}x{cols})", error.hint) from None
    return replace(structure, scaled=scaled)


def _names(layer: RecurrentLayer, weight: str) -> list[str]:
    """What a pattern may match to mean this matrix, most exact first. A bare layer has no name."""
    return [name for name in (layer.full_name(weight), weight, layer.name) if name]


def _any_match(names: Sequence[str], patterns: Sequence[str]) -> bool:
    return any(matches(name, pattern) for name in names for pattern in patterns)


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern means a name: the name written out, whatever it holds ("rnn[0]"), or a glob."""
    return name == pattern or fnmatchcase(name, pattern)


def _override(names: Sequence[str], gate: str, overrides: Mapping[str, str]) -> str | None:
    candidates = [*(f"{name}.{gate}" for name in names), *names]
    for name in candidates:
        if name in overrides:
            return overrides[name]
    for name in candidates:
        for pattern, spec in overrides.items():
            if matches(name, pattern):
                return spec
    return None


def matching(layer: RecurrentLayer, patterns: Mapping[str, str]) -> dict[str, str]:
    """Those of the patterns that match something of a layer."""
    return {p: spec for p, spec in patterns.items() if any(matches(name, p) for name in all_names([layer]))}


def all_names(layers: Sequence[RecurrentLayer]) -> list[str]:
    """All that a pattern may match: layers, matrices, gates."""
    return [
        full
        for layer in layers
        for weight in layer.weights
        for name in _names(layer, weight)
        for full in (name, *(f"{name}.{gate}" for gate in layer.gates))
    ]


def _check_patterns(layers: Sequence[RecurrentLayer], patterns: Sequence[str]) -> None:
    names = all_names(layers)
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            raise PlanError(f"the pattern '{pattern}' matches no layer, matrix or gate{_nearest(pattern, names)}")


def _nearest(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    return f"; the nearest name is '{close[0]}'" if close else ""
