from __future__ import annotations

import pytest
import torch

from kruify.decomposition import fit
from kruify.decomposition.unitary import polar
from kruify.errors import UnsupportedError
from kruify.factors import parse


def gaussian(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def planted(shapes, dtype, scale):
    w = torch.full((1, 1), scale, dtype=dtype)
    for i, shape in enumerate(shapes):
        w = torch.kron(w, polar(gaussian(*shape, dtype=dtype, seed=i)))
    return w


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("shapes", [[(4, 4), (4, 4)], [(2, 2)] * 4, [(3, 2), (2, 4)]])
def test_planted_unitary_factors_are_recovered_with_their_scale(shapes, dtype):
    w = planted(shapes, dtype, 2.5)
    structure = parse(",".join(f"{p}x{q}" for p, q in shapes)).resolve(*w.shape)
    f = fit(w, structure, unitary=True, null=False)
    assert f.relative_error < 1e-7
    assert float(f.terms[0][0]) == pytest.approx(2.5)
    for factor in f.terms[0][1]:
        m = factor[0] if factor.shape[1] >= factor.shape[2] else factor[0].mH
        torch.testing.assert_close(m.mH @ m, torch.eye(m.shape[1], dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_never_worse_than_the_polar_factors_of_the_free_fit(dtype):
    w, structure = gaussian(16, 16, dtype=dtype), parse("4x4").resolve(16, 16)
    ours = fit(w, structure, unitary=True, null=False)
    for seed in range(5):
        product = (
            planted([(4, 4), (4, 4)], dtype, 1.0)
            if seed == 0
            else torch.kron(
                polar(gaussian(4, 4, dtype=dtype, seed=seed)), polar(gaussian(4, 4, dtype=dtype, seed=seed + 50))
            )
        )
        score = float((w * product.conj()).sum().real)
        assert 1 - ours.relative_error**2 >= score**2 / 16 / float(w.abs().square().sum())
    if dtype is torch.float64:
        free = fit(w, structure, null=False)
        product = torch.kron(*[polar(f[0]) for f in free.terms[0][1]])
        score = float((w * product).sum())
        assert ours.energy >= score**2 / 16 / float(w.square().sum()) - 1e-12
        assert ours.energy <= free.energy


def test_sums_of_unitary_products_keep_more_with_every_term():
    w = gaussian(16, 16)
    energy = [fit(w, parse(f"{r}*(4x4,4x4)").resolve(16, 16), unitary=True, null=False).energy for r in (1, 2, 4)]
    assert energy[0] < energy[1] < energy[2] < 1


def test_a_complex_overlay_is_named():
    with pytest.raises(UnsupportedError, match="overlay"):
        fit(gaussian(16, 16, dtype=torch.complex128), parse("4x4+sparse:5%").resolve(16, 16), unitary=True)
