"""The task: batches of whole utterances, frame by frame."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kruify.errors import TaskError
from kruify.tasks._sequence import Batch, SequenceNetwork, SequenceTask, accuracy
from kruify.tasks.base import check_split
from kruify.tasks.phonemes import spoken, timit
from kruify.tasks.phonemes.features import FEATURES, with_differences
from kruify.tasks.phonemes.labels import CLASSES, IGNORED

_EVALUATION_BATCH = 32


@dataclass(eq=False)
class Phonemes(SequenceTask):
    """Frames of 10 ms, each described by 123 numbers (40 mel bands, energy, two orders of differences), 39 classes.

    espeak-ng speaks 650 sentences in thirteen voices, two of them heard in the test split alone: a stand-in for TIMIT,
    much easier than people. `data=FOLDER` takes TIMIT itself, and so does the task `timit`.

    Args:
        data: the folder of TIMIT that holds TRAIN and TEST.
    """

    data: str | None = None
    cell: str = "kru-lstm"
    batch_size: int = 16

    metric = "accuracy"
    higher_is_better = True
    output_kind = "softmax"
    measures = "Share of 10 ms frames of synthetic speech whose phoneme is recognised (39 classes, unheard voices)."
    chance = "accuracy 0.06 by always saying the commonest phoneme, 0.026 by guessing"

    def model(self) -> SequenceNetwork:
        return SequenceNetwork(FEATURES, len(CLASSES), self)

    def _utterances(self, split: str) -> list[tuple[Tensor, Tensor]]:
        return load(self.data)[check_split(split)]

    def examples(self, split: str) -> int:
        """Return the number of frames in `split`, glottal stops left out."""
        return sum(int((labels != IGNORED).sum()) for _, labels in self._utterances(split))

    def batches(self, split: str, *, seed: int = 0) -> Iterator[Batch]:
        """Yield x (utterances, frames, 123) float32, y (utterances, frames) int64, mask where a frame counts."""
        found = self._utterances(split)
        for index in self.parts(len(found), split, seed, _EVALUATION_BATCH):
            chosen = [found[i] for i in index.tolist()]
            y = pad_sequence([labels for _, labels in chosen], batch_first=True, padding_value=float(IGNORED))
            yield Batch(pad_sequence([features for features, _ in chosen], batch_first=True), y, y != IGNORED)

    def metrics(self, outputs: Tensor, batch: Batch) -> dict[str, float]:
        return accuracy(outputs, batch)


@dataclass(eq=False)
class Timit(Phonemes):
    """The same on TIMIT (Garofolo et al. 1993), which is in no package: `timit:data=FOLDER`.

    Train is TRAIN without the SA sentences (3,696 utterances), test the core test set (192), valid 50 other speakers of
    TEST by sha1 of their names (400).
    """

    measures = "Share of 10 ms frames of TIMIT whose phone is recognised (39 classes, core test set)."
    chance = "accuracy 0.026 by guessing; the share of silence by always saying it"

    def __post_init__(self) -> None:
        if not self.data:
            hint = "Name its folder, timit:data=FOLDER; the task `phonemes` has a stand-in"
            raise TaskError("TIMIT is in no package", where="timit", hint=hint)


@cache
def load(data: str | None) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Return split -> features (frames, 123) float32 and classes (frames,) int64 of each utterance.

    Every feature has mean 0 and deviation 1 over the train split.
    """
    found = timit.utterances(Path(data).expanduser()) if data else spoken.utterances()
    splits = {
        split: [(with_differences(torch.from_numpy(x)), torch.from_numpy(y)) for x, y in utterances]
        for split, utterances in found.items()
    }
    deviation, mean = torch.std_mean(torch.cat([x for x, _ in splits["train"]]), dim=0)
    deviation = deviation.clamp_min(1e-5)
    return {split: [((x - mean) / deviation, y) for x, y in utterances] for split, utterances in splits.items()}
