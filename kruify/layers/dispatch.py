"""Which backend runs a layer: the measured rule."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kruify.errors import UsageError
from kruify.layers import dense, int8, kernel
from kruify.layers.backend import Backend, Sequences
from kruify.layers.compiled import CompiledBackend
from kruify.layers.matrix import KroneckerMatrix
from kruify.layers.reference import ReferenceBackend
from kruify.ops import graphs, precision
from kruify.ops.functions import training, transformed
from kruify.ops.reference import State

if TYPE_CHECKING:
    from kruify.layers.recurrent import RecurrentLayer

BACKENDS: dict[str, Backend] = {  # by the name that users give
    "kernel": CompiledBackend(),
    "dense": dense.TorchBackend(),
    "reference": ReferenceBackend(),
}


def choose(layer: RecurrentLayer, input: Sequences, state: State) -> Backend:
    """The backend that runs this input: what the user named, else the fastest; the reference where no other can.

    Raises:
        UsageError: the compiled kernels were asked for and cannot run the layer.
    """
    name, x = layer.backend, input.data
    if x.numel() == 0 or x.is_meta or (not torch.compiler.is_compiling() and transformed()):
        name = "reference"
    elif name == "auto":
        ready = int8.prepared(layer, x, state)
        if ready is not None:
            return ready
        name = pick(layer, input.steps, input.batch, x)
    elif name == "kernel" and not kernel_serves(layer, x):
        raise UsageError(
            "the compiled kernels need Kronecker recurrent matrices, no projection, and float32 or float64 on a"
            f" device they were built for, got {x.dtype} on {x.device.type}",
            type(layer).__name__,
            "backend='auto' picks a path that works",
        )
    return BACKENDS[name]


def pick(layer: RecurrentLayer, steps: int, batch: int, x: Tensor) -> str:
    """The fastest of "kernel", "dense" and "reference" for these sizes.

    Where the compiled kernels serve, their work is compared with the dense product's: `gain` is the ratio of vector
    multiply-adds. Where they do not, forming W costs about one pass over it and a loop in Python a fixed time per step:
    one step alone (streaming) is faster with the factors; from the second step on torch's own kernel wins.
    """
    if not layer.torch_has_it:
        return "kernel" if kernel_serves(layer, x) else "reference"
    known, served = kernel.known_batch(batch), kernel_serves(layer, x)
    if served and not x.is_cuda:
        if torch.compiler.is_compiling() and dense.breaks_the_graph(layer, x):
            return "kernel"
        gains = [_gain(matrix, layer.kind, known) for matrix in layer.recurrent_weights()]
        return "kernel" if min(gains) >= _needed_gain(layer, known) else "dense"
    kept = graphs.keeps(x, steps, batch)
    if served and all(_cuda_takes(layer, x, batch, kept, k, d) for k, d in layer.directions()):
        return "kernel"
    if not served and steps == 1 and known <= 8 and layer.hidden_size >= 512:
        return "reference"
    if x.is_cuda:
        kernel.say_dense()
    return "dense"


def _cuda_takes(layer: RecurrentLayer, x: Tensor, batch: int, kept: bool, k: int, d: int) -> bool:
    """Whether one of the CUDA kernels that keep weights and state on the chip takes this recurrence, and its share of a
    multiprocessor's shared memory suffices (csrc/cuda/README.md has the limits). The general CUDA kernel takes all
    others, but is not expected to beat cuDNN on the dense weight. No GPU has measured this yet:
    benchmarks/cuda_layers.py."""
    matrix = layer.weights(k, d)["weight_hh"]
    assert isinstance(matrix, KroneckerMatrix)
    plans, terms = kernel.form_of(matrix).plans, matrix.term_list()
    if matrix.dtype != torch.float32:
        return False
    wanted, device = precision.of_products(x.device), x.device.index or 0
    low_rank = kernel.low_rank(matrix)
    if low_rank is not None:
        batch = 64 if torch.compiler.is_compiling() else batch  # a program for any batch
        return kernel.low_rank_pays(low_rank, batch, training(), kept, wanted, device)
    if (
        matrix.overlay is not None
        or len(plans) != 1
        or len(terms[0].gates) != matrix.gates
        or len(plans[0].shapes) != 2
        or any(p != q for p, q in plans[0].shapes)
    ):
        return False
    (rows1, _), (rows2, _) = plans[0].shapes
    return kernel.template_fits(matrix.gates, terms[0].term.rank, rows1, rows2, training(), wanted, device)


def _gain(matrix: object, kind: str, batch: int) -> float:
    assert isinstance(matrix, KroneckerMatrix)
    form = kernel.form_of(matrix)
    return form.dense / max(kernel.work(matrix, form, kind, batch)[0], 1.0)


def _needed_gain(layer: RecurrentLayer, batch: int) -> float:
    """The gain from which on the kernel beats the densified layer: thresholds read off benchmarks/dispatch_rule.py.

    Measured on a Zen 5 with AVX-512 for hidden sizes 16 to 512, one to sixteen terms, batches 1, 8 and 64, forward and
    training. torch's GRU and RNN go step by step and lose everywhere; its LSTM is one oneDNN call, whose GEMMs only a
    small batch or a small layer starves.
    """
    hidden = layer.hidden_size
    if layer.kind != "lstm" or batch <= 2:
        return 0.0
    if training():
        return (1.0 if hidden <= 256 else 1.5) if batch > 8 else 0.4 if hidden <= 64 else 0.55
    return 0.7 if hidden <= (64 if batch > 8 else 128) else 1.5 if batch > 8 else 1.05


def kernel_serves(layer: RecurrentLayer, x: Tensor) -> bool:
    """Whether the compiled kernels can run every layer and direction."""
    return all(kernel.serves(matrix, x, bool(layer.proj_size)) for matrix in layer.recurrent_weights())
