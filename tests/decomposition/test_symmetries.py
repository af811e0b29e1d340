from __future__ import annotations

import itertools

import pytest
import torch

from kruify.decomposition import fit, symmetries
from kruify.decomposition.symmetries import _exchange_gain, _flips
from kruify.errors import UsageError
from kruify.factors import parse


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_price_of_every_exchange_is_what_exchanging_does():
    w, k = gaussian(2, 5, 5), gaussian(2, 5, 5, seed=1)
    gain = _exchange_gain(w, k)
    for i, j in itertools.product(range(5), repeat=2):
        order = list(range(5))
        order[i], order[j] = j, i
        moved = w[:, order][:, :, order]
        torch.testing.assert_close(gain[i, j], ((moved - w) * k).sum())


def test_signs_end_where_no_single_flip_helps():
    w, k = gaussian(3, 6, 6), gaussian(3, 6, 6, seed=1)

    def score(signs):
        turned = w * signs
        turned[2] *= signs[:, None]
        return float((turned * k).sum())

    signs = _flips(w, k, [2])
    for i in range(6):
        flipped = signs.clone()
        flipped[i] *= -1
        assert score(flipped) <= score(signs) + 1e-9
    assert score(signs) >= score(torch.ones(6, dtype=torch.float64))


def test_hidden_structure_is_found_beyond_chance_and_the_search_is_seeded():
    planted = torch.stack([torch.kron(gaussian(3, 3, seed=s), gaussian(4, 4, seed=s + 9)) for s in range(2)])
    order = [7, 1, 2, 3, 4, 5, 6, 0, 8, 11, 10, 9]  # two pairs of units have changed places
    w = planted[:, order][:, :, order]
    structure = parse("3x3,4x4").resolve(12, 12)
    found = symmetries(w, structure, restarts=100, seconds=30)
    assert found.energy_after >= found.energy_before and found.null_after >= found.null_before
    assert found.energy_after > 0.999 and found.gain > 0.1
    again = symmetries(w, structure, restarts=100, seconds=30)
    assert torch.equal(found.permutation, again.permutation)


def test_signs_are_found_where_the_cell_allows_them():
    """Planted: a product whose units changed their sign, in the columns of both gates and in the rows of the second."""
    planted = torch.stack([torch.kron(gaussian(3, 3, seed=s), gaussian(4, 4, seed=s + 9)) for s in range(2)])
    signs = torch.ones(12, dtype=torch.float64)
    signs[[1, 6, 8]] = -1
    w = planted * signs
    w[1] *= signs[:, None]
    structure = parse("3x3,4x4").resolve(12, 12)
    found = symmetries(w, structure, odd=[1], restarts=60, seconds=30)
    assert found.energy_after > 0.999 > found.energy_before
    order, flips = (torch.tensor(found.units).abs() - 1), torch.tensor(found.units).sign()
    back = w[:, order][:, :, order] * flips
    back[1] *= flips[:, None]
    kept = sum(fit(gate, structure, null=False).energy * float(gate.square().sum()) for gate in back)
    assert kept / float(w.square().sum()) == pytest.approx(found.energy_after, abs=1e-6)
    assert symmetries(w, structure, restarts=5, seconds=30).signs.eq(1).all()


def test_with_a_projection_rows_alone_are_exchanged_and_flipped():
    w, k = gaussian(2, 5, 3), gaussian(2, 5, 3, seed=1)
    gain = _exchange_gain(w, k, projected=True)
    for i, j in itertools.product(range(5), repeat=2):
        order = list(range(5))
        order[i], order[j] = j, i
        torch.testing.assert_close(gain[i, j], ((w[:, order] - w) * k).sum())
    signs = _flips(w, k, [1], projected=True)
    assert torch.equal(signs, ((w * k)[1].sum(dim=1) >= 0).double() * 2 - 1)
    planted = torch.stack([torch.kron(gaussian(3, 2, seed=s), gaussian(4, 3, seed=s + 9)) for s in range(2)])
    order = [7, 1, 2, 3, 4, 5, 6, 0, 8, 11, 10, 9]
    found = symmetries(planted[:, order], parse("3x2,4x3").resolve(12, 6), projected=True, restarts=60, seconds=30)
    assert found.energy_after > 0.999 > found.energy_before


def test_every_gate_may_have_a_structure_of_its_own():
    w = torch.stack([torch.kron(gaussian(3, 3), gaussian(4, 4, seed=1)), gaussian(12, 12, seed=2)])
    structures = [parse(spec).resolve(12, 12) for spec in ("3x3,4x4", "12x12")]
    assert symmetries(w, structures, restarts=1).energy_before == pytest.approx(1)
    with pytest.raises(UsageError, match="time limit"):
        symmetries(w, structures, seconds=0)


def test_other_shapes_are_named():
    with pytest.raises(UsageError, match="hidden"):
        symmetries(gaussian(2, 4, 6), parse("2x2,2x3").resolve(4, 6))
