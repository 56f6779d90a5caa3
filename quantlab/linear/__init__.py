"""Linear layers whose weights are not floats: packed ones that are decoded in each call, and ones that compute in int8."""

from quantlab.linear.int8 import (
    DynamicInt8Linear,
    Int8Linear,
    StaticInt8Linear,
    WeightOnlyLinear,
    int_linear,
    kernel_status,
)  # fmt: skip

__all__ = ["DynamicInt8Linear", "Int8Linear", "StaticInt8Linear", "WeightOnlyLinear", "int_linear", "kernel_status"]
