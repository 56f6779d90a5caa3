"""One linear layer with quantlab's codes as an ONNX file: a graph that asks for int8, or weights of 4 or 8 bits.

Int8 is written as Q/DQ nodes: QuantizeLinear, DequantizeLinear and a float product. Such a graph is a request: an
engine that knows the pattern computes in integers, another one in floats. fused(path) shows which it was.
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from quantlab.affine import QParams, quantize
from quantlab.arguments import check_choice, check_flag, check_int, check_kind, check_real
from quantlab.export.onnx_graphs import (
    blocked_constants,
    check_layer,
    layer_model,
    nbits_constants,
    nbits_group,
    product,
    write_onnx,
)
from quantlab.export.onnx_run import codes_in, fused, onnx_session
from quantlab.export.parts import float_bias, int32_bias, some_inputs
from quantlab.granularity import QTensor
from quantlab.linear import StaticInt8Linear, int_linear
from quantlab.modules import as_linear, check_linear, weight_of

__all__ = [
    "FORMS", "INT8_FORMS", "codes_in", "expected_int8", "fused", "onnx_session", "save_onnx_float", "save_onnx_int8",
    "save_onnx_weights",
]  # fmt: skip

INT8_FORMS = ("Gemm, int32 bias", "Gemm", "MatMul")
FORMS = ("MatMulNBits", "MatMul", "Gemm")


def save_onnx_float(linear: nn.Linear, path) -> int:
    """Write a float layer, x (tokens, in) -> y (tokens, out): what the others are compared with; returns its bytes."""
    linear = as_linear(check_linear(linear))
    w = weight_of(linear).float()
    constants = {"w_grid": w.contiguous().numpy(), "b": float_bias(linear.bias, len(w)).numpy()}
    return write_onnx(path, layer_model(product("Gemm", "x"), constants, tuple(w.shape)))


def save_onnx_int8(
    layer: StaticInt8Linear, path, *, form: str = "Gemm, int32 bias", signed: bool = False, verify: bool = False
) -> int:
    """Write a static int8 layer as Q/DQ nodes, x (tokens, in) -> y (tokens, out); returns the file's size in bytes.

    form: "Gemm, int32 bias" is what ONNX Runtime fuses into one integer operator (the bias is rounded to steps of
    scale_x scale_w); with a float bias, "Gemm" or "MatMul" and Add, it computes in floats. signed: activations are
    int8 with zero point 0, as TensorRT asks, for the same range. verify: the file is read and run before it takes its
    place; codes must be the same, outputs expected_int8's, operator by operator (fused, a CPU without VNNI may add two
    products in 16 bits, which do not always fit; weights of 7 bits always do).

    Raises: ValueError if the layer is no StaticInt8Linear with activations of 8 bits, an int32 does not hold its bias,
    or verify finds a difference; ModuleNotFoundError.
    """
    (scale, zero), verify = _input_map(layer, check_flag(signed, "signed")), check_flag(verify, "verify")
    turned = check_choice(form, "form", INT8_FORMS) == "MatMul"
    codes = layer.codes.T if turned else layer.codes
    bias, step = float_bias(layer.bias, layer.out_features), scale * layer.weight_scale
    constants = {
        "x_scale": scale.numpy(), "x_zero": np.array(int(zero), np.int8 if signed else np.uint8),
        "w": codes.contiguous().numpy(), "w_scale": layer.weight_scale.numpy(),
        "w_zero": np.zeros(layer.out_features, np.int8),
    }  # fmt: skip
    nodes = [
        ("QuantizeLinear", ["x", "x_scale", "x_zero"], "x_codes", {}),
        ("DequantizeLinear", ["x_codes", "x_scale", "x_zero"], "x_grid", {}),
        ("DequantizeLinear", ["w", "w_scale", "w_zero"], "w_grid", {"axis": int(turned)}),
    ]
    if form == "Gemm, int32 bias":
        constants |= {"b_codes": int32_bias(bias, step).numpy(), "b_scale": step.numpy()}
        nodes += [("DequantizeLinear", ["b_codes", "b_scale"], "b", {"axis": 0})]
    else:
        constants |= {"b": bias.numpy()}
    model = layer_model(nodes + product(form, "x_grid"), constants, tuple(layer.codes.shape))
    slack = step.max().item() / 2 if form == "Gemm, int32 bias" else 0.0
    return write_onnx(path, model, partial(_check_int8, layer, signed, slack) if verify else None)


def expected_int8(layer: StaticInt8Linear, x: Tensor, *, signed: bool = False) -> Tensor:
    """What the file of save_onnx_int8 shall give for x (tokens, in), by exact integers; float32, (tokens, out).

    Raises: ValueError as save_onnx_int8 does, or if x does not fit.
    """
    scale, zero = _input_map(layer, check_flag(signed, "signed"))
    if check_real(x).ndim != 2 or x.shape[1] != layer.in_features:
        raise ValueError(f"x must be (tokens, {layer.in_features}), got {tuple(x.shape)}")
    if not signed:
        return layer.exact(x.float())
    sums = int_linear(quantize(x.float(), QParams(scale, zero, -128, 127)), 0, layer.codes)
    y = sums.float() * (scale * layer.weight_scale)
    return y if layer.bias is None else y + layer.bias.detach()


def save_onnx_weights(
    q: QTensor, path, *, bias: Tensor | None = None, form: str = "MatMulNBits", level: int = 1, verify: bool = False
) -> int:
    """Write a layer whose weight alone has codes, x (tokens, in) -> y (tokens, out); returns the file's size in bytes.

    form: "MatMulNBits" is ONNX Runtime's own operator; its level 1 computes in float32, 4 rounds activations to int8.
    "MatMul" and "Gemm" are standard ONNX (opset 21): a blocked DequantizeLinear of UINT4 codes, then the product; they
    have no level. verify: the file is read and run before it takes its place; at level 4 only its codes are compared.

    Raises: ValueError if q has no groups of a power of two from 16 on that divides the columns, is not of 4 or 8 bits,
    has an order of columns (act-order), the bias or the level does not fit, or verify finds a difference;
    ModuleNotFoundError.
    """
    group, form, level = nbits_group(q), check_choice(form, "form", FORMS), check_int(level, "level", 0, 4)
    bias, verify = float_bias(bias, q.shape[0]), check_flag(verify, "verify")
    if form != "MatMulNBits" and level != 1:
        raise ValueError(f'level is an attribute of "MatMulNBits", "{form}" has none: leave it at 1, got {level}')
    if form == "MatMulNBits":
        about = {"K": q.shape[1], "N": q.shape[0], "bits": q.bits, "block_size": group, "accuracy_level": level}
        nodes = [("MatMulNBits", ["x", "w", "w_scale", "w_zero", "", "b"], "y", about)]
        constants = nbits_constants(q)
    else:
        about = {"axis": int(form == "Gemm"), "block_size": group}
        nodes = [("DequantizeLinear", ["w", "w_scale", "w_zero"], "w_grid", about), *product(form, "x")]
        constants = blocked_constants(q, turned=form == "MatMul")
    model = layer_model(nodes, constants | {"b": bias.numpy()}, q.shape)
    return write_onnx(path, model, partial(_check_weights, q, bias, level) if verify else None)


def _check_int8(layer: StaticInt8Linear, signed: bool, slack: float, path: Path) -> None:
    x = some_inputs(16, layer.in_features, 20 * _input_map(layer, signed)[0].item())
    check_layer(path, layer.codes, x, expected_int8(layer, x, signed=signed), slack)


def _check_weights(q: QTensor, bias: Tensor, level: int, path: Path) -> None:
    x = some_inputs(16, q.shape[1], 1.0)
    y = None if level == 4 else x @ q.dequantize().float().T + bias
    check_layer(path, q.codes.int() - q.qparams.qmin, x, y)


def _input_map(layer: StaticInt8Linear, signed: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the activations: the layer's own, or int8 around 0 for the same range."""
    layer = check_kind(layer, "layer", StaticInt8Linear, "StaticInt8Linear.from_linear gives")
    if layer.activation_bits != 8:
        raise ValueError(f"QuantizeLinear makes 8 bits of activations, this layer has {layer.activation_bits}")
    scale, zero = layer.input_scale, layer.input_zero_point
    if not signed:
        return scale, zero
    return scale * torch.maximum(zero, 255 - zero) / 127, torch.zeros_like(zero)
