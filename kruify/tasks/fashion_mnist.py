"""fashion-mnist-rows, -pixels, -permuted, mnist-pixels, -permuted: a 28 x 28 picture that is read step by step.

Data: Fashion-MNIST (Xiao, Rasul & Vollgraf 2017) of the Debian package dataset-fashion-mnist. `data=FOLDER` takes any
other folder with the four idx files of that format. MNIST itself (LeCun, Bottou, Bengio & Haffner 1998) is in no
package: `mnist-pixels:data=/srv/mnist`.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from kruify.errors import CorruptError, TaskError
from kruify.tasks._sequence import Batch, SequenceNetwork, SequenceTask, accuracy
from kruify.tasks.base import check_split

INSTALLED = Path("/usr/share/datasets/fashion-mnist")
_VALID = 5000  # the last pictures of the training file
_EVALUATION_BATCH = 500
_UNSIGNED_BYTES = b"\x00\x00\x08"


@dataclass(eq=False)
class FashionMnistRows(SequenceTask):
    """28 steps of 28 pixels.

    A dense GRU of 128 gets 0.858 on test after two epochs (AdamW 3e-3, one cycle).

    Train is the training file without its last 5,000 pictures, valid starts with those, test is the test file.

    Args:
        data: folder with {train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz].
        valid_examples: pictures of the valid split that are looked at, at most 5,000.
    """

    data: str | None = None
    valid_examples: int = _VALID
    cell: str = "gru"
    batch_size: int = 128

    metric = "accuracy"
    output_kind = "softmax"
    higher_is_better = True
    measures = "Share of clothes recognised in pictures that are read row by row (28 steps)."
    chance = "accuracy 0.1"
    step: ClassVar[int] = 28
    """Pixels that are read at once."""

    def model(self) -> SequenceNetwork:
        return SequenceNetwork(self.step, 10, self, last=True)

    def _split(self, split: str) -> tuple[Tensor, Tensor]:
        images, labels = load(self.data, "t10k" if check_split(split) == "test" else "train")
        if split == "test":
            return images, labels
        valid = min(_VALID, len(images) // 10)
        if split == "train":
            return images[:-valid], labels[:-valid]
        end = len(images) - valid + min(self.valid_examples, valid)
        return images[len(images) - valid : end], labels[len(images) - valid : end]

    def examples(self, split: str) -> int:
        return len(self._split(split)[0])

    def order(self, pixels: Tensor) -> Tensor:
        """Return `pixels` (batch, n) in the order in which they are read."""
        return pixels

    def batches(self, split: str, *, seed: int = 0) -> Iterator[Batch]:
        """Yield x (batch, steps, pixels per step) float32 in [0, 1], y (batch,) int64."""
        images, labels = self._split(split)
        for index in self.parts(len(images), split, seed, _EVALUATION_BATCH):
            pixels = self.order(images[index].flatten(1)).float().div(255)
            yield Batch(pixels.reshape(len(index), -1, self.step), labels[index])

    def metrics(self, outputs: Tensor, batch: Batch) -> dict[str, float]:
        return accuracy(outputs, batch)


@dataclass(eq=False)
class FashionMnistPixels(FashionMnistRows):
    """784 steps of one pixel, line by line. Options as for the rows; 1,000 pictures for validation."""

    valid_examples: int = 1000

    measures = "Share of clothes recognised in pictures that are read pixel by pixel (784 steps)."
    step = 1


@dataclass(eq=False)
class FashionMnistPermuted(FashionMnistPixels):
    """784 steps of one pixel, in an order drawn once for all (torch.randperm(784), seed 0)."""

    measures = (
        "Share of clothes recognised in pictures that are read pixel by pixel in a fixed random order (784 steps)."
    )

    def order(self, pixels: Tensor) -> Tensor:
        return pixels[:, torch.randperm(pixels.shape[1], generator=torch.Generator().manual_seed(0))]


class _Digits:
    """MNIST has to be named."""

    data: str | None

    def __post_init__(self) -> None:
        if not self.data:
            hint = "Name a folder with its four idx files, :data=FOLDER; fashion-mnist-* have a package"
            raise TaskError("MNIST is in no package", where="mnist", hint=hint)


@dataclass(eq=False)
class MnistPixels(_Digits, FashionMnistPixels):
    """784 steps of one pixel, line by line. Options as for Fashion-MNIST; `data` must be given."""

    measures = "Share of digits recognised in pictures that are read pixel by pixel (784 steps)."


@dataclass(eq=False)
class MnistPermuted(_Digits, FashionMnistPermuted):
    """784 steps of one pixel, in the fixed random order of fashion-mnist-permuted; `data` must be given."""

    measures = (
        "Share of digits recognised in pictures that are read pixel by pixel in a fixed random order (784 steps)."
    )


@cache
def load(data: str | None, part: str) -> tuple[Tensor, Tensor]:
    """Return pictures (n, height, width) uint8 and labels (n,) int64 of `part`, "train" or "t10k"."""
    folder = Path(data).expanduser() if data else INSTALLED
    images, labels = (read_idx(_find(folder, f"{part}-{name}-ubyte")) for name in ("images-idx3", "labels-idx1"))
    if images.dim() != 3 or labels.dim() != 1 or len(images) != len(labels):
        shapes = f"{tuple(images.shape)} pictures and {tuple(labels.shape)} labels"
        raise CorruptError(f"{shapes} do not belong together", where=folder)
    return images, labels.long()


def _find(folder: Path, name: str) -> Path:
    for file in (folder / name, folder / f"{name}.gz"):
        if file.is_file():
            return file
    hint = (
        "Run `apt-get install dataset-fashion-mnist`, or name a folder with idx files: fashion-mnist-rows:data=FOLDER"
    )
    raise TaskError(f"{name}[.gz] is not there", where=folder, hint=hint)


def read_idx(file: Path) -> Tensor:
    """Return the array of unsigned bytes in an idx file, gzipped or not (format: LeCun, the MNIST page)."""
    hint = "Install or download it again"
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise CorruptError(f"it cannot be read: {error}", where=file, hint=hint) from error
    dimensions = content[3] if content[:3] == _UNSIGNED_BYTES and len(content) > 3 else 0
    start = 4 + 4 * dimensions
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4)]
    if not dimensions or len(content) < start or math.prod(shape) != len(content) - start:
        raise CorruptError("this is not a whole idx file of unsigned bytes", where=file, hint=hint)
    return torch.frombuffer(bytearray(content[start:]), dtype=torch.uint8).reshape(shape)
