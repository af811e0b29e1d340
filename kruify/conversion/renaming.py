"""Names of a file that differ from those of the user's model: ONNX names a layer after its node, and either side may be
wrapped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from torch import nn

from kruify.checkpoint import Checkpoint
from kruify.checkpoint.wrapper import renaming
from kruify.errors import UsageError


def renamed(checkpoint: Checkpoint, names: Mapping[str, str]) -> Callable[[str], str]:
    """How the tensors and layers of a file are called in the model.

    Args:
        names: name of a tensor, or of what stands before a dot in names -> the new one, "" for the model itself:
            {"rnn.LSTM": "rnn"}. The longest that fits decides.

    Raises:
        UsageError: the file has no such name, or two tensors would have one.
    """
    old = list(checkpoint.tensors)
    for name in names:
        if not any(other == name or other.startswith(f"{name}.") for other in old):
            raise UsageError(f"it has nothing named '{name[:80]}' to rename", checkpoint.path, "See 'kruify inspect'")
    prefixes = sorted(names, key=len, reverse=True)

    def new(name: str) -> str:
        for prefix in prefixes:
            if name == prefix or name.startswith(f"{prefix}."):
                return f"{names[prefix]}{name[len(prefix) :]}".removeprefix(".")
        return name

    twice = [name for name, count in Counter(map(new, old)).items() if count > 1]
    if twice:
        raise UsageError(f"two tensors would be named '{twice[0][:80]}'", checkpoint.path, "Give each its own name")
    return new


def names_in(model: nn.Module, names: Iterable[str]) -> Callable[[str], str]:
    """What the tensors and layers of a file, whose tensors have these names, are called in a model that may be wrapped
    in another way."""
    return renaming(names, [name for name, _ in model.named_modules(remove_duplicate=False)], model.state_dict())
