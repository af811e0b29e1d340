"""Converted files whose plan and tensors do not fit each other: refused before anything is built from the plan."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kruify
from kruify.checkpoint import read, write_safetensors
from kruify.conversion.check import stored_plan, stored_shapes
from kruify.conversion.plan import Plan
from kruify.errors import CorruptError, KruifyError
from kruify.factors import parse
from kruify.layers.matrix import KroneckerMatrix

Tensors = dict[str, torch.Tensor]
NAME = "weight_hh_l0"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tensors, dict[str, str]]:
    torch.manual_seed(0)
    small, _ = kruify.convert(nn.LSTM(8, 36), "2*(6x6,6x6)+diag+sparse:1%:4")
    path = tmp_path_factory.mktemp("stored") / "a.safetensors"
    kruify.save(small, path)
    checkpoint = read(path)
    return dict(checkpoint.tensors), checkpoint.metadata


@pytest.mark.parametrize(
    "specs", ["6x6", "auto:3+diag", "2*(6x6,6x6)+sparse:5%:2", "stacked:3*auto", "6x6;36x1,1x36+diag"]
)
def test_shapes_are_those_of_the_module(specs: str) -> None:
    texts = specs.split(";")
    if specs.startswith("stacked:"):
        structures = (parse(specs).resolve(2 * 36, 36, 2),)
    else:
        structures = tuple(parse(text).resolve(36, 36) for text in texts)
    state = KroneckerMatrix(structures).state_dict()
    assert stored_shapes(structures) == {name: tuple(tensor.shape) for name, tensor in state.items()}


def index(change: Callable[[torch.Tensor], Any]) -> Callable[[Tensors], None]:
    def apply(tensors: Tensors) -> None:
        found = tensors[f"{NAME}.overlay.index"].clone()
        new = change(found)
        tensors[f"{NAME}.overlay.index"] = found if new is None else new

    return apply


BROKEN: dict[str, Callable[[Tensors], Any]] = {
    "row-outside": index(lambda i: i[-1, 0].fill_(4 * 36)),
    "row-negative": index(lambda i: i[0, 0].fill_(-4)),
    "column-outside": index(lambda i: i[0, 1].fill_(36)),
    "unsorted": index(lambda i: i.flip(0)),
    "twice": index(lambda i: i[1].copy_(i[0])),
    "two-gates": index(lambda i: i[-1, 0].fill_(36 * 4 - 2)),
    "index-dtype": index(lambda i: i.long()),
    "extra": lambda t: t.__setitem__(f"{NAME}.other", torch.ones(1)),
    "extra-layer": lambda t: t.__setitem__("weight_hh_l7", torch.ones(1)),
    "dense-beside": lambda t: t.__setitem__(NAME, torch.ones(144, 36)),
    "missing": lambda t: t.pop(f"{NAME}.diagonal"),
    "bias-missing": lambda t: t.pop("bias_hh_l0"),
    "shape": lambda t: t.__setitem__("weight_ih_l0", torch.ones(144, 9)),
    "complex": lambda t: t.update(
        {n: v.to(torch.complex64) for n, v in t.items() if NAME in n and v.dtype.is_floating_point}
    ),
    "whole-numbers": lambda t: t.__setitem__(f"{NAME}.diagonal", t[f"{NAME}.diagonal"].to(torch.int8)),
}


@pytest.mark.parametrize("how", BROKEN)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, good: tuple[Tensors, dict[str, str]], how: str) -> None:
    tensors, metadata = dict(good[0]), good[1]
    BROKEN[how](tensors)
    write_safetensors(tmp_path / "a.safetensors", tensors, metadata)
    with pytest.raises(CorruptError):
        kruify.verify(tmp_path / "a.safetensors")


LAYER: dict[str, list[Any]] = {
    "input_size": [0, -1, 1 << 40, "8", True, None],
    "hidden_size": [0, -36, 1 << 40, 10**400],
    "num_layers": [0, 2, 10**9],
    "proj_size": [-1, 4],
    "dtype": ["float", "nn", "int8", "Tensor", "float64 "],
    "bidirectional": [True, 1],
    "kind": ["gru", "kru", "none"],
    "cell": [True],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in LAYER.items() for value in values])
def test_sizes_in_a_plan_are_bounded(
    tmp_path: Path, good: tuple[Tensors, dict[str, str]], key: str, value: Any
) -> None:
    plan = json.loads(good[1]["kruify.plan"])
    plan["layers"][0][key] = value
    write_safetensors(tmp_path / "a.safetensors", good[0], {**good[1], "kruify.plan": json.dumps(plan)})
    with pytest.raises(KruifyError):
        stored_plan(read(tmp_path / "a.safetensors"))


SPECS = [
    "2000000*(6x6,6x6)",
    "auto:5000",
    "auto:0",
    "9" * 5000 + "*(6x6)",
    "٢x٢",
    "0*(6x6)",
    "+".join(["6x6"] * 5000),
    "6x6,0x6",
]


@pytest.mark.parametrize("spec", SPECS, ids=range(len(SPECS)))
def test_specs_in_a_plan_allocate_nothing(tmp_path: Path, good: tuple[Tensors, dict[str, str]], spec: str) -> None:
    plan = json.loads(good[1]["kruify.plan"])
    plan["layers"][0]["matrices"][NAME] = {"gates": dict.fromkeys("ifgo", spec)}
    write_safetensors(tmp_path / "a.safetensors", good[0], {**good[1], "kruify.plan": json.dumps(plan)})
    with pytest.raises(KruifyError):
        stored_plan(read(tmp_path / "a.safetensors"))


def test_a_layer_twice_and_no_layers(tmp_path: Path, good: tuple[Tensors, dict[str, str]]) -> None:
    plan = json.loads(good[1]["kruify.plan"])
    with pytest.raises(KruifyError, match="twice"):
        Plan.from_json(json.dumps({**plan, "layers": plan["layers"] * 2}))
    write_safetensors(
        tmp_path / "a.safetensors", good[0], {**good[1], "kruify.plan": json.dumps({**plan, "layers": []})}
    )
    with pytest.raises(KruifyError, match="no layers"):
        kruify.verify(tmp_path / "a.safetensors")


def test_mutated_plans_are_read_or_refused(tmp_path: Path, good: tuple[Tensors, dict[str, str]]) -> None:
    draw = random.Random(0)
    for _ in range(300):
        text = list(good[1]["kruify.plan"])
        for _ in range(draw.randint(1, 3)):
            text[draw.randrange(len(text))] = draw.choice('{}[]",:0-19.ex*(+')
        write_safetensors(tmp_path / "a.safetensors", good[0], {**good[1], "kruify.plan": "".join(text)})
        try:
            stored_plan(read(tmp_path / "a.safetensors"))
        except KruifyError as error:
            assert error.exit_code > 1 and "\n" not in str(error)
