"""The 39 classes that TIMIT's 61 phones are folded into (Lee & Hon 1989), and espeak-ng's names for them."""

from __future__ import annotations

_NAMES = """
aa ae ah aw ay b ch d dh dx eh er ey f g hh ih iy jh k l m n ng ow oy p r s sh sil t th uh uw v w y z
"""
CLASSES = tuple(_NAMES.split())
SILENCE = CLASSES.index("sil")
IGNORED = -1
"""The glottal stop, TIMIT's "q", belongs to no class: its frames are not counted."""

_FOLDED = {
    "ao": "aa", "ax": "ah", "ax-h": "ah", "axr": "er", "hv": "hh", "ix": "ih", "el": "l", "em": "m", "en": "n",
    "nx": "n", "eng": "ng", "zh": "sh", "ux": "uw",
    **dict.fromkeys(("pcl", "tcl", "kcl", "bcl", "dcl", "gcl", "h#", "pau", "epi"), "sil"),
}  # fmt: skip

# The phonemes of espeak-ng's voice en-us. A vowel with an r in it counts as the vowel.
_ESPEAK = {
    "0": "aa", "O2": "aa", "O:": "aa", "O@": "aa", "o@": "aa", "A:": "aa", "A@": "aa", "a": "ae", "aa": "ae",
    "@": "ah", "@2": "ah", "a#": "ah", "V": "ah", "aU": "aw", "aI": "ay", "aI3": "ay", "aI@": "ay", "tS": "ch",
    "D": "dh", "t#": "dx", "E": "eh", "e@": "eh", "3": "er", "3:": "er", "eI": "ey", "h": "hh", "I": "ih", "I#": "ih",
    "I2": "ih", "i@": "ih", "i@3": "ih", "i": "iy", "i:": "iy", "dZ": "jh", "@L": "l", "N": "ng", "oU": "ow",
    "OI": "oy", "r-": "r", "S": "sh", "Z": "sh", "t2": "t", "T": "th", "U": "uh", "U@": "uh", "u:": "uw", "j": "y",
    ";": "y", "_": "sil", "_!": "sil", "_:": "sil",
}  # fmt: skip


def fold(phone: str) -> int:
    """Return the class of one of TIMIT's 61 phones, IGNORED for "q"; KeyError for anything else."""
    if phone == "q":
        return IGNORED
    folded = _FOLDED.get(phone, phone)
    if folded not in CLASSES:
        raise KeyError(phone)
    return CLASSES.index(folded)


def from_espeak(mnemonic: str) -> int:
    """Return the class of a phoneme as espeak-ng's voice en-us writes it, stress marks or not; KeyError if unknown."""
    plain = mnemonic.strip("',%=") or "_"
    return fold(_ESPEAK.get(plain, plain))
