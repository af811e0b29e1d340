"""A file's numbers into a user's model, which may be wrapped in another way than the one that was saved."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from kruify.checkpoint import Checkpoint
from kruify.checkpoint.wrapper import is_counter
from kruify.conversion.check import load_tensors, stored_plan
from kruify.conversion.locate import AnyTensor
from kruify.conversion.modules import swap
from kruify.conversion.plan import Plan
from kruify.conversion.renaming import names_in, renamed
from kruify.layers.storage import mark


def load_into(model: nn.Module, checkpoint: Checkpoint, names: Mapping[str, str] | None = None) -> nn.Module:
    """Swaps the layers that the file's plan names, and loads its tensors.

    DataParallel, torch.compile, FSDP and AveragedModel put parts into names that the other side may not have.

    Args:
        names: what the file calls otherwise (`renamed`).

    Raises:
        PlanError, CorruptError: the file does not fit the model.
    """
    plan = stored_plan(checkpoint) if checkpoint.is_kruify else Plan()
    new = renamed(checkpoint, names or {})
    unwrap = names_in(model, map(new, checkpoint.tensors))

    def rename(name: str) -> str:
        return unwrap(new(name))

    model = swap(model, plan.renamed(rename))
    own = model.state_dict()
    tensors: dict[str, AnyTensor] = {name: tensor for name, tensor in own.items() if is_counter(name)}
    tensors |= {rename(name): tensor for name, tensor in checkpoint.tensors.lazy.items()}
    if checkpoint.is_graph:  # has constants that no module has
        tensors = {n: t for n, t in tensors.items() if n in own}
    load_tensors(model, {n: t for n, t in tensors.items() if n in own or not is_counter(n)}, checkpoint.path)
    mark(model, {rename(name): dtype for name, dtype in checkpoint.storage.items()})
    return model
