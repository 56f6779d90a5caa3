"""ONNX files in ONNX Runtime: run, read back, and seen as the engine rewrote them."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from quantlab.arguments import check_file, check_flag
from quantlab.export.engines import engine
from quantlab.packing import unpack

_QUIET = 3  # of ONNX Runtime's log: errors alone


def onnx_session(path, *, optimize: bool = True) -> Callable[[np.ndarray], np.ndarray]:
    """A file as a function of its one input, run by ONNX Runtime on one thread of the CPU.

    optimize=False runs the graph operator by operator, as it is written.
    Raises: FileNotFoundError, ModuleNotFoundError; what ONNX Runtime says of a file that is none.
    """
    session = _session(check_file(path), check_flag(optimize, "optimize"))
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})[0]


def fused(path) -> list[str]:
    """The operators that ONNX Runtime runs for a file after it has rewritten the graph, in order.

    A file asks, the engine decides: QGemm, MatMulIntegerToFloat and MatMulNBits compute with codes; MatMul or Gemm
    among the operators computes in floats, whatever Q/DQ nodes stand around it.
    Raises: FileNotFoundError, ModuleNotFoundError.
    """
    path, onnx = check_file(path), engine("onnx")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "optimized.onnx"
        _session(path, True, out)
        return [node.op_type for node in onnx.load(out).graph.node]


def codes_in(path) -> Tensor:
    """The weight's codes in a layer's file, (out, in), int32: signed as int8, counted from 0 as 4 or 8 bits unsigned.

    Raises: FileNotFoundError, ModuleNotFoundError; ValueError if no node of the file has a weight of codes.
    """
    onnx = engine("onnx")
    graph = onnx.load(check_file(path)).graph
    held = {t.name: t for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            return _nbits_codes(node, onnx.numpy_helper.to_array(held[node.input[1]]))
    products = [n for n in graph.node if n.op_type in ("MatMul", "Gemm")]
    made_by = {n.output[0]: n for n in graph.node if n.op_type == "DequantizeLinear"}
    if not products or products[0].input[1] not in made_by or made_by[products[0].input[1]].input[0] not in held:
        raise ValueError(f"{Path(path).name} has no product with a weight of codes")
    codes = _array(held[made_by[products[0].input[1]].input[0]])
    return codes if products[0].op_type == "Gemm" else codes.T.contiguous()


def _array(constant) -> Tensor:
    return torch.from_numpy(engine("onnx").numpy_helper.to_array(constant).astype(np.int32))


def _nbits_codes(node, blocks: np.ndarray) -> Tensor:
    about = {a.name: a.i for a in node.attribute}
    raw = torch.from_numpy(blocks.copy())
    codes = unpack(raw, bits=about["bits"], count=raw.numel() * 8 // about["bits"])
    return codes.view(about["N"], -1)[:, : about["K"]].int()


def _session(path: Path, optimize: bool, out: Path | None = None):
    ort = engine("onnxruntime")
    options, levels = ort.SessionOptions(), ort.GraphOptimizationLevel
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = _QUIET
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    if out is not None:
        options.optimized_model_filepath = str(out)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
