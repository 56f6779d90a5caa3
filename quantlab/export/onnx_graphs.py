"""ONNX graphs put together and written: nodes, constants, packed codes, and the check of a file before it is there."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from quantlab.arguments import check_kind, check_path
from quantlab.blocks import PerGroup
from quantlab.export.engines import engine
from quantlab.export.onnx_run import codes_in, onnx_session
from quantlab.export.parts import check_close, check_same_codes
from quantlab.files import write_whole
from quantlab.granularity import QTensor
from quantlab.packing import pack

OPSET, IR = 21, 10  # the first with blocks in DequantizeLinear and with UINT4; engines of 2024 read them
LIMIT = 2**31 - 1  # bytes of one protobuf message
ENGINE = "ONNX Runtime"


def check_layer(path: Path, codes: Tensor, x: Tensor, y: Tensor | None, slack: float = 0.0) -> None:
    """ValueError unless a file holds these codes (out, in), and answers x by y, within slack + 1e-4 of the largest.

    It is run operator by operator: what the graph says, whatever an optimizer would make of it. y None: the engine
    rounds activations in a way of its own, and must only run.
    """
    check_same_codes(codes_in(path), codes)
    got = torch.from_numpy(onnx_session(path, optimize=False)(x.numpy()))
    if y is not None:
        check_close(got, y, slack + 1e-4 * y.abs().max().item(), ENGINE)


def product(form: str, x: str) -> list[tuple]:
    """The nodes of y = x Wᵀ + b. Gemm turns W (out, in) itself; for MatMul it is written turned."""
    if form == "MatMul":
        return [("MatMul", [x, "w_grid"], "xw", {}), ("Add", ["xw", "b"], "y", {})]
    return [("Gemm", [x, "w_grid", "b"], "y", {"transB": 1})]


def layer_model(nodes: list[tuple], constants: Mapping, shape: tuple[int, int]):
    """A model x (tokens, in) -> y (tokens, out) of nodes (operator, inputs, output, attributes)."""
    onnx = engine("onnx")
    made, own = [], any(kind == "MatMulNBits" for kind, *_ in nodes)
    for kind, inputs, output, attributes in nodes:
        domain = "com.microsoft" if kind == "MatMulNBits" else ""
        made.append(onnx.helper.make_node(kind, inputs, [output], name=f"{kind}_{output}", domain=domain, **attributes))
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["tokens", size])
        for name, size in (("x", shape[1]), ("y", shape[0]))
    ]
    graph = onnx.helper.make_graph(made, "layer", ends[:1], ends[1:], [tensor(n, c) for n, c in constants.items()])
    opsets = [onnx.helper.make_opsetid("", OPSET)] + [onnx.helper.make_opsetid("com.microsoft", 1)] * own
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=IR)
    onnx.checker.check_model(model, full_check=not own)
    return model


def tensor(name: str, values):
    """A constant: a numpy array, or (codes 0..15, as a tensor) for UINT4, which numpy has not."""
    onnx = engine("onnx")
    if isinstance(values, np.ndarray):
        return onnx.numpy_helper.from_array(values, name)
    raw = pack(values, bits=4).numpy().tobytes()
    return onnx.helper.make_tensor(name, onnx.TensorProto.UINT4, list(values.shape), raw, raw=True)


def nbits_group(q: QTensor) -> int:
    """The columns of a group; ValueError if neither MatMulNBits nor a blocked DequantizeLinear can hold the codes."""
    q = check_kind(q, "q", QTensor, "quantize_tensor gives")
    group = q.granularity.group_size if isinstance(q.granularity, PerGroup) else 0
    if len(q.shape) != 2 or group < 16 or group & (group - 1) or q.shape[1] % group or q.group_index is not None:
        raise ValueError(
            f"ONNX has groups of 16, 32, 64, .. columns in order, which divide a row; got {q.granularity} "
            f"of {tuple(q.shape)}{'' if q.group_index is None else ', with act-order'}"
        )
    if q.bits not in (4, 8):
        raise ValueError(f"MatMulNBits is written here with 4 or 8 bits, got {q.bits}")
    return group


def nbits_constants(q: QTensor) -> dict[str, np.ndarray]:
    """MatMulNBits' constants: codes (out, groups, bytes), scales (out, groups), zero points (out, bytes)."""
    group, (rows, columns) = nbits_group(q), q.shape
    codes, zeros = (part.int() - q.qparams.qmin for part in (q.codes, q.qparams.zero_point))
    zeros = F.pad(zeros, (0, zeros.shape[1] % 2 if q.bits == 4 else 0))  # a row of them ends with a byte
    codes, zeros = (pack(part, bits=q.bits).view(rows, -1) for part in (codes, zeros))
    blocks = codes.view(rows, columns // group, group * q.bits // 8)
    return {"w": blocks.numpy(), "w_scale": q.qparams.scale.contiguous().numpy(), "w_zero": zeros.numpy()}


def blocked_constants(q: QTensor, *, turned: bool) -> dict:
    """A blocked DequantizeLinear's constants, (out, in) or turned: UINT4 or uint8 codes and zero points, scales."""
    parts = [q.codes.int() - q.qparams.qmin, q.qparams.zero_point.int() - q.qparams.qmin, q.qparams.scale]
    codes, zeros, scale = (part.T.contiguous() if turned else part.contiguous() for part in parts)
    if q.bits == 8:
        codes, zeros = codes.to(torch.uint8).numpy(), zeros.to(torch.uint8).numpy()
    return {"w": codes, "w_zero": zeros, "w_scale": scale.numpy()}


def write_onnx(path, model, check: Callable[[Path], None] | None = None) -> int:
    """Write a model, whole or not at all, checked before it takes its place; returns its size in bytes.

    Raises: ValueError if it is larger than one ONNX file can be (2 GiB), or the check finds a difference.
    """
    path, size = check_path(path), model.ByteSize()
    if size > LIMIT:
        raise ValueError(f"one ONNX file holds at most 2 GiB, this model has {size / 2**30:.1f} GiB")
    return write_whole(path, model.SerializeToString(), check)
