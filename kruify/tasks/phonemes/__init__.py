"""phonemes, timit: which phoneme is being spoken, frame by frame."""

from kruify.tasks.phonemes.task import Phonemes, Timit

__all__ = ["Phonemes", "Timit"]
