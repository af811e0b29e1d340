"""Linear layers and embeddings with factored weights, against torch's of the dense weight."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from kruify.factors import parse
from kruify.layers import KroneckerEmbedding, KroneckerLinear

SPECS = ("3*(24x1,1x32)", "2*(6x8,4x4)", "2*(24x1,1x32)+sparse:5%:2", "24x32")


@pytest.mark.parametrize("spec", SPECS)
def test_linear_is_that_of_the_dense_weight(spec: str) -> None:
    torch.manual_seed(0)
    layer = KroneckerLinear([parse(spec).resolve(24, 32)], dtype=torch.float64)
    assert layer.bias is not None
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(2, 3, 32, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight.to_dense(), layer.bias))
    assert torch.autograd.gradcheck(layer, x)


@pytest.mark.parametrize("spec", SPECS)
def test_embedding_is_that_of_the_dense_weight_and_padding_is_not_trained(spec: str) -> None:
    torch.manual_seed(0)
    layer = KroneckerEmbedding([parse(spec).resolve(24, 32)], padding_idx=3, dtype=torch.float64)
    indices = torch.tensor([[0, 3, 23], [5, 5, 3]])
    found = layer(indices)
    torch.testing.assert_close(found, layer.weight.to_dense()[indices])
    if spec == SPECS[0]:
        found.sum().backward()
        rows = layer.weight.term_list()[0].factors[0].grad
        assert rows is not None and not rows[0, :, 3].any() and bool(rows[0, :, 5].all())
