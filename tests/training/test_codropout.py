from __future__ import annotations

import torch
from tiny import LayeredDelay

from kruify.api import convert
from kruify.factors import parse
from kruify.layers.matrix import KroneckerMatrix
from kruify.training import finetune
from kruify.training.codropout import CoMatrixDropout


def matrix() -> KroneckerMatrix:
    torch.manual_seed(0)
    m = KroneckerMatrix([parse("2*(8x1,1x8)+sparse:25%:2").resolve(8, 8)] * 2, dtype=torch.float64)
    with torch.no_grad():
        m.overlay.values.normal_()
    return m


def test_rows_of_k_and_of_s_vanish_and_the_rest_grows() -> None:
    m = matrix()
    with torch.no_grad():
        whole, values = m.to_dense(), m.overlay.values.clone()
        m.overlay.values.zero_()
        k = m.to_dense()
        m.overlay.values.copy_(values)
    s = whole - k
    with CoMatrixDropout(m, 0.5).applied(3), torch.no_grad():
        dropped = m.to_dense()
    dense_rows = {(a, b) for a in (0, 2) for b in (0, 2)}
    seen = set()
    for row in range(16):
        fits = {c for c in dense_rows if torch.allclose(dropped[row], c[0] * k[row] + c[1] * s[row])}
        assert fits, row
        seen |= fits if len(fits) == 1 else set()
    assert len(seen) >= 3  # K and S are dropped independently
    assert torch.equal(m.to_dense(), whole)  # everything is put back


def test_gradients_are_those_of_the_masked_product() -> None:
    m, dropout = matrix(), None
    dropout = CoMatrixDropout(m, 0.3)
    target = torch.randn(16, 8, dtype=torch.float64)
    with dropout.applied(1, 2):
        (m.to_dense() * target).sum().backward()
    ((factor, k_mask), (values, s_mask)) = dropout._masks(m, torch.Generator().manual_seed(seed_of(1, 2)))
    free_k, free_s = factor.detach().clone().requires_grad_(), values.detach().clone().requires_grad_()
    changed = {"terms.0.factors.0": free_k * k_mask, "overlay.values": free_s * s_mask}
    product = torch.func.functional_call(Dense(m), {f"matrix.{n}": t for n, t in changed.items()}, ())
    (product * target).sum().backward()
    torch.testing.assert_close(factor.grad, free_k.grad)
    torch.testing.assert_close(values.grad, free_s.grad)


class Dense(torch.nn.Module):
    def __init__(self, m: KroneckerMatrix) -> None:
        super().__init__()
        self.matrix = m

    def forward(self) -> torch.Tensor:
        return self.matrix.to_dense()


def seed_of(*key: int | str) -> int:
    from kruify.training.randomness import mix

    return mix("codropout", *key)


def test_training_with_it_differs_and_learns() -> None:
    task = LayeredDelay(count=10)
    teacher = task.model()
    losses = []
    for share in (0.0, 0.2):
        student = convert(teacher, "2*(8x1,1x8)+sparse:25%:1")[0]
        result = finetune(student, task, epochs=4, lr=2e-2, overlay_dropout=share, device="cpu")
        losses.append([entry["loss"] for entry in result.history[1:]])
    assert losses[0] != losses[1]
    assert losses[1][-1] < losses[1][0]
