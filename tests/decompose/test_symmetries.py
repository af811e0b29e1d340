from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from kruify.decompose import symmetries
from kruify.decompose.symmetries import Relabelling, _exchange_gain, _flips
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


@pytest.mark.parametrize(("kind", "odd"), [(nn.RNN, [0]), (nn.GRU, [2]), (nn.LSTM, [2])])
def test_relabelling_a_layer_only_relabels_its_output(kind, odd):
    torch.manual_seed(0)
    rnn = kind(3, 6).double()
    signs = torch.tensor([1, -1, 1, -1, -1, 1], dtype=torch.float64)
    found = Relabelling(torch.randperm(6), signs, 0, 0, 0, 0)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    wanted = rnn(x)[0][..., found.permutation] * signs
    count = rnn.weight_hh_l0.shape[0] // 6
    with torch.no_grad():
        rnn.weight_hh_l0.copy_(found.relabel(rnn.weight_hh_l0.reshape(count, 6, 6), odd).reshape(-1, 6))
        rnn.weight_ih_l0.copy_(found.relabel_rows(rnn.weight_ih_l0.reshape(count, 6, 3), odd).reshape(-1, 3))
        for bias in (rnn.bias_ih_l0, rnn.bias_hh_l0):
            bias.copy_(found.relabel_rows(bias.reshape(count, 6), odd).reshape(-1))
    torch.testing.assert_close(rnn(x)[0], wanted)


def test_other_shapes_are_named():
    with pytest.raises(UsageError, match="hidden"):
        symmetries(gaussian(2, 4, 6), parse("2x2,2x3").resolve(4, 6))
