"""Linear layers whose weights are not floats: packed ones, decoded in each call, and ones that compute in int8."""

from quantlab.linear.int8 import DynamicInt8Linear, Int8Linear, StaticInt8Linear, int_linear, kernel_status
from quantlab.linear.packed import PackedLinear, WeightOnlyLinear, packed_layers

__all__ = [
    "DynamicInt8Linear", "Int8Linear", "PackedLinear", "StaticInt8Linear", "WeightOnlyLinear", "int_linear",
    "kernel_status", "packed_layers",
]  # fmt: skip
