"""What the matrices of a dense network are applied to: E[h], E[h h^T] and E[x], E[x x^T], streamed over batches.

They weigh the decomposition (`decompose.fit(covariance=...)`) and correct the bias for what it leaves out.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from kruify.errors import TaskError, UsageError
from kruify.progress import Progress
from kruify.tasks.base import evaluating, to_device

BATCHES = 16
"""Of "train", that calibration looks at."""
NOISE = 1e-12
"""Of E[h^2], times the columns: more than float64 leaves of a covariance of zero (2e-13 in 2,000 trials)."""


class Calibration(Protocol):
    """The part of a `Task` that calibration needs."""

    def batches(self, split: str, *, seed: int = 0) -> Iterable[Any]: ...
    def forward(self, model: nn.Module, batch: Any) -> Tensor: ...


@dataclass
class Moments:
    """First and second moments of the vectors that one matrix was applied to, in float64.

    Raises:
        UsageError: the shapes do not fit each other.

    Attributes:
        count: number of vectors (sequence steps that are not padding).
        total: (n,), their sum.
        outer: (n, n), the sum of their outer products.
    """

    count: int
    total: Tensor
    outer: Tensor

    def __post_init__(self) -> None:
        if self.outer.shape != (*self.total.shape, *self.total.shape) or self.total.ndim != 1:
            what = f"moments are a sum (n,) and products (n, n), got {[*self.total.shape]} and {[*self.outer.shape]}"
            raise UsageError(what)

    @staticmethod
    def empty(n: int) -> Moments:
        return Moments(0, torch.zeros(n, dtype=torch.float64), torch.zeros(n, n, dtype=torch.float64))

    def add(self, vectors: Tensor) -> None:
        """Adds (count, n) vectors."""
        v = vectors.detach().to("cpu", torch.float64)
        self.count += v.shape[0]
        self.total += v.sum(dim=0)
        self.outer += v.T @ v

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.total + other.total, self.outer + other.outer)

    @property
    def mean(self) -> Tensor:
        """E[h], (n,)."""
        return self.total / max(self.count, 1)

    @property
    def second(self) -> Tensor:
        """E[h h^T], (n, n): the weight for a layer without bias."""
        return self.outer / max(self.count, 1)

    @property
    def covariance(self) -> Tensor:
        """E[(h - E h)(h - E h)^T], (n, n): the weight where the bias is corrected for the mean afterwards. Its
        diagonal is a little larger, by more than what rounding leaves where the vectors are all but alike."""
        diagonal = NOISE * len(self.mean) * self.second.diagonal()
        return self.second - torch.outer(self.mean, self.mean) + diagonal.diag()

    def weight(self, bias: bool) -> Tensor:
        """What weighs the error of a matrix, (n, n): a bias beside it takes up the mean."""
        return self.covariance if bias else self.second


def bias_correction(dense: Tensor, fitted: Tensor, mean: Tensor) -> Tensor:
    """(W - K) E[h], (gates * rows,) float64: what to add to the bias beside the matrix.

    For a recurrent matrix that is bias_hh, for an input matrix bias_ih. In torch's GRU b_hn stands inside
    r * (W_hn h + b_hn), together with the product that it corrects, so the same holds for its third gate.
    """
    return (dense.detach().double().cpu() - fitted.detach().double().cpu()) @ mean


@torch.no_grad()
def calibrate(
    model: nn.Module,
    task: Calibration,
    *,
    split: str = "train",
    batches: int | None = BATCHES,
    seed: int = 0,
    beside: Collection[str] = (),
    progress: Progress | None = None,
) -> dict[str, Moments]:
    """Runs the dense model over batches of the task and collects the moments of every recurrent layer.

    Works on nn.RNN, nn.LSTM, nn.GRU (layers, directions, projections, packed or padded input, initial states) and
    their cells, wherever they stand in the model. In padded input without lengths, padding is counted.

    Args:
        model: the dense model; run in eval mode, left in the mode it was in.
        task: gives batches and the forward pass.
        batches: number of batches to run; None for all.
        beside: names of linear layers to collect those of, too, and of embeddings, whose weights count alike.
        progress: told of the batches done.

    Returns:
        full weight name ("encoder.weight_hh_l0", "cell.weight_ih") -> moments of what it is applied to; layers that
        the forward pass never runs are left out, and those of `beside` that meet NaN or infinity, as in padding.

    Raises:
        TaskError: the task has no batch in that split, it runs none of the recurrent layers, or the model gives NaN or
            infinite states.
    """
    found: dict[str, Moments] = {}
    layers = {
        n: m
        for n, m in model.named_modules(remove_duplicate=False)
        if isinstance(m, nn.RNNBase | nn.RNNCellBase) or n in beside
    }
    handles = [
        module.register_forward_pre_hook(observer(f"{name}." if name else "", found), with_kwargs=True)
        for name, module in layers.items()
    ]
    done = 0
    try:
        with evaluating(model) as device:
            for batch in itertools.islice(task.batches(split, seed=seed), batches):
                task.forward(model, to_device(batch, device))
                done += 1
                if progress is not None:
                    progress(done, batches or done, "calibrating")
    finally:
        for handle in handles:
            handle.remove()
    if done == 0:
        raise TaskError(f"the task gave no batch to calibrate on in split '{split}'")
    if layers.keys() - {*beside} and not found.keys() - {f"{name}.weight" for name in beside}:
        what = "its forward pass calls none of the recurrent layers, so that their errors cannot be weighed"
        raise TaskError(what, type(task).__name__, "Let it run the model as a whole, or convert without a task")
    others = {f"{name}.weight" for name in beside}
    found = {n: moments for n, moments in found.items() if n not in others or bool(moments.outer.isfinite().all())}
    check_finite(found)
    return found


def check_finite(found: Mapping[str, Moments]) -> None:
    """Raises `TaskError` where the vectors that a matrix was applied to were not all finite."""
    for name, moments in found.items():
        if not bool(torch.isfinite(moments.outer).all()):
            raise TaskError("calibration met NaN or infinite states", name, "Check the model and the task's data")


def observer(prefix: str, found: dict[str, Moments]) -> Callable[..., None]:
    """A function of a dense layer or cell and the arguments of one call of it, (module, args, kwargs), that adds the
    moments of its matrices to `found`, by their names after `prefix`."""

    def add(weight: str, vectors: Tensor) -> None:
        found.setdefault(prefix + weight, Moments.empty(vectors.shape[-1])).add(vectors)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(("input", "hx"), args, strict=False)) | kwargs
        if isinstance(module, nn.Linear):
            add("weight", given["input"].reshape(-1, module.in_features))
        elif isinstance(module, nn.Embedding):
            if f"{prefix}weight" not in found:
                size = module.embedding_dim
                alike = torch.zeros(size, dtype=torch.float64), torch.eye(size, dtype=torch.float64)
                found[f"{prefix}weight"] = Moments(1, *alike)
        elif isinstance(module, nn.RNNCellBase):
            _observe_cell(module, given["input"], given.get("hx"), add)
        elif isinstance(module, nn.RNNBase):
            _observe_layers(module, given["input"], given.get("hx"), add)

    return hook


def _observe_cell(cell: nn.RNNCellBase, x: Tensor, state: Any, add: Callable[[str, Tensor], None]) -> None:
    x = x.reshape(-1, cell.input_size)
    h = state[0] if isinstance(state, tuple) else state
    add("weight_ih", x)
    add("weight_hh", x.new_zeros(x.shape[0], cell.hidden_size) if h is None else h.reshape(-1, cell.hidden_size))


def _observe_layers(module: nn.RNNBase, x: Any, state: Any, add: Callable[[str, Tensor], None]) -> None:
    """Runs the stack one layer at a time, since torch shows only the last layer's states."""
    x, lengths, state = padded(module, x, state)
    hidden = state if isinstance(state, tuple) else (state,)
    valid = torch.arange(x.shape[0], device=x.device)[:, None] < lengths.to(x.device)  # (time, batch)
    directions = 2 if module.bidirectional else 1
    for layer in range(module.num_layers):
        outputs = []
        for direction in range(directions):
            suffix = f"l{layer}" + ("_reverse" if direction else "")
            add(f"weight_ih_{suffix}", x[valid])
            place = layer * directions + direction
            first = [s[place : place + 1] for s in hidden]
            single = _single_layer(module, suffix, x.shape[-1])
            turned = _reverse(x, lengths) if direction else x
            out = single(turned, tuple(first) if len(first) > 1 else first[0])[0]
            add(f"weight_hh_{suffix}", torch.cat([first[0], out[:-1]])[valid])
            outputs.append(_reverse(out, lengths) if direction else out)
        x = torch.cat(outputs, dim=-1)


def padded(module: nn.RNNBase, x: Any, state: Any) -> tuple[Tensor, Tensor, Any]:
    """Any input that nn.LSTM takes -> (time, batch, features), lengths (batch,), initial states in that order."""
    unbatched = False
    if isinstance(x, PackedSequence):
        order = x.sorted_indices
        data, lengths = pad_packed_sequence(PackedSequence(x.data, x.batch_sizes))
        if state is not None and order is not None:
            state = _each(state, lambda s: s.index_select(1, order))
    else:
        unbatched = x.ndim == 2
        data = x[:, None] if unbatched else x.transpose(0, 1) if module.batch_first else x
        lengths = torch.full((data.shape[1],), data.shape[0])
    if state is None:
        count = module.num_layers * (2 if module.bidirectional else 1)
        h = data.new_zeros(count, data.shape[1], module.proj_size or module.hidden_size)
        state = (h, data.new_zeros(count, data.shape[1], module.hidden_size)) if module.mode == "LSTM" else h
    elif unbatched:
        state = _each(state, lambda s: s[:, None])
    return data, lengths, state


def _each(state: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return tuple(change(s) for s in state) if isinstance(state, tuple) else change(state)


def _single_layer(module: nn.RNNBase, suffix: str, input_size: int) -> nn.RNNBase:
    """One direction of one layer as a layer of its own; not registered anywhere, hence never hooked."""
    options: dict[str, Any] = {"bias": module.bias, "device": next(module.parameters()).device}
    if module.mode == "LSTM":
        options["proj_size"] = module.proj_size
        single: nn.RNNBase = nn.LSTM(input_size, module.hidden_size, **options)
    elif module.mode == "GRU":
        single = nn.GRU(input_size, module.hidden_size, **options)
    else:
        nonlinearity = "tanh" if module.mode == "RNN_TANH" else "relu"
        single = nn.RNN(input_size, module.hidden_size, nonlinearity=nonlinearity, **options)
    single = single.to(next(module.parameters()).dtype).eval()
    for stem in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"):
        if hasattr(single, f"{stem}_l0"):
            getattr(single, f"{stem}_l0").copy_(getattr(module, f"{stem}_{suffix}"))
    return single


def _reverse(x: Tensor, lengths: Tensor) -> Tensor:
    """Every sequence of (time, batch, features) backwards, its padding left at the end."""
    time = torch.arange(x.shape[0], device=x.device)[:, None]
    lengths = lengths.to(x.device)
    place = torch.where(time < lengths, lengths - 1 - time, time)
    return x.gather(0, place[..., None].expand_as(x))
