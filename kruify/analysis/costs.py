"""What a checkpoint costs: parameters, bytes, multiply-adds, latency; and how its recurrent matrices behave."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kruify.analysis.conditioning import conditioning
from kruify.checkpoint import Checkpoint, LazyTensor
from kruify.checkpoint.tensors import ties
from kruify.conversion import build_dense, build_layer, load_tensors, plan_of
from kruify.conversion.locate import RecurrentLayer, locate, locate_checkpoint
from kruify.conversion.plan import LayerPlan, Plan, Structures
from kruify.factors import Structure
from kruify.layers.matrix import exact

BATCHES = (1, 32)
STEPS = 64
SECONDS = 2.0  # spent on each model and batch size


@dataclass(frozen=True)
class Layers:
    """The recurrent layers of a checkpoint, whichever of their matrices are factored.

    Attributes:
        items: layer -> structures of its factored matrices by weight name, empty for a dense layer.
    """

    checkpoint: Checkpoint
    items: list[tuple[RecurrentLayer, dict[str, Structures]]]

    def modules(self) -> list[nn.Module]:
        """The layers as modules with the numbers of the checkpoint in them, in evaluation mode."""
        return [self._module(layer, matrices).eval() for layer, matrices in self.items]

    def _module(self, layer: RecurrentLayer, matrices: dict[str, Structures]) -> nn.Module:
        if matrices:
            module: nn.Module = build_layer(LayerPlan(layer, matrices))
        else:
            module = build_dense(layer)
        prefix = f"{layer.name}." if layer.name else ""
        wanted = module.state_dict()
        tensors = self.checkpoint.tensors
        load_tensors(module, {n: tensors[prefix + n] for n in wanted if prefix + n in tensors}, self.checkpoint.path)
        return module


def layers_of(checkpoint: Checkpoint) -> Layers:
    """The recurrent layers of a dense or a converted checkpoint."""
    dense = locate_checkpoint(checkpoint).layers
    text = checkpoint.metadata.get("kruify.plan")
    plan = Plan.from_json(text, f"plan in {checkpoint.path}") if text else Plan()
    planned = {item.layer.name for item in plan.layers}
    items: list[tuple[RecurrentLayer, dict[str, Structures]]] = [(item.layer, item.matrices) for item in plan.layers]
    items += [(layer, {}) for layer in dense if layer.name not in planned]
    order = {name: i for i, name in enumerate(checkpoint.tensors)}
    return Layers(checkpoint, sorted(items, key=lambda item: _first(item[0], order)))


def _first(layer: RecurrentLayer, order: dict[str, int]) -> int:
    prefix = f"{layer.name}." if layer.name else ""
    return min((i for name, i in order.items() if name.startswith(prefix)), default=0)


def count_parameters(layers: Layers) -> dict[str, int]:
    """Trainable numbers in the file: recurrent matrices, input matrices, all other tensors, total.

    A tensor that stands in the file under two names counts once, a complex number twice.
    """
    return _count(layers.checkpoint.tensors.lazy, [layer for layer, _ in layers.items])


def count_network(model: nn.Module) -> dict[str, int]:
    """`count_parameters` of a network in memory."""
    layers = [item.layer for item in plan_of(model).layers] + locate(model).layers
    return _count({name: LazyTensor.of(tensor) for name, tensor in model.state_dict().items()}, layers)


def _count(tensors: Mapping[str, LazyTensor], layers: Sequence[RecurrentLayer]) -> dict[str, int]:
    counts = {"recurrent": 0, "input": 0, "other": 0}
    tied = ties(tensors)
    for name, tensor in tensors.items():
        if tensor.reals and name not in tied:
            counts[_part(name, layers)] += tensor.reals
    return {**counts, "total": sum(counts.values())}


def _part(name: str, layers: Sequence[RecurrentLayer]) -> str:
    for layer in layers:
        for suffix in layer.suffixes:
            for stem, part in (("weight_hh", "recurrent"), ("weight_ih", "input")):
                weight = layer.full_name(stem + suffix)
                if name == weight or name.startswith(f"{weight}."):
                    return part
    return "other"


def multiply_adds(layers: Layers) -> int:
    """Multiply-adds of one step in time of every recurrent layer for one sequence: W_ih, W_hh and projections.

    A complex number times a complex one is four of them, times a real one two.
    """
    total = 0
    for layer, matrices in layers.items:
        for suffix in layer.suffixes:
            for stem, each in (("weight_ih", layer.reals), ("weight_hh", layer.reals**2)):
                rows, cols = layer.shape(stem + suffix)
                structures = matrices.get(stem + suffix)
                count = sum(s.multiply_adds for s in structures) if structures else len(layer.gates) * rows * cols
                total += each * count
            total += layer.proj_size * layer.hidden_size
    return total


@dataclass(frozen=True)
class MatrixHealth:
    """How one gate's recurrent matrix treats the state that it is multiplied with at every step.

    Attributes:
        condition_number: largest over smallest singular value (infinite for a singular matrix).
        spectral_norm: largest singular value.
        unitarity_defect: ||W^H W - I||_F / sqrt(N), 0 for an orthogonal or unitary matrix.
        factors: the structure as a spec, "dense" for a dense matrix.
        parameters: trainable numbers of this gate; of stacked gates an equal share.
        dense_parameters: rows times columns.
        singular_values: descending; at most 64 of them, evenly spread over all.
        energy: 1 - ||W - K||^2 / ||W||^2 against the same gate of the first model of a report, as both stand in their
            files: after fine-tuning it tells how far the network has moved. None for the first model.
        energy_null: what the same structure keeps of a matrix without any structure. None for a dense matrix.
    """

    name: str
    gate: str
    condition_number: float
    spectral_norm: float
    unitarity_defect: float
    factors: str = "dense"
    parameters: int = 0
    dense_parameters: int = 0
    singular_values: tuple[float, ...] = ()
    energy: float | None = None
    energy_null: float | None = None


def matrix_health(layers: Layers, progress: Callable[[str], None] | None = None) -> list[MatrixHealth]:
    """The health of every gate of every recurrent matrix, in float64."""
    results = []
    for name, gate, matrix, structure in gate_matrices(layers):
        if progress:
            progress(f"{name} {gate}")
        results.append(_health(name, gate, matrix, structure))
    return results


def gate_matrices(layers: Layers) -> Iterator[tuple[str, str, Tensor, Structure | None]]:
    """(name of the recurrent matrix, gate, the dense (rows, cols) it stands for, its structure if factored).

    Stacked gates all come with the structure of the stack. In float64, complex128 for a complex matrix.
    """
    for (layer, matrices), module in zip(layers.items, layers.modules(), strict=True):
        for suffix in layer.suffixes:
            weight = getattr(module, f"weight_hh{suffix}")
            dense = exact(weight)
            structures: Sequence[Structure | None] = matrices.get(f"weight_hh{suffix}") or (None,)
            structures = [s for s in structures for _ in range(len(layer.gates) // len(structures))]
            for gate, matrix, structure in zip(
                layer.gates, torch.split(dense, layer.hidden_size), structures, strict=True
            ):
                yield layer.full_name(f"weight_hh{suffix}"), gate, matrix.detach(), structure


def _health(name: str, gate: str, matrix: Tensor, structure: Structure | None) -> MatrixHealth:
    measured = conditioning(matrix)
    reals = 2 if matrix.is_complex() else 1
    return MatrixHealth(
        name=name,
        gate=gate,
        condition_number=measured.condition_number,
        spectral_norm=measured.spectral_norm,
        unitarity_defect=measured.unitarity_defect,
        factors="dense" if structure is None else str(structure),
        parameters=reals * (matrix.numel() if structure is None else structure.parameters // structure.gates),
        dense_parameters=reals * matrix.numel(),
        singular_values=_sample(measured.singular_values),
    )


def _sample(values: Sequence[float], most: int = 64) -> tuple[float, ...]:
    """At most `most` of the values, the first and the last among them."""
    if len(values) <= most:
        return tuple(values)
    return tuple(values[round(i * (len(values) - 1) / (most - 1))] for i in range(most))


@dataclass(frozen=True)
class Latency:
    """Median milliseconds of the recurrent layers over sequences of `steps`.

    Attributes:
        median: one entry a model: batch size -> milliseconds.
        p95: the same for the 95th percentile.
    """

    median: list[dict[int, float]]
    p95: list[dict[int, float]]
    steps: int
    threads: int


def measure_latency(
    models: Sequence[Layers],
    *,
    batches: Sequence[int] = BATCHES,
    steps: int = STEPS,
    threads: int = 1,
    seconds: float = SECONDS,
    progress: Callable[[float, float, str], None] | None = None,
) -> Latency:
    """Times the recurrent layers of several models against each other, on the CPU, on random inputs.

    Models take turns, so that a busy moment of the machine falls on all of them.

    Args:
        seconds: spent on each batch size and model.
    """
    modules = [layers.modules() for layers in models]
    medians: list[dict[int, float]] = [{} for _ in models]
    p95s: list[dict[int, float]] = [{} for _ in models]
    with _threads(threads), torch.inference_mode():
        for done, batch in enumerate(batches):
            runs = [runner(layers, module, batch, steps) for layers, module in zip(models, modules, strict=True)]
            samples = _interleaved(runs, seconds * len(runs))
            for median, p95, sample in zip(medians, p95s, samples, strict=True):
                median[batch] = 1e3 * statistics.median(sample)
                p95[batch] = 1e3 * sorted(sample)[int(0.95 * (len(sample) - 1) + 0.5)]
            if progress:
                progress(done + 1, len(batches), "measuring latency")
    return Latency(medians, p95s, steps, threads)


def runner(layers: Layers, modules: Sequence[nn.Module], batch: int, steps: int) -> Callable[[], None]:
    """One run of all layers over random sequences, as a function to be timed."""
    generator = torch.Generator().manual_seed(0)
    work: list[tuple[nn.Module, Tensor, bool]] = []
    for (layer, _), module in zip(layers.items, modules, strict=True):
        leading = (batch, steps) if layer.batch_first and not layer.cell else (steps, batch)
        x = torch.randn(*leading, layer.input_size, generator=generator)
        work.append((module, x.to(next(module.parameters()).dtype.to_real()), layer.cell))

    def run() -> None:
        for module, x, cell in work:
            if not cell:
                module(x)
                continue
            state = None
            for step in x:
                state = module(step, state)

    return run


def _interleaved(runs: Sequence[Callable[[], None]], seconds: float) -> list[list[float]]:
    """Seconds of each run, over at least 5 rounds; the first, which warms up, is thrown away."""
    samples: list[list[float]] = [[] for _ in runs]
    start = time.perf_counter()
    rounds = 0
    while rounds < 6 or (time.perf_counter() - start < seconds and rounds < 200):
        for run, sample in zip(runs, samples, strict=True):
            begin = time.perf_counter()
            run()
            sample.append(time.perf_counter() - begin)
        rounds += 1
    return [sample[1:] for sample in samples]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
