"""TIMIT in its usual layout: TRAIN/DR1/FCJF0/SX37.WAV with SX37.PHN beside it, capitals or not.

The audio is NIST SPHERE, as on the disc, or RIFF, as many copies have it (SX37.WAV.wav). The two sentences that
everybody reads (SA) are left out, as usual.
"""

from __future__ import annotations

import io
import wave
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kruify.errors import CorruptError, TaskError, UnsupportedError
from kruify.tasks._data import sha1
from kruify.tasks.phonemes.features import RATE, frame_labels, log_mel
from kruify.tasks.phonemes.labels import fold

Utterance = tuple[NDArray[np.float32], NDArray[np.int64]]  # (frames, 41), (frames,)

# The core test set of the corpus's own documentation: two men and one woman of each of eight dialect regions.
_SPEAKERS = """
mdab0 mwbt0 felc0 mtas1 mwew0 fpas0 mjmp0 mlnt0 fpkt0 mlll0 mtls0 fjlm0 mbpm0 mklt0 fnlp0 mcmj0 mjdh0 fmgd0
mgrt0 mnjm0 fdhc0 mjln0 mpam0 fmld0
"""
CORE = frozenset(_SPEAKERS.split())
_VALID_SPEAKERS = 50


def utterances(folder: Path) -> dict[str, list[Utterance]]:
    """Return split -> utterances. "train" is TRAIN, "test" the core test set, "valid" 50 other speakers of TEST.

    Raises:
        TaskError: the folder is not laid out so.
        CorruptError, UnsupportedError: a file cannot be read.
    """
    parts = {path.name.lower(): path for path in folder.iterdir()} if folder.is_dir() else {}
    if not {"train", "test"} <= parts.keys():
        hint = "Name the folder of TIMIT that holds TRAIN and TEST: timit:data=FOLDER"
        raise TaskError("there are no folders TRAIN and TEST", where=folder, hint=hint)
    spoken = {name: _speakers(parts[name]) for name in ("train", "test")}
    others = sorted((s for s in spoken["test"] if s not in CORE), key=sha1)
    chosen = {
        "train": list(spoken["train"]),
        "valid": others[:_VALID_SPEAKERS],
        "test": [speaker for speaker in spoken["test"] if speaker in CORE],
    }
    for split, speakers in chosen.items():
        if not speakers:
            raise TaskError(f"nobody speaks in split {split}", where=folder, hint="Name the whole of TIMIT")
    return {
        split: [_read(file) for s in speakers for file in spoken["train" if split == "train" else "test"][s]]
        for split, speakers in chosen.items()
    }


def _speakers(part: Path) -> dict[str, list[Path]]:
    """Return speaker -> the phone files of what they say."""
    found: dict[str, list[Path]] = {}
    for file in sorted(part.glob("*/*/*")):
        if file.suffix.lower() == ".phn" and not file.name.lower().startswith("sa"):
            found.setdefault(file.parent.name.lower(), []).append(file)
    return found


def _read(phones: Path) -> Utterance:
    features = log_mel(audio(_beside(phones)))
    return features, frame_labels(bounds(phones), len(features))


def _beside(phones: Path) -> Path:
    wanted = {f"{phones.stem}.wav".lower(), f"{phones.stem}.wav.wav".lower()}
    for file in sorted(phones.parent.iterdir()):
        if file.name.lower() in wanted:
            return file
    raise TaskError("there is no audio beside it", where=phones, hint="Name a whole copy of TIMIT")


def bounds(file: Path) -> list[tuple[int, int]]:
    """Return (first sample, class) of each line "0 3050 h#" of a phone file."""
    found = []
    for number, line in enumerate(file.read_text("ascii", errors="replace").splitlines(), 1):
        try:
            start, _, phone = line.split()
            found.append((int(start), fold(phone)))
        except (ValueError, KeyError):
            hint = "Each line is FIRST LAST PHONE, the phone one of TIMIT's 61"
            raise CorruptError(f'"{line[:40]}" is no phone', where=f"{file}:{number}", hint=hint) from None
    if not found:
        raise CorruptError("it holds no phones", where=file)
    return found


def audio(file: Path) -> NDArray[np.int16]:
    """Return the samples of a SPHERE or RIFF file of one channel, 16 bits, 16 kHz."""
    content = file.read_bytes()
    return _sphere(content, file) if content.startswith(b"NIST_1A") else _riff(content, file)


def _riff(content: bytes, file: Path) -> NDArray[np.int16]:
    try:
        with wave.open(io.BytesIO(content)) as sound:
            form = (sound.getnchannels(), sound.getsampwidth(), sound.getframerate())
            samples = sound.readframes(sound.getnframes())
    except (wave.Error, EOFError) as error:
        raise CorruptError(f"it is neither a SPHERE nor a RIFF file: {error}", where=file) from error
    if form != (1, 2, RATE):
        raise UnsupportedError(f"it has {form[0]} channels of {8 * form[1]} bits at {form[2]} Hz", file)
    return np.frombuffer(samples, "<i2")


def _sphere(content: bytes, file: Path) -> NDArray[np.int16]:
    """NIST SPHERE: "NIST_1A", the header's length, lines "name -type value", "end_head", padding, then the samples."""
    try:
        length = int(content[8:16])
        lines = content[16:length].decode("ascii").partition("end_head")[0].splitlines()
        fields = {name: value for name, _, value in (line.split(None, 2) for line in lines if line.strip())}
        count, rate = int(fields["sample_count"]), int(fields["sample_rate"])
        form = (fields.get("channel_count", "1"), fields["sample_n_bytes"], rate)
        order = fields["sample_byte_format"]
    except (ValueError, KeyError, UnicodeDecodeError) as error:
        raise CorruptError(f"its SPHERE header is damaged: {error}", where=file, hint="Copy it again") from None
    coding = fields.get("sample_coding", "pcm").strip()
    if coding != "pcm":
        raise UnsupportedError(f"its samples are coded as {coding[:40]}", file, "Unpack it with w_decode or sph2pipe")
    if form != ("1", "2", RATE) or order not in ("01", "10"):
        raise UnsupportedError(
            f"it has {form[0]} channels of {form[1]} bytes ({order}) at {rate} Hz, not TIMIT's", file
        )
    samples = np.frombuffer(content[length : length + 2 * count], "<i2" if order == "01" else ">i2")
    if len(samples) != count:
        raise CorruptError(f"it is cut short: {len(samples)} of {count} samples", where=file, hint="Copy it again")
    return samples.astype(np.int16)
