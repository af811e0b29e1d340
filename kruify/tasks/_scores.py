"""The Bach chorales of the package music21 as frames: MusicXML read once, kept in the user's cache folder."""

from __future__ import annotations

import json
import math
import zipfile
from contextlib import suppress
from fractions import Fraction
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from kruify.errors import TaskError
from kruify.tasks._data import cache_folder, find_in_package, keep, split_of
from kruify.tasks.base import SPLITS

Piece = list[list[int]]
"""Frames, each the MIDI pitches that sound in it."""
Note = tuple[Fraction, Fraction, int]
"""Start and end in quarter notes, MIDI pitch."""

_VOICES = ("soprano", "alto", "tenor", "bass")
_SEMITONES = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
_FORMAT = 1  # of the cache file


def chorales() -> dict[str, list[Piece]]:
    """Return split -> chorales of the installed music21, 60/20/20 by sha1 of the file name; TaskError if missing."""
    folder = find_in_package("music21", "corpus/bach")
    if folder is None:
        hint = (
            "Run `pip install --no-deps music21` (its own dependencies are not needed), or name a file: jsb:data=FILE"
        )
        raise TaskError("the Python package music21, which holds the scores, is not installed", hint=hint)
    cached = cache_folder() / f"jsb-{_FORMAT}-music21-{metadata.version('music21')}.json"
    with suppress(OSError, ValueError, KeyError):
        content = json.loads(cached.read_bytes())
        return {split: content[split] for split in SPLITS}
    splits: dict[str, list[Piece]] = {split: [] for split in SPLITS}
    for file in sorted(folder.glob("*.mxl")):
        if piece := frames(_score(file)):
            splits[split_of(file.name, 20)].append(piece)
    keep(cached, json.dumps(splits).encode())
    return splits


def _score(file: Path) -> Element:
    """Return the root of the score in a compressed MusicXML file (a zip with one score beside META-INF)."""
    with zipfile.ZipFile(file) as archive:
        name = next(n for n in archive.namelist() if n.endswith((".xml", ".musicxml")) and not n.startswith("META-INF"))
        return ElementTree.fromstring(archive.read(name))


def frames(score: Element) -> Piece:
    """Return what the four voices sing at every quarter note; frames in which all are silent are left out.

    Instruments are left out, except where no part is named after a voice: there the first four parts are taken.
    """
    voices = {
        part.get("id")
        for part in score.iterfind("part-list/score-part")
        if (part.findtext("part-name") or "").lower().startswith(_VOICES)
    }
    parts = score.findall("part")
    chosen = [part for part in parts if part.get("id") in voices] or parts[:4]
    sung = [note for part in chosen for note in notes(part)]
    end = math.ceil(max((end for _, end, _ in sung), default=0))
    grid: list[set[int]] = [set() for _ in range(end)]
    for start, stop, pitch in sung:
        for frame in range(math.ceil(start), math.ceil(stop)):
            grid[frame].add(pitch)
    return [sorted(pitches) for pitches in grid if pitches]


def notes(part: Element) -> list[Note]:
    """Return the notes of one part of a MusicXML score (partwise): repeats are not played, tied notes stay apart."""
    found: list[Note] = []
    now = onset = Fraction(0)
    divisions, transpose = 1, 0
    for element in (element for measure in part.iterfind("measure") for element in measure):
        if element.tag == "attributes":
            divisions = int(element.findtext("divisions") or divisions)
            if element.find("transpose") is not None:
                octaves = int(element.findtext("transpose/octave-change") or 0)
                transpose = int(element.findtext("transpose/chromatic") or 0) + 12 * octaves
            continue
        length = Fraction(element.findtext("duration") or 0) / divisions
        if element.tag == "backup":
            now -= length
        elif element.tag == "forward":
            now += length
        elif element.tag == "note" and element.find("grace") is None and element.find("cue") is None:
            if element.find("chord") is None:  # a note of a chord starts with the one before it
                onset, now = now, now + length
            if (pitch := element.find("pitch")) is not None:
                octave, step = int(pitch.findtext("octave") or 4), pitch.findtext("step") or "C"
                alter = int(float(pitch.findtext("alter") or 0))
                found.append((onset, onset + length, 12 * (octave + 1) + _SEMITONES[step] + alter + transpose))
    return found
