"""jsb: foresee the next chord of a Bach chorale (Boulanger-Lewandowski, Bengio & Vincent 2012).

The scores are the MusicXML files in the Python package music21, read here without importing it. `data=FILE` takes the
classic file instead, or any other of its formats: "JSB Chorales.pickle", "Piano-midi.de.pickle", or the same as JSON:
"train", "valid" and "test", each a list of pieces, each a list of frames, each a list of MIDI pitches; or a .mat file
with `traindata`, `validdata` and `testdata`, each a cell array of matrices (frames, 88) of zeros and ones.

`piano-midi` is the same task on Piano-midi.de, which is in no package.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.io import loadmat
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from kruify.errors import CorruptError, TaskError, UnsafeError
from kruify.tasks._scores import Piece, chorales
from kruify.tasks._sequence import Batch, SequenceNetwork, SequenceTask
from kruify.tasks.base import SPLITS, check_split

LOWEST, KEYS = 21, 88  # the piano: A0 is MIDI pitch 21


@dataclass(eq=False)
class Jsb(SequenceTask):
    """408 chorales, 22,618 quarter-note frames of 88 keys; 60/20/20 by sha1 of the file name.

    Not the classic split and not quite its pieces: figures are near published ones, not equal to them. For those give
    the classic file as `data`. A dense GRU of 256 (AdamW 4e-3, cosine, 75 epochs) gets 9.11 on valid, 8.96 on test.

    Args:
        data: the classic file (.pickle, .json, .mat); music21's scores without it.
    """

    data: str | None = None
    hidden: int = 256
    cell: str = "gru"
    dropout: float = 0.4
    batch_size: int = 16

    metric = "nll"
    output_kind = "sigmoid"
    measures = (
        "How well the next chord of a Bach chorale is foreseen: negative log-likelihood of a frame of 88 keys, in nats."
    )
    chance = "nll 11.3 by the frequency of each key alone"

    def model(self) -> SequenceNetwork:
        return SequenceNetwork(KEYS, KEYS, self)

    def _pieces(self, split: str) -> list[Tensor]:
        return rolls(self.data)[check_split(split)]

    def examples(self, split: str) -> int:
        """Return the number of frames in `split`."""
        return sum(len(piece) for piece in self._pieces(split))

    def batches(self, split: str, *, seed: int = 0) -> Iterator[Batch]:
        """Yield x, y (pieces, frames, 88) float32, y the frames and x the frame before each (none before the first)."""
        pieces = self._pieces(split)
        for index in self.parts(len(pieces), split, seed, self.batch_size):
            chosen = [pieces[i] for i in index.tolist()]
            y = pad_sequence(chosen, batch_first=True).float()
            mask = torch.arange(y.shape[1]) < torch.tensor([len(piece) for piece in chosen])[:, None]
            yield Batch(functional.pad(y, (0, 0, 1, 0))[:, :-1], y, mask)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the mean over all frames of the negative log-likelihood of their 88 keys in nats."""
        keys = functional.binary_cross_entropy_with_logits(outputs, batch.y, reduction="none")
        return keys.sum(-1)[batch.mask].mean()


@dataclass(eq=False)
class PianoMidi(Jsb):
    """Piano-midi.de (Poliner & Ellis 2007) in frames of 88 keys, in the classic split: `piano-midi:data=FILE`."""

    measures = (
        "How well the next chord of piano music is foreseen: negative log-likelihood of a frame of 88 keys, in nats."
    )
    chance = "nll 61.0 by guessing each key"

    def __post_init__(self) -> None:
        if not self.data:
            hint = 'Name "Piano-midi.de.pickle" or a .mat of it, piano-midi:data=FILE; the task `jsb` has a package'
            raise TaskError("Piano-midi.de is in no package", where="piano-midi", hint=hint)


@cache
def rolls(data: str | None) -> dict[str, list[Tensor]]:
    """Return split -> piano rolls (frames, 88) bool."""
    splits = read(Path(data).expanduser()) if data else chorales()
    return {split: [_roll(piece) for piece in splits[split]] for split in SPLITS}


def _roll(piece: Piece) -> Tensor:
    roll = torch.zeros(len(piece), KEYS, dtype=torch.bool)
    for frame, pitches in enumerate(piece):
        roll[frame, [pitch - LOWEST for pitch in pitches]] = True
    return roll


class _PlainUnpickler(pickle.Unpickler):
    """Reads numbers, texts and containers, and refuses everything that could run code."""

    def find_class(self, module: str, name: str) -> object:
        raise UnsafeError(f"the pickle asks for {module}.{name}", hint="Give the data as JSON")


def read(file: Path) -> dict[str, list[Piece]]:
    """Return split -> pieces of frames of MIDI pitches 21..108, from a classic .pickle, .json or .mat file."""
    if not file.is_file():
        raise TaskError(
            "there is no such file", where=file, hint='Give "JSB Chorales.pickle" or the like, or leave data out'
        )
    try:
        if file.suffix == ".json":
            content = json.loads(file.read_bytes())
        elif file.suffix == ".mat":
            content = _read_mat(file)
        else:
            with file.open("rb") as stream:
                content = _PlainUnpickler(stream, encoding="latin-1").load()
        splits = {split: [[_pitches(frame) for frame in piece] for piece in content[split]] for split in SPLITS}
    except UnsafeError:
        raise
    except Exception as error:  # a damaged pickle raises almost anything
        what = f"it is not a file of pieces: {type(error).__name__}: {error}"
        hint = '"train", "valid", "test": lists of lists of lists of pitches; in a .mat traindata, validdata, testdata'
        raise CorruptError(what, where=file, hint=hint) from error
    if not all(any(pieces) for pieces in splits.values()):
        raise CorruptError("a split has no frames", where=file)
    return {split: [piece for piece in pieces if piece] for split, pieces in splits.items()}


def _read_mat(file: Path) -> dict[str, list[Piece]]:
    """The splits of a MATLAB 5 file; scipy's reader runs nothing."""
    arrays = loadmat(str(file), variable_names=[f"{split}data" for split in SPLITS])
    return {split: [_frames(matrix) for matrix in arrays[f"{split}data"].ravel()] for split in SPLITS}


def _frames(matrix: NDArray[Any]) -> Piece:
    if matrix.ndim != 2 or matrix.shape[1] != KEYS:
        raise ValueError(f"a piece of shape {matrix.shape}, not (frames, {KEYS})")
    return [[LOWEST + int(key) for key in np.flatnonzero(frame)] for frame in matrix]


def _pitches(frame: list[int]) -> list[int]:
    pitches = sorted({int(pitch) for pitch in frame if int(pitch) >= 0})  # -1 is a rest in the JSON editions
    if pitches and not LOWEST <= pitches[0] <= pitches[-1] < LOWEST + KEYS:
        raise ValueError(f"pitch outside {LOWEST}..{LOWEST + KEYS - 1}")
    return pitches
