from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kruify.quantization import LEVELS, compensated, dequantize, quantize_rows
from kruify.quantization.compensation import ROWS


def matrices(seed: int, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """A matrix, and the second moments of few vectors that lie near a subspace."""
    generator = torch.Generator().manual_seed(seed)
    seen = torch.randn(2 * cols, max(1, cols // 3), generator=generator, dtype=torch.float64)
    seen = seen @ torch.randn(seen.shape[1], cols, generator=generator, dtype=torch.float64)
    return torch.randn(rows, cols, generator=generator), seen.T @ seen / len(seen)


def one_after_another(weight: Tensor, second: Tensor, scale: Tensor, damping: float = 0.01) -> Tensor:
    """The oracle: after each column is rounded, those that are left are what makes the error least."""
    cols = weight.shape[1]
    damped = second + damping * second.diagonal().mean() * torch.eye(cols, dtype=torch.float64)
    order, left, fixed = damped.diagonal().argsort(descending=True).tolist(), weight.double(), torch.zeros(0)
    found = torch.zeros_like(left)
    for at, column in enumerate(order):
        levels = scale.double() * LEVELS.double()
        places = (left[:, column, None] - levels).abs().argmin(1, keepdim=True)
        found[:, column] = levels.expand(len(left), -1).gather(1, places)[:, 0]
        fixed, rest = order[: at + 1], order[at + 1 :]
        wrong = weight.double()[:, fixed] - found[:, fixed]
        left = left.clone()
        if rest:
            taken = torch.linalg.solve(damped[rest][:, rest], damped[rest][:, fixed] @ wrong.T).T
            left[:, rest] = weight.double()[:, rest] + taken
    return found


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), rows=st.integers(1, 5), cols=st.sampled_from([1, 2, 7, 70]))
def test_it_is_what_least_squares_after_each_column_gives(seed: int, rows: int, cols: int) -> None:
    weight, second = matrices(seed, rows, cols)
    scale = quantize_rows(weight, (1,), "int4")[1]
    assert torch.equal(compensated(weight, second, scale), one_after_another(weight, second, scale).float())


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), by_columns=st.booleans())
def test_what_it_gives_is_stored_as_it_is_and_errs_less_at_the_output(seed: int, by_columns: bool) -> None:
    weight, second = matrices(seed, 24, 40)
    dims = (0,) if by_columns else (1,)
    values, scale = quantize_rows(weight, dims, "int4")
    found = compensated(weight, second, scale)
    assert torch.equal(dequantize(*quantize_rows(found, dims, "int4")), found)

    def error(rounded: Tensor) -> float:
        wrong = (weight - rounded).double()
        return float(torch.trace(wrong @ second @ wrong.T))

    assert error(found) < 0.5 * error(dequantize(values, scale))


def test_where_no_input_tells_of_another_each_number_becomes_the_nearest() -> None:
    weight, _ = matrices(0, 6, 10)
    values, scale = quantize_rows(weight, (1,), "int4")
    for second in (torch.eye(10), torch.zeros(10, 10)):
        assert torch.equal(compensated(weight, second, scale), dequantize(values, scale))


def test_rows_do_not_depend_on_those_beside_them() -> None:
    weight, second = matrices(0, ROWS + 3, 6)
    scale = quantize_rows(weight, (1,), "int4")[1]
    apart = [compensated(weight[rows], second, scale[rows]) for rows in (slice(ROWS - 2), slice(ROWS - 2, None))]
    assert torch.equal(compensated(weight, second, scale), torch.cat(apart))
