"""Where the time goes in which onnxruntime loads the small graphs: python examples/deepfilternet3/load.py

After run.py, in the same folder. Nodes that work out weights are replaced by what they give, kind by kind; each version
of the three graphs is loaded in turns with the others, on one thread; milliseconds of
the processor.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from data import FOLDER, GRAPHS
from onnx import helper, numpy_helper
from showcase import keep

KINDS = ("Cast", "Mul", "MatMul")
REPEATS = 15


def worked_out(path: Path, kinds: tuple[str, ...]) -> bytes:
    """The graph with the results of these operators on constants in their place."""
    model = onnx.load(path)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    before = set(constants)
    for node in list(model.graph.node):
        if node.op_type in kinds and constants.keys() >= set(node.input):
            given = [constants[name] for name in node.input]
            if node.op_type == "Cast":
                constants[node.output[0]] = given[0].astype(helper.tensor_dtype_to_np_dtype(node.attribute[0].i))
            else:
                constants[node.output[0]] = given[0] * given[1] if node.op_type == "Mul" else given[0] @ given[1]
            model.graph.node.remove(node)
    read = {name for node in model.graph.node for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in read]
    new = [numpy_helper.from_array(np.ascontiguousarray(constants[name]), name) for name in constants.keys() - before]
    del model.graph.initializer[:]
    model.graph.initializer.extend([*kept, *(tensor for tensor in new if tensor.name in read)])
    found: bytes = model.SerializeToString()
    return found


def main() -> None:
    """Prints the milliseconds and keeps them as deepfilternet3-out/load.json."""
    versions = {"original": [(FOLDER / "original" / f"{name}.onnx").read_bytes() for name in GRAPHS]}
    for count in range(len(KINDS) + 1):
        kinds = KINDS[:count]
        title = "small" if not kinds else f"small, {', '.join(kinds)} worked out"
        versions[title] = [worked_out(FOLDER / "small" / f"{name}.onnx", kinds) for name in GRAPHS]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    least = dict.fromkeys(versions, float("inf"))
    for _ in range(REPEATS):
        for title, models in versions.items():
            start = time.process_time()
            for model in models:
                onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            least[title] = min(least[title], 1000 * (time.process_time() - start))
    keep({"load_ms": least}, FOLDER / "load.json")


if __name__ == "__main__":
    main()
