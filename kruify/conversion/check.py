"""Whether plan, tensors and model fit each other."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from kruify.checkpoint import LazyTensor
from kruify.conversion.locate import AnyTensor, Located
from kruify.conversion.plan import Plan
from kruify.errors import CorruptError, PlanError


def check_plan(plan: Plan, located: Located) -> None:
    """Raises `PlanError` unless every layer of the plan is there and has the sizes that the plan was made for."""
    found = {layer.name: layer for layer in located.layers}
    for layer, weight, structures in plan.matrices():
        actual = found.get(layer.name)
        if actual is None:
            raise PlanError(f"the plan names layer '{layer.name}', which the model does not have: {sorted(found)}")
        suffix = weight.removeprefix("weight_ih").removeprefix("weight_hh")
        if (actual.kind, actual.cell) != (layer.kind, layer.cell) or suffix not in actual.suffixes:
            raise PlanError(f"the plan's '{layer.full_name(weight)}' does not fit the {actual.kind} in the model")
        rows, cols = structures[0].rows // structures[0].gates, structures[0].cols
        if (rows, cols) != actual.shape(weight):
            have = "x".join(map(str, actual.shape(weight)))
            raise PlanError(
                f"the plan is made for {rows}x{cols} gates, the model has {have}",
                layer.full_name(weight),
            )


def load_tensors(model: nn.Module, tensors: Mapping[str, AnyTensor], where: object = None) -> None:
    """`model.load_state_dict`, strict, with one clear sentence where the names or shapes differ.

    Raises:
        CorruptError: names are missing or too many, or a shape differs.
    """
    try:
        model.load_state_dict({name: loaded(tensor) for name, tensor in tensors.items()})
    except RuntimeError as error:
        what, hint = _difference(model.state_dict(), tensors)
        what = what or " ".join(str(error).split())[:300]
        raise CorruptError(f"the tensors do not fit {type(model).__name__}: {what}", where, hint) from None


def _difference(wanted: Mapping[str, Tensor], got: Mapping[str, AnyTensor]) -> tuple[str, str]:
    """What differs between the names and shapes of a model and of a file, and what to do about it."""
    hint = "Use the model that the checkpoint was made for"
    missing, extra = [n for n in wanted if n not in got], [n for n in got if n not in wanted]
    said = [_listed(missing, "missing"), _listed(extra, "not known to it")]
    said += [
        f"{name} is {'x'.join(map(str, got[name].shape))}, not {'x'.join(map(str, tensor.shape))}"
        for name, tensor in wanted.items()
        if name in got and tuple(got[name].shape) != tuple(tensor.shape)
    ][:3]
    for names, others, whose in ((extra, wanted, "file"), (missing, got, "model")):
        wrapper = names[0].partition(".")[0] if names else ""
        if wrapper and {name.removeprefix(f"{wrapper}.") for name in names} == set(others):
            hint = f"The names of the {whose} begin with '{wrapper}.': save or build the network with or without it"
    return "; ".join(filter(None, said)), hint


def _listed(names: list[str], what: str) -> str:
    if len(names) < 2:
        return f"{names[0]} is {what}" if names else ""
    return f"{names[0]} and {len(names) - 1} more are {what}"


def loaded(tensor: AnyTensor) -> Tensor:
    """The numbers of a tensor that may still be in its file."""
    return tensor.load() if isinstance(tensor, LazyTensor) else tensor
