"""Find the state dict inside what a training script saved, and strip what its wrappers put before the names.

Training scripts nest the state dict ("model_state_dict") beside an epoch and an optimizer, and DataParallel,
torch.compile and FSDP put a prefix before its names. Both are taken off here and remembered, so that they can be
put back.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kruify.checkpoint import extras as plain
from kruify.checkpoint.tensors import LazyTensor
from kruify.errors import CorruptError, UnsupportedError, UsageError

KEYS = ("state_dict", "model_state_dict", "model", "net", "ema")
"""Entries that usually hold the state dict; any other entry that holds tensors is considered after them."""

LEADING = ("module.", "model.")
"""Stripped where every name starts with them."""

ANYWHERE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""Stripped wherever they stand: torch.compile, FSDP and activation checkpointing also wrap inner modules."""

WRAPPERS = {"module", *(part.rstrip(".") for part in ANYWHERE)}
"""Parts of names that come from wrappers, when a file is compared with a model."""

COUNTER = "n_averaged"
"""What torch's AveragedModel keeps beside the weights."""

OPTIMIZER = ("optim", "scheduler", "scaler", "opt_state")
DEPTH = 4
"""How deep a state dict may be nested."""

Node = Any  # a LazyTensor, a mapping, a sequence or a plain value, as it came out of the file


@dataclass(frozen=True)
class Found:
    """A state dict inside a file, and what stood beside it: `before` of the extras stand before the state dict."""

    key: str | None
    tensors: dict[str, LazyTensor]
    extras: dict[str, Any]
    dropped: tuple[str, ...]
    node: Node = None  # the mapping itself, as it came out of the file
    before: int = 0


def find_state_dict(root: Node, key: str | None, where: object) -> Found:
    """The state dict in `root`, the one under `key` if given.

    Raises:
        UsageError: `key` is not there, or several entries could be meant.
        CorruptError: there is none.
    """
    if not isinstance(root, Mapping):
        raise CorruptError("it holds no state dict", where, "Save model.state_dict() instead")
    candidates = dict(_candidates(root, ""))
    if key is not None:
        chosen = key
        if key not in candidates:
            names = ", ".join(name for name in candidates if name)[:400] or "no nested ones"
            raise UsageError(f"it has no state dict under --key {key}", where, f"It has: {names}")
    elif "" in candidates:
        chosen = ""
    else:
        usual = [name for name in candidates if name.rpartition(".")[2] in KEYS]
        choices = usual or list(candidates)
        if not choices:
            raise CorruptError("it holds no tensors", where, "Give a file with the weights of a model")
        if len(choices) > 1:
            raise UsageError(
                f"it holds {len(choices)} state dicts ({', '.join(choices)[:400]})", where, "Choose one with --key NAME"
            )
        chosen = choices[0]
    tensors, dropped = _flat(candidates[chosen], where)
    extras: dict[str, Any] = {}
    before = 0
    if chosen:
        top = chosen if chosen in root else _top(root, chosen)
        extras, before = _extras(root, top, dropped)
        if any(len(part) > 1 for part in _between(root, chosen, top)):
            dropped.append(f"what stands beside {chosen} inside {top} is left out")
    return Found(chosen or None, tensors, extras, tuple(dropped), candidates[chosen], before)


def strip(names: Sequence[str]) -> tuple[str, dict[str, str]]:
    """Names without wrapper prefixes.

    Returns: (the prefix that stood before every name, {name as in the file: stripped name}). Names that would collide
    are left as they are.
    """
    stripped = {name: _strip_anywhere(name) for name in names}
    if len(set(stripped.values())) < len(stripped):
        stripped = {name: name for name in names}
    counters = {name: short for name, short in stripped.items() if is_counter(name)}
    stripped = {name: short for name, short in stripped.items() if name not in counters}
    lead = _lead(stripped.values())
    stripped = {name: short.removeprefix(lead) for name, short in stripped.items()}
    prefixes = {name[: -len(short)] if name.endswith(short) else "" for name, short in stripped.items()}
    stripped = {name: (counters | stripped)[name] for name in names}
    return (prefixes.pop() if len(prefixes) == 1 else ""), stripped


def is_counter(name: str) -> bool:
    """Whether a tensor is no weight but what AveragedModel counts with."""
    return name.rpartition(".")[2] == COUNTER


def renaming(names: Iterable[str], modules: Iterable[str], state: Collection[str]) -> Callable[[str], str]:
    """What names of a file, of tensors or of modules, are in a model that other wrappers may be around.

    Args:
        names: those of the tensors of the file.
        modules: names of all modules of the model, outer ones first.
        state: names of its state dict; these stay as they are.
    """
    ours, theirs = _lead(map(_bare, names)), _lead(map(_bare, state))
    places: dict[str, str] = {}
    for module in modules:
        bare = _bare(module, theirs)
        if bare in places and not module.startswith(places[bare]):
            return lambda name: name  # two modules that only the name of a wrapper tells apart
        places[bare] = module

    def rename(name: str) -> str:
        parts = name.split(".")
        if name in state:
            return name
        for n in range(len(parts), -1, -1):
            place = places.get(_bare(".".join(parts[:n]), ours))
            if place is not None:
                return ".".join([*filter(None, [place]), *parts[n:]])
        return name

    return rename


def _lead(names: Iterable[str]) -> str:
    """The `LEADING` that stand before every name."""
    found, names = "", [name for name in names if not is_counter(name)]
    while lead := next((p for p in LEADING if names and all(_has(n, found + p) for n in names)), ""):
        found += lead
    return found


def _bare(name: str, lead: str = "") -> str:
    """The name of a tensor or a module without parts of wrappers and without what stands before every name."""
    bare = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    return f"{bare}.".removeprefix(lead).removesuffix(".")


def _has(name: str, prefix: str) -> bool:
    return name.startswith(prefix) and len(name) > len(prefix)


def _strip_anywhere(name: str) -> str:
    for part in ANYWHERE:
        name = name.replace(part, "") or name
    return name


def _candidates(node: Node, path: str, depth: int = 0) -> Iterator[tuple[str, Mapping[Any, Node]]]:
    """Mappings that hold tensors directly, by dotted path; none inside another, none in optimizer state."""
    if not isinstance(node, Mapping) or depth > DEPTH:
        return
    if any(isinstance(value, LazyTensor) for value in node.values()) and _is_state_dict(node, depth):
        yield path, node
        return
    for name, value in node.items():
        if isinstance(name, str) and not _is_optimizer(name):
            yield from _candidates(value, f"{path}.{name}" if path else name, depth + 1)


def _is_state_dict(node: Mapping[Any, Node], depth: int) -> bool:
    # {"model": {...}, "best": tensor} is a training script's dict, not a state dict.
    nested = any(
        isinstance(value, Mapping) and any(isinstance(v, LazyTensor) for v in value.values()) for value in node.values()
    )
    return depth > 0 or not nested or any("." in str(name) for name in node)


def _is_optimizer(name: str) -> bool:
    return any(part in name.lower() for part in OPTIMIZER)


def _flat(node: Mapping[Any, Node], where: object) -> tuple[dict[str, LazyTensor], list[str]]:
    tensors: dict[str, LazyTensor] = {}
    dropped: list[str] = []
    for name, value in node.items():
        if not isinstance(value, LazyTensor):
            dropped.append(f"the entry {str(name)[:80]} of the state dict is no tensor and is left out")
        elif not isinstance(name, str):
            raise UnsupportedError("its state dict has a tensor whose name is no text", where, "Rename its entries")
        else:
            tensors[name] = value
    return tensors, dropped


def _top(root: Mapping[Any, Node], chosen: str) -> str:
    parts = chosen.split(".")
    return next(p for i in range(1, len(parts) + 1) if (p := ".".join(parts[:i])) in root)


def _between(root: Mapping[Any, Node], chosen: str, top: str) -> Iterator[Mapping[Any, Node]]:
    """The mappings below `root` that are gone through to reach the chosen one."""
    node, rest = root[top], chosen.removeprefix(top).removeprefix(".")
    while rest:
        yield node
        name = rest if rest in node else _top(node, rest)
        node, rest = node[name], rest.removeprefix(name).removeprefix(".")


def _extras(root: Mapping[Any, Node], chosen: str, dropped: list[str]) -> tuple[dict[str, Any], int]:
    """What stands beside the state dict and can be written again, and how much of it stands before."""
    extras: dict[str, Any] = {}
    before = 0
    for name, value in root.items():
        title = f"the entry {name[:80]}" if isinstance(name, str) else f"an entry named by a {type(name).__name__}"
        if name == chosen:
            before = len(extras)
        elif not isinstance(name, str):
            dropped.append(f"{title} is left out")
        elif _is_optimizer(name):
            dropped.append(f"{title} (optimizer state) is left out")
        else:
            try:
                plain.to_json(value)
            except ValueError:
                dropped.append(f"{title} is left out")
            else:
                extras[name] = value
    return extras, before
