"""One run of training towards what is known: the weights with the least error on what is held out are kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kruify.checkpoint import atomic_file
from kruify.checkpoint.writing import save_tree
from kruify.conversion.storing import store_as
from kruify.errors import CorruptError, UnsupportedError, UsageError
from kruify.layers.storage import marks
from kruify.progress import Progress
from kruify.training.rounding import ROUNDED_FROM, rounded_weights
from kruify.training.schedule import lr_factor

Found = TypeVar("Found")
WARMUP, CLIP = 0.2, 1.0
VALIDATIONS = 20  # in a run
LEARNT = 1e-5  # error of what has nothing to learn


def fit(
    model: nn.Module,
    loss: Callable[[int], Tensor],
    error: Callable[[], float],
    title: str,
    *,
    steps: int,
    lr: float,
    file: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> tuple[float, float, int]:
    """Trains a module in place; weights that are stored in fewer bits are rounded in the last quarter and at the end.

    Args:
        loss: step -> what is to be minimised.
        error: on what is held out, with the weights as they are stored.
        file: for the state at every validation, from which an interrupted run goes on; `settings` say which run it is.

    Returns:
        The error before and after, and the steps: 0 where there was nothing to learn.

    Raises:
        UnsupportedError: the error is no number before any step. UsageError, CorruptError: as `kept_state`.
    """
    settings = {} if settings is None else settings
    parameters = [p for p in model.parameters() if p.requires_grad]
    # Not fused: torch's fused step changes parameters without counting a version, on which caches of merged weights
    # rely.
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, foreach=True)

    def go_on(kept: dict[str, Any]) -> tuple[float, float, dict[str, Tensor], int]:
        for state in (kept["weights"], kept["latest"]):
            model.load_state_dict(state)
        optimizer.load_state_dict(kept["optimizer"])
        return kept["before"], kept["best"], kept["weights"], kept["step"]

    kept = None if file is None else kept_state(file, settings, go_on)
    if kept is None:
        before = best = error()
        weights, first = _copied(model), 0
    else:
        before, best, weights, first = kept
    if math.isnan(before):
        raise UnsupportedError(f"the outputs of the {title} on held-out samples are NaN before it is trained")
    done = 0 if before < LEARNT else steps
    for step in range(first, done):
        optimizer.param_groups[0]["lr"] = lr * lr_factor("onecycle", step / steps, WARMUP)
        optimizer.zero_grad()
        with rounded_weights(model) if step >= ROUNDED_FROM * steps else nullcontext():
            loss(step).backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        if math.isfinite(float(norm)):
            optimizer.step()
        if (step + 1) % max(1, steps // VALIDATIONS) == 0 or step + 1 == steps:
            now = error()
            if now < best:
                best, weights = now, _copied(model)
            if file is not None:
                state = {"before": before, "best": best, "weights": weights, "step": step + 1}
                state |= {"latest": model.state_dict(), "optimizer": optimizer.state_dict()}
                save_state(file, settings, state)
        if progress is not None:
            progress(step + 1, steps, f"{title}: relative error {best:.4f}")
    model.load_state_dict(weights)
    store_as(model, marks(model))
    return before, best, done


def save_state(file: Path, settings: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Writes what `kept_state` reads."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as stream:
        save_tree({"settings": dict(settings), **state}, stream)


def kept_state(file: Path, settings: Mapping[str, Any], take: Callable[[dict[str, Any]], Found]) -> Found | None:
    """What `take` makes of what a run of these settings left; None where there is no file.

    Raises:
        UsageError: it is of another run. CorruptError: it cannot be read, or `take` failed.
    """
    if not file.exists():
        return None
    try:
        found: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        before = dict(found.pop("settings"))
        if before == dict(settings):
            return take(found)
    except Exception as error:  # whatever a file that is none brings forth
        raise CorruptError("the state of the training cannot be read", file, "Name an empty folder") from error
    different = ", ".join(name for name in settings if before.get(name) != settings[name])
    raise UsageError(f"the folder holds another run (other {different})", file, "Name an empty folder")


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
