"""How weights are stored in fewer bits: integers with one scale per row, 16-bit floats. Tensors only."""

from kruify.quantization.rows import DTYPES, dequantize, integers, pays, quantize_rows, round_to, row_dims, scale_of

__all__ = ["DTYPES", "dequantize", "integers", "pays", "quantize_rows", "round_to", "row_dims", "scale_of"]
