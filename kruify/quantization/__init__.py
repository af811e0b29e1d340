"""How weights are stored in fewer bits: integers with one scale per row, 16-bit floats. Tensors only."""

from kruify.quantization.rows import (
    DTYPES,
    SCALES,
    dequantize,
    pays,
    quantize_groups,
    quantize_rows,
    round_to,
    row_dims,
)

__all__ = ["DTYPES", "SCALES", "dequantize", "pays", "quantize_groups", "quantize_rows", "round_to", "row_dims"]
