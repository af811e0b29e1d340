"""Writing: what is written is read back, the same bytes for the same input, and all or nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from kruify.checkpoint import atomic_file, metadata_for, read, write_safetensors, write_torch
from kruify.checkpoint.file_format import STORAGE
from kruify.checkpoint.writing import DTYPES
from kruify.errors import CorruptError, UnsupportedError, UsageError

PLAN = json.dumps({"layers": [{"name": "rnn"}]})


def some() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "b": torch.randn(3, 5).half(),
        "a": torch.randn(4, 2, dtype=torch.float64),
        "flag": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3),
        "view": torch.randn(6, 4).t(),
        "strided": torch.randn(1, 2)[:, 1],
        "brain": torch.randn(3).bfloat16(),
    }


@pytest.mark.parametrize("write", [write_safetensors, write_torch])
def test_round_trip_with_metadata(tmp_path: Path, write) -> None:
    metadata = {**metadata_for(PLAN, source_sha256="ab" * 32, seed=7), STORAGE: "{}"}  # float16 is computed as such
    write(tmp_path / "a", some(), metadata)
    checkpoint = read(tmp_path / "a")
    assert checkpoint.metadata == metadata
    assert checkpoint.is_kruify
    assert list(checkpoint.tensors) == list(some())
    for name, tensor in some().items():
        assert torch.equal(checkpoint.tensors[name], tensor) and checkpoint.tensors[name].dtype == tensor.dtype


@pytest.mark.parametrize("write", [write_safetensors, write_torch])
def test_same_input_same_bytes_whatever_the_file_is_called(tmp_path: Path, write) -> None:
    write(tmp_path / "a.x", some(), metadata_for(PLAN))
    write(tmp_path / "longer-name.y", some(), metadata_for(PLAN))
    assert (tmp_path / "a.x").read_bytes() == (tmp_path / "longer-name.y").read_bytes()


def test_the_safetensors_library_reads_what_is_written(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a", some(), {"note": "é"})
    for name, tensor in safetensors.torch.load_file(tmp_path / "a").items():
        assert torch.equal(tensor, some()[name])
    with safetensors.safe_open(tmp_path / "a", framework="pt") as file:
        assert file.metadata() == {"note": "é"}


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.tensor([0, 1, 1, 0, 1]).to(dtype)
    write_safetensors(tmp_path / "a", {"w": tensor})
    assert torch.equal(read(tmp_path / "a").tensors["w"].view(torch.uint8), tensor.view(torch.uint8))
    assert torch.equal(safetensors.torch.load_file(tmp_path / "a")["w"].view(torch.uint8), tensor.view(torch.uint8))


def test_torch_reads_what_is_written(tmp_path: Path) -> None:
    write_torch(tmp_path / "a.pt", some(), key="model", extras={"epoch": 3})
    loaded = torch.load(tmp_path / "a.pt", weights_only=True)
    assert loaded["epoch"] == 3
    assert all(torch.equal(loaded["model"][name], tensor) for name, tensor in some().items())


def test_views_are_written_without_the_storage_behind_them(tmp_path: Path) -> None:
    write_torch(tmp_path / "a.pt", {"w": torch.zeros(1_000_000)[:10]})
    assert (tmp_path / "a.pt").stat().st_size < 10_000


def test_ties_are_written_as_ties(tmp_path: Path) -> None:
    tensor = torch.ones(4)
    write_torch(tmp_path / "a.pt", {"a": tensor, "b": tensor.clone()}, links={"b": "a"})
    assert read(tmp_path / "a.pt").ties == {"b": "a"}


def test_same_path_in_and_out(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, some())
    checkpoint = read(path)
    write_safetensors(path, {**checkpoint.tensors.lazy, "new": torch.ones(100)})
    assert len(read(path).tensors) == len(some()) + 1
    # What was opened before still reads the file that it opened.
    assert torch.equal(checkpoint.tensors["a"], some()["a"])


def test_an_error_leaves_the_old_file_and_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), atomic_file(path) as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    with atomic_file(tmp_path / "link") as file:
        file.write(b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


def test_permissions_are_kept_and_new_files_are_ordinary(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"")
    (tmp_path / "old").chmod(0o640)
    (tmp_path / "plain").write_bytes(b"")
    for name in ("old", "new"):
        with atomic_file(tmp_path / name) as file:
            file.write(b"x")
    assert (tmp_path / "old").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    for name in ("missing/a", "."):
        with pytest.raises(UsageError), atomic_file(tmp_path / name):
            pass


def test_a_flipped_bit_in_a_converted_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, some(), metadata_for(PLAN))
    data = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for at in torch.randint(len(data), (200,), generator=generator).tolist():
        broken = bytearray(data)
        broken[at] ^= 1
        path.write_bytes(broken)
        with pytest.raises(CorruptError):
            read(path)


def test_names_that_safetensors_cannot_hold(tmp_path: Path) -> None:
    for tensors, metadata in (({"a\ud800": torch.ones(1)}, {}), ({"a": torch.ones(1)}, {"b": "\udfff"})):
        with pytest.raises(UnsupportedError, match="surrogate"):
            write_safetensors(tmp_path / "a.safetensors", tensors, metadata)
    assert not list(tmp_path.iterdir())
