"""TensorRT's written rules, held against an ONNX file without TensorRT; and the command that runs it where it is.

Nothing here was tried on a GPU: the rules were read, in NVIDIA's documentation of TensorRT 11 (Quantization Schemes,
Explicit Quantization, the operators Quantize and Dequantize) and in the list of operators of its ONNX parser. The
parser may refuse what no rule here names.

    python -m quantlab.export.tensorrt layer.onnx          # needs an NVIDIA GPU, and pip install tensorrt
"""

import sys
from pathlib import Path

import numpy as np
import torch

from quantlab.arguments import check_file
from quantlab.export.engines import engine
from quantlab.export.onnx_run import onnx_session

CODES = {"INT8", "INT4", "FLOAT8E4M3FN", "FLOAT4E2M1"}  # what Q/DQ nodes may have on the side of the codes
PAIR = ("QuantizeLinear", "DequantizeLinear")


def tensorrt_refusals(path) -> list[str]:
    """What TensorRT's written rules refuse in an ONNX file, a sentence each; an empty list: no rule refuses it.

    The rules: no operators of com.microsoft; codes are int8, int4, float8 or float4, signed; zero points are 0; scales
    are constants above 0, one for a tensor of activations, one for each output channel (or block) of a weight; int4 is
    for weights alone.
    Raises: FileNotFoundError if there is no file, ModuleNotFoundError if onnx is not installed.
    """
    graph = engine("onnx").load(check_file(path)).graph
    held = {t.name: t for t in graph.initializer}
    said = []
    for node in graph.node:
        if node.domain not in ("", "ai.onnx"):
            said.append(f"{node.op_type} is an operator of {node.domain}, which TensorRT's parser does not know")
        elif node.op_type in PAIR:
            said += [f"{node.op_type} {node.output[0]}: {why}" for why in _refused(node, graph, held)]
    return said


def _refused(node, graph, held: dict) -> list[str]:
    """The rules that a Q or DQ node breaks."""
    onnx = engine("onnx")
    weight, kind, why = node.input[0] in held, _kind_of_codes(node, held), []
    if kind not in CODES:
        why.append(f"codes are {kind.lower()}; TensorRT has int8, int4, float8 and float4, all signed")
    if len(node.input) > 2 and node.input[2] and _numbers(held, node.input[2]) != 0:
        why.append("the zero point is not 0; TensorRT is symmetric")
    if kind == "INT4" and not weight:
        why.append("int4 is for weights alone")
    scale = held.get(node.input[1])
    if scale is None:
        return why + ["the scale is no constant of the file"]
    values, axis = onnx.numpy_helper.to_array(scale), _attribute(node, "axis", 1)
    if not (values > 0).all():
        why.append("a scale is not above 0")
    if values.size > 1 and not weight and kind != "INT32":
        why.append("activations have one scale for the tensor; a scale a channel is for weights")
    blocked = _attribute(node, "block_size", 0)
    if values.ndim == 1 and values.size > 1 and weight and not blocked and axis != _output_axis(node, graph):
        why.append(f"scales lie along axis {axis}, which is not that of the weight's output channels")
    return why


def _kind_of_codes(node, held: dict) -> str:
    names = engine("onnx").TensorProto.DataType
    if node.op_type == "DequantizeLinear" and node.input[0] in held:
        return names.Name(held[node.input[0]].data_type)
    zero = held.get(node.input[2]) if len(node.input) > 2 else None
    return "UINT8" if zero is None else names.Name(zero.data_type)  # ONNX's default


def _numbers(held: dict, name: str) -> int:
    """How many values of a zero point are not 0; one that is no constant counts as one."""
    return int(np.count_nonzero(engine("onnx").numpy_helper.to_array(held[name]))) if name in held else 1


def _output_axis(node, graph) -> int | None:
    """Which axis of a weight makes the outputs of the product that reads it: 1 in x @ W, 0 where it is turned."""
    for product in graph.node:
        if node.output[0] in product.input[1:2]:
            return 0 if product.op_type == "Conv" or _attribute(product, "transB", 0) else 1
    return 0  # of a bias


def _attribute(node, name: str, default: int) -> int:
    return next((a.i for a in node.attribute if a.name == name), default)


def run_tensorrt(path) -> tuple[torch.Tensor, torch.Tensor]:
    """The answers of TensorRT and of ONNX Runtime to 16 random rows. Untried: see the module's first lines.

    Raises: ValueError with the rules that the file breaks; ModuleNotFoundError; RuntimeError if no engine is built.
    """
    if said := tensorrt_refusals(path):
        raise ValueError(f"TensorRT would refuse {Path(path).name}: {'; '.join(said)}")
    trt = engine("tensorrt")
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(Path(path).read_bytes()):
        raise RuntimeError("; ".join(str(parser.get_error(i)) for i in range(parser.num_errors)))
    columns = network.get_input(0).shape[1]
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    profile.set_shape("x", *[(16, columns)] * 3)
    config.add_optimization_profile(profile)
    built = builder.build_serialized_network(network, config)
    if built is None:
        raise RuntimeError("TensorRT built no engine")
    context = trt.Runtime(logger).deserialize_cuda_engine(built).create_execution_context()
    x = torch.randn(16, columns, generator=torch.Generator().manual_seed(0))
    on_gpu = {"x": x.cuda(), "y": torch.empty(16, network.get_output(0).shape[1], device="cuda")}
    context.set_input_shape("x", (16, columns))
    for name, tensor in on_gpu.items():
        context.set_tensor_address(name, tensor.data_ptr())
    context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    return on_gpu["y"].cpu(), torch.from_numpy(onnx_session(path, optimize=False)(x.numpy()))


if __name__ == "__main__":
    theirs, ours = run_tensorrt(sys.argv[1])
    print(f"TensorRT ran it; furthest from ONNX Runtime's answer: {(theirs - ours).abs().max():.2e}")
