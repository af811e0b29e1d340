"""A stand-in for TIMIT: sentences spoken by espeak-ng, which reports their phonemes and times.

The library comes with the Python package espeakng-loader, or with the Debian package libespeak-ng1. It is called in a
process of its own, which writes the features to the user's cache folder: espeak-ng keeps global state and may leave a
process that it does not like.
"""

from __future__ import annotations

import ctypes
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from ctypes.util import find_library
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.signal import resample_poly

from kruify.errors import TaskError
from kruify.tasks._data import cache_folder, find_in_package, keep
from kruify.tasks.base import SPLITS
from kruify.tasks.phonemes.features import RATE, frame_labels, log_mel
from kruify.tasks.phonemes.labels import SILENCE, from_espeak
from kruify.tasks.phonemes.sentences import sentences
from kruify.tasks.phonemes.timit import Utterance

INSTALL = (
    "Run `pip install espeakng-loader` or `apt-get install espeak-ng`, or name the folder of TIMIT: timit:data=FOLDER"
)

# Speakers are espeak-ng's variants of its voice en-us; nobody of one split speaks in another.
SPEAKERS = {
    "train": ("m1", "m2", "m3", "m4", "m5", "m6", "f1", "f2", "f3"),
    "valid": ("m7", "f4"),
    "test": ("m8", "f5"),
}
SENTENCES = {"train": 450, "valid": 80, "test": 120}
_FORMAT = 1  # of the cache file
_RETRIEVE = 1  # AUDIO_OUTPUT_RETRIEVAL: samples go to the callback
_PHONEME_EVENTS, _DONT_EXIT = 0x0001, 0x8000  # options of espeak_Initialize
_LIST_END, _PHONEME = 0, 7  # kinds of events
_SPEED, _PITCH, _RANGE = 1, 3, 4  # parameters
_CHARACTERS = 1  # espeakCHARS_UTF8, POS_CHARACTER


def utterances() -> dict[str, list[Utterance]]:
    """Return split -> utterances, spoken once and kept in the user's cache folder.

    Raises:
        TaskError: espeak-ng is not installed, or does not speak.
    """
    library = find()
    kept = cache_folder() / f"phonemes-{_FORMAT}-{library.stat().st_size}.npz"
    with suppress(OSError, ValueError, KeyError):
        return _load(kept)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "spoken.npz"
        command = [sys.executable, "-m", __name__, str(library), str(file)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode or not file.is_file():
            last = (done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"])[-1]
            raise TaskError(f"espeak-ng does not speak: {last[:200]}", where=library, hint=INSTALL)
        keep(kept, file.read_bytes())
        return _load(file)


def find() -> Path:
    """Return the file of the library: of the package espeakng-loader, else of the system."""
    if packaged := find_in_package("espeakng_loader", "libespeak-ng.so"):
        return packaged
    name = find_library("espeak-ng")
    for folder in ("lib/x86_64-linux-gnu", "lib/aarch64-linux-gnu", "lib64", "lib", "local/lib"):
        if name is not None and (file := Path("/usr") / folder / name).is_file():
            return file
    raise TaskError("espeak-ng, which speaks the sentences, is not installed", hint=INSTALL)


def _load(file: Path) -> dict[str, list[Utterance]]:
    with np.load(file, allow_pickle=False) as arrays:
        splits = {}
        for split in SPLITS:
            ends = np.cumsum(arrays[f"{split}_frames"])[:-1]
            features = np.split(arrays[f"{split}_features"].astype(np.float32), ends)
            splits[split] = list(zip(features, np.split(arrays[f"{split}_labels"].astype(np.int64), ends), strict=True))
        return splits


def speak_all(library: Path, file: Path) -> None:
    """Speak every sentence of every split and write features and labels to `file`."""
    voice = Voice(library)
    arrays: dict[str, NDArray[Any]] = {}
    for number, split in enumerate(SPLITS):
        rng = random.Random(number)
        spoken = []
        for text in sentences(SENTENCES[split], seed=number):
            samples, times = voice.say(text, rng.choice(SPEAKERS[split]), rng.randint(140, 200), rng.randint(35, 65))
            features = log_mel(samples)
            spoken.append((features, frame_labels(times, len(features))))
        arrays[f"{split}_frames"] = np.array([len(features) for features, _ in spoken])
        arrays[f"{split}_features"] = np.concatenate([features for features, _ in spoken]).astype(np.float16)
        arrays[f"{split}_labels"] = np.concatenate([labels for _, labels in spoken]).astype(np.int8)
    with file.open("wb") as stream:
        np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]


class _Id(ctypes.Union):
    _fields_: ClassVar = [("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8)]


class _Event(ctypes.Structure):
    """espeak_EVENT of speak_lib.h."""

    _fields_: ClassVar = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _Id),
    ]


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


class Voice:
    """espeak-ng, speaking to memory. One in a process: the library's state is global."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        data = str(library.parent).encode() if (library.parent / "espeak-ng-data").is_dir() else None
        options = _PHONEME_EVENTS | _DONT_EXIT
        self.rate = int(self._library.espeak_Initialize(_RETRIEVE, 0, ctypes.c_char_p(data), options))
        if self.rate <= 0:
            raise RuntimeError(f"espeak_Initialize failed with {self.rate}")
        self._samples: list[NDArray[np.int16]] = []
        self._times: list[tuple[int, str]] = []
        self._callback = _Callback(self._take)  # the library keeps the pointer, so we keep the object
        self._library.espeak_SetSynthCallback(self._callback)

    def say(self, text: str, variant: str, speed: int, pitch: int) -> tuple[NDArray[np.int16], list[tuple[int, int]]]:
        """Return 16 kHz samples, and (first sample, class) of every phoneme.

        Args:
            variant: of the voice en-us: m1 to m8, f1 to f5.
            speed: words per minute.
            pitch: 0 to 99.
        """
        self._samples, self._times = [], []
        if self._library.espeak_SetVoiceByName(f"en-us+{variant}".encode()):
            raise RuntimeError(f"espeak-ng has no voice en-us+{variant}")
        for parameter, value in ((_SPEED, speed), (_PITCH, pitch), (_RANGE, 50)):
            self._library.espeak_SetParameter(parameter, value, 0)
        written = text.encode()
        none = ctypes.c_void_p(None)
        if self._library.espeak_Synth(written, ctypes.c_size_t(len(written) + 1), 0, 1, 0, _CHARACTERS, none, none):
            raise RuntimeError(f"espeak_Synth failed on {text!r}")
        self._library.espeak_Synchronize()
        if not self._samples or not self._times:
            raise RuntimeError(f"espeak-ng said nothing to {text!r}")
        samples = np.concatenate(self._samples).astype(np.float64)
        spoken = resample_poly(samples, RATE, self.rate)
        return np.clip(np.rint(spoken), -32768, 32767).astype(np.int16), list(self._labelled())

    def _labelled(self) -> Iterator[tuple[int, int]]:
        yield 0, SILENCE
        for sample, mnemonic in self._times:
            try:
                yield round(sample * RATE / self.rate), from_espeak(mnemonic)
            except KeyError:
                raise RuntimeError(f"espeak-ng speaks a phoneme that kruify does not know: {mnemonic}") from None

    def _take(self, samples: Any, count: int, events: Any) -> int:
        if samples and count > 0:
            self._samples.append(np.ctypeslib.as_array(samples, (count,)).copy())
        place = 0
        while events[place].type != _LIST_END:
            event = events[place]
            if event.type == _PHONEME:
                self._times.append((event.sample, event.id.string.decode()))
            place += 1
        return 0


if __name__ == "__main__":
    speak_all(Path(sys.argv[1]), Path(sys.argv[2]))
