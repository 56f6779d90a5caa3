"""Exercises of chapter 20: files for other engines.

Two of them are judged on an ONNX file that the learner writes.
"""

import tempfile
from pathlib import Path

import torch

from quantlab.exercises.material import off_ties, uniform, whole
from quantlab.export.engines import PIP, engine, engine_here
from quantlab.export.onnx_graphs import layer_model
from quantlab.export.onnx_run import fused, onnx_session
from quantlab.export.tensorrt import tensorrt_refusals
from quantlab.judging import Exercise, Wrong, as_tensor, call, expect


def bias_solution(bias, x_scale, w_scale):
    """A bias is added to the accumulators, so it is counted in their step, a step for each row."""
    return torch.round(bias / (x_scale * w_scale)).to(torch.int32)


def _bias_cases(random):
    for _ in range(3):
        rows, x_scale = whole(random, 4, 9), uniform(random, 0.01, 0.1)
        w_scale = 0.001 + 0.01 * torch.rand(rows, generator=random)
        steps = off_ties(random, rows, -3000, 3000)
        yield steps * x_scale * w_scale, x_scale, w_scale


def _bias_edges():
    yield torch.tensor([0.0, 0.76, -0.76]), 0.5, torch.tensor([0.1, 0.2, 0.4])


def pack_solution(codes, group):
    """Two codes a byte, the first in the low four bits; a row becomes (groups, bytes)."""
    packed = codes[:, 0::2] | codes[:, 1::2] << 4
    return packed.reshape(len(codes), -1, group // 2)


def _pack_cases(random):
    for group in (16, 32, 64):
        rows, groups = whole(random, 2, 6), whole(random, 1, 4)
        yield torch.randint(0, 16, (rows, group * groups), generator=random, dtype=torch.uint8), group


def _pack_edges():
    yield torch.arange(32, dtype=torch.uint8)[None] % 16, 16


# Files


def file_solution(x_scale, x_zero, codes, w_scale, b_codes):
    """Gemm, whose three inputs come from DequantizeLinear; the bias has the accumulators' step."""
    constants = {
        "x_scale": x_scale.numpy(), "x_zero": x_zero.numpy(), "w": codes.numpy(), "w_scale": w_scale.numpy(),
        "w_zero": torch.zeros_like(codes[:, 0]).numpy(), "b_codes": b_codes.numpy(),
        "b_scale": (x_scale * w_scale).numpy(),
    }  # fmt: skip
    nodes = [
        ("QuantizeLinear", ["x", "x_scale", "x_zero"], "x_codes", {}),
        ("DequantizeLinear", ["x_codes", "x_scale", "x_zero"], "x_grid", {}),
        ("DequantizeLinear", ["w", "w_scale", "w_zero"], "w_grid", {"axis": 0}),
        ("DequantizeLinear", ["b_codes", "b_scale"], "b", {"axis": 0}),
        ("Gemm", ["x_grid", "w_grid", "b"], "y", {"transB": 1}),
    ]
    return layer_model(nodes, constants, tuple(codes.shape))


def signed_file_solution(x_scale, x_zero, codes, w_scale, bias):
    """The farther end of the range on 127, zero point 0; the bias stays float."""
    scale = x_scale * max(int(x_zero), 255 - int(x_zero)) / 127
    constants = {
        "x_scale": scale.numpy(), "x_zero": torch.tensor(0, dtype=torch.int8).numpy(), "w": codes.numpy(),
        "w_scale": w_scale.numpy(), "b": bias.numpy(),
    }  # fmt: skip
    nodes = [
        ("QuantizeLinear", ["x", "x_scale", "x_zero"], "x_codes", {}),
        ("DequantizeLinear", ["x_codes", "x_scale", "x_zero"], "x_grid", {}),
        ("DequantizeLinear", ["w", "w_scale"], "w_grid", {"axis": 0}),
        ("Gemm", ["x_grid", "w_grid", "b"], "y", {"transB": 1}),
    ]
    return layer_model(nodes, constants, tuple(codes.shape))


def _material(seed: int) -> tuple:
    """(x_scale, x_zero, codes, w_scale, b_codes) of a small layer; weights of 7 bits, whose pairs fit any CPU."""
    random = torch.Generator().manual_seed(seed)
    rows = 8 + 4 * seed
    codes = torch.randint(-64, 64, (rows, 32), generator=random, dtype=torch.int16).to(torch.int8)
    w_scale = 0.001 + 0.01 * torch.rand(rows, generator=random)
    b_codes = torch.randint(-2000, 2000, (rows,), generator=random, dtype=torch.int32)
    return torch.tensor(0.02 + 0.01 * seed), torch.tensor(100 + 60 * seed, dtype=torch.uint8), codes, w_scale, b_codes


def _fusing_test(answer) -> str:
    """The learner's file is rewritten by ONNX Runtime, and run."""
    for seed in (0, 1):
        x_scale, x_zero, codes, w_scale, b_codes = material = _material(seed)
        with tempfile.TemporaryDirectory() as folder:
            path = _written("20.2", answer, material, folder)
            kinds = fused(path)
            expect("QGemm" in kinds, f"ONNX Runtime runs {', '.join(kinds)}: no QGemm. {_unfused(path)}")
            steps = x_scale, x_zero, 0, 255, w_scale
            _expect_right(path, codes, steps, b_codes * (x_scale * w_scale), "It fuses")
    return "It fuses into QGemm, and the integers are right."


def _signed_test(answer) -> str:
    """The learner's file is held against TensorRT's rules, and run."""
    for seed in (0, 1):
        x_scale, x_zero, codes, w_scale, b_codes = _material(seed)
        bias, scale = b_codes * (x_scale * w_scale), x_scale * max(int(x_zero), 255 - int(x_zero)) / 127
        with tempfile.TemporaryDirectory() as folder:
            path = _written("20.4", answer, (x_scale, x_zero, codes, w_scale, bias), folder)
            refused = tensorrt_refusals(path)
            expect(not refused, f"TensorRT would refuse it: {'; '.join(refused[:1])}.")
            times = _input_scale(path) / scale.item()
            expect(times > 0.999, f"The step of x is {times:.3f} of what its farther end needs: inputs are clamped.")
            expect(times < 1.001, f"The step of x is {times:.3f} times what its range needs: codes are wasted.")
            steps = scale, torch.tensor(0), -128, 127, w_scale
            _expect_right(path, codes, steps, bias, "No rule refuses it")
    return "No rule refuses it, and the integers are right."


def _written(name: str, answer, material: tuple, folder: str) -> Path:
    """The path of what the answer returns, written as a file."""
    model, path = call(EXERCISES[name], answer, material), Path(folder) / "yours.onnx"
    if not (engine_here("onnx") and engine_here("onnxruntime")):
        raise Wrong(f"Nothing can be checked: ONNX Runtime is not here. `{PIP}` gets it")
    expect(hasattr(model, "SerializeToString"), "Return the model, as layer_model and onnx.helper.make_model give it.")
    path.write_bytes(model.SerializeToString())
    return path


def _unfused(path: Path) -> str:
    """Why ONNX Runtime may have left a file's product in floats."""
    onnx = engine("onnx")
    graph = onnx.load(path).graph
    kinds = {t.name: t.data_type for t in graph.initializer}
    read = {kinds.get(n.input[0]): n for n in graph.node if n.op_type == "DequantizeLinear"}
    if onnx.TensorProto.INT32 not in read:
        return "The bias must be codes too, of int32, with a DequantizeLinear of their own."
    if onnx.TensorProto.INT8 not in read:
        return "The weight must be codes of int8, with a DequantizeLinear of their own."
    if len(read[onnx.TensorProto.INT8].input) < 3:
        return "The DequantizeLinear of the weight names no zero point, and must, even where all are 0."
    return "Compare your nodes with the table in section 2."


def _input_scale(path: Path) -> float:
    """The scale of the QuantizeLinear that reads x."""
    onnx = engine("onnx")
    graph = onnx.load(path).graph
    held = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    first = next((node for node in graph.node if node.op_type == "QuantizeLinear" and node.input[0] == "x"), None)
    expect(first is not None, "A QuantizeLinear must read the input, x.")
    return float(held[first.input[1]].max())


def _expect_right(path: Path, codes, steps: tuple, bias, well: str) -> None:
    """Hold the file's answer, operator by operator, against the integers."""
    x_scale, x_zero, low, high, w_scale = steps
    x = torch.randn(6, codes.shape[1], generator=torch.Generator().manual_seed(2))
    got = as_tensor(onnx_session(path, optimize=False)(x.numpy()))
    x_codes = (torch.round(x / x_scale) + x_zero).clamp(low, high) - x_zero
    y = (x_codes.double() @ codes.double().T * (x_scale * w_scale) + bias).float()
    expect(got.shape == y.shape, f"y must be {tuple(y.shape)}, your file gives {tuple(got.shape)}.")
    apart = ((got - y).abs().max() / y.abs().max()).item()
    expect(apart < 1e-3, f"{well}, but it is off by {apart:.2g} of the largest value. Are all scales right?")


EXERCISES = {
    "20.1": Exercise(
        "a bias for the accumulators",
        hints=(
            "Accumulators are whole numbers; what is one of them worth?",
            "One step of the accumulators of row r is x_scale · w_scale[r].",
            "torch.round(bias / (x_scale * w_scale)).to(torch.int32)",
        ),
        solution=bias_solution,
        cases=_bias_cases,
        edges=_bias_edges,
        slips={
            "The weight's scale was left out: an accumulator is a product of two codes.": (
                "(x_scale * w_scale)", "x_scale"
            ),
            "The input's scale was left out: an accumulator is a product of two codes.": (
                "(x_scale * w_scale)", "w_scale"
            ),
            "Divide by both scales: bias / x_scale * w_scale multiplies by the second.": (
                "bias / (x_scale * w_scale)", "bias / x_scale * w_scale"
            ),
            "Round to the nearest; a conversion to int32 alone cuts off.": (
                "torch.round(bias / (x_scale * w_scale))", "(bias / (x_scale * w_scale))"
            ),
            "It is 32 bits wide: nothing is clamped to 8.": (
                "torch.round(bias / (x_scale * w_scale))", "torch.round(bias / (x_scale * w_scale)).clamp(-128, 127)"
            ),
        },
    ),
    "20.2": Exercise(
        "a file that fuses",
        hints=(
            "Five nodes: QuantizeLinear and DequantizeLinear for x, a DequantizeLinear each for weight and bias, Gemm.",
            "Gemm with transB=1 takes the weight as (out, in); DequantizeLinear of weight and bias have axis=0. The "
            "bias's scale is x_scale * w_scale, and the weight's zero points are written out, int8 zeros.",
            '("DequantizeLinear", ["w", "w_scale", "w_zero"], "w_grid", {"axis": 0}), '
            '("DequantizeLinear", ["b_codes", "b_scale"], "b", {"axis": 0}), '
            '("Gemm", ["x_grid", "w_grid", "b"], "y", {"transB": 1})',
        ),
        solution=file_solution,
        test=_fusing_test,
    ),
    "20.3": Exercise(
        "codes of 4 bits in bytes",
        hints=(
            "A byte is low + 16 · high.",
            "The first of two neighbours is the low one: codes[:, 0::2] and codes[:, 1::2].",
            "(codes[:, 0::2] | codes[:, 1::2] << 4).reshape(len(codes), -1, group // 2)",
        ),
        solution=pack_solution,
        cases=_pack_cases,
        edges=_pack_edges,
        slips={
            "The first of two codes is in the low four bits.": (
                "codes[:, 0::2] | codes[:, 1::2] << 4", "codes[:, 1::2] | codes[:, 0::2] << 4"
            ),
            "Neighbours share a byte; GGUF (notebook 19) does it the other way, half a block apart.": (
                "packed = codes[:, 0::2] | codes[:, 1::2] << 4",
                "blocks = codes.reshape(len(codes), -1, group)\n"
                "    packed = blocks[:, :, : group // 2] | blocks[:, :, group // 2 :] << 4",
            ),
            "A shape (out, groups, group // 2) was asked for.": (".reshape(len(codes), -1, group // 2)", ""),
        },
    ),
    "20.4": Exercise(
        "a file that TensorRT's rules let pass",
        hints=(
            "Which reals do the codes 0 and 255 stand for? The farther of the two must fall on 127.",
            "The scale of x is x_scale · max(x_zero, 255 - x_zero) / 127, its zero point an int8 0; the bias is a "
            "float constant of Gemm.",
            '("QuantizeLinear", ["x", "x_scale", "x_zero"], "x_codes", {}), where x_zero is '
            'torch.tensor(0, dtype=torch.int8).numpy(), and ("Gemm", ["x_grid", "w_grid", "b"], "y", {"transB": 1})',
        ),
        solution=signed_file_solution,
        test=_signed_test,
    ),
}  # fmt: skip
