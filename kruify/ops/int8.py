"""Products with eight-bit matrices: CPU, inference; csrc/README.md tells the arithmetic.

There is no implementation in torch: where the kernels are missing, callers take the float operators.
"""

from __future__ import annotations

from kruify.ops.registration import MATRIX, define

define("int8_instruction_set", "() -> int")
define("int8_pack", "(Tensor? first, Tensor second, int[] layout) -> Tensor")
define("fingerprint", "(Tensor[] tensors) -> int")
define("int8_linear", "(Tensor x, Tensor packed, int[] layout) -> Tensor")
define(
    "int8_recurrence",
    "(Tensor x, Tensor? input, int[] input_layout, Tensor? input_residual, Tensor? input_index, Tensor? bias_ih,"
    " Tensor? batch_sizes, Tensor h0, Tensor? c0,"
    f" Tensor recurrent, int[] recurrent_layout, {MATRIX}, str kind, bool reverse)"
    " -> (Tensor out, Tensor hT, Tensor cT)",
)
