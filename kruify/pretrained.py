"""A converted network as a folder or a repository of the Hugging Face Hub: weights, configuration, model card."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import overload

from torch import nn

from kruify.api import FilePath, load, save
from kruify.checkpoint import atomic_file, check_target, make_folder
from kruify.conversion import plan_of
from kruify.errors import UnsupportedError, UsageError, first_line
from kruify.layers.storage import marks
from kruify.reporting.card import to_plain_card

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
SCHEMA = 1
REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


def save_pretrained(model: nn.Module, folder: FilePath, *, metrics: Mapping[str, float] | None = None) -> Path:
    """Writes a module with KRU layers as a folder that `from_pretrained` reads and the Hub shows.

    It gets `model.safetensors` (what `kruify.save` writes), `config.json` (the plan, for people to read) and, where
    there is none, a model card, `README.md`. `hf upload NAME FOLDER` publishes it.

    Args:
        folder: made if it is missing; other files in it are left alone.
        metrics: what the network achieves, for the card.

    Returns:
        The folder.

    Raises:
        UsageError: the module has no KRU layer, a metric is no number, or the folder cannot be written.
    """
    folder, plan = Path(folder), plan_of(model)
    if not plan.layers:
        raise UsageError("the model has no KRU layer", type(model).__name__, "Convert it first with kruify.convert")
    try:
        metrics = {name: float(value) for name, value in (metrics or {}).items()}
    except (TypeError, ValueError) as error:
        raise UsageError(f"a metric is no number ({error})", "metrics", "Give a number for each name") from None
    make_folder(folder)
    for name in (WEIGHTS, CONFIG):
        check_target(folder / name)
    weights = folder / WEIGHTS
    save(model, weights)
    config = {"library_name": "kruify", "schema": SCHEMA, "plan": json.loads(plan.to_json())}
    _write(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    if not (folder / CARD).exists():
        size, name = weights.stat().st_size, folder.resolve().name
        _write(folder / CARD, to_plain_card(name, plan, marks(model), size, metrics))
    return folder


@overload
def from_pretrained(source: FilePath, into: nn.Module, *, revision: str | None = None) -> nn.Module: ...
@overload
def from_pretrained(source: FilePath, into: None = None, *, revision: str | None = None) -> dict[str, nn.Module]: ...
def from_pretrained(
    source: FilePath, into: nn.Module | None = None, *, revision: str | None = None
) -> nn.Module | dict[str, nn.Module]:
    """Loads the weights that `save_pretrained` wrote; nothing else in the folder is read, and nothing is run.

        model = kruify.from_pretrained("owner/name", into=network)

    Args:
        source: a folder, or a repository of the Hub, which huggingface_hub fetches and keeps.
        into: as of `kruify.load`: the dense network, or None for the recurrent layers by name.
        revision: branch, tag or commit of a repository.

    Raises:
        UsageError: there is no such folder, the repository cannot be fetched, or without `into` there is no recurrent
            layer.
        UnsupportedError: a repository, and huggingface_hub is not installed.
        CorruptError, PlanError: the weights are damaged, or do not fit `into`.
    """
    if not source:
        raise UsageError("no folder or repository is named", "from_pretrained", "Name one")
    folder = Path(source)
    if not os.path.isdir(folder):  # of a name that is too long, too
        folder = _fetched(str(source), revision)
    elif revision is not None:
        raise UsageError("a folder has no revisions", folder, "Leave the revision out")
    weights = folder / WEIGHTS
    return load(weights) if into is None else load(weights, into=into)


def _fetched(name: str, revision: str | None) -> Path:
    """The folder in which huggingface_hub keeps a repository."""
    if not REPOSITORY.fullmatch(name):
        raise UsageError("there is no such folder", name, "Name a folder, or a repository of the Hub: owner/name")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UnsupportedError(
            "there is no such folder, and huggingface_hub is not installed", name, "Run: pip install 'kruify[hub]'"
        ) from None
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[WEIGHTS, CONFIG]))
    except Exception as error:  # its own, those of the network below it, and those of the file system
        raise UsageError(
            f"there is no such folder, and the repository cannot be fetched ({first_line(error)})",
            name,
            "Check name and network",
        ) from error


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())
