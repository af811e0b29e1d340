"""`KroneckerMatrix`: the module that stands where a recurrent layer kept a dense weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kruify.errors import UnsupportedError, UsageError
from kruify.factors import Shape, Structure, Term
from kruify.layers.computed import parameter
from kruify.ops import Layout, TermLayout, reference


class KroneckerTerm(nn.Module):
    """`rank` Kronecker products of equal factor shapes, for one or more gates.

    Attributes:
        gates: the gates of the matrix that this term belongs to, ascending.
        factors: one parameter per factor, each (len(gates), rank, P_f, Q_f); of stacked gates the first holds the rows
            of each gate, (gates, rank, P_0 / gates, Q_0), and the others belong to all, (1, rank, P_f, Q_f).
        scale: a parameter (len(gates), rank), or None where the scale is folded into the factors.
        stacked: whether the term is one of stacked gates.
    """

    stacked = False  # on the class for terms pickled without it

    def __init__(
        self,
        term: Term,
        gates: tuple[int, ...],
        scaled: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        stacked: bool = False,
    ) -> None:
        super().__init__()
        self.term, self.gates, self.stacked = term, gates, stacked
        shape = (len(gates), term.rank)
        self.factors = nn.ParameterList(
            nn.Parameter(torch.empty(1 if stacked and f else shape[0], term.rank, p, q, device=device, dtype=dtype))
            for f, (p, q) in enumerate(self.shapes)
        )
        self.scale: nn.Parameter | None
        if scaled:
            self.scale = nn.Parameter(torch.ones(shape, device=device, dtype=dtype))
        else:
            self.register_parameter("scale", None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Each factor orthogonal (semi-orthogonal if rectangular), so that one product has singular values 1; a sum
        of `rank` products is shrunk by sqrt(rank)."""
        for factor in self.factors:
            exact = torch.complex128 if factor.is_complex() else torch.float64
            tall = torch.randn(*factor.shape[:2], max(factor.shape[2:]), min(factor.shape[2:]), dtype=exact)
            q, r = torch.linalg.qr(tall)
            q = q * r.diagonal(dim1=-2, dim2=-1).sgn()[..., None, :]  # Haar distributed (Mezzadri 2007)
            factor.copy_(q if factor.shape[2] >= factor.shape[3] else q.mT)
        if self.term.rank > 1:
            if self.scale is not None:
                self.scale.fill_(self.term.rank**-0.5)
            else:
                self.factors[0].mul_(self.term.rank**-0.5)

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """(P_f, Q_f) of the factors that one gate's product is made of."""
        (p, q), *rest = self.term.factors
        return ((p // len(self.gates), q), *rest) if self.stacked else self.term.factors

    def held(self) -> tuple[list[Tensor], Tensor | None]:
        """The factors and the scale."""
        factors = [parameter(self.factors, str(f)) for f in range(len(self.term.factors))]
        return factors, parameter(self, "scale")  # type: ignore[return-value]

    def extra_repr(self) -> str:
        return f"{self.term}, gates={self.gates}"


class SparseResidual(nn.Module):
    """A block-sparse matrix for what the Kronecker products leave over: `values[b]` stands in column `index[b, 1]`, in
    `block` rows from `index[b, 0]` on.

    A block is several rows of one column, so that `y[i:i+block] += values[b] * x[j]` is one SIMD multiply-add.

    Attributes:
        values: parameter (blocks, block).
        index: int32 buffer (blocks, 2), rows counted over all gates, ascending by (row, column).
    """

    index: Tensor

    def __init__(
        self,
        blocks: int,
        block: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(blocks, block, device=device, dtype=dtype))
        self.register_buffer("index", torch.zeros(blocks, 2, device=device, dtype=torch.int32))

    def extra_repr(self) -> str:
        return f"blocks={self.values.shape[0]}, block={self.values.shape[1]}x1"


Overlay = SparseResidual  # modules that version 0.1.0 pickled name it so


class KroneckerMatrix(nn.Module):
    """A (gates * rows, cols) weight held as sums of Kronecker products, one `Structure` per gate.

    Terms that several gates have in common are stacked into one `KroneckerTerm`, so that one kernel call serves all.

    Args:
        structures: one per gate, in the gate order of the layer, all of the same (rows, cols); or one of all gates
            stacked.

    Attributes:
        rows, cols: of one gate.
        structures: as given.
        storage: dtype in which a file holds the factors and the sparse residual, a key of `quantization.DTYPES`; the
            parameters are on its grid when they were stored or loaded.

    Raises:
        UsageError: the structures differ in size, or their sparse residuals in block height.
    """

    storage = "float32"  # on the class for matrices pickled without it

    def __init__(
        self,
        structures: Sequence[Structure],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {(s.rows, s.cols) for s in structures}
        if len(sizes) != 1:
            raise UsageError(f"the gates of one matrix must have one size, got {sorted(sizes)}")
        heights = {s.block for s in structures if s.sparse_blocks}
        if len(heights) > 1:
            raise UsageError(f"the sparse residuals of one matrix must have one block height, got {sorted(heights)}")
        self.structures = tuple(structures)
        if len(structures) > 1 and any(s.gates > 1 for s in structures):
            raise UsageError("a structure of stacked gates stands alone")
        rows, self.cols = sizes.pop()
        stacked = structures[0].gates
        self.rows = rows // stacked
        all_gates = tuple(range(stacked))
        self.terms = nn.ModuleList(
            KroneckerTerm(term, gates if stacked == 1 else all_gates, scaled, device, dtype, stacked > 1)
            for (term, scaled, _), gates in group_terms(structures).items()
        )
        self.diagonal_gates = tuple(g for g, s in enumerate(structures) if s.diagonal)
        self.diagonal: nn.Parameter | None
        self.overlay: SparseResidual | None  # `overlay` is its name in state dicts and files
        if self.diagonal_gates:
            shape = (len(self.diagonal_gates), min(self.rows, self.cols))
            self.diagonal = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))
        else:
            self.register_parameter("diagonal", None)
        blocks = sum(s.sparse_blocks for s in structures)
        self.overlay = SparseResidual(blocks, heights.pop(), device, dtype) if blocks else None
        if self.overlay is not None:
            self._draw_places(self.overlay)

    @torch.no_grad()
    def _draw_places(self, residual: SparseResidual) -> None:
        """From scratch the places are drawn at random (seeded by their number alone): there is no matrix to take the
        largest entries of."""
        generator = torch.Generator().manual_seed(residual.values.shape[0])
        block, picked = residual.values.shape[1], []
        for place, s in enumerate(self.structures):
            cells = torch.randperm(s.rows // block * s.cols, generator=generator, device="cpu")
            cells = cells[: s.sparse_blocks].sort().values
            rows = place * s.rows + cells // s.cols * block
            picked.append(torch.stack([rows, cells % s.cols], dim=1))
        residual.index.copy_(torch.cat(picked))

    def term_list(self) -> list[KroneckerTerm]:
        """`terms`, with the type that a ModuleList forgets."""
        return [term for term in self.terms if isinstance(term, KroneckerTerm)]

    @property
    def gates(self) -> int:
        return sum(s.gates for s in self.structures)

    @property
    def shape(self) -> torch.Size:
        """(gates * rows, cols) of the dense weight that this module stands for; `size` and `dim` are as a tensor's."""
        return torch.Size((self.gates * self.rows, self.cols))

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return len(self.shape)

    @property
    def requires_grad(self) -> bool:
        """Whether any of its parameters is trained."""
        return any(p.requires_grad for p in self.parameters())

    @property
    def dtype(self) -> torch.dtype:
        return self._some_parameter().dtype

    @property
    def device(self) -> torch.device:
        return self._some_parameter().device

    def _some_parameter(self) -> Tensor:
        terms: Any = self._modules["terms"]  # self.parameters() would take twenty times as long
        for term in terms._modules.values():
            factors = term._modules["factors"]
            for factor in factors._parameters.values():
                if factor is not None:
                    return factor  # type: ignore[no-any-return]
            return factors[0]  # type: ignore[no-any-return]  # a replica of DataParallel
        return self.diagonal if self.overlay is None else self.overlay.values  # type: ignore[return-value]

    def __prepare_scriptable__(self) -> None:  # torch.jit.script asks every module for it
        raise UnsupportedError(
            "torch.jit.script cannot compile it", type(self).__name__, "Use torch.jit.trace, or kruify.densify before"
        )

    def parts_beside_terms(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The diagonal, the sparse residual's values and index; None for what there is not."""
        diagonal, residual = parameter(self, "diagonal"), self.overlay
        return (diagonal, None, None) if residual is None else (diagonal, parameter(residual, "values"), residual.index)

    def to_dense(self) -> Tensor:  # (gates * rows, cols)
        """The dense weight, differentiable in every parameter; in their precision under autocast, too."""
        if self.device.type == "meta":
            raise UsageError("it has no numbers: it is on the meta device", type(self).__name__, "Load weights first")
        with torch.autocast(self.device.type, enabled=False):
            return self.formed(lambda t: t)

    def formed(self, change: Callable[[Tensor], Tensor]) -> Tensor:  # (gates * rows, cols)
        """The dense weight from changed parameters."""
        diagonal, values, index = self.parts_beside_terms()
        diagonal, values = (None if t is None else change(t) for t in (diagonal, values))
        return reference.dense(self._factors(change), diagonal, values, index, layout=self._layout())

    def forward(self, x: Tensor) -> Tensor:  # (..., cols) -> (..., gates * rows)
        """The product with every gate, `x @ W.T`, without forming W."""
        parts = self.parts_beside_terms()
        return reference.kron_matmul(x, self._factors(), *parts, bias=None, layout=self._layout())

    def _factors(self, change: Callable[[Tensor], Tensor] = lambda t: t) -> list[Tensor]:
        """Of all terms, a scale in the first of its term."""
        found: list[Tensor] = []
        for term in self.term_list():
            factors, scale = term.held()
            scale = None if scale is None else change(scale)
            found += reference.merge([change(f) for f in factors], scale, [1] * len(factors))
        return found

    def _layout(self) -> list[int]:
        terms = tuple(TermLayout(len(term.factors), term.gates) for term in self.term_list())
        return Layout(self.gates, self.rows, self.cols, self.diagonal_gates, terms).encode()

    def extra_repr(self) -> str:
        return f"gates={self.gates}, rows={self.rows}, cols={self.cols}"


def apply_weight(weight: KroneckerMatrix | Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """x @ W.T + b with a dense or a Kronecker weight: (n, cols) -> (n, rows)."""
    if isinstance(weight, Tensor):
        return nn.functional.linear(x, weight, bias)
    y: Tensor = weight(x)
    return y if bias is None else y + bias


def group_terms(structures: Sequence[Structure]) -> dict[tuple[Term, bool, int], tuple[int, ...]]:
    """Which gates share a term: (term, scaled, number of equal terms before it in its gate) -> gates."""
    groups: dict[tuple[Term, bool, int], tuple[int, ...]] = {}
    for gate, structure in enumerate(structures):
        seen: dict[Term, int] = {}
        for term in structure.terms:
            key = (term, structure.scaled, seen.get(term, 0))
            seen[term] = key[2] + 1
            groups[key] = (*groups.get(key, ()), gate)
    return groups


@torch.no_grad()
def reset_like_torch(layer: nn.Module, hidden_size: int) -> None:
    """Dense weights and biases of a layer uniform in +-1/sqrt(hidden_size), as torch.nn does; factors orthogonal."""
    bound = hidden_size**-0.5
    for own in layer.parameters(recurse=False):
        own.uniform_(-bound, bound)
    for child in layer.children():
        if isinstance(child, KroneckerMatrix):
            for term in child.term_list():
                term.reset_parameters()


@torch.no_grad()
def exact(weight: KroneckerMatrix | Tensor) -> Tensor:  # (gates * rows, cols)
    """The dense matrix that a weight stands for, worked out in float64 (complex128 for a complex one)."""
    if isinstance(weight, Tensor):
        return _double(weight.detach())
    return weight.formed(_double)


def _double(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
