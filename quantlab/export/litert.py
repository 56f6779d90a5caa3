"""One linear layer with quantlab's codes as a LiteRT file (.tflite, once TensorFlow Lite's), without TensorFlow."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from quantlab.affine import QParams, dequantize, quantize
from quantlab.arguments import check_flag, check_int, check_kind, check_path, check_real
from quantlab.blocks import PerAxis, PerGroup
from quantlab.export.litert_graph import Graph
from quantlab.export.litert_run import check_layer, litert_session, weight_codes
from quantlab.export.parts import float_bias, half_scales, int32_bias, some_inputs
from quantlab.granularity import QTensor, quantize_tensor
from quantlab.linear import StaticInt8Linear
from quantlab.packing import pack

__all__ = ["expected_litert", "litert_session", "save_litert_int8", "save_litert_weights", "weight_codes"]


def save_litert_int8(layer: StaticInt8Linear, output: QParams, path, *, tokens: int = 1, verify: bool = False) -> int:
    """Write a static int8 layer, x (tokens, in) -> y (tokens, out) floats; returns the file's size in bytes.

    The file quantizes x, computes with int8 codes and an int32 bias, and rounds y to output: one scale, codes 0..255,
    from what an observer saw of the layer's outputs. LiteRT's codes are signed, so 128 is taken from codes and zero
    points. The number of tokens is fixed. verify: the file must hold the same codes, and LiteRT's outputs must be
    within a step of the exact ones, before it takes its place.

    Raises: ValueError if the layer is no StaticInt8Linear of 8 bits, an int32 does not hold its bias, output is no map
    to 0..255, or verify finds a difference; ModuleNotFoundError if ai-edge-litert is not here.
    """
    _check_static(layer, output)
    path, tokens, verify = check_path(path), check_int(tokens, "tokens", 1, 2**16), check_flag(verify, "verify")
    graph, sizes = Graph(), {"x": (tokens, layer.in_features), "y": (tokens, layer.out_features)}
    maps = {"x": QParams(layer.input_scale, layer.input_zero_point, 0, 255), "y": output}
    x, y = (graph.tensor(name, shape) for name, shape in sizes.items())
    x_codes, y_codes = (
        graph.tensor(f"{n}_codes", sizes[n], "int8", scale=m.scale, zero=m.zero_point.item() - 128)
        for n, m in maps.items()
    )
    w = graph.tensor("w", layer.codes.shape, "int8", layer.codes.numpy(), scale=layer.weight_scale)
    step = layer.input_scale * layer.weight_scale
    b_codes = int32_bias(float_bias(layer.bias, layer.out_features), step)
    b = graph.tensor("b", b_codes.shape, "int32", b_codes.numpy(), scale=step)
    graph.op("QUANTIZE", [x], x_codes)
    graph.op("FULLY_CONNECTED", [x_codes, w, b], y_codes)
    graph.op("DEQUANTIZE", [y_codes], y)
    return graph.save(x, y, path, partial(_check_int8, layer, output, tokens) if verify else None)


def save_litert_weights(
    q: QTensor, path, *, bias: Tensor | None = None, tokens: int = 1, verify: bool = False
) -> int:  # fmt: skip
    """Write a layer whose weight has codes, x (tokens, in) -> y (tokens, out) floats; returns the file's size in bytes.

    q: symmetric signed codes of 8 bits with one scale a row, or of 4 bits with one a row, or a group of 32, 64, 128 ..
    (stored in float16, used in bfloat16: values move by up to 2⁻⁹ and a little). LiteRT itself rounds x to int8,
    asymmetric, one scale a token: "dynamic range" in its words. verify: the file must hold the same codes, and
    LiteRT's outputs must be expected_litert's, within a hundredth of the largest, before it takes its place.

    Raises: ValueError if q or the bias does not fit, or verify finds a difference; ModuleNotFoundError if
    ai-edge-litert is not here.
    """
    size, path, tokens = _check_weight(q), check_path(path), check_int(tokens, "tokens", 1, 2**16)
    bias, verify = float_bias(bias, q.shape[0]), check_flag(verify, "verify")
    graph, scale = Graph(), q.qparams.scale
    x, y = graph.tensor("x", (tokens, q.shape[1])), graph.tensor("y", (tokens, q.shape[0]))
    kind, data = ("int4", pack(q.codes & 15, bits=4)) if q.bits == 4 else ("int8", q.codes)
    if size is None:
        w = graph.tensor("w", q.shape, kind, data.numpy(), scale=scale)
    else:
        scales = graph.tensor("w_scale", scale.shape, "float16", half_scales(scale).numpy())
        w = graph.tensor("w", q.shape, kind, data.numpy(), block=size, scales=scales)
    b = graph.tensor("b", bias.shape, "float32", bias.numpy())
    graph.op("FULLY_CONNECTED", [x, w, b], y)
    return graph.save(x, y, path, partial(_check_weights, q, bias, tokens) if verify else None)


def expected_litert(q: QTensor, x: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """What a file of save_litert_weights shall give for x (tokens, in): x in int8, asymmetric, one scale a token.

    The file has the scales of groups in float16, and LiteRT's kernels (XNNPACK's) round these to bfloat16: so is done
    here. Measured: the two differ by float rounding alone. float32, (tokens, out).

    Raises: ValueError as save_litert_weights does, or if x does not fit.
    """
    grouped = _check_weight(q) is not None
    if check_real(x).ndim != 2 or x.shape[1] != q.shape[1]:
        raise ValueError(f"x must be (tokens, {q.shape[1]}), got {tuple(x.shape)}")
    scale = q.qparams.scale.half().bfloat16().float() if grouped else q.qparams.scale
    weight = replace(q, qparams=replace(q.qparams, scale=scale), dtype=torch.float32).dequantize()
    rounded = quantize_tensor(x.float(), bits=8, granularity=PerAxis(0), symmetric=False)
    return F.linear(rounded.dequantize(), weight, float_bias(bias, q.shape[0]))


def _check_int8(layer: StaticInt8Linear, output: QParams, tokens: int, path: Path) -> None:
    x = some_inputs(tokens, layer.in_features, 20 * layer.input_scale.item())
    check_layer(path, layer.codes, x, dequantize(quantize(layer.exact(x), output), output), 1.01 * output.scale.item())


def _check_weights(q: QTensor, bias: Tensor, tokens: int, path: Path) -> None:
    x = some_inputs(tokens, q.shape[1], 1.0)
    y = expected_litert(q, x, bias=bias)
    check_layer(path, q.codes, x, y, 0.01 * y.abs().max().item())


def _check_static(layer, output) -> None:
    if check_kind(layer, "layer", StaticInt8Linear).activation_bits != 8 or layer.weight_bits != 8:
        raise ValueError(f"LiteRT's int8 layers have 8 bits, got {layer.weight_bits} and {layer.activation_bits}")
    check_kind(output, "output", QParams, "choose_qparams gives")
    if output.scale.numel() != 1 or (output.qmin, output.qmax) != (0, 255):
        raise ValueError(
            f"output must be one map to 0..255, got {output.scale.numel()} to {output.qmin}..{output.qmax}"
        )


def _check_weight(q: QTensor) -> int | None:
    """The group size of q, None if it has a scale a row; ValueError that names the rule if LiteRT has no such layer."""
    how = check_kind(q, "q", QTensor, "quantize_tensor gives").granularity
    size = how.group_size if isinstance(how, PerGroup) else None
    signed = q.symmetric and q.codes.dtype == torch.int8 and not q.qparams.zero_point.any()
    if len(q.shape) != 2 or q.bits not in (4, 8) or not signed:
        raise ValueError(f"LiteRT takes matrices of symmetric signed codes of 4 or 8 bits, got {q.bits} bits")
    if q.group_index is not None or (size is None and how != PerAxis(0)):
        raise ValueError(f"LiteRT takes one scale a row, or groups in the order of the columns, got {how}")
    if size is not None and (q.bits == 8 or size % 32 or q.shape[1] % size):
        raise ValueError(
            f"LiteRT's groups are 4 bits, of a multiple of 32 that divides the inputs; got {q.bits}, {how}"
        )
    if q.bits == 4 and q.shape[1] % 2:
        raise ValueError(f"two codes of 4 bits share a byte: the inputs must be even, got {q.shape[1]}")
    return size
