"""What the operators' derivatives have in common: a Kronecker matrix's parameters become stages inside one node of the
graph, because torch.library's own way around an operator takes longer than a short sequence.

Every such node is a `torch.autograd.Function` whose arguments are `assembly, options, *first, diagonal, residual,
residual_index, *parameters`. The operator of the same name has it as its derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kruify.ops import reference
from kruify.ops.layout import decode
from kruify.ops.library import has_kernel

Optional = Tensor | None
_ops = torch.ops.kruify


def transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is under way. Neither kernels nor nodes of the
    graph know them; the reference serves."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def traced() -> bool:
    """Whether a program is recorded, by torch.compile, torch.export or torch.jit.trace: it is given operators, which
    it can run again, not the node of one call."""
    return torch.compiler.is_compiling() or torch._C._is_tracing()


def training() -> bool:
    """Whether derivatives may be asked for. torch.jit.trace runs without them to check a program that it traced with
    them, and wants the same operators."""
    return torch.is_grad_enabled() or (not torch.compiler.is_compiling() and torch._C._is_tracing())


@dataclass(frozen=True)
class Assembly:
    """How the parameters of a Kronecker matrix become an operator's arguments.

    terms: of each term its number of factors, the groups in which they are merged (None: each is a stage), and whether
        a scale follows them in the list of parameters.
    layout: of the matrix (ops/layout.py).
    whole: the layout of W as one plain stage where W is formed before the operator runs; else None.
    """

    terms: tuple[tuple[int, tuple[int, ...] | None, bool], ...]
    layout: list[int]
    whole: list[int] | None = None

    def stages(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Factors, and scales where there are any, of all terms -> stages; no derivatives."""
        return self._each_term(_ops.merge.default, parameters)

    def reference_stages(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The same in plain torch, differentiable any number of times."""
        return self._each_term(reference.merge, parameters)

    def _each_term(self, merge: Any, parameters: Sequence[Tensor]) -> list[Tensor]:
        stages: list[Tensor] = []
        at = 0
        for count, groups, scaled in self.terms:
            factors, at = parameters[at : at + count], at + count + scaled
            if groups is not None:
                factors = merge(factors, parameters[at - 1] if scaled else None, groups)
            stages += factors
        return stages

    def backward(self, grads: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of the stages -> those of the parameters."""
        found: list[Tensor] = []
        stage = at = 0
        for count, groups, scaled in self.terms:
            factors, at = parameters[at : at + count], at + count + scaled
            size = count if groups is None else len(groups)
            part, stage = grads[stage : stage + size], stage + size
            if groups is not None:
                part = _ops.merge_backward.default(part, factors, parameters[at - 1] if scaled else None, groups)
            found += part
        return found


def unmerged(layout: Sequence[int]) -> Assembly:
    """Of an operator's own arguments: every parameter is a stage."""
    return Assembly(tuple((term.stages, None, False) for term in decode(layout).terms), list(layout))


def matrix_gradients(
    assembly: Assembly, found: list[Tensor], diagonal: Optional, residual: Optional, parameters: Sequence[Tensor]
) -> tuple[Optional, ...]:
    """Gradients as the operators order them (stages, diagonal, residual) -> those of diagonal, residual, index and
    parameters."""
    grad_residual = None if residual is None else found.pop()
    grad_diagonal = None if diagonal is None else found.pop()
    return grad_diagonal, grad_residual, None, *assembly.backward(found, parameters)


def needs_reference(grads: Sequence[Optional]) -> bool:
    """Whether a backward pass is differentiated itself (create_graph), runs on a batch (is_grads_batched), or on a
    device without compiled kernels."""
    functorch = torch._C._functorch
    if torch.is_grad_enabled() or functorch.peek_interpreter_stack() is not None:
        return True
    present = [g for g in grads if g is not None]
    return any(functorch.is_legacy_batchedtensor(g) or not has_kernel(g.device.type) for g in present)


def reference_gradients(
    assembly: Assembly,
    function: Callable[[list[Any], dict[str, Any]], Sequence[Optional]],
    tensors: Sequence[Optional],
    first: int,
    grads: Sequence[Optional],
) -> list[Optional]:
    """Gradients of all tensors of a node through the reference.

    Args:
        function: the node's outputs from its first tensors and the matrix as kruify.ops.reference names it.
        tensors: those of the node; the matrix begins at number `first`.
        grads: of the outputs.
    """

    again = torch.is_grad_enabled()
    with torch.enable_grad():
        if not again:
            tensors = [t.detach().requires_grad_() if t is not None and t.is_floating_point() else t for t in tensors]
        diagonal, residual, index, *parameters = tensors[first:]
        stages = assembly.reference_stages(parameters)  # type: ignore[arg-type]
        matrix = {"stages": stages, "diagonal": diagonal, "residual": residual, "residual_index": index}
        outputs = function(list(tensors[:first]), {**matrix, "layout": assembly.layout})
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o is not None and g is not None]
        pairs = [(o, g) for o, g in pairs if o.requires_grad]
        wanted = [t for t in tensors if t is not None and t.requires_grad]
        found: Any = iter([None] * len(wanted))
        if pairs:
            ends, given = zip(*pairs, strict=True)
            found = iter(torch.autograd.grad(ends, wanted, given, create_graph=again, allow_unused=True))
        return [next(found) if t is not None and t.requires_grad else None for t in tensors]
