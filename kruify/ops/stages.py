"""How the factors of one term are merged into the one to three stages that a kernel runs.

A chain of ten 2x2 factors has a third of the multiply-adds of a 32x32 pair and is slower all the same: a stage pays off
once its rows fill SIMD registers. The counts below are those of csrc/stage.h.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from kruify.factors import Shape

LANES = 16  # float32 in a 512-bit register
CALL = 24  # what one small GEMM costs before it starts, in vector multiply-adds


@dataclass(frozen=True)
class TermPlan:
    """`order`: the factors as the kernel takes them; `groups`: how many consecutive ones make one stage."""

    order: tuple[int, ...]
    groups: tuple[int, ...]
    shapes: tuple[Shape, ...]  # of the stages
    cost: float  # vector multiply-adds of one product with one vector

    @property
    def merges(self) -> bool:
        return len(self.groups) < len(self.order)


@lru_cache(maxsize=1024)
def plan(shapes: tuple[Shape, ...], products: int, sharing: int = 1) -> TermPlan:
    """The cheapest stages for `products` (gates x rank) Kronecker products of these factor shapes. Where `sharing`
    gates have the trailing factor in common it is applied once, unless it is merged with others."""
    order = tuple(range(len(shapes)))
    if sharing == 1 and len(shapes) == 2 and shapes[0][0] == shapes[1][1] == 1:
        order = (1, 0)  # a row times a column: the factors commute, and the column comes first
    ordered = [shapes[i] for i in order]
    candidates = []
    for groups in _compositions(len(ordered)):
        merged, start = [], 0
        for size in groups:
            part = ordered[start : start + size]
            merged.append((math.prod(p for p, _ in part), math.prod(q for _, q in part)))
            start += size
        trailing = products // sharing if 1 < len(groups) == len(ordered) else products
        candidates.append(TermPlan(order, groups, tuple(merged), _cost(tuple(merged), products, trailing)))
    return min(candidates, key=lambda c: (c.cost, len(c.groups)))


@lru_cache(maxsize=1024)
def plan_pair(shapes: tuple[Shape, ...], products: int) -> TermPlan:
    """Two stages for the templates of the CUDA kernels: the smallest pair whose sizes are all multiples of four; else
    as `plan`. A chain of many small factors costs a GPU a barrier each."""
    pairs = []
    for k in range(1, len(shapes)):
        sizes = [math.prod(n) for part in (shapes[:k], shapes[k:]) for n in zip(*part, strict=True)]
        if not any(n % 4 for n in sizes):
            stages = ((sizes[0], sizes[1]), (sizes[2], sizes[3]))
            order = tuple(range(len(shapes)))
            pairs.append(TermPlan(order, (k, len(shapes) - k), stages, _cost(stages, products)))
    return min(pairs, key=_size, default=plan(shapes, products))


@lru_cache(maxsize=1024)
def plan_complex(shapes: tuple[Shape, ...], rank: int, templates: bool = False) -> TermPlan:
    """One or two stages for complex factors in their real form (layers/planar.py): the first stage is twice as high and
    wide, and a pair has twice the rank. `templates`: a pair that the CUDA templates take, if there is one."""
    order = tuple(range(len(shapes)))
    rows, cols = (math.prod(n) for n in zip(*shapes, strict=True))
    whole = ((2 * rows, 2 * cols),)
    plans = [TermPlan(order, (len(shapes),), whole, _cost(whole, rank))]
    for k in range(1, len(shapes)):
        p, q = (math.prod(n) for n in zip(*shapes[:k], strict=True))
        stages = ((2 * p, 2 * q), (rows // p, cols // q))
        plans.append(TermPlan(order, (k, len(shapes) - k), stages, _cost(stages, 2 * rank)))
    fours = [p for p in plans[1:] if templates and not any(n % 4 for shape in p.shapes for n in shape)]
    return min(fours, key=_size) if fours else min(plans, key=lambda p: p.cost)


def _size(pair: TermPlan) -> tuple[int, int]:
    """Elements of a pair; of equal ones the larger first stage comes first, as in csrc/cuda/instantiations.h."""
    return sum(math.prod(s) for s in pair.shapes), -math.prod(pair.shapes[0])


def _compositions(count: int) -> Iterator[tuple[int, ...]]:
    yield (count,)
    for first in range(1, count):
        yield first, count - first
        for second in range(1, count - first):
            yield first, second, count - first - second


def _vectors(n: int) -> int:
    return -(-n // LANES)


def _cost(stages: tuple[Shape, ...], products: int, trailing: int | None = None) -> float:
    """Vector multiply-adds and calls of one product; a plain matrix counts double, it is read from the cache. The last
    of several stages has `trailing` products, all where it is None."""
    trailing = products if trailing is None else trailing
    (p0, q0), (p_last, q_last) = stages[0], stages[-1]
    if len(stages) == 1:
        return 2.0 * products * _vectors(p0) * q0 + CALL * products
    if len(stages) == 2 and q0 == 1 and p_last == 1:
        return 2.0 * (_vectors(trailing) * q_last + products * _vectors(p0)) + CALL * products
    cost = float(q0 * _vectors(trailing * p_last) * q_last)
    if len(stages) == 2:
        return cost + products * (p0 * q0 * _vectors(p_last) + CALL) + CALL
    p1, q1 = stages[1]
    cost = q0 * q1 * _vectors(trailing * p_last) * q_last
    cost += products * q0 * (p1 * q1 * _vectors(p_last) + CALL)
    return cost + products * (p0 * q0 * _vectors(p1 * p_last) + CALL)
