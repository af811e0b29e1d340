"""The factor grammar, and the counts that follow from it. Pure Python: no arrays, no torch.

    2x2                     one shape, repeated until the matrix is filled (512 = 2^9: nine factors)
    32x32,16x16             these factors, in this order, left to right
    512x1,1x512             rectangular: rows multiply to M, columns to N
    4*(32x32,16x16)         a sum of four such products
    A+B                     a sum of different shapes
    ...+diag                a diagonal
    ...+sparse:2%           a sparse residual: the largest entries of what is left, in blocks of 8 rows x 1 column
    ...+sparse:2%:1         the same with blocks of 1 (any block height that divides the rows)
    auto, auto:3            balanced shapes for the size at hand (two factors; three); 4*auto is a sum of four
    stacked:26*(2048x1,1x512)   the gates of an LSTM with 512 units seen as one matrix, as torch stacks them: every gate
                            has its own rows of the first factor, all share the other factors

A `Spec` is what was written; `Spec.resolve(rows, cols)` turns it into the `Structure` of one matrix.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

from kruify.errors import FactorSpecError

Shape = tuple[int, int]  # (rows, columns) of one factor

GRAMMAR = "'2x2', '32x32,16x16', '4*(32x32,16x16)+8*(512x1,1x512)+diag+sparse:2%', 'auto' or 'auto:3'"
STACKED = "stacked:"
BLOCK_HEIGHTS = (8, 4, 2, 1)  # of the blocks of a sparse residual that SIMD lanes can take, best first


@dataclass(frozen=True)
class Term:
    """`rank` Kronecker products that share their factor shapes."""

    factors: tuple[Shape, ...]
    rank: int = 1

    @property
    def rows(self) -> int:
        return math.prod(p for p, _ in self.factors)

    @property
    def cols(self) -> int:
        return math.prod(q for _, q in self.factors)

    @property
    def parameters(self) -> int:
        return self.rank * sum(p * q for p, q in self.factors)

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of one matrix-vector product, factors applied in `contraction_order`."""
        size, total = self.cols, 0
        for f in contraction_order(self.factors):
            p, q = self.factors[f]
            total += size * p
            size = size // q * p
        return self.rank * total

    def __str__(self) -> str:
        shapes = ",".join(f"{p}x{q}" for p, q in self.factors)
        if self.rank > 1:
            return f"{self.rank}*({shapes})"
        # A lone '2x2' means 'repeat until filled': one factor that fills the matrix reads the same either way.
        return shapes


@dataclass(frozen=True)
class Structure:
    """What stands in for one dense (rows, cols) matrix: a sum of terms, a diagonal, a sparse residual."""

    rows: int
    cols: int
    terms: tuple[Term, ...] = ()
    diagonal: bool = False
    sparse_blocks: int = 0
    block: int = 1  # rows of one block of the sparse residual; it is one column wide
    scaled: bool = False  # one separate scalar per product, instead of scale folded into the factors
    gates: int = 1  # gates stacked in the rows; all share every factor but the first

    @property
    def parameters(self) -> int:
        """Trainable numbers: factor entries, separate scales, diagonal and sparse values (indices are not trained)."""
        scales = sum(t.rank for t in self.terms) if self.scaled else 0
        diagonal = min(self.rows, self.cols) if self.diagonal else 0
        return sum(t.parameters for t in self.terms) + scales + diagonal + self.sparse_blocks * self.block

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of one matrix-vector product."""
        diagonal = min(self.rows, self.cols) if self.diagonal else 0
        return sum(t.multiply_adds for t in self.terms) + diagonal + self.sparse_blocks * self.block

    @property
    def dense_parameters(self) -> int:
        return self.rows * self.cols

    def __str__(self) -> str:
        parts = [str(t) for t in self.terms]
        if self.diagonal:
            parts.append("diag")
        if self.sparse_blocks:
            parts.append(f"sparse:{self._sparse_percent()}%:{self.block}")
        return (STACKED if self.gates > 1 else "") + "+".join(parts)

    def _sparse_percent(self) -> str:
        """The shortest percentage that resolves to the same number of blocks again."""
        possible = self.rows * self.cols / self.block
        for digits in range(3, 18):  # from 3 on: "100", never "1e+02"
            text = f"{100 * self.sparse_blocks / possible:.{digits}g}"
            if round(float(text) / 100 * possible) == self.sparse_blocks:
                return text
        raise AssertionError("17 digits identify every float")


@dataclass(frozen=True)
class _Product:
    factors: tuple[Shape, ...]
    rank: int

    def resolve(self, rows: int, cols: int, gates: int = 1) -> Term:
        factors = self.factors
        if len(factors) == 1:
            factors = _repeat(factors[0], rows, cols) or factors
        term = Term(factors, self.rank)
        if (term.rows, term.cols) != (rows, cols):
            raise _misfit(factors, rows, cols, gates)
        if factors[0][0] % gates:
            raise FactorSpecError(
                f"the first factor's {factors[0][0]} rows are not shared out among {gates} gates",
                hint=f"Put a factor first whose rows are a multiple of {gates}",
            )
        return term


@dataclass(frozen=True)
class _Auto:
    count: int
    rank: int

    def resolve(self, rows: int, cols: int, gates: int = 1) -> Term:
        return Term(balanced(rows, cols, self.count, gates), self.rank)


@dataclass(frozen=True)
class Spec:
    """A parsed factor spec; it has no size until `resolve` gives it one."""

    text: str
    products: tuple[_Product | _Auto, ...] = ()
    diagonal: bool = False
    sparse_fraction: float = 0.0
    block: int | None = None

    def resolve(self, rows: int, cols: int, gates: int = 1) -> Structure:
        """The structure of a (rows, cols) matrix, which holds `gates` gates of rows / gates rows each.

        Raises:
            FactorSpecError: the factors do not multiply to the size; the text names the nearest specs that do.
        """
        if any(p.rank > rows * cols for p in self.products):
            raise FactorSpecError(f"it has more terms than a {rows}x{cols} matrix has entries", self.text)
        terms = tuple(p.resolve(rows, cols, gates) for p in self.products)
        structure = Structure(rows, cols, terms, self.diagonal, gates=gates)
        if not self.sparse_fraction:
            return structure
        high = rows // gates  # a block lies within one gate
        block = self.block or next(b for b in BLOCK_HEIGHTS if high % b == 0)
        if high % block:
            raise FactorSpecError(
                f"sparse blocks of {block} rows do not divide {high} rows",
                self.text,
                f"Try sparse:...%:{next(b for b in BLOCK_HEIGHTS if high % b == 0)}",
            )
        blocks = round(self.sparse_fraction * rows * cols / block)
        return replace(structure, sparse_blocks=max(1, min(blocks, rows * cols // block)), block=block)

    def __str__(self) -> str:
        return self.text


MOST_TERMS, MOST_FACTORS = 1000, 64
_INT = "[0-9]{1,9}"  # no other digits of Unicode, and no number beyond any matrix
_TERM = re.compile(rf"(?:({_INT})\*)?(?:\(([^()]*)\)|([^()*+]*))")
_SHAPE = re.compile(rf"({_INT})x({_INT})")
_AUTO = re.compile(rf"auto(?::({_INT}))?")
_SPARSE = re.compile(rf"sparse:({_INT}(?:\.[0-9]*)?(?:e-?[0-9]{{1,3}})?)%(?::({_INT}))?")


def parse(text: str) -> Spec:
    """Reads a factor spec.

    Raises:
        FactorSpecError: the text is not in the grammar.
    """
    compact = _compact(text)
    if not compact:
        raise FactorSpecError("the factor spec is empty", hint=f"Write for example {GRAMMAR}")
    stacked = compact.startswith(STACKED)
    products: list[_Product | _Auto] = []
    diagonal, fraction, block = False, 0.0, None
    parts = compact.removeprefix(STACKED).split("+")
    if len(parts) > MOST_TERMS:
        raise FactorSpecError(f"the spec has {len(parts)} terms, at most {MOST_TERMS} are possible", text[:80])
    for part in parts:
        if part == "diag":
            if stacked:
                raise FactorSpecError("stacked gates have no diagonal", text)
            if diagonal:
                raise FactorSpecError("the diagonal is named twice", text)
            diagonal = True
        elif match := _SPARSE.fullmatch(part):
            if fraction:
                raise FactorSpecError("the sparse residual is named twice", text)
            fraction, block = float(match[1]) / 100, int(match[2]) if match[2] else None
            if not 0 < fraction <= 1 or block == 0:
                raise FactorSpecError(f"'{part}' is not a share above 0 % and up to 100 %", text)
        else:
            products.append(_parse_product(part, text))
    if not products and not diagonal and not fraction:
        raise FactorSpecError("the spec names no factors", text, f"Write for example {GRAMMAR}")
    return Spec(text, tuple(products), diagonal, fraction, block)


def stacks(text: str) -> bool:
    """Whether a spec is of the gates of a matrix stacked, not of each gate."""
    return _compact(text).startswith(STACKED)


def _compact(text: str) -> str:
    return re.sub(r"\s+", "", text).lower()


def _parse_product(part: str, text: str) -> _Product | _Auto:
    match = _TERM.fullmatch(part)
    body = (match[2] or match[3] or "") if match else ""
    rank = int(match[1]) if match and match[1] else 1
    auto = _AUTO.fullmatch(body)
    shapes = [_SHAPE.fullmatch(s) for s in body.split(",")]
    if match is None or rank < 1 or not (auto or all(shapes)):
        raise FactorSpecError(f"'{part}' is not a factor spec", text, f"Write for example {GRAMMAR}")
    if auto:
        count = int(auto[1]) if auto[1] else 2
        if not 1 <= count <= 32:
            raise FactorSpecError(f"auto takes 1 to 32 factors, not {count}", text)
        return _Auto(count, rank)
    factors = tuple((int(m[1]), int(m[2])) for m in shapes if m)
    if any(p < 1 or q < 1 for p, q in factors):
        raise FactorSpecError("a factor has no rows or no columns", text)
    if len(factors) > MOST_FACTORS:
        raise FactorSpecError(f"a product of {len(factors)} factors, at most {MOST_FACTORS} are possible", text[:80])
    return _Product(factors, rank)


def _repeat(shape: Shape, rows: int, cols: int) -> tuple[Shape, ...] | None:
    """`shape` as often as it takes to fill (rows, cols), or None where no power of it does."""
    p, q = shape
    count, r, c = 1, p, q
    while r < rows or c < cols:
        if (p == 1 and r < rows) or (q == 1 and c < cols):
            return None
        r, c, count = r * p, c * q, count + 1
        if r > rows or c > cols:
            return None
    return (shape,) * count if (r, c) == (rows, cols) else None


def contraction_order(factors: Sequence[Shape]) -> tuple[int, ...]:
    """The cheapest order in which to apply the factors of one product to a vector.

    Factors act on different modes, so any order gives the same result. Applying factor (p, q) to a vector of current
    size s costs s*p and leaves s*p/q; exchanging two neighbours shows that descending 1/p - 1/q is optimal.
    """
    return tuple(sorted(range(len(factors)), key=lambda f: 1 / factors[f][1] - 1 / factors[f][0]))


@cache
def _divisors(n: int) -> tuple[int, ...]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return tuple(sorted({*small, *(n // d for d in small)}))


@cache
def balanced_split(n: int, count: int) -> tuple[int, ...]:
    """`count` divisors of n whose product is n, as equal as they can be, the largest first (512, 2 -> 32, 16)."""
    if count == 1:
        return (n,)
    best: tuple[int, ...] | None = None
    for d in _divisors(n):
        if d < n ** (1 / count) - 1e-9:
            continue
        candidate = tuple(sorted((d, *balanced_split(n // d, count - 1)), reverse=True))
        if best is None or sum(candidate) < sum(best):
            best = candidate
    assert best is not None  # d = n always qualifies
    return best


def balanced(rows: int, cols: int, count: int, gates: int = 1) -> tuple[Shape, ...]:
    """`count` factor shapes that multiply to (rows, cols), as square and as equal as the sizes allow.

    Sizes without divisors are served too: 257 with two factors is 257x257 and 1x1, which is the dense matrix; the 1x1
    factors are left out. Of stacked gates: the shapes for one, its first factor as often as there are gates.
    """
    split_rows, split_cols = balanced_split(rows // gates, count), balanced_split(cols, count)
    shapes = tuple((p, q) for p, q in zip(split_rows, split_cols, strict=True) if (p, q) != (1, 1))
    (p, q), *rest = shapes or ((1, 1),)
    return (gates * p, q), *rest


def two_factor_shapes(rows: int, cols: int) -> Iterator[tuple[Shape, Shape]]:
    """Every pair of factor shapes that multiplies to (rows, cols), 1x1 factors left out."""
    for p in _divisors(rows):
        for q in _divisors(cols):
            if (p, q) not in ((1, 1), (rows, cols)):
                yield (p, q), (rows // p, cols // q)


def suggestions(factors: Sequence[Shape], rows: int, cols: int, limit: int = 3, gates: int = 1) -> list[str]:
    """Specs that fit (rows, cols), which holds `gates` gates, the nearest to `factors` first."""

    def distance(candidate: Sequence[Shape]) -> float:
        wanted = list(factors) + [factors[-1]] * max(0, len(candidate) - len(factors))
        gap = sum(
            abs(math.log(p / a)) + abs(math.log(q / b)) for (p, q), (a, b) in zip(candidate, wanted, strict=False)
        )
        return gap / len(candidate) + 0.25 * abs(len(candidate) - max(len(factors), 2))

    candidates: list[tuple[Shape, ...]] = [*two_factor_shapes(rows, cols)]
    candidates += [balanced(rows, cols, count) for count in (2, 3, 4)]
    candidates += [power for d in _divisors(rows)[1:] if (power := _repeat((d, d), rows, cols))]
    candidates = [c for c in candidates if c[0][0] % gates == 0]
    names = {c: f"{c[0][0]}x{c[0][1]}" if len(set(c)) == 1 else str(Term(c)) for c in candidates}
    return [names[c] for c in sorted(names, key=lambda c: (distance(c), names[c]))[:limit]]


def _misfit(factors: Sequence[Shape], rows: int, cols: int, gates: int) -> FactorSpecError:
    spec = ",".join(f"{p}x{q}" for p, q in factors)
    if len(factors) == 1:
        what = f"factors {spec} repeated do not fill a {rows}x{cols} matrix"
    else:
        made = f"{math.prod(p for p, _ in factors)}x{math.prod(q for _, q in factors)}"
        what = f"factors {spec} multiply to {made}, not to {rows}x{cols}"
    prefix = STACKED if gates > 1 else ""
    fitting = ", ".join(f"'{prefix}{s}'" for s in suggestions(factors, rows, cols, gates=gates))
    return FactorSpecError(what, hint=f"Specs that fit: {fitting} or '{prefix}auto'")
