"""What the layers hand to the CUDA kernels."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace

import pytest
import torch

from kruify.layers import KRULSTM, dispatch, kernel, storage
from kruify.ops import library, precision
from kruify.ops.stages import plan, plan_pair


@pytest.mark.parametrize(
    ("bits", "wanted"), [(8, (16, 16)), (9, (32, 16)), (10, (32, 32)), (11, (64, 32)), (12, (64, 64))]
)
def test_chains_merge_to_the_fixed_shapes(bits: int, wanted: tuple[int, int]) -> None:
    found = plan_pair(((2, 2),) * bits, 4)
    assert found.shapes == tuple((n, n) for n in wanted)
    assert sum(found.groups) == bits and found.merges


@pytest.mark.parametrize(
    "shapes", [((32, 32), (16, 16)), ((16, 16), (32, 32)), ((8, 8), (8, 8), (16, 16)), ((4, 8), (12, 8), (2, 2))]
)
def test_pairs_keep_the_product(shapes: tuple[tuple[int, int], ...]) -> None:
    found = plan_pair(shapes, 1)
    assert len(found.shapes) == 2
    for side in (0, 1):
        assert math.prod(s[side] for s in found.shapes) == math.prod(s[side] for s in shapes)
    assert all(n % 4 == 0 for s in found.shapes for n in s)


@pytest.mark.parametrize("shapes", [((3, 3), (5, 5)), ((512, 1), (1, 512)), ((64, 64),), ((2, 2), (128, 128))])
def test_what_makes_no_pair_is_planned_as_for_the_cpu(shapes: tuple[tuple[int, int], ...]) -> None:
    assert plan_pair(shapes, 4) == plan(shapes, 4)


def test_forms_for_both_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """With CUDA kernels there a matrix is planned for both devices; on the CPU the CPU's plan is used."""
    monkeypatch.setattr(library, "_devices", {"cpu", "cuda"})
    layer = KRULSTM(8, 256, factors="2x2")
    matrix = layer.weight_hh_l0
    assert len(kernel.form_of(matrix).plans[0].shapes) == 3
    forms = matrix.__dict__[kernel._CACHE]
    assert forms["cuda"].plans[0].shapes == ((16, 16), (16, 16))
    with torch.device("meta"):
        x = torch.empty(3, 8)
    monkeypatch.setattr(kernel, "form_of", lambda m: forms["cuda"])
    asked: list[tuple[object, ...]] = []

    def fits(*question: object) -> bool:
        asked.append(question)
        return question[4] is False

    monkeypatch.setattr(kernel, "template_fits", fits)
    assert not dispatch._cuda_takes(layer, x, 1, False, 0, 0)
    with torch.no_grad():
        assert dispatch._cuda_takes(layer, x, 1, False, 0, 0)
    assert asked == [(4, 1, 16, 16, training, 0, 0) for training in (True, False)]
    assert not dispatch._cuda_takes(layer.double(), x.double(), 1, False, 0, 0)


@pytest.mark.parametrize(
    ("factors", "wanted"),
    [("4*(16x1,1x16)", (4, 4)), ("4*(1x16,16x1)", (4, 4)), ("2*(16x1,1x16)+3*(16x1,1x16)", (4, 5)),
     ("stacked:4*(64x1,1x16)", (1, 4)), ("4*(4x4,4x4)", None), ("4*(16x1,1x16)+2*(4x4,4x4)", (4, 4, 2, 4, 4)),
     ("4*(16x1,1x16)+2*(4x4,4x4)+3*(2x2,8x8)", None), ("4*(16x1,1x16)+2*(2x4,8x4)", None),
     ("stacked:4*(64x1,1x16)+sparse:12.5%", (1, 4, 0, 0, 0, 16, 8))],
)  # fmt: skip
def test_what_the_low_rank_kernel_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, factors: str, wanted: tuple[int, ...] | None
) -> None:
    """Sets of rows, the rank, and what stands beside; gates that have rows in common hand them over once on any
    device."""
    layer, asked = KRULSTM(8, 16, factors=factors, device="meta"), []
    found = kernel.LowRank(16, 4, *wanted) if wanted else None
    assert kernel.low_rank(layer.weight_hh_l0) == found
    if wanted is None or len(wanted) > 2:
        return
    monkeypatch.setattr(kernel, "low_rank_pays", lambda *question: asked.append(question) or True)
    x = torch.empty(3, 8, device="meta")
    with torch.no_grad():
        assert dispatch._cuda_takes(layer, x, 7, True, 0, 0)
    assert asked == [(found, 7, False, True, precision.FLOAT32, 0)]
    stages = kernel.parameters_of(layer.weight_hh_l0, kernel.form_of(layer.weight_hh_l0))
    assert stages[1].shape[0] == wanted[0]


@pytest.mark.parametrize("factors", ["4x4", None])
def test_a_dense_weight_on_a_gpu_is_said_once(factors: str | None) -> None:
    """Also of a layer whose dense weights are stored in eight bits, which the CPU computes in integers."""
    layer = KRULSTM(8, 16, factors=factors)
    storage.mark(layer, {"weight_hh_l0": "int8"})
    x = SimpleNamespace(device=torch.device("cuda", 0), is_cuda=True, dtype=torch.float32)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        assert [dispatch.pick(layer, 3, 2, x) for _ in range(3)] == ["dense"] * 3  # type: ignore[arg-type]
    assert len(told) == 1 and "dense weight" in str(told[0].message)


@pytest.mark.parametrize("compiled_for", [True, False])
def test_a_gpu_that_the_library_was_not_compiled_for_is_left_to_torch(
    monkeypatch: pytest.MonkeyPatch, compiled_for: bool
) -> None:
    """There the smallest template does not fit: the library holds no code to run."""
    monkeypatch.setattr(library, "_devices", {"cpu", "cuda"})
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(kernel, "template_fits", lambda *question: asked.append(question) or compiled_for)
    matrix = KRULSTM(8, 256, factors="2x2").weight_hh_l0
    x = SimpleNamespace(device=torch.device("cuda", 3), is_cuda=True, dtype=torch.float32)
    assert kernel.serves(matrix, x, False) == compiled_for  # type: ignore[arg-type]
    assert asked == [(1, 1, 4, 4, False, precision.FLOAT32, 3)]
