"""Layers whose weights are stored as int8: close to the float32 layer, and computed in integers where possible."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from all_pairs import all_pairs
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import kruify
from kruify.conversion.storing import store_as
from kruify.factors import parse
from kruify.layers import KRUGRU, KRULSTM, KRURNN, KRUGRUCell, KRULSTMCell, KRURNNCell
from kruify.layers.dispatch import BACKENDS, choose
from kruify.layers.int8 import matrices
from kruify.layers.matrix import KroneckerMatrix
from kruify.layers.storage import mark
from kruify.ops import has_kernel
from kruify.quantization import round_to

pytestmark = pytest.mark.skipif(not has_kernel("cpu"), reason="no compiled kernels")
KINDS = {"lstm": KRULSTM, "gru": KRUGRU, "tanh": KRURNN, "relu": KRURNN}
CELLS = {"lstm": KRULSTMCell, "gru": KRUGRUCell, "rnn": KRURNNCell}
GATES = {"lstm": 4, "gru": 3, "tanh": 1, "relu": 1}


def make(kind: str, factors: str | None, of_input: str | None = None, **options: Any) -> Any:
    """A layer with 11 inputs and 24 hidden units, all of whose weights are marked as stored in int8."""
    if kind in ("tanh", "relu"):
        options["nonlinearity"] = kind
    specs = [f if f is None else f.format(rows=24 * GATES[kind], gates=GATES[kind]) for f in (factors, of_input)]
    layer = KINDS[kind](11, 24, factors=specs[0] or {}, input_factors=specs[1], **options)
    for matrix in layer.modules():
        if isinstance(matrix, KroneckerMatrix) and matrix.overlay is not None:
            nn.init.normal_(matrix.overlay.values, std=0.1)
    matrices = [name for name, child in layer.named_children() if isinstance(child, KroneckerMatrix)]
    dense = [name for name, p in layer.named_parameters(recurse=False) if p.dim() > 1]
    mark(layer, dict.fromkeys(matrices + dense, "int8"))
    return layer.eval()


def unmarked(layer: Any, x: Any, hx: Any = None) -> Any:
    """What the float32 path gives."""
    with torch.no_grad():
        return layer.compute(x, hx, lambda *_: BACKENDS["reference"])


def flat(output: Any) -> list[Tensor]:
    if isinstance(output, PackedSequence):
        return [output.data]
    return [output] if isinstance(output, Tensor) else [t for part in output for t in flat(part)]


@pytest.mark.parametrize(
    ("kind", "factors", "of_input", "options", "form"),
    all_pairs(
        kind=("lstm", "gru", "tanh", "relu"),
        factors=(
            *(None, "stacked:5*({rows}x1,1x24)", "3*(24x1,1x24)", "2*(1x24,24x1)+3*(24x1,1x24)"),
            *("5*(24x1,1x24)+sparse:3%", "5*(24x1,1x24)+sparse:3%+diag", "4*(2x24,12x1)+diag"),
        ),
        of_input=(
            None,
            "3*(24x1,1x11)",
            "3*(24x1,1x11)+sparse:3%",
            "12x1,2x11",
            "stacked:2*({gates}x11,24x1)",
            "4x11,6x1",
        ),
        options=({}, {"bidirectional": True, "num_layers": 2}, {"bias": False, "batch_first": True}),
        form=("batch", "state", "packed", "unbatched"),
    ),
)
def test_parity_with_float32(
    kind: str, factors: str | None, of_input: str | None, options: dict[str, Any], form: str
) -> None:
    if "stacked" in f"{factors} {of_input}" and kind in ("tanh", "relu"):
        pytest.skip("one gate is not stacked")
    layer = make(kind, factors, None if "num_layers" in options else of_input, **options)
    x, hx = torch.randn(7, 3, 11), None
    if options.get("batch_first"):
        x = x.transpose(0, 1)
    if form == "packed":
        x = pack_padded_sequence(x, torch.tensor([2, 5, 3]), layer.batch_first, enforce_sorted=False)
    elif form == "unbatched":
        x = x[0]
    elif form == "state":
        hx = [torch.randn(layer.num_layers * layer.num_directions, 3, 24) for _ in range(2 if kind == "lstm" else 1)]
        hx = tuple(hx) if kind == "lstm" else hx[0]
    with torch.no_grad():
        found = layer(x, hx)
    wanted = unmarked(layer, x, hx)
    for a, b in zip(flat(found), flat(wanted), strict=True):
        assert a.shape == b.shape and not torch.equal(a, b)
        torch.testing.assert_close(a, b, atol=0.02, rtol=0.02)


@pytest.mark.parametrize(
    "of_input", [None, "3*(24x1,1x11)", "3*(24x1,1x11)+sparse:3%", "2*(12x1,2x11)", "stacked:2*({gates}x11,24x1)"]
)
def test_the_input_matrix_is_computed_as_it_is_stored(of_input: str | None) -> None:
    layer, x = make("lstm", "5*(24x1,1x24)", of_input), torch.randn(7, 3, 11)
    with torch.no_grad():
        both = layer(x)[0]
        mark(layer, {"weight_hh_l0": "int8"})
        assert not torch.equal(both, layer(x)[0])


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    "specs",
    [
        ["2*(24x1,1x11)", "2x11,12x1", "2*(12x1,2x11)", "24x1,1x11+2x11,12x1"],
        ["2*(24x1,1x11)", "sparse:20%:8", "sparse:20%:8"],
        ["2*(96x1,1x11)"],
        ["2*(48x1,2x11)"],
        ["2*(4x11,24x1)"],
        ["8x11,12x1+96x1,1x11"],
    ],
)
def test_outer_products_are_those_of_the_matrix(specs: list[str], scaled: bool) -> None:
    gates = 4 if len(specs) == 1 else len(specs)
    stacked = gates // len(specs)
    structures = [replace(parse(spec).resolve(24 * stacked, 11, stacked), scaled=scaled) for spec in specs]
    matrix = KroneckerMatrix(structures)
    for name, parameter in matrix.named_parameters():
        nn.init.zeros_(parameter) if "overlay" in name else nn.init.normal_(parameter)
        if ".factors." in name and parameter.shape[3] == 1:  # as it is stored
            parameter.data = round_to(parameter, "int8", (0, 2) if stacked > 1 else (2,))
    first, second, layout = matrices(matrix, gates)
    assert first is not None
    product = [
        rows[:, :count] @ first[start : start + count]
        for rows, start, count in zip(second.chunk(gates), layout[4::2], layout[5::2], strict=True)
    ]
    torch.testing.assert_close(torch.cat(product), matrix.to_dense())


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("factors", [None, "5*(24x1,1x24)+sparse:3%"])
def test_a_cell_is_one_step_of_the_layer(kind: str, factors: str | None) -> None:
    layer = make("tanh" if kind == "rnn" else kind, factors)
    cell = CELLS[kind](11, 24, factors=factors or {})
    cell.load_state_dict({name.replace("_l0", ""): t for name, t in layer.state_dict().items()})
    x, state = torch.randn(3, 11), [torch.randn(3, 24) for _ in range(2 if kind == "lstm" else 1)]
    with torch.no_grad():
        cell(x, tuple(state) if kind == "lstm" else state[0])  # in float32: what it keeps may not outlive the mark
        mark(cell, {"weight_ih": "int8", "weight_hh": "int8"})
        found = flat(cell(x, tuple(state) if kind == "lstm" else state[0]))
        given = [s[None] for s in state]
        _, last = layer(x[None], tuple(given) if kind == "lstm" else given[0])
        for a, b in zip(found, flat(last), strict=True):
            assert torch.equal(a, b[0])
        for a, b in zip(flat(cell(x[0])), flat(cell(x[:1])), strict=True):
            assert torch.equal(a, b[0])


@pytest.mark.parametrize("factors", [None, "5*(24x1,1x24)+sparse:3%"])
def test_four_bits_are_computed_in_integers(factors: str | None) -> None:
    layer, x = make("gru", factors, "3*(24x1,1x11)"), torch.randn(7, 3, 11)
    store_as(layer, {"weight_hh_l0": "int4", "weight_ih_l0": "int4"})
    with torch.no_grad():
        found = layer(x)
    for a, b in zip(flat(found), flat(unmarked(layer, x, None)), strict=True):
        assert not torch.equal(a, b)
        torch.testing.assert_close(a, b, atol=0.02, rtol=0.02)


def test_where_integers_do_not_serve_float32_does() -> None:
    layer, x = make("lstm", "5*(24x1,1x24)"), torch.randn(3, 2, 11)

    class Seen:
        def __init__(self, data: Tensor) -> None:
            self.data, self.steps, self.batch = data, 3, 2

    def backend(layer: Any, x: Tensor = x) -> str:
        return type(choose(layer, Seen(x), ())).__name__  # type: ignore[arg-type]

    assert backend(layer) != "Int8Backend"  # parameters that need gradients
    with torch.no_grad():
        assert backend(layer) == "Int8Backend"
        assert backend(layer, x.double()) != "Int8Backend"
        with torch.autocast("cpu"):
            assert backend(layer) != "Int8Backend"
        for other in (
            make("lstm", "6x6,4x4"),
            make("lstm", "5*(24x1,1x24)+6x6,4x4"),
            make("lstm", "2*(12x24,2x1)"),  # more numbers as outer products than the dense matrix
            make("lstm", None, proj_size=5),
            make("lstm", "5*(24x1,1x24)", backend="reference"),
        ):
            assert backend(other) != "Int8Backend"
        layer.weight_hh_l0.storage = "float16"
        assert backend(layer) != "Int8Backend"
    assert backend(make("lstm", None).requires_grad_(False)) == "Int8Backend"


def test_a_state_that_needs_derivatives_gets_them() -> None:
    """A frozen decoder passes gradients on to what made its initial state."""
    layer = kruify.quantize(nn.GRU(4, 6), "int8").requires_grad_(False)
    x, h = torch.randn(3, 2, 4), torch.randn(1, 2, 6, requires_grad=True)
    layer(x, h)[0].sum().backward()
    assert h.grad is not None and h.grad.abs().min() > 0


def test_a_pruned_layer_is_quantised_written_and_read(tmp_path: Path) -> None:
    model = nn.Sequential(OrderedDict(rnn=nn.GRU(4, 6)))
    prune.l1_unstructured(model.rnn, "weight_hh_l0", 0.5)
    wanted = model.rnn.weight_hh_l0.detach()
    kruify.save(kruify.quantize(model, "int8"), tmp_path / "small.kru.safetensors")
    weight = kruify.load(tmp_path / "small.kru.safetensors")["rnn"].weight_hh_l0
    assert torch.equal(weight == 0, wanted == 0)
    assert (weight - wanted).abs().max() <= wanted.abs().max() / 254
