"""Relabelling hidden units so that recurrent matrices hold more Kronecker structure.

Units may be renumbered in every cell without changing the function: W_g -> P W_g P^T for every gate g, the same P for
all. In tanh cells a unit may also change its sign: the columns of every gate that read it, and the rows of the gates
that write it through an odd function (RNN: its one gate; GRU: n; LSTM: g), whose c or h then changes sign too. With a
projection the units are those of the rows (and of c) alone.

The search alternates two steps, each of which can only raise the energy: fit K to W, then exchange units or flip signs
where that raises <W, K>. With K fixed all exchanges are priced at once by two matrix products, as in the quadratic
assignment problem (Burkard et al., "Assignment Problems", 2009, section 8.2).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kruify.decomposition.fit import check, fit_with
from kruify.decomposition.plain import Plain
from kruify.errors import UsageError
from kruify.factors import Structure

EXCHANGES = 64  # at most so many exchanges between two fits


@dataclass(frozen=True)
class Relabelling:
    """A renumbering of hidden units, and what it brought.

    Attributes:
        permutation: (hidden,) int64; new unit i is old unit permutation[i].
        signs: (hidden,) +-1 float64, of the new units.
        energy_before, energy_after: energy that the structure keeps of all gates together.
        null_before, null_after: the same search on the gates with their entries shuffled: what it gains from chance.
    """

    permutation: Tensor
    signs: Tensor
    energy_before: float
    energy_after: float
    null_before: float
    null_after: float

    @property
    def gain(self) -> float:
        """What the search found beyond chance."""
        return (self.energy_after - self.energy_before) - (self.null_after - self.null_before)

    @property
    def units(self) -> tuple[int, ...]:
        """New unit i is old unit |units[i]|, counted from 1, with the sign of units[i]."""
        return tuple(((self.permutation + 1) * self.signs.long()).tolist())


def symmetries(
    gates: Tensor,
    structure: Structure | Sequence[Structure],
    *,
    odd: Sequence[int] | None = None,
    projected: bool = False,
    seed: int = 0,
    restarts: int = 20,
    seconds: float = 60.0,
    progress: Callable[[float], None] | None = None,
) -> Relabelling:
    """Searches relabellings of hidden units that let `structure` keep more of all gates' recurrent matrices.

    Args:
        gates: (gates, hidden, hidden); with a projection (gates, hidden, projection).
        structure: of every gate, or one a gate.
        odd: gates whose rows change sign with a unit (RNN tanh: [0], GRU: [2], LSTM: [2]); None searches no signs.
        projected: the columns are not the hidden units but those of a projection, which stay as they are.
        seed: of the restarts and of the shuffle.
        restarts: how often the best order so far is disturbed (a few units change places) and improved again.
        seconds: time limit, half of it for the control; what is found by then is returned. A search that ends before
            (`restarts`) is the same for the same seed.
        progress: called with the energy after each round.

    Raises:
        UsageError, UnsupportedError: as `fit`.
    """
    if gates.ndim != 3 or gates.shape[0] == 0 or not (projected or gates.shape[1] == gates.shape[2]):
        raise UsageError(f"relabelling takes recurrent matrices (gates, hidden, hidden), got {tuple(gates.shape)}")
    if not seconds > 0:
        raise UsageError(f"a search needs a time limit above 0 seconds, got {seconds}")
    structures = [structure] * len(gates) if isinstance(structure, Structure) else list(structure)
    for gate, s in zip(gates, structures, strict=True):
        check(gate, s)
    w = gates.detach().to("cpu", torch.float64)
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.stack([g.reshape(-1)[torch.randperm(g.numel(), generator=generator)].reshape(g.shape) for g in w])
    problem = _Problem(structures, None if odd is None else list(odd), projected)
    before, after, permutation, signs = _search(w, problem, seed, restarts, seconds / 2, progress)
    null_before, null_after, _, _ = _search(shuffled, problem, seed, restarts, seconds / 2, None)
    return Relabelling(permutation, signs, before, after, null_before, null_after)


@dataclass(frozen=True)
class _Problem:
    structures: list[Structure]
    odd: list[int] | None
    projected: bool

    def fit(self, w: Tensor) -> Tensor:
        fits = [fit_with(Plain(), gate, s, sweeps=3) for gate, s in zip(w, self.structures, strict=True)]
        return torch.stack([found.to_dense() for found in fits])

    def reordered(self, w: Tensor, order: Tensor) -> Tensor:
        return w[:, order] if self.projected else w[:, order][:, :, order]

    def flipped(self, w: Tensor, signs: Tensor) -> Tensor:
        """Signs of the columns that read a unit, and of the rows that write it through an odd function."""
        w = w.clone() if self.projected else w * signs
        if self.odd is not None:
            w[self.odd] *= signs[:, None]
        return w


def _search(
    w: Tensor,
    problem: _Problem,
    seed: int,
    restarts: int,
    seconds: float,
    progress: Callable[[float], None] | None,
) -> tuple[float, float, Tensor, Tensor]:
    hidden, end = w.shape[1], time.monotonic() + seconds
    generator = torch.Generator().manual_seed(seed)
    first = best = _energy(w, problem.fit(w))
    best_state = torch.arange(hidden), torch.ones(hidden, dtype=torch.float64)
    for start in range(restarts + 1):
        permutation, signs = best_state
        if start > 0:
            kick = torch.arange(hidden)
            units = torch.randperm(hidden, generator=generator)[: 2 + hidden // 32]
            kick[units] = units.roll(1)
            permutation, signs = permutation[kick], signs[kick]
        now = problem.flipped(problem.reordered(w, permutation), signs)
        energy = -1.0
        while time.monotonic() < end:
            k = problem.fit(now)
            previous, energy = energy, _energy(now, k)
            if progress is not None:
                progress(energy)
            if energy > best:
                best, best_state = energy, (permutation.clone(), signs.clone())
            if energy - previous <= 1e-6:
                break
            for _ in range(EXCHANGES):
                gain = _exchange_gain(now, k, problem.projected)
                place = int(gain.argmax())
                i, j = place // hidden, place % hidden
                if float(gain[i, j]) <= 1e-12 or time.monotonic() >= end:
                    break
                order = torch.arange(hidden)
                order[i], order[j] = j, i
                now, permutation, signs = problem.reordered(now, order), permutation[order], signs[order]
            if problem.odd is not None:
                flips = _flips(now, k, problem.odd, problem.projected)
                signs, now = signs * flips, problem.flipped(now, flips)
    return first, best, *best_state


def _energy(w: Tensor, k: Tensor) -> float:
    total = float(w.square().sum())
    return 1 - float((w - k).square().sum()) / total if total > 0 else 1.0


def _exchange_gain(w: Tensor, k: Tensor, projected: bool = False) -> Tensor:
    """(hidden, hidden): how much exchanging units i and j raises <W, K>, for all pairs at once."""
    gain = torch.zeros(w.shape[1], w.shape[1], dtype=w.dtype)
    for left, right in ((w, k),) if projected else ((w, k), (w.mT, k.mT)):
        both = (left @ right.mT).sum(dim=0)
        own = both.diagonal()
        gain += both + both.T - own[:, None] - own
    if projected:
        return gain
    # The four entries where rows and columns i, j meet were counted as if only one of the two moved.
    wd, kd = w.diagonal(dim1=1, dim2=2), k.diagonal(dim1=1, dim2=2)
    w_ii, w_jj, k_ii, k_jj = wd[:, :, None], wd[:, None, :], kd[:, :, None], kd[:, None, :]
    w_ij, w_ji, k_ij, k_ji = w, w.mT, k, k.mT
    row = (w_ji - w_ii) * (k_ii - k_ji) + (w_jj - w_ij) * (k_ij - k_jj)
    col = (w_ij - w_ii) * (k_ii - k_ij) + (w_jj - w_ji) * (k_ji - k_jj)
    both_moved = (w_jj - w_ii) * (k_ii - k_jj) + (w_ji - w_ij) * (k_ij - k_ji)
    return gain + (both_moved - row - col).sum(dim=0)


def _flips(w: Tensor, k: Tensor, odd: Sequence[int], projected: bool = False) -> Tensor:
    """Signs (hidden,) found by flipping, one after the other, the unit that raises <W, K> most."""
    hidden = w.shape[1]
    signs = torch.ones(hidden, dtype=torch.float64)
    product = w * k
    if projected:  # each row by itself
        return signs.where(product[list(odd)].sum(dim=(0, 2)) >= 0, -signs)
    one_sided = product[[g for g in range(len(w)) if g not in odd]].sum(dim=(0, 1))
    two_sided = product[list(odd)].sum(dim=0)
    two_sided = two_sided + two_sided.T
    two_sided.fill_diagonal_(0)  # a unit's own entry changes sign twice
    for _ in range(4 * hidden):
        gain = -2 * signs * (one_sided + two_sided @ signs)
        place = int(gain.argmax())
        if float(gain[place]) <= 1e-12:
            break
        signs[place] = -signs[place]
    return signs
