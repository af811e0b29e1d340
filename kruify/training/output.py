"""A trained network as a file: its plan, how it was trained, and what it came from."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from kruify.checkpoint import NETWORK, ORIGIN, Checkpoint, write_model
from kruify.checkpoint.file_bytes import to_text
from kruify.conversion import plan_of
from kruify.conversion.check import loaded
from kruify.conversion.computed import state_of
from kruify.conversion.storing import write_converted
from kruify.layers.storage import marks
from kruify.training.recipe import Recipe
from kruify.training.result import FinetuneResult


def write_trained(
    path: str | os.PathLike[str],
    outcome: FinetuneResult,
    recipe: Recipe,
    *,
    source: Checkpoint | None = None,
    network: Mapping[str, Any] | None = None,
) -> None:
    """Write the network with its plan, history and recipe, and the hashes of every file on the way.

    A network without Kronecker matrices becomes an ordinary state dict with the same notes. The ending decides between
    safetensors and torch.save's format.

    Args:
        source: the file that was fine-tuned; None for a network trained from scratch.
        network: the task's options that say which network this is (conversion.network); by default the source's.
    """
    plan = plan_of(outcome.model)
    state = {name: loaded(tensor).cpu() for name, tensor in state_of(outcome.model).items()}
    history = [entry.to_json() for entry in outcome.history]
    told = {"kruify.history": to_text(history), "kruify.recipe": to_text(recipe.to_json())}
    before = source.metadata if source is not None else {}
    if network is not None or NETWORK in before:
        told[NETWORK] = to_text(network) if network is not None else before[NETWORK]
    if not plan.layers:
        write_model(path, state, told)
        return
    dense = before.get("kruify.source_sha256", "")
    if source is not None:
        parents = [*(earlier_files(source) or [dense]), source.sha256]
        told |= {"kruify.parents": to_text(parents), ORIGIN: before.get(ORIGIN, "")}
    write_converted(path, state, plan, marks(outcome.model), source_sha256=dense, seed=recipe.seed, extra=told)


def earlier_files(source: Checkpoint) -> list[str]:
    """The hashes of the files that `source` was made from, as it records them; empty where it records none that
    can be read: that is no reason to lose what was trained."""
    try:
        found = json.loads(source.metadata.get("kruify.parents", "[]"))
    except (ValueError, RecursionError):
        return []
    return [str(item)[:64] for item in found] if isinstance(found, list) else []
