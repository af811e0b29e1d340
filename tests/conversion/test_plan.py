"""Plans: from specs and patterns, through JSON and back, and what they refuse."""

from __future__ import annotations

import json
from typing import Any

import pytest
from torch import nn

from kruify.conversion.locate import RecurrentLayer, locate
from kruify.conversion.plan import Plan, make_plan
from kruify.errors import FactorSpecError, KruifyError, PlanError, UnsupportedError


def layers() -> list[RecurrentLayer]:
    net = nn.ModuleDict({"encoder": nn.LSTM(12, 16, 2, bidirectional=True), "decoder": nn.GRU(12, 8)})
    return locate(net).layers


def specs(plan: Plan) -> dict[str, list[str]]:
    return {layer.full_name(w): [str(s) for s in structures] for layer, w, structures in plan.matrices()}


def test_default_is_every_recurrent_matrix() -> None:
    found = specs(make_plan(layers(), "auto"))
    assert list(found) == [
        *(f"encoder.weight_hh_l{k}{d}" for k in (0, 1) for d in ("", "_reverse")),
        "decoder.weight_hh_l0",
    ]
    assert found["encoder.weight_hh_l0"] == ["4x4,4x4"] * 4
    assert found["decoder.weight_hh_l0"] == ["4x4,2x2"] * 3


def test_input_factors_add_the_input_matrices() -> None:
    found = specs(make_plan(layers(), "auto", "auto"))
    assert found["encoder.weight_ih_l1"] == ["4x8,4x4"] * 4
    assert len(found) == 10


def test_patterns() -> None:
    found = specs(make_plan(layers(), "auto", only=["encoder"], skip=["*_reverse"]))
    assert list(found) == ["encoder.weight_hh_l0", "encoder.weight_hh_l1"]
    found = specs(
        make_plan(
            layers(),
            "auto",
            overrides={
                "encoder*": "2x2",
                "encoder.weight_hh_l1": "16x1,1x16",
                "decoder.weight_hh_l0.n": "dense",
                "encoder.weight_hh_l0_reverse": "dense",
                "decoder.weight_ih_l0": "4x6,2x2",
            },
        )
    )
    assert found["encoder.weight_hh_l0"] == ["2x2,2x2,2x2,2x2"] * 4
    assert found["encoder.weight_hh_l1"] == ["16x1,1x16"] * 4  # a name written out beats a glob
    assert "encoder.weight_hh_l0_reverse" not in found
    assert found["decoder.weight_hh_l0"] == ["4x4,2x2", "4x4,2x2", "8x8"]  # one gate dense
    assert found["decoder.weight_ih_l0"] == ["4x6,2x2"] * 3


def test_a_name_written_out_is_no_glob() -> None:
    """Nodes of ONNX graphs have such names."""
    found, name = locate(nn.ModuleDict({"rnn[0]": nn.RNN(4, 8)})).layers, "rnn[0].weight_hh_l0"
    assert specs(make_plan(found, "dense", overrides={name: "8x1,1x8"})) == {name: ["8x1,1x8"]}
    assert list(specs(make_plan(found, only=["rnn[0]"]))) == [name]


@pytest.mark.parametrize("pattern", ["only", "skip", "overrides"])
def test_a_pattern_that_matches_nothing_names_the_nearest(pattern: str) -> None:
    value: Any = {"encodr": "2x2"} if pattern == "overrides" else ["encodr"]
    with pytest.raises(PlanError, match=r"'encodr' matches no layer.*nearest name is 'encoder'"):
        make_plan(layers(), "auto", **{pattern: value})


def test_misfit_names_the_matrix() -> None:
    with pytest.raises(FactorSpecError, match=r"encoder\.weight_hh_l0 gate i \(16x16\): factors 3x3"):
        make_plan(layers(), "3x3")


def test_json_round_trip() -> None:
    plan = make_plan(
        [*layers(), *locate(nn.ModuleDict({"c": nn.RNNCell(3, 4)})).layers],
        "2*auto+diag+sparse:3.1%:1",
        "auto",
        overrides={"decoder.weight_hh_l0.n": "dense"},
    )
    again = Plan.from_json(plan.to_json(indent=2))
    assert again == plan == Plan.from_json(plan.to_compact_json())
    assert all(s.scaled == (layer.kind == "rnn") for layer, _, structures in again.matrices() for s in structures)


def test_the_compact_form_says_what_is_no_default() -> None:
    net = nn.ModuleDict({"a": nn.LSTM(3, 4), "b": nn.GRUCell(4, 4), "c": nn.RNN(4, 4)})
    plan = make_plan(locate(net).layers, "2x2", overrides={"a": "stacked:auto", "b.weight_hh.n": "dense"})
    a, b, c = json.loads(plan.to_compact_json())["layers"]
    sizes, options = {"input_size": 4, "hidden_size": 4}, {"batch_first": False, "dropout": 0.0}
    of_a, of_b = (
        {"weight_hh_l0": "stacked:8x2,2x2"},
        {"weight_hh": {"gates": {"r": "2x2,2x2", "z": "2x2,2x2", "n": "4x4"}}},
    )
    of_c = {"weight_hh_l0": {"scale": True, "gates": {"all": "2x2,2x2"}}}
    assert a == {"name": "a", "kind": "lstm", "input_size": 3, "hidden_size": 4, **options, "matrices": of_a}
    assert b == {"name": "b", "kind": "gru", "cell": True, **sizes, "matrices": of_b}
    assert c == {"name": "c", "kind": "rnn", **sizes, **options, "nonlinearity": "tanh", "matrices": of_c}
    assert Plan.from_json(plan.to_compact_json()) == plan


def broken(change: Any) -> str:
    data = json.loads(make_plan(layers(), "auto").to_json())
    return change(data) or json.dumps(data)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda d: "{", PlanError, "not valid JSON"),
        (lambda d: "[]", PlanError, "an object with 'schema' and 'layers'"),
        (lambda d: d.update(schema=99), UnsupportedError, "schema 99 is newer"),
        (lambda d: d.update(schema="1"), PlanError, "whole number"),
        (
            lambda d: d.update(schema=2),
            UnsupportedError,
            "relabelled, which kruify no longer reads. Convert the source again",
        ),
        (
            lambda d: d["layers"][1]["matrices"]["weight_hh_l0"].update(units="8 -1 2 3 4 5 6 7"),
            UnsupportedError,
            "relabelled, which kruify no longer reads. Convert the source again",
        ),
        (lambda d: d["layers"][0].pop("matrices"), PlanError, "'matrices'"),
        (lambda d: d["layers"][0].pop("hidden_size"), PlanError, "layer 'encoder' has no 'hidden_size'"),
        (lambda d: d["layers"][0].update(hidden_size="16"), PlanError, "'hidden_size' of layer 'encoder' must be int"),
        (lambda d: d["layers"][0].update(bias=1), PlanError, "'bias' of layer 'encoder' must be bool"),
        (lambda d: d["layers"][0].update(kind="tcn"), PlanError, "layer 'encoder' is of an unknown kind, 'tcn'"),
        (lambda d: d["layers"][0].update(colour="red"), PlanError, "unknown key 'colour'"),
        (lambda d: d["layers"][1]["matrices"].update(weight_hh_l7={}), PlanError, "nearest name is 'weight_hh_l0'"),
        (lambda d: d["layers"][1]["matrices"]["weight_hh_l0"]["gates"].pop("r"), PlanError, "one spec for each gate"),
        (lambda d: d["layers"][1]["matrices"].update(weight_hh_l0=["2x2"]), PlanError, "one spec for each gate"),
        (lambda d: d["layers"][1]["matrices"].update(weight_hh_l0="3x3"), FactorSpecError, "gate r (8x8)"),
        (
            lambda d: d["layers"][1]["matrices"]["weight_hh_l0"]["gates"].update(r=""),
            FactorSpecError,
            "decoder.weight_hh_l0 gate r (8x8)",
        ),
        (
            lambda d: d["layers"][1]["matrices"]["weight_hh_l0"]["gates"].update(r="3x3"),
            FactorSpecError,
            "decoder.weight_hh_l0 gate r (8x8)",
        ),
    ],
)
def test_edited_plans_are_checked(change: Any, error: type[KruifyError], words: str) -> None:
    def quiet(data: Any) -> str | None:
        result = change(data)
        return result if isinstance(result, str) and result in ("{", "[]") else None

    with pytest.raises(error) as caught:
        Plan.from_json(broken(quiet))
    assert words in str(caught.value)


def test_stacked_gates_are_one_structure() -> None:
    plan = make_plan(layers(), "stacked:auto", overrides={"encoder.weight_hh_l0": "2x2"})
    found = specs(plan)
    assert found["encoder.weight_hh_l0"] == ["2x2,2x2,2x2,2x2"] * 4
    assert found["encoder.weight_hh_l1"] == ["stacked:16x4,4x4"]
    assert found["decoder.weight_hh_l0"] == ["stacked:12x4,2x2"]
    text = plan.to_json()
    assert json.loads(text)["schema"] == 3
    assert json.loads(text)["layers"][1]["matrices"]["weight_hh_l0"]["gates"] == {"all": "stacked:12x4,2x2"}
    assert Plan.from_json(text) == plan
    assert make_plan(layers(), "auto", chosen={n: s for n, s in _chosen(plan)}) == make_plan(
        layers(), "stacked:auto", overrides={"encoder.weight_hh_l0": "2x2"}
    )


def _chosen(plan: Plan) -> Any:
    return [(layer.full_name(weight), structures) for layer, weight, structures in plan.matrices()]


def test_a_plain_rnn_has_nothing_to_stack() -> None:
    rnn = locate(nn.ModuleDict({"c": nn.RNN(3, 4)})).layers
    assert specs(make_plan(rnn, "stacked:auto")) == {"c.weight_hh_l0": ["2x2,2x2"]}


def test_one_spec_may_stand_for_all_gates() -> None:
    data = json.loads(make_plan(layers(), "auto").to_json())
    data["layers"][1]["matrices"]["weight_hh_l0"]["gates"] = {"all": "2x2"}
    assert specs(Plan.from_json(json.dumps(data)))["decoder.weight_hh_l0"] == ["2x2,2x2,2x2"] * 3


@pytest.mark.parametrize(
    ("factors", "overrides", "words"),
    [
        ("stacked:auto", {"decoder.weight_hh_l0.n": "dense"}, "decoder.weight_hh_l0: gates are stacked all together"),
        ("auto", {"decoder.weight_hh_l0.n": "stacked:auto"}, "stacked all together or not at all"),
        ("stacked:4x4,2x2", {}, "encoder.weight_hh_l0 stacked gates (64x16)"),
    ],
)
def test_stacked_gates_that_do_not_go_together(factors: str, overrides: dict[str, str], words: str) -> None:
    with pytest.raises(FactorSpecError) as caught:
        make_plan(layers(), factors, overrides=overrides)
    assert words in str(caught.value)
