"""Weights of parametrised layers: computed as torch computes them, and parameters that give a weight back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from kruify.checkpoint import read
from kruify.checkpoint.parametrised import sources_for

NAME = "weight_hh_l0"


def lstm() -> nn.LSTM:
    torch.manual_seed(0)
    return nn.LSTM(3, 4)


def weight_norm() -> tuple[nn.Module, torch.Tensor]:
    module = parametrizations.weight_norm(lstm(), NAME)
    with torch.no_grad():
        module.parametrizations[NAME].original0.mul_(3)
    return module, module.weight_hh_l0


def weight_norm_dim1() -> tuple[nn.Module, torch.Tensor]:
    module = parametrizations.weight_norm(lstm(), NAME, dim=1)
    return module, module.weight_hh_l0


def weight_norm_whole() -> tuple[nn.Module, torch.Tensor]:
    module = parametrizations.weight_norm(lstm(), NAME, dim=None)
    return module, module.weight_hh_l0


def old_weight_norm() -> tuple[nn.Module, torch.Tensor]:
    module = torch.nn.utils.weight_norm(lstm(), NAME)
    with torch.no_grad():
        module.weight_hh_l0_g.mul_(2)
    module(torch.zeros(1, 1, 3))
    return module, module.weight_hh_l0


def spectral_norm() -> tuple[nn.Module, torch.Tensor]:
    module = parametrizations.spectral_norm(lstm(), NAME).eval()
    return module, module.weight_hh_l0


def old_spectral_norm() -> tuple[nn.Module, torch.Tensor]:
    module = torch.nn.utils.spectral_norm(lstm(), NAME).eval()
    module(torch.zeros(1, 1, 3))
    return module, module.weight_hh_l0


def pruning() -> tuple[nn.Module, torch.Tensor]:
    module = prune.l1_unstructured(lstm(), NAME, amount=0.5)
    return module, module.weight_hh_l0


ALL = [
    weight_norm,
    weight_norm_dim1,
    weight_norm_whole,
    old_weight_norm,
    spectral_norm,
    old_spectral_norm,
    pruning,
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("wrapper", ["", "module.rnn."])
def test_the_weight_is_computed(tmp_path: Path, make, wrapper: str) -> None:
    module, expected = make()
    torch.save({wrapper + name: tensor for name, tensor in module.state_dict().items()}, tmp_path / "a.pt")
    checkpoint = read(tmp_path / "a.pt")
    base = wrapper.removeprefix("module.")
    assert {name.removeprefix(base) for name in checkpoint.tensors} == set(lstm().state_dict())
    torch.testing.assert_close(checkpoint.tensors[base + NAME], expected.detach(), rtol=1e-6, atol=1e-7)
    assert set(checkpoint.computed) == {base + NAME}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", ALL)
def test_parameters_that_give_a_weight_back(tmp_path: Path, make) -> None:
    module, _ = make()
    torch.save(module.state_dict(), tmp_path / "a.pt")
    how = read(tmp_path / "a.pt").computed[NAME]
    wanted = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    state = module.state_dict()
    found = sources_for(wanted, how)
    assert all(found[name].shape == state[name].shape for name in found)
    module.load_state_dict({**state, **found})
    module.eval()
    with torch.no_grad():
        module(torch.zeros(1, 1, 3))
    torch.testing.assert_close(getattr(module, NAME).detach(), wanted, rtol=1e-5, atol=1e-6)


class WeightDrop(nn.Module):
    """As fastai: the raw weight beside the wrapped module, a dropped copy inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.module = lstm()
        self.register_parameter(f"{NAME}_raw", nn.Parameter(self.module.weight_hh_l0.detach().clone()))
        with torch.no_grad():
            self.module.weight_hh_l0.mul_(torch.rand(16, 4) > 0.5)


def test_weight_drop_takes_the_raw_weight(tmp_path: Path) -> None:
    torch.save(nn.ModuleDict({"rnn": WeightDrop()}).state_dict(), tmp_path / "a.pt")
    checkpoint = read(tmp_path / "a.pt")
    assert {name.removeprefix("rnn.module.") for name in checkpoint.tensors} == set(lstm().state_dict())
    assert torch.equal(checkpoint.tensors["rnn.module.weight_hh_l0"], lstm().weight_hh_l0)
    assert set(sources_for(torch.ones(1), checkpoint.computed["rnn.module.weight_hh_l0"])) == {
        "rnn.weight_hh_l0_raw",
        "rnn.module.weight_hh_l0",
    }


def test_weight_drop_inside_the_module(tmp_path: Path) -> None:
    state = {f"rnns.0.module.{name}": tensor for name, tensor in lstm().state_dict().items()}
    state["rnns.0.module.weight_hh_l0_raw"] = state.pop("rnns.0.module.weight_hh_l0")
    torch.save(state, tmp_path / "a.pt")
    assert torch.equal(read(tmp_path / "a.pt").tensors["rnns.0.module.weight_hh_l0"], lstm().weight_hh_l0)


def test_half_precision_is_computed_wide(tmp_path: Path) -> None:
    module = parametrizations.weight_norm(lstm(), NAME)
    expected = module.weight_hh_l0.detach()
    torch.save({name: tensor.bfloat16() for name, tensor in module.state_dict().items()}, tmp_path / "a.pt")
    found = read(tmp_path / "a.pt").tensors[NAME]
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.01)


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def test_an_unknown_parametrisation_is_skipped_with_a_reason(tmp_path: Path) -> None:
    module = nn.ModuleDict({"rnn": lstm()})
    parametrize.register_parametrization(module["rnn"], NAME, Doubled())
    torch.save(module.state_dict(), tmp_path / "a.pt")
    checkpoint = read(tmp_path / "a.pt")
    assert "weight_hh_l0 is parametrised" in checkpoint.skipped["rnn"]
    assert "rnn.parametrizations.weight_hh_l0.original" in checkpoint.tensors


def test_names_that_only_look_parametrised(tmp_path: Path) -> None:
    state = {"a_g": torch.ones(3), "a_v": torch.ones(4, 2), "b_orig": torch.ones(2), "w": torch.ones(2)}
    torch.save({**state, "w_g": torch.ones(2, 1), "w_v": torch.ones(2, 2)}, tmp_path / "a.pt")
    checkpoint = read(tmp_path / "a.pt")
    assert not checkpoint.computed
    assert set(checkpoint.tensors) == {*state, "w_g", "w_v"}
