"""Folders and repositories of the Hub; the cache that huggingface_hub keeps is made by hand, and nothing is fetched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import kruify
from kruify.errors import CorruptError, UsageError


def network() -> nn.ModuleDict:
    return nn.ModuleDict({"rnn": nn.LSTM(3, 8), "out": nn.Linear(8, 2)})


@pytest.fixture
def small() -> nn.Module:
    return kruify.quantize(kruify.convert(network(), "2*(4x2,2x4)")[0], "int8")


def test_folder_into_the_network_and_without_it(tmp_path: Path, small: nn.Module) -> None:
    folder = kruify.save_pretrained(small, tmp_path / "new" / "parity", metrics={"accuracy": 0.9})
    assert {file.name for file in folder.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    again, layers = kruify.from_pretrained(folder, into=network()), kruify.from_pretrained(folder)
    x = torch.randn(5, 2, 3)
    for layer in (again["rnn"], layers["rnn"]):
        torch.testing.assert_close(layer(x)[0], small["rnn"](x)[0], rtol=0, atol=0)
    assert again["out"].weight.equal(small["out"].weight)
    config = json.loads((folder / "config.json").read_text())
    assert config["library_name"] == "kruify" and config["plan"]["layers"][0]["name"] == "rnn"


def test_card(tmp_path: Path, small: nn.Module) -> None:
    folder = kruify.save_pretrained(small, tmp_path / "parity", metrics={"accuracy": 0.9})
    card = (folder / "README.md").read_text()
    assert card.startswith('---\nlibrary_name: "kruify"\ntags: [') and "]\n---\n\n# parity\n\n" in card
    assert "| accuracy | 0.900 |" in card and "| `rnn.weight_hh_l0` | f | `2*(4x2,2x4)` | 64 | 32 |" in card
    size = (folder / "model.safetensors").stat().st_size
    assert f"{size:,} bytes, weights in int8" in card and 'kruify.from_pretrained("parity", into=dense)' in card
    (folder / "README.md").write_text("mine")
    kruify.save_pretrained(small, folder)
    assert (folder / "README.md").read_text() == "mine"


def test_repository_from_the_cache_of_the_hub(
    tmp_path: Path, small: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit, cache = "0" * 40, tmp_path / "models--owner--parity"
    kruify.save_pretrained(small, cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    assert list(kruify.from_pretrained("owner/parity")) == list(kruify.from_pretrained("owner/parity", revision="main"))
    with pytest.raises(UsageError, match="cannot be fetched"):
        kruify.from_pretrained("owner/other")


def test_refusals(tmp_path: Path, small: nn.Module) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        kruify.from_pretrained(tmp_path / "missing")
    folder = kruify.save_pretrained(small, tmp_path / "parity")
    for nothing in ("", None):
        with pytest.raises(UsageError, match="no folder or repository is named"):
            kruify.from_pretrained(nothing)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no revisions"):
        kruify.from_pretrained(folder, revision="main")
    with pytest.raises(UsageError, match="no KRU layer"):
        kruify.save_pretrained(network(), tmp_path / "dense")
    assert not (tmp_path / "dense").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be made"):
        kruify.save_pretrained(small, tmp_path / "file" / "parity")
    with pytest.raises(UsageError, match="no such folder"):
        kruify.from_pretrained("a" * 5000)
    with pytest.raises(UsageError, match="cannot be made"):
        kruify.save_pretrained(small, "a\0b")
    with pytest.raises(UsageError, match="metric is no number"):
        kruify.save_pretrained(small, tmp_path / "new", metrics={"accuracy": "high"})  # type: ignore[dict-item]
    assert not (tmp_path / "new").exists()
    (tmp_path / "half" / "config.json").mkdir(parents=True)
    with pytest.raises(UsageError, match="it is a folder"):
        kruify.save_pretrained(small, tmp_path / "half")
    assert not (tmp_path / "half" / "model.safetensors").exists()
    kruify.checkpoint.write_safetensors(folder / "model.safetensors", {"out.weight": torch.ones(2, 8)})
    with pytest.raises(UsageError, match=r"no recurrent layer.*as `into`"):
        kruify.from_pretrained(folder)
    kruify.save_pretrained(small, folder)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(CorruptError):
        kruify.from_pretrained(folder)
