"""Patterns for what stays dense anyway: neither a recurrent layer that can be converted nor a layer that is factored
beside these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kruify.conversion.locate import AnyTensor, RecurrentLayer
from kruify.conversion.plan import all_names, matches
from kruify.errors import PlanError

HINT = (
    "'kruify inspect' lists the recurrent layers and why one cannot be converted; weights of nn.Linear and "
    "nn.Embedding become low rank only with a task under a budget of bytes, where they are large enough and the "
    "network uses them by calling their layer alone"
)


def without_dense(
    layers: Sequence[RecurrentLayer],
    tensors: Mapping[str, AnyTensor],
    only: Sequence[str],
    skip: Sequence[str],
    overrides: Mapping[str, str] | None,
) -> tuple[list[str], dict[str, str]]:
    """`skip` and `overrides` without patterns that leave dense what stays dense anyway: `make_plan`, which knows only
    `layers`, would refuse them as matching nothing.

    Args:
        layers: what may be factored.
        tensors: of the whole network.
        only, skip, overrides: patterns as in `conversion.plan.make_plan`.

    Raises:
        PlanError: a pattern asks for factors, and all that it matches stays dense.
    """
    known, dense = all_names(layers), _dense(layers, tensors)

    def named(pattern: str) -> str | None:
        """A tensor that the pattern matches; None where it matches nothing or what may be factored."""
        if any(matches(name, pattern) for name in known):
            return None
        return next((tensor for name, tensor in dense.items() if matches(name, pattern)), None)

    leaving = [*skip, *(pattern for pattern, spec in (overrides or {}).items() if spec == "dense")]
    needless = {pattern for pattern in leaving if named(pattern)}
    for pattern in [*only, *(overrides or {})]:
        if pattern not in needless and (tensor := named(pattern)) is not None:
            size = "x".join(map(str, tensors[tensor].shape))
            raise PlanError(f"'{pattern}' means {tensor} ({size}), which stays dense", hint=HINT)
    left = {pattern: spec for pattern, spec in (overrides or {}).items() if pattern not in needless}
    return [pattern for pattern in skip if pattern not in needless], left


def _dense(layers: Sequence[RecurrentLayer], tensors: Mapping[str, AnyTensor]) -> dict[str, str]:
    """Name of a tensor that stays dense, or of what has it -> the tensor, of several the first."""
    own, found = {layer.name for layer in layers}, dict[str, str]()
    for name in tensors:
        layer = name.rpartition(".")[0]
        if layer not in own and name not in own:
            found[name] = name
            found.setdefault(layer, name)
    return found
