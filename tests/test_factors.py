"""The factor grammar and its counts."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kruify.errors import FactorSpecError
from kruify.factors import Structure, Term, balanced, contraction_order, parse, two_factor_shapes


@pytest.mark.parametrize(
    ("text", "rows", "cols", "terms"),
    [
        ("2x2", 512, 512, [(1, ((2, 2),) * 9)]),
        ("16x16", 256, 256, [(1, ((16, 16),) * 2)]),
        ("256x256", 256, 256, [(1, ((256, 256),))]),
        ("32x32,16x16", 512, 512, [(1, ((32, 32), (16, 16)))]),
        ("512x1, 1x512", 512, 512, [(1, ((512, 1), (1, 512)))]),
        ("4*(32x32,16x16)", 512, 512, [(4, ((32, 32), (16, 16)))]),
        ("3*2x2", 8, 8, [(3, ((2, 2),) * 3)]),
        ("auto", 512, 512, [(1, ((32, 32), (16, 16)))]),
        ("auto:3", 512, 512, [(1, ((8, 8),) * 3)]),
        ("2*auto", 650, 650, [(2, ((26, 26), (25, 25)))]),
        ("auto", 257, 257, [(1, ((257, 257),))]),
        ("auto", 1024, 256, [(1, ((32, 16), (32, 16)))]),
        (
            "2*(32x32,16x16)+8*(512x1,1x512)",
            512,
            512,
            [(2, ((32, 32), (16, 16))), (8, ((512, 1), (1, 512)))],
        ),
    ],
)
def test_resolves(text: str, rows: int, cols: int, terms: list[tuple[int, tuple[tuple[int, int], ...]]]) -> None:
    structure = parse(text).resolve(rows, cols)
    assert [(t.rank, t.factors) for t in structure.terms] == terms
    assert structure.parameters == sum(rank * sum(p * q for p, q in factors) for rank, factors in terms)


def test_diagonal_and_overlay() -> None:
    structure = parse("16x16+diag+sparse:2%").resolve(256, 256)
    assert structure.diagonal
    assert (structure.sparse_blocks, structure.block) == (round(0.02 * 256 * 256 / 8), 8)
    assert structure.parameters == 512 + 256 + 164 * 8
    assert parse("sparse:10%").resolve(50, 50).block == 2  # 8 and 4 do not divide 50
    assert parse("sparse:10%:1").resolve(64, 64).sparse_blocks == 410
    assert parse("sparse:0.0001%").resolve(8, 8).sparse_blocks == 1  # never an overlay of nothing


@pytest.mark.parametrize(
    ("text", "rows", "cols", "words"),
    [
        ("3x3", 256, 256, "Specs that fit: '4x4', '8x8,8x8,4x4'"),
        ("32x32,8x8", 512, 512, "multiply to 256x256, not to 512x512. Specs that fit: '32x32,16x16'"),
        ("2x2", 50, 50, "'auto'"),
        ("2x2", 650, 650, "'13x13"),
        ("2x2", 257, 257, "'auto'"),
        ("2x2", 512, 256, "Specs that fit"),
        ("sparse:2%:8", 50, 50, "blocks of 8 rows do not divide 50"),
    ],
)
def test_misfits_name_specs_that_fit(text: str, rows: int, cols: int, words: str) -> None:
    with pytest.raises(FactorSpecError) as caught:
        parse(text).resolve(rows, cols)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["", " ", "x", "2x", "2x2,", "0*(2x2)", "2x0", "4*(2x2", "auto:0", "diag+diag", "sparse:0%", "sparse:101%",
     "sparse:2", "sparse:1%+sparse:1%", "2x2++2x2", "-2x2", "2*(2x2+4x4)", "sparse:5%:0", "2,2",
     "4x4," * 20_000 + "4x4"],
)  # fmt: skip
def test_not_in_the_grammar(text: str) -> None:
    with pytest.raises(FactorSpecError) as caught:
        parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("rows", "cols"), [(256, 256), (50, 50), (650, 650), (257, 257), (768, 256), (1, 7)])
def test_suggestions_fit_and_auto_always_does(rows: int, cols: int) -> None:
    with pytest.raises(FactorSpecError) as caught:
        parse("999x999").resolve(rows, cols)
    named = [part for i, part in enumerate(str(caught.value).split("'")) if i % 2]
    assert named[-1] == "auto"
    for spec in named:
        parse(spec).resolve(rows, cols)


shapes = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=4)


@given(st.integers(1, 9), shapes, st.booleans(), st.integers(0, 40))
def test_text_of_a_structure_reads_back(rank: int, factors: list[tuple[int, int]], diagonal: bool, blocks: int) -> None:
    rows, cols = Term(tuple(factors)).rows, Term(tuple(factors)).cols
    terms = (Term(tuple(factors), min(rank, rows * cols)),)  # a spec of more terms than entries is refused
    blocks = min(blocks, rows * cols)
    structure = Structure(rows, cols, terms, diagonal, blocks, 1)
    assert parse(str(structure)).resolve(rows, cols) == structure


@given(shapes)
def test_contraction_order_is_the_cheapest(factors: list[tuple[int, int]]) -> None:
    def cost(order: tuple[int, ...]) -> int:
        sizes, total = [q for _, q in factors], 0
        for f in order:
            sizes[f] = factors[f][0]
            total += math.prod(sizes) * factors[f][1]
        return total

    cheapest = min(cost(order) for order in itertools.permutations(range(len(factors))))
    assert cost(contraction_order(factors)) == cheapest
    assert Term(tuple(factors)).multiply_adds == cheapest


def test_costs_that_the_issue_names() -> None:
    """Eight balanced terms at H=256 cost what the dense gate costs; low rank costs what it holds."""
    assert parse("8*(16x16,16x16)").resolve(256, 256).multiply_adds == 256 * 256
    assert parse("8*(256x1,1x256)").resolve(256, 256).multiply_adds == 4096


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 4))
def test_balanced_fills_the_size(rows: int, cols: int, count: int) -> None:
    term = Term(balanced(rows, cols, count))
    assert (term.rows, term.cols) == (rows, cols)


def test_two_factor_shapes_are_all_pairs() -> None:
    assert set(two_factor_shapes(4, 2)) == {
        ((1, 2), (4, 1)), ((2, 1), (2, 2)), ((2, 2), (2, 1)), ((4, 1), (1, 2)),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "gates", "factors"),
    [
        ("stacked:26*(2048x1,1x512)", 4, ((2048, 1), (1, 512))),
        ("stacked:128x32,16x16", 4, ((128, 32), (16, 16))),
        ("stacked:auto", 4, ((128, 32), (16, 16))),
        ("Stacked: auto:3 + sparse:2%", 4, ((32, 8), (8, 8), (8, 8))),
        ("stacked:auto", 3, ((96, 32), (16, 16))),
    ],
)
def test_stacked_gates_are_one_matrix(text: str, gates: int, factors: tuple[tuple[int, int], ...]) -> None:
    structure = parse(text).resolve(gates * 512, 512, gates)
    assert (structure.gates, structure.terms[0].factors) == (gates, factors)
    assert structure.parameters < sum(parse("26*(512x1,1x512)").resolve(512, 512).parameters for _ in range(gates))
    assert parse(str(structure)).resolve(gates * 512, 512, gates) == structure
    assert str(structure).startswith("stacked:")


def test_what_stacked_gates_count() -> None:
    structure = parse("stacked:2*(64x4,4x4)+sparse:1.5625%:2").resolve(256, 16, 4)
    assert structure.parameters == 2 * (64 * 4 + 16) + 64
    assert structure.multiply_adds == 2 * (4 * 4 * 4 + 4 * 64 * 4) + 64
    assert parse("stacked:sparse:10%").resolve(3 * 50, 50, 3).block == 2  # within one gate


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stacked:16x16,16x16", "multiply to 256x256, not to 768x256. Specs that fit: 'stacked:24x16,32x16'"),
        ("stacked:16x16,48x16", "first factor's 16 rows are not shared out among 3 gates"),
        ("stacked:2x2", "do not fill a 768x256 matrix"),
        ("stacked:auto+diag", "stacked gates have no diagonal"),
        ("stacked:", "not a factor spec"),
    ],
)
def test_stacked_gates_that_do_not_fit(text: str, words: str) -> None:
    with pytest.raises(FactorSpecError) as caught:
        parse(text).resolve(768, 256, 3)
    assert words in str(caught.value)
