"""Quantization-aware training: the public names of quantlab.train, but for the loop (train/loop.py) and QLoRA."""

from quantlab.train.fake_quant import FakeQuantLinear, convert, fake_quant_layers, prepare_qat
from quantlab.train.few_levels import binary, pack_ternary, quantize_binary, quantize_ternary, ternary, unpack_ternary
from quantlab.train.lsq import LSQ
from quantlab.train.rounding import MinMaxRounding, Rounding

__all__ = [
    "LSQ", "FakeQuantLinear", "MinMaxRounding", "Rounding", "binary", "convert", "fake_quant_layers", "pack_ternary",
    "prepare_qat", "quantize_binary", "quantize_ternary", "ternary", "unpack_ternary",
]  # fmt: skip
