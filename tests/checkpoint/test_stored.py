"""What a file stores of tensors and back: any sparse residual, any row, and hostile notes of storage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import kruify
from kruify.checkpoint import LazyTensor, read, write_safetensors
from kruify.checkpoint.stored import decode, encode
from kruify.errors import CorruptError, KruifyError, UnsupportedError
from kruify.quantization import LEVELS

NAME = "rnn.weight_hh_l0"
Held = tuple[dict[str, torch.Tensor], dict[str, str]]


@st.composite
def residuals(draw: st.DrawFn) -> tuple[dict[str, torch.Tensor], tuple[int, int]]:
    """The entries of a sparse residual, and the (rows, columns) of its matrix."""
    height, stripes, cols = draw(st.sampled_from([1, 2, 8, 16])), draw(st.integers(1, 5)), draw(st.integers(1, 9))
    places = sorted(draw(st.sets(st.integers(0, stripes * cols - 1), min_size=1)))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    values = torch.from_numpy(rng.normal(size=(len(places), height)).astype(np.float32))
    index = torch.tensor([[place // cols * height, place % cols] for place in places], dtype=torch.int32)
    return {f"{NAME}.overlay.values": values, f"{NAME}.overlay.index": index}, (stripes * height, cols)


def loaded(tensors: dict[str, LazyTensor]) -> dict[str, torch.Tensor]:
    found = {name: tensor.load() for name, tensor in tensors.items()}
    assert all((t.shape, t.dtype) == (tensors[n].shape, tensors[n].dtype) for n, t in found.items())
    return found


@given(residuals())
def test_a_sparse_index_comes_back(given: tuple[dict[str, torch.Tensor], tuple[int, int]]) -> None:
    tensors, size = given
    stored = encode(tensors, {}, {NAME: size})
    blocks, height = tensors[f"{NAME}.overlay.values"].shape
    counts, columns = stored[f"{NAME}.overlay.counts"].load(), stored[f"{NAME}.overlay.columns"].load()
    index = tensors[f"{NAME}.overlay.index"].numpy()
    np.testing.assert_array_equal(counts.numpy(), np.bincount(index[:, 0] // height, minlength=size[0] // height))
    np.testing.assert_array_equal(columns.numpy(), index[:, 1])
    assert sum(t.nbytes for t in stored.values()) == 4 * blocks * height + 2 * blocks + 2 * (size[0] // height)
    back = loaded(decode(stored, {}, {NAME}, "here"))
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


@given(residuals())
def test_eight_bit_blocks_have_one_scale_for_all_that_begin_in_a_row(
    given: tuple[dict[str, torch.Tensor], tuple[int, int]],
) -> None:
    tensors, size = given
    storage, matrices = {NAME: "int8"}, {NAME: size}
    stored = encode(tensors, storage, matrices)
    first, values = loaded(stored), tensors[f"{NAME}.overlay.values"].numpy()
    stripe = tensors[f"{NAME}.overlay.index"][:, 0].numpy() // values.shape[1]
    scale = first[f"{NAME}.overlay.values.scale"].float().numpy()[:, 0]
    for row in range(len(scale)):
        largest = np.abs(values[stripe == row]).max(initial=0)
        assert abs(max(largest / 127, 2.0**-126) - scale[row]) <= 2.0**-8 * scale[row]
    back = decode(stored, storage, {NAME}, "here")
    assert np.all(np.abs(back[f"{NAME}.overlay.values"].load().numpy() - values) <= scale[stripe, None] / 2)
    again = loaded(encode(back, storage, matrices))
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())


def test_four_bits_of_any_factor() -> None:
    """Two to a byte along rows of an even number of entries, a byte each where it is odd; the same in float32 again."""
    rows = {
        (1, 3, 1, 8): (1, 3, 1, 4),
        (2, 3, 8, 1): (2, 3, 4, 1),
        (2, 3, 4, 6): (2, 3, 4, 3),
        (1, 3, 1, 7): (1, 3, 1, 7),
    }
    for shape, held in rows.items():
        name, tensor = f"{NAME}.terms.0.factors.0", torch.randn(shape)
        stored = loaded(encode({name: tensor}, {NAME: "int4"}, {NAME: (16, 16)}))
        assert (stored[name].shape, stored[name].dtype) == (held, torch.int8 if shape[3] == 7 else torch.uint8)
        again = encode({name: tensor}, {NAME: "int4"}, {NAME: (16, 16)}, packed=False)
        assert again[name].shape == shape and again[name].dtype == torch.int8
        for form in (encode({name: tensor}, {NAME: "int4"}, {NAME: (16, 16)}), again):
            back = loaded(decode(form, {NAME: "int4"}, {NAME}, "here"))[name]
            assert torch.equal(back, loaded(decode(again, {NAME: "int4"}, {NAME}, "here"))[name])
            scale = stored[f"{name}.scale"].float()
            assert torch.equal((back / scale).round() * scale, back)
            if shape[3] == 7:
                assert float((back / scale).abs().max()) == 127
            else:
                assert set((back / scale).flatten().tolist()) <= set(LEVELS.tolist())


def test_a_file_in_four_bits(tmp_path: Path) -> None:
    """Bytes of a network of its own stay what they are; up to schema 5 one half byte stands for no integer."""
    net = nn.ModuleDict({"rnn": nn.GRU(4, 16), "out": nn.Linear(16, 3)})
    net["out"].register_buffer("bytes", torch.arange(8, dtype=torch.uint8).view(1, 1, 2, 4))
    small = kruify.convert(net, "2*(4x4,4x4)+sparse:5%:4", dtype="int4")[0]
    kruify.save(small, tmp_path / "a")
    kruify.verify(tmp_path / "a")
    checkpoint = read(tmp_path / "a")
    assert checkpoint.storage[NAME] == checkpoint.storage["out.weight"] == "int4"
    assert checkpoint.stored["out.weight"].shape == (3, 8) and "kruify.storage" not in checkpoint.metadata
    assert torch.equal(checkpoint.tensors["out.bytes"], net["out"].bytes)
    back = kruify.load(tmp_path / "a", net)
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), small.state_dict().values(), strict=True))
    stored = {name: tensor.load() for name, tensor in checkpoint.stored.items()}
    factor = f"{NAME}.terms.0.factors.0"
    for value in (0x80, 0x08):
        stored[factor] = stored[factor].clone()
        stored[factor].view(-1)[0] = value
        write_safetensors(tmp_path / "b", stored, checkpoint.metadata | {"kruify.schema": "5"})
        with pytest.raises(CorruptError, match="outside of -7 to 7"):
            kruify.verify(tmp_path / "b")


def test_bytes_of_an_older_file_are_the_networks(tmp_path: Path) -> None:
    """Schema 4 has no integers of four bits: bytes with a scale beside them were a tensor of the network's then."""
    extra = {"side": torch.arange(8, dtype=torch.uint8).view(2, 4), "side.scale": torch.rand(2, 1)}
    torch.save({**{f"rnn.{n}": t for n, t in nn.GRU(4, 8).state_dict().items()}, **extra}, tmp_path / "a.pt")
    kruify.convert(tmp_path / "a.pt", "auto", dtype="bfloat16", output=tmp_path / "b")
    checkpoint = read(tmp_path / "b")
    older = {n: text for n, text in checkpoint.metadata.items() if n != "kruify.storage"} | {"kruify.schema": "4"}
    write_safetensors(tmp_path / "b", {name: tensor.load() for name, tensor in checkpoint.stored.items()}, older)
    assert read(tmp_path / "b").storage == checkpoint.storage
    assert torch.equal(read(tmp_path / "b").tensors["side"], extra["side"])


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_large_weights_have_scales(dtype: str) -> None:
    """Whatever times its scale is a number of float32."""
    weight = {"w": torch.tensor([[3e38, 1e38, -2e38, 0.0]])}
    for packed in (True, False):
        back = loaded(decode(encode(weight, {"w": dtype}, {}, packed), {"w": dtype}, set(), "here"))["w"]
        torch.testing.assert_close(back, weight["w"], rtol=0, atol=3e37)


def test_wide_matrices_have_wide_columns() -> None:
    tensors = {
        f"{NAME}.overlay.values": torch.ones(2, 1),
        f"{NAME}.overlay.index": torch.tensor([[0, 65_535], [3, 69_999]], dtype=torch.int32),
    }
    stored = encode(tensors, {}, {NAME: (4, 70_000)})
    assert stored[f"{NAME}.overlay.columns"].dtype == stored[f"{NAME}.overlay.counts"].dtype == torch.int32
    assert torch.equal(
        decode(stored, {}, {NAME}, "here")[f"{NAME}.overlay.index"].load(), tensors[f"{NAME}.overlay.index"]
    )


def test_a_name_that_a_scale_needs_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"a\.scale"):
        encode({"a": torch.ones(2, 2), "a.scale": torch.ones(3)}, {"a": "int8"}, {})
    assert set(encode({"a": torch.ones(2), "a.scale": torch.ones(3)}, {"a": "int8"}, {})) == {"a", "a.scale"}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Held:
    torch.manual_seed(0)
    net = nn.ModuleDict({"rnn": nn.GRU(4, 16), "out": nn.Linear(16, 3)})
    path = tmp_path_factory.mktemp("stored") / "a.safetensors"
    small = kruify.convert(net, "2*(4x4,4x4)+sparse:5%:4", dtype="int8")[0]
    kruify.save(small, path)
    checkpoint = read(path)
    return {name: tensor.load() for name, tensor in checkpoint.stored.items()}, checkpoint.metadata


NOTES: dict[str, tuple[Any, int]] = {
    "list": (["out.weight"], 4),
    "null": (None, 4),
    "numbers": ({"out.weight": 8}, 4),
    "nested": ({"out.weight": {"dtype": "int8"}}, 4),
    "no such weight": ({"out.weight": "int8", "nobody": "int8"}, 4),
    "layer": ({"rnn": "int8"}, 4),
    "newer dtype": ({"out.weight": "int3"}, 5),
    "four bits": ({"out.weight": "int4", NAME: "int8"}, 4),
    "other dtype": ({"out.weight": "float16"}, 4),
    "left out": ({}, 4),
    "no such sum": ({"rnn.bias_hh_l0": "sum"}, 4),
    "sum of a matrix": ({"out.weight": "sum", "rnn.bias_ih_l0": "float16"}, 4),
    "a factor": ({f"{NAME}.terms.0.factors.0": "int8"}, 4),
}


@pytest.mark.parametrize("note", NOTES)
def test_notes_of_storage_that_do_not_fit(note: str, good: Held, tmp_path: Path) -> None:
    value, code = NOTES[note]
    write_safetensors(tmp_path / "b", good[0], {**good[1], "kruify.storage": json.dumps(value)})
    with pytest.raises(KruifyError) as caught:
        kruify.verify(tmp_path / "b")
    assert caught.value.exit_code == code and "\n" not in str(caught.value)


def test_both_forms_of_an_index_are_refused(good: Held, tmp_path: Path) -> None:
    index = torch.zeros(38, 2, dtype=torch.int32)
    write_safetensors(tmp_path / "b", {**good[0], f"{NAME}.overlay.index": index}, good[1])
    with pytest.raises(CorruptError, match="twice"):
        read(tmp_path / "b")
