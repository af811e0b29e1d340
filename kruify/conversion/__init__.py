"""Swaps dense recurrent matrices for Kronecker sums, in state dicts and in modules. Nothing else swaps layers."""

from kruify.conversion.build import Factored, build_dense, build_layer, describe_kru, plan_of
from kruify.conversion.check import check_plan, load_tensors
from kruify.conversion.inspection import Inspection, LayerSummary, inspect
from kruify.conversion.modules import convert_module, dense_kru, densify, swap
from kruify.conversion.pipeline import convert
from kruify.conversion.result import Conversion, GateResult, ParameterCounts, count_parameters, expected
from kruify.conversion.storing import quantize
from kruify.conversion.tensors import convert_tensors, decompose_matrix, densify_tensors

__all__ = [
    "Conversion",
    "Factored",
    "GateResult",
    "Inspection",
    "LayerSummary",
    "ParameterCounts",
    "build_dense",
    "build_layer",
    "check_plan",
    "convert",
    "convert_module",
    "convert_tensors",
    "count_parameters",
    "decompose_matrix",
    "dense_kru",
    "densify",
    "densify_tensors",
    "describe_kru",
    "expected",
    "inspect",
    "load_tensors",
    "plan_of",
    "quantize",
    "swap",
]
