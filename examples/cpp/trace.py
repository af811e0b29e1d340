"""Writes the layer of a converted file for stream_torch.cpp: `python trace.py small.kru.safetensors layer.ts`.

operators.h, beside it, declares kruify's operators, which C++ does not learn from a Python package.
"""

import json
import sys
import warnings
from pathlib import Path

import torch

import kruify


def main(source: str, target: str) -> None:
    (layer,) = kruify.load(source).values()
    example = torch.zeros(2, 1, layer.input_size)  # (time, batch, features): all but the last may differ later
    warnings.simplefilter("ignore", torch.jit.TracerWarning)  # the batch size decides how fast it is, not what it gives
    with torch.no_grad():
        torch.jit.trace(layer.eval(), (example,), check_trace=False).save(target)
    schemas = [str(schema) for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("kruify::")]
    lines = ",\n".join(json.dumps(schema) for schema in schemas)
    Path(target).with_name("operators.h").write_text(f"static const char* const OPERATORS[] = {{\n{lines}}};\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
