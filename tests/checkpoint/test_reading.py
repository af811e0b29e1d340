"""Reading state dicts: kinds, wrappers, nesting, ties, refusals."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from kruify.checkpoint import metadata_for, read, write_safetensors
from kruify.errors import CorruptError, UnsafeError, UnsupportedError, UsageError


def lstm() -> nn.LSTM:
    torch.manual_seed(0)
    return nn.LSTM(5, 7, 2, bidirectional=True)


def assert_equal_tensors(found, expected) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    "wrapper", ["", "module.", "model.", "_orig_mod.", "_fsdp_wrapped_module.", "module._orig_mod.model."]
)
@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_wrapper_prefixes_are_stripped_and_remembered(tmp_path: Path, kind: str, wrapper: str) -> None:
    state = lstm().state_dict()
    wrapped = {wrapper + name: tensor for name, tensor in state.items()}
    path = tmp_path / "any.name"
    torch.save(wrapped, path) if kind == "torch" else safetensors.torch.save_file(wrapped, path)
    checkpoint = read(path)
    assert checkpoint.format == kind
    assert checkpoint.prefix == wrapper
    assert {checkpoint.names.get(name, name) for name in checkpoint.tensors} == set(wrapped)
    assert_equal_tensors({n: checkpoint.tensors[n] for n in state}, state)


def test_inner_wrappers_are_stripped_too(tmp_path: Path) -> None:
    torch.save(
        {"encoder._orig_mod.rnn.weight_hh_l0": torch.ones(4, 1), "head.weight": torch.ones(2)}, tmp_path / "a.pt"
    )
    checkpoint = read(tmp_path / "a.pt")
    assert list(checkpoint.tensors) == ["encoder.rnn.weight_hh_l0", "head.weight"]
    assert checkpoint.prefix == ""
    assert checkpoint.names == {"encoder.rnn.weight_hh_l0": "encoder._orig_mod.rnn.weight_hh_l0"}


def test_a_shared_prefix_stays_where_stripping_would_collide(tmp_path: Path) -> None:
    torch.save({"a._orig_mod.w": torch.ones(1), "a.w": torch.zeros(1)}, tmp_path / "a.pt")
    assert list(read(tmp_path / "a.pt").tensors) == ["a._orig_mod.w", "a.w"]


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "net", "ema", "anything"])
def test_nested_state_dicts_are_found(tmp_path: Path, key: str) -> None:
    state = lstm().state_dict()
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}
    torch.save({"epoch": 3, key: state, "optimizer": optimizer, "lr": [0.1, 0.2]}, tmp_path / "a.pt")
    checkpoint = read(tmp_path / "a.pt")
    assert checkpoint.key == key
    assert checkpoint.extras == {"epoch": 3, "lr": [0.1, 0.2]}
    assert len(checkpoint.dropped) == 1 and "optimizer" in checkpoint.dropped[0]
    assert_equal_tensors(checkpoint.tensors, state)


def test_two_candidates_need_a_key(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.ones(2)}, "ema": {"w": torch.zeros(2)}}, tmp_path / "a.pt")
    with pytest.raises(UsageError, match=r"model, ema.*--key"):
        read(tmp_path / "a.pt")
    assert read(tmp_path / "a.pt", key="ema").tensors["w"].tolist() == [0, 0]
    with pytest.raises(UsageError, match=r"--key nett.*model, ema"):
        read(tmp_path / "a.pt", key="nett")


def test_a_dotted_key_reaches_deeper(tmp_path: Path) -> None:
    torch.save({"run": {"a": {"w": torch.ones(2)}, "b": {"w": torch.zeros(2)}}}, tmp_path / "a.pt")
    assert read(tmp_path / "a.pt", key="run.b").tensors["w"].tolist() == [0, 0]


def test_ties_are_equal_views_not_equal_storage(tmp_path: Path) -> None:
    flat = torch.arange(12.0)
    state = {"a": flat[:6].view(2, 3), "b": flat[6:].view(2, 3), "c": flat[:6].view(2, 3), "d": flat[:6].view(3, 2)}
    torch.save(state, tmp_path / "a.pt")
    assert read(tmp_path / "a.pt").ties == {"c": "a"}


def test_optimizer_only_file_has_no_state_dict(tmp_path: Path) -> None:
    torch.save({"optimizer": {"state": {"a": torch.ones(2)}}}, tmp_path / "a.pt")
    with pytest.raises(CorruptError, match="holds no tensors"):
        read(tmp_path / "a.pt")


class Hostile:
    def __reduce__(self):
        return os.system, ("true",)


def test_a_pickle_that_runs_something_is_refused_by_name(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2), "x": Hostile()}, tmp_path / "a.pt")
    with pytest.raises(UnsafeError, match=r"posix\.system"):
        read(tmp_path / "a.pt")


def test_files_that_are_not_there_or_not_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, words in (("none.pt", "no such file"), (".", "folder"), ("pipe", "regular")):
        with pytest.raises(UsageError, match=words):
            read(tmp_path / name)


@pytest.mark.parametrize(
    "content", [b"", b"hello world", b"PK\x03\x04" + b"\0" * 100, b"\x80\x02" + b"\xff" * 50, b"\0" * 99]
)
def test_no_checkpoint(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(CorruptError):
        read(tmp_path / "a.pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_truncated_files_are_corrupt(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    (torch.save if suffix == ".pt" else safetensors.torch.save_file)(dict(lstm().state_dict()), path)
    data = path.read_bytes()
    for keep in (1, 7, 8, 9, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:keep])
        with pytest.raises(CorruptError):
            read(path)


def test_a_flipped_bit_in_a_zip_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"w": torch.full((100,), 2.0)}, path)
    data = bytearray(path.read_bytes())
    at = data.index(torch.full((4,), 2.0).numpy().tobytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptError, match="checksum"):
        read(path)


def test_an_expanded_tensor_cannot_ask_for_terabytes(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1).expand(4000000, 1000000)}, tmp_path / "a.pt")
    with pytest.raises(UnsafeError, match="asks for 16000000000000 bytes"):
        read(tmp_path / "a.pt")


def test_meta_and_quantised_tensors_are_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.empty(2, device="meta")}, tmp_path / "a.pt")
    with pytest.raises(UnsupportedError, match="meta"):
        read(tmp_path / "a.pt")
    torch.save({"w": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}, tmp_path / "b.pt")
    with pytest.raises(UnsupportedError, match="quantised"):
        read(tmp_path / "b.pt")


def test_a_newer_schema_is_refused_politely(tmp_path: Path) -> None:
    metadata = {**metadata_for(json.dumps({})), "kruify.schema": "999", "kruify.version": "9.1"}
    write_safetensors(tmp_path / "a.safetensors", {"w": torch.ones(1)}, metadata)
    with pytest.raises(UnsupportedError, match=r"kruify 9\.1 with file schema 999.*Upgrade"):
        read(tmp_path / "a.safetensors")
    write_safetensors(tmp_path / "a.safetensors", {"w": torch.ones(1)}, {**metadata, "kruify.schema": "1.0"})
    with pytest.raises(CorruptError, match="schema"):
        read(tmp_path / "a.safetensors")


def test_numbers_that_are_not_finite_are_counted(tmp_path: Path) -> None:
    inf, nan = float("inf"), float("nan")
    state = {
        "a": torch.tensor([1, nan, inf]),
        "b": torch.ones(2),
        "c": torch.tensor([nan]).bfloat16(),
        "d": torch.tensor([3]),
    }
    torch.save(state, tmp_path / "a.pt")
    assert read(tmp_path / "a.pt").nonfinite() == {"a": 2, "c": 1}
    assert read(tmp_path / "a.pt").nonfinite(["b"]) == {}


def test_the_hash_is_that_of_the_file(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    assert read(tmp_path / "a.pt").sha256 == hashlib.sha256((tmp_path / "a.pt").read_bytes()).hexdigest()
