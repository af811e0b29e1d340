"""How weights are stored in fewer bits: integers with one scale per row, 16-bit floats. Tensors only."""

from kruify.quantization.compensation import compensated
from kruify.quantization.rows import (
    DTYPES,
    EQUAL_LEVELS,
    INTEGERS,
    LARGEST,
    LEVELS,
    SCALES,
    dequantize,
    in_pairs,
    pack,
    pays,
    quantize_groups,
    quantize_rows,
    round_to,
    row_dims,
    unpack,
)

__all__ = [
    "DTYPES",
    "EQUAL_LEVELS",
    "INTEGERS",
    "LARGEST",
    "LEVELS",
    "SCALES",
    "compensated",
    "dequantize",
    "in_pairs",
    "pack",
    "pays",
    "quantize_groups",
    "quantize_rows",
    "round_to",
    "row_dims",
    "unpack",
]
