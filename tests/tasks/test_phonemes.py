from __future__ import annotations

import math
import struct
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kruify.errors import CorruptError, TaskError, UnsupportedError
from kruify.tasks import _data
from kruify.tasks.loader import load_task
from kruify.tasks.phonemes import spoken, task
from kruify.tasks.phonemes.features import FEATURES, HOP, RATE, WINDOW, frame_labels, log_mel, with_differences
from kruify.tasks.phonemes.labels import CLASSES, IGNORED, SILENCE, fold, from_espeak
from kruify.tasks.phonemes.sentences import sentences
from kruify.tasks.phonemes.task import load
from kruify.tasks.phonemes.timit import CORE, audio, bounds, utterances

TIMIT_61 = """
aa ae ah ao aw ax ax-h axr ay b bcl ch d dcl dh dx eh el em en eng epi er ey f g gcl h# hh hv ih ix iy jh k kcl l m n
ng nx ow oy p pau pcl q r s sh t tcl th uh uw ux v w y z zh
"""
ORDER = {"<i2": "01", ">i2": "10"}


def has_espeak() -> bool:
    try:
        return spoken.find().is_file()
    except TaskError:
        return False


installed = pytest.mark.skipif(not has_espeak(), reason="espeak-ng is not installed")


def sphere(samples: np.ndarray, order: str = "<i2", **changes: str) -> bytes:
    fields = {
        "database_id": "-s5 TIMIT", "sample_count": f"-i {len(samples)}", "sample_rate": "-i 16000",
        "channel_count": "-i 1", "sample_n_bytes": "-i 2", "sample_byte_format": f"-s2 {ORDER[order]}", **changes,
    }  # fmt: skip
    lines = "".join(f"{name} {value}\n" for name, value in fields.items() if value)
    return f"NIST_1A\n   1024\n{lines}end_head\n".encode().ljust(1024) + samples.astype(order).tobytes()


def tone(seconds: float = 0.5) -> np.ndarray:
    return (8000 * np.sin(2 * math.pi * 440 * np.arange(round(seconds * RATE)) / RATE)).astype(np.int16)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    task.load.cache_clear()


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """TIMIT's layout, a few records: capitals and SPHERE for training, small letters and RIFF for testing."""
    for speaker in ("FCJF0", "MDAC0"):
        folder = tmp_path / "TRAIN" / "DR1" / speaker
        folder.mkdir(parents=True)
        for name in ("SA1", "SI648", "SX37"):
            (folder / f"{name}.WAV").write_bytes(sphere(tone()))
            (folder / f"{name}.PHN").write_text("0 3000 h#\n3000 4000 sh\n4000 5000 q\n5000 8000 ix\n")
    for number, speaker in enumerate((*sorted(CORE)[:2], "faks0", "mabw0", "mbjk0")):
        folder = tmp_path / "test" / "dr1" / speaker
        folder.mkdir(parents=True)
        with wave.open(str(folder / f"si{number}.WAV.wav"), "wb") as sound:
            sound.setnchannels(1), sound.setsampwidth(2), sound.setframerate(RATE)
            sound.writeframes(tone(0.3).tobytes())
        (folder / f"si{number}.phn").write_text("0 2400 pau\n2400 4800 zh\n")
    return tmp_path


def test_61_phones_become_39_classes() -> None:
    folded = {phone: fold(phone) for phone in TIMIT_61.split()}
    assert len(folded) == 61
    assert len(CLASSES) == 39 and set(folded.values()) == {IGNORED, *range(39)}
    same = {c: {p for p, label in folded.items() if label == CLASSES.index(c)} for c in CLASSES}
    # Lee & Hon 1989, table 2, with the closures and pauses as one silence
    assert {c: p for c, p in same.items() if len(p) > 1} == {
        "aa": {"aa", "ao"}, "ah": {"ah", "ax", "ax-h"}, "er": {"er", "axr"}, "hh": {"hh", "hv"}, "ih": {"ih", "ix"},
        "l": {"l", "el"}, "m": {"m", "em"}, "n": {"n", "en", "nx"}, "ng": {"ng", "eng"}, "sh": {"sh", "zh"},
        "sil": {"bcl", "dcl", "gcl", "pcl", "tcl", "kcl", "h#", "pau", "epi"}, "uw": {"uw", "ux"},
    }  # fmt: skip
    assert [p for p, label in folded.items() if label == IGNORED] == ["q"]
    with pytest.raises(KeyError):
        fold("xx")
    assert CLASSES[from_espeak("'i:")] == "iy" and from_espeak("_:") == SILENCE
    with pytest.raises(KeyError):
        from_espeak("q!")


def test_a_tone_is_loudest_in_the_band_around_it() -> None:
    features = log_mel(tone())
    assert features.shape == (1 + (len(tone()) - WINDOW) // HOP, 41)
    mel = 2595 * math.log10(1 + 440 / 700)
    band = mel / (2595 * math.log10(1 + 8000 / 700) / 41) - 1  # 42 edges, band k peaks at edge k + 1
    assert abs(int(features[10, :40].argmax()) - band) <= 1
    silence = log_mel(np.zeros(1600, np.int16))
    assert silence.shape == (8, 41) and not silence.any()
    assert len(log_mel(np.zeros(10, np.int16))) == 1


def test_labels_are_what_is_spoken_in_the_middle_of_a_frame() -> None:
    assert frame_labels([(100, 7), (HOP + WINDOW // 2, 3), (HOP + WINDOW // 2 + 1, 9)], 4).tolist() == [7, 3, 9, 9]


def test_differences_of_a_parabola() -> None:
    t = torch.arange(20.0, dtype=torch.float64)
    found = with_differences(torch.stack([t**2, 3 * t], 1).repeat(1, 21)[:, :41])
    assert found.shape == (20, FEATURES)
    torch.testing.assert_close(found[2:-2, 41], 2 * t[2:-2])
    torch.testing.assert_close(found[2:-2, 42], torch.full((16,), 3.0, dtype=torch.float64))
    torch.testing.assert_close(found[4:-4, 82], torch.full((12,), 2.0, dtype=torch.float64))


@pytest.mark.parametrize("order", ["<i2", ">i2"])
def test_sphere_samples_in_either_byte_order(tmp_path: Path, order: str) -> None:
    (tmp_path / "a.WAV").write_bytes(sphere(tone(), order))
    assert np.array_equal(audio(tmp_path / "a.WAV"), tone())


@pytest.mark.parametrize(
    ("content", "error", "said"),
    [
        (sphere(tone())[:-2], CorruptError, "7999 of 8000 samples"),
        (sphere(tone(), sample_rate=""), CorruptError, "SPHERE header is damaged"),
        (sphere(tone(), sample_count="-i many"), CorruptError, "SPHERE header is damaged"),
        (b"NIST_1A\n", CorruptError, "SPHERE header is damaged"),
        (sphere(tone(), sample_coding="-s26 pcm,embedded-shorten-v2.00"), UnsupportedError, "sph2pipe"),
        (sphere(tone(), sample_rate="-i 8000"), UnsupportedError, "at 8000 Hz"),
        (b"RIFF" + struct.pack("<I", 40) + b"WAVE", CorruptError, "neither a SPHERE nor a RIFF"),
        (b"", CorruptError, "neither a SPHERE nor a RIFF"),
    ],
)
def test_broken_audio(tmp_path: Path, content: bytes, error: type[Exception], said: str) -> None:
    (tmp_path / "a.WAV").write_bytes(content)
    with pytest.raises(error, match=said):
        audio(tmp_path / "a.WAV")


def test_broken_phones(tmp_path: Path) -> None:
    file = tmp_path / "a.PHN"
    for text in ("0 100 h#\n100 200 zz\n", "0 100\n", "x 1 aa\n"):
        file.write_text(text)
        with pytest.raises(CorruptError, match=r"a\.PHN:\d: "):
            bounds(file)
    file.write_text("")
    with pytest.raises(CorruptError, match="holds no phones"):
        bounds(file)


def test_timits_layout(corpus: Path) -> None:
    found = utterances(corpus)
    assert {split: len(spoken_) for split, spoken_ in found.items()} == {"train": 4, "valid": 3, "test": 2}
    features, labels = found["train"][0]
    assert features.shape == (48, 41)
    names = [CLASSES[label] if label != IGNORED else "q" for label in labels.tolist()]
    middles = [frame * HOP + WINDOW // 2 for frame in range(48)]
    expected = ["sil" if m < 3000 else "sh" if m < 4000 else "q" if m < 5000 else "ih" for m in middles]
    assert names == expected
    assert set(found["test"][0][1].tolist()) == {SILENCE, CLASSES.index("sh")}


@pytest.mark.parametrize("missing", ["TRAIN", "test"])
def test_a_folder_that_is_not_timit(corpus: Path, missing: str) -> None:
    (corpus / missing).rename(corpus / "elsewhere")
    with pytest.raises(TaskError, match="no folders TRAIN and TEST"):
        utterances(corpus)
    with pytest.raises(TaskError, match="TIMIT is in no package"):
        load_task("timit")


def test_an_incomplete_timit(corpus: Path) -> None:
    (corpus / "TRAIN/DR1/FCJF0/SX37.WAV").unlink()
    with pytest.raises(TaskError, match="no audio beside it"):
        utterances(corpus)
    for speaker in CORE:
        folder = corpus / "test/dr1" / speaker
        for file in folder.glob("*"):
            file.unlink()
    with pytest.raises(TaskError, match="nobody speaks in split test"):
        utterances(corpus)


class Says(nn.Module):
    """Gives every frame the same answer."""

    def __init__(self, label: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(nn.functional.one_hot(torch.tensor(label), 39).float())

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(*x.shape[:2], -1)


def test_batches_loss_and_accuracy_leave_out_padding_and_glottal_stops(corpus: Path) -> None:
    rng = np.random.default_rng(0)
    for file in (corpus / "TRAIN").rglob("*.WAV"):
        file.write_bytes(sphere(rng.integers(-9000, 9000, 8000).astype(np.int16)))
    (corpus / "TRAIN/DR1/MDAC0/SX37.WAV").write_bytes(sphere(tone(0.7)))
    task = load_task("timit", data=corpus, hidden=8, batch_size=4)
    batch = next(iter(task.batches("train", seed=1)))
    lengths = [len(labels) for _, labels in utterances(corpus)["train"]]
    assert batch.x.shape == (4, max(lengths), FEATURES)
    counted = sum(int((labels != IGNORED).sum()) for _, labels in utterances(corpus)["train"])
    assert task.weight(batch) == task.examples("train") == counted
    every = torch.cat([x[: len(y)] for x, y in load(task.data)["train"]])
    torch.testing.assert_close(every.mean(0), torch.zeros(FEATURES), atol=1e-4, rtol=0)
    labels = torch.cat([torch.from_numpy(y) for _, y in utterances(corpus)["train"]])
    labels = labels[labels != IGNORED]
    share = float((labels == SILENCE).float().mean())
    assert task.evaluate(Says(SILENCE), "train") == {"accuracy": pytest.approx(share)}
    expected = -math.log(math.e / (math.e + 38)) * share - math.log(1 / (math.e + 38)) * (1 - share)
    assert task.loss(task.forward(Says(SILENCE), batch), batch).item() == pytest.approx(expected, rel=1e-5)
    model = task.model()
    assert task.forward(model, batch).shape == (*batch.y.shape, 39)


def test_sentences_follow_from_the_seed() -> None:
    assert sentences(3, 5) == sentences(4, 5)[:3]
    assert sentences(3, 5) != sentences(3, 6)
    words = {word.strip(".").lower() for text in sentences(500, 1) for word in text.split()}
    assert len(words) > 150 and all(word.isalpha() for word in words)


def test_missing_library_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_data.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(spoken, "find_library", lambda name: None)
    with pytest.raises(TaskError, match="espeak-ng, which speaks the sentences, is not installed"):
        spoken.utterances()


def test_a_library_that_does_not_speak_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "libespeak-ng.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(spoken, "find", lambda: broken)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(TaskError, match="espeak-ng does not speak: "):
        spoken.utterances()


@installed
def test_espeak_speaks_and_tells_when(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The whole way with few sentences: another process, the cache, the task."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    script = tmp_path / "speak.py"
    script.write_text(
        "import sys; from pathlib import Path; from kruify.tasks.phonemes import spoken\n"
        "spoken.SENTENCES = {'train': 6, 'valid': 2, 'test': 2}\n"
        "spoken.speak_all(Path(sys.argv[-2]), Path(sys.argv[-1]))\n"
    )
    real = spoken.subprocess.run
    calls = []

    def run(command: list[str], **options: object) -> object:
        calls.append(command)
        return real([command[0], str(script), *command[-2:]], **options)

    monkeypatch.setattr(spoken.subprocess, "run", run)
    task = load_task("phonemes", hidden=8)
    assert [len(load(task.data)[split]) for split in ("train", "valid", "test")] == [6, 2, 2]
    features, labels = load(task.data)["train"][0]
    assert features.shape == (len(labels), FEATURES)
    seconds = len(labels) * HOP / RATE
    assert 1 < seconds < 10
    text = sentences(1, 0)[0]
    changes = 1 + int((labels[1:] != labels[:-1]).sum())
    assert len(text) * 0.4 < changes < len(text), "about a phoneme a letter or two"
    # Silence is quieter than speech: labels and sound belong together.
    every = [(x[:, 40], y) for x, y in load(task.data)["train"]]
    quiet = torch.cat([e[y == SILENCE] for e, y in every]).mean()
    loud = torch.cat([e[y == CLASSES.index("aa")] for e, y in every]).mean()
    assert loud > quiet + 1
    spoken.utterances()
    assert len(calls) == 1, "the second time comes from the cache"
