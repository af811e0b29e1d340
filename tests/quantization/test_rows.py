"""Integers and scales against the same arithmetic in numpy, and what quantising twice gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from kruify.errors import UnsupportedError
from kruify.quantization import (
    EQUAL_LEVELS,
    LEVELS,
    dequantize,
    in_pairs,
    pack,
    pays,
    quantize_rows,
    round_to,
    row_dims,
    unpack,
)

MATRICES = arrays.arrays(
    np.float32,
    arrays.array_shapes(min_dims=2, max_dims=4, max_side=6),
    elements=st.floats(-float(np.finfo(np.float32).max), float(np.finfo(np.float32).max), width=32),
)


def oracle(values: np.ndarray, axes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Integers and scales in float64, the scale to the nearest of 8 significant bits."""
    exact = np.maximum((np.abs(values).max(axes, keepdims=True) / np.float32(127)).astype(np.float64), 2.0**-126)
    fraction, exponent = np.frexp(exact)
    scale = np.ldexp(np.rint(np.ldexp(fraction, 8)), exponent - 8)
    return np.clip(np.rint((values / scale.astype(np.float32)).astype(np.float64)), -127, 127), scale


@given(MATRICES)
def test_integers_and_scales_are_those_of_numpy(values: np.ndarray) -> None:
    axes = tuple(range(1, values.ndim))
    found, scale = quantize_rows(torch.from_numpy(values), axes)
    wanted, wanted_scale = oracle(values, axes)
    assert found.dtype == torch.int8 and scale.dtype == torch.bfloat16
    np.testing.assert_array_equal(found.numpy(), wanted)
    np.testing.assert_array_equal(scale.float().numpy(), wanted_scale)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@given(values=MATRICES)
def test_what_was_rounded_has_the_same_integers_and_scales(values: np.ndarray, dtype: str) -> None:
    tensor = torch.from_numpy(values)
    found, scale = quantize_rows(tensor, (-1,), dtype)
    rounded = dequantize(found, scale)
    exact = found.double() * scale.double()
    assert torch.equal(rounded.double(), exact)
    again, scale_again = quantize_rows(rounded, (-1,), dtype)
    assert torch.equal(again, found) and torch.equal(scale_again, scale)
    gap = int(LEVELS.int().diff().max()) if dtype == "int4" else 1
    within = (tensor.double() - exact).abs() <= gap * scale.double() / 2
    assert bool((within | (found.abs() == 127) if dtype == "int4" else within).all())


# NF4 as published (Dettmers et al. 2023, appendix E)
NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


def test_four_bits_are_the_nearest_levels_at_the_best_scale() -> None:
    levels = np.rint(127 * NF4).astype(np.float32)
    np.testing.assert_array_equal(LEVELS.numpy(), levels)
    rows = np.random.default_rng(0).laplace(size=(200, 256)).astype(np.float32)
    found, scale = quantize_rows(torch.from_numpy(rows), (1,), "int4")
    integers = np.array(
        [*sorted({abs(level) for level in levels} - {0.0})[::-1], *(127 / np.array([0.9, 0.8, 0.7, 0.6]))]
    )
    scales = np.abs(rows).max(1, keepdims=True) / integers[:, None, None]
    scales = torch.from_numpy(scales).bfloat16().double().numpy()
    nearest = levels[np.abs(rows[..., None] / scales[..., None] - levels).argmin(-1)]  # (scales, rows, columns)
    errors = np.square(nearest * scales - rows).sum(2)
    best = errors.argmin(0)
    assert {0, 14, 15} <= set(best)  # as they are, clipped, and more than that
    np.testing.assert_array_equal(scale.double().numpy()[:, 0], scales[best, range(200), 0])
    np.testing.assert_array_equal(found.numpy(), nearest[best, range(200)])


@pytest.mark.parametrize("level", sorted({abs(level) for level in LEVELS.tolist()} - {0}))
def test_rows_that_miss_the_largest_levels_keep_their_numbers(level: int) -> None:
    """Weights that were trained with scales from before are in a file what they were in training."""
    small = LEVELS[LEVELS.abs() <= level]
    values = small[torch.from_numpy(np.random.default_rng(0).integers(0, len(small), (50, 16)))]
    values[:, 0] = LEVELS[LEVELS.abs() == level][0]
    rounded = dequantize(values, torch.from_numpy(np.random.default_rng(1).random((50, 1))).bfloat16())
    assert torch.equal(dequantize(*quantize_rows(rounded, (1,), "int4")), rounded)


def test_given_scales_are_taken() -> None:
    scale, rows = torch.tensor([[0.5], [0.25]], dtype=torch.bfloat16), torch.tensor([[3.0, 70.0], [-1.0, 6.0]])
    found, same = quantize_rows(rows, (1,), "int4", scale)
    assert found.tolist() == [[10, 127], [0, 20]]
    assert same is scale
    with pytest.raises(UnsupportedError, match="NaN or infinite"):
        quantize_rows(rows * torch.nan, (1,), "int4", scale)


@pytest.mark.parametrize("power", [-100, 110])
def test_rows_of_any_magnitude_get_the_same_integers(power: int) -> None:
    """Squares of their errors are beyond what float32 holds."""
    rows = torch.from_numpy(np.random.default_rng(0).laplace(size=(200, 32)).astype(np.float32))
    (found, scale), (same, other) = (quantize_rows(r, (1,), "int4") for r in (rows, rows * 2.0**power))
    assert torch.equal(found, same) and torch.equal(scale * 2.0**power, other)


@given(st.lists(st.integers(1, 4), min_size=4, max_size=4), st.integers(0, 3), st.integers(0, 99))
def test_two_integers_share_a_byte(shape: list[int], dim: int, seed: int) -> None:
    shape[dim] *= 2
    places = np.random.default_rng(seed).integers(0, 16, shape)
    packed = pack(LEVELS[torch.from_numpy(places)], dim)
    low, high = (places.take(range(first, shape[dim], 2), dim) for first in (0, 1))
    np.testing.assert_array_equal(packed.numpy(), (low + 16 * high).astype(np.uint8))
    assert torch.equal(unpack(packed, dim), LEVELS[torch.from_numpy(places)])
    older = places - 16 * (places > 7)  # in two's complement
    np.testing.assert_array_equal(unpack(packed, dim, EQUAL_LEVELS).numpy(), older)
    assert in_pairs((3, 4, 5), (0, 1)) and not in_pairs((3, 4, 5), (2,)) and not in_pairs((3, 2), (1,))


def test_rows() -> None:
    assert row_dims((3, 5)) == (1,) and row_dims((3, 5, 2, 2)) == (1, 2, 3)  # outputs, output channels
    assert row_dims((4, 8, 16, 4), factor=True) == (3,)
    assert row_dims((4, 8, 16, 1), factor=True) == (2,)  # low rank: the column of a term
    assert row_dims((4, 8, 16, 1), factor=True, shared=True) == (0, 2)  # in all gates
    assert row_dims((1, 8, 1, 16), factor=True) == (3,)
    assert pays((3, 2), (1,)) and not pays((3, 1), (1,)) and not pays((0, 2), (1,))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none_are_refused(bad: float) -> None:
    with pytest.raises(UnsupportedError, match="NaN or infinite"):
        quantize_rows(torch.tensor([[1.0, bad]]), (1,))


def test_a_double_beyond_float32_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="NaN or infinite"):
        quantize_rows(torch.tensor([[1e300, 0.0]], dtype=torch.float64), (1,))


@pytest.mark.parametrize(("dtype", "wanted"), [("float16", np.float16), ("bfloat16", None), ("float32", np.float32)])
def test_rounding_to_floats(dtype: str, wanted: type | None) -> None:
    x = torch.linspace(-3, 3, 50)[None]
    expected = x.bfloat16().float() if wanted is None else torch.from_numpy(x.numpy().astype(wanted).astype(np.float32))
    assert torch.equal(round_to(x, dtype, (1,)), expected)


def test_rounding_to_int8_keeps_the_dtype() -> None:
    x = torch.randn(3, 5, dtype=torch.float64)
    rounded = round_to(x, "int8", (1,))
    assert rounded.dtype == torch.float64
    assert torch.equal(rounded, dequantize(*quantize_rows(x, (1,))).double())
