from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kruify.errors import CorruptError, TaskError
from kruify.tasks import fashion_mnist
from kruify.tasks.fashion_mnist import INSTALLED, read_idx
from kruify.tasks.loader import load_task

installed = pytest.mark.skipif(not INSTALLED.is_dir(), reason="Debian package dataset-fashion-mnist is not installed")


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for part, count in (("train", 40), ("t10k", 7)):
        images, labels = rng.integers(0, 256, (count, 28, 28)), rng.integers(0, 10, count)
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))  # gzipped or not: both are usual
    return tmp_path


def test_rows_from_a_folder(folder: Path) -> None:
    task = load_task(f"fashion-mnist-rows:data={folder},batch_size=16,hidden=8")
    assert [task.examples(split) for split in ("train", "valid", "test")] == [36, 4, 7]
    batches = list(task.batches("train", seed=1))
    assert [batch.x.shape for batch in batches] == [(16, 28, 28), (16, 28, 28), (4, 28, 28)]
    test = next(iter(task.batches("test")))
    images = np.random.default_rng(0)
    images.integers(0, 256, (40, 28, 28)), images.integers(0, 10, 40)
    expected = torch.tensor(images.integers(0, 256, (7, 28, 28)) / 255, dtype=torch.float32)
    torch.testing.assert_close(test.x, expected)
    assert test.y.tolist() == images.integers(0, 10, 7).tolist()
    assert 0 <= task.evaluate(task.model(), "test")["accuracy"] <= 1
    kept = load_task(f"fashion-mnist-rows:data={folder},valid_examples=2")
    assert torch.equal(next(iter(kept.batches("valid"))).x, next(iter(task.batches("valid"))).x[:2])


def test_training_pictures_are_those_before_validation(folder: Path) -> None:
    task = load_task(f"fashion-mnist-rows:data={folder}")
    every = read_idx(folder / "train-images-idx3-ubyte.gz").float() / 255
    train = torch.cat([batch.x for batch in task.batches("train", seed=5)])
    valid = torch.cat([batch.x for batch in task.batches("valid")])
    torch.testing.assert_close(train.flatten(1).sort(0).values, every[:36].flatten(1).sort(0).values)
    torch.testing.assert_close(valid, every[36:])


def test_pixels_and_their_fixed_permutation(folder: Path) -> None:
    rows, pixels, permuted = (
        next(iter(load_task(f"fashion-mnist-{order}:data={folder}").batches("test"))).x
        for order in ("rows", "pixels", "permuted")
    )
    assert pixels.shape == permuted.shape == (7, 784, 1)
    assert torch.equal(pixels.flatten(1), rows.flatten(1))
    order = torch.randperm(784, generator=torch.Generator().manual_seed(0))
    assert torch.equal(permuted[:, :, 0], pixels[:, order, 0])
    assert order[:4].tolist() == [60, 361, 167, 578]  # or every figure for this task changes its meaning


def test_accuracy_counts_what_is_right(folder: Path) -> None:
    class Always(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.eye(10)[3].expand(len(x), 10)

    task = load_task(f"fashion-mnist-rows:data={folder}")
    labels = read_idx(folder / "t10k-labels-idx1-ubyte")
    assert task.evaluate(Always(), "test") == {"accuracy": float((labels == 3).sum()) / 7}


@installed
def test_installed_data() -> None:
    task = load_task("fashion-mnist-rows")
    assert [task.examples(split) for split in ("train", "valid", "test")] == [55_000, 5000, 10_000]
    labels = torch.cat([batch.y for batch in task.batches("test")])
    assert labels.bincount().tolist() == [1000] * 10


def test_missing_data_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_mnist, "INSTALLED", tmp_path / "nothing")
    fashion_mnist.load.cache_clear()
    with pytest.raises(TaskError, match="apt-get install dataset-fashion-mnist") as caught:
        load_task("fashion-mnist-rows").examples("test")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "content",
    [b"", b"\0\0\x08", b"\0\0\x08\x01\0\0\0\x05abc", b"\0\0\x09\x01\0\0\0\x01a", b"\0\0\x08\x01\0\0\0\x01ab"],
    ids=["empty", "cut in the head", "cut", "other type", "too long"],
)
def test_damaged_idx(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(CorruptError, match="not a whole idx file"):
        read_idx(tmp_path / "a")
    (tmp_path / "b.gz").write_bytes(gzip.compress(content)[:-3])
    with pytest.raises(CorruptError, match="cannot be read"):
        read_idx(tmp_path / "b.gz")


def test_labels_that_do_not_belong_to_the_pictures(folder: Path) -> None:
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(np.zeros(6)))
    with pytest.raises(CorruptError, match="do not belong together"):
        load_task(f"fashion-mnist-rows:data={folder}").examples("test")


@pytest.mark.parametrize("order", ["pixels", "permuted"])
def test_mnist_is_the_same_task_on_named_files(folder: Path, order: str) -> None:
    with pytest.raises(TaskError, match="MNIST is in no package"):
        load_task(f"mnist-{order}")
    digits, clothes = (load_task(f"{name}-{order}:data={folder}") for name in ("mnist", "fashion-mnist"))
    for found, wanted in zip(digits.batches("train", seed=2), clothes.batches("train", seed=2), strict=True):
        assert torch.equal(found.x, wanted.x) and torch.equal(found.y, wanted.y)
    assert "digits" in digits.measures
