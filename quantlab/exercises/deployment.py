"""Exercises of chapter 20: files for other engines."""

import tempfile
from pathlib import Path

import torch

from quantlab.exercises.material import off_ties, uniform
from quantlab.judging import Exercise, as_tensor, expect


def bias_solution(bias, x_scale, w_scale):
    """A bias is added to the accumulators, so it is counted in their step, a step for each row."""
    return torch.round(bias / (x_scale * w_scale)).to(torch.int32)


def _bias_cases(random):
    for _ in range(3):
        rows, x_scale = int(uniform(random, 4, 9)), uniform(random, 0.01, 0.1)
        w_scale = 0.001 + 0.01 * torch.rand(rows, generator=random)
        steps = off_ties(random, rows, -3000, 3000)
        yield steps * x_scale * w_scale, x_scale, w_scale


def _bias_edges():
    yield torch.tensor([0.0, 0.76, -0.76]), 0.5, torch.tensor([0.1, 0.2, 0.4])


def pairs_solution(x_codes, w_codes):
    """Products two and two, clamped to 16 bits, then added in 32."""
    products = x_codes.int() * w_codes.int()
    pairs = products[0::2] + products[1::2]
    return pairs.clamp(-(2**15), 2**15 - 1).sum()


def _pairs_cases(random):
    for spread in (60, 128, 128):
        size = 2 * int(uniform(random, 8, 20))
        x = torch.randint(0, 256, (size,), generator=random, dtype=torch.uint8)
        x[:4] = 255
        w = torch.randint(-spread, spread, (size,), generator=random, dtype=torch.int16).to(torch.int8)
        w[:4] = torch.tensor([127, 127, -128, -128] if spread == 128 else [59, 59, -60, -60])
        yield x, w


def _pairs_edges():
    yield torch.tensor([255, 255, 1, 2], dtype=torch.uint8), torch.tensor([127, 127, -3, 5], dtype=torch.int8)
    yield torch.tensor([255, 255, 255, 255], dtype=torch.uint8), torch.tensor([-128, -128, 127, 0], dtype=torch.int8)
    yield torch.tensor([255, 0, 255, 0, 9, 9], dtype=torch.uint8), torch.tensor([127] * 6, dtype=torch.int8)


def pack_solution(codes, group):
    """Two codes a byte, the first in the low four bits; a row becomes (groups, bytes)."""
    packed = codes[:, 0::2] | codes[:, 1::2] << 4
    return packed.reshape(len(codes), -1, group // 2)


def _pack_cases(random):
    for group in (16, 32, 64):
        rows, groups = int(uniform(random, 2, 6)), int(uniform(random, 1, 4))
        yield torch.randint(0, 16, (rows, group * groups), generator=random, dtype=torch.uint8), group


def _pack_edges():
    yield torch.arange(32, dtype=torch.uint8)[None] % 16, 16


def signed_scale_solution(scale, zero_point):
    """The range runs from -scale·zero to scale·(255 - zero); its farther end must fall on 127."""
    return scale * max(zero_point, 255 - zero_point) / 127


def _signed_scale_cases(random):
    for low, high in ((0, 100), (100, 155), (155, 256)):
        yield uniform(random, 0.001, 1.0), int(uniform(random, low, high))


def _signed_scale_edges():
    yield 0.5, 0
    yield 0.25, 255


def file_solution(x_scale, x_zero, codes, w_scale, b_codes):
    """Q, DQ for the input; DQ for weight and bias; Gemm turns the weight. The bias has the accumulators' scale."""
    import onnx
    from onnx import helper, numpy_helper

    constants = {
        "x_scale": x_scale.numpy(), "x_zero": x_zero.numpy(), "w": codes.numpy(), "w_scale": w_scale.numpy(),
        "b_codes": b_codes.numpy(), "b_scale": (x_scale * w_scale).numpy(),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["x_codes"]),
        helper.make_node("DequantizeLinear", ["x_codes", "x_scale", "x_zero"], ["x_grid"]),
        helper.make_node("DequantizeLinear", ["w", "w_scale"], ["w_grid"], axis=0),
        helper.make_node("DequantizeLinear", ["b_codes", "b_scale"], ["b"], axis=0),
        helper.make_node("Gemm", ["x_grid", "w_grid", "b"], ["y"], transB=1),
    ]
    ends = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["tokens", size])
        for name, size in (("x", codes.shape[1]), ("y", codes.shape[0]))
    ]
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "layer", ends[:1], ends[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def _material(seed: int):
    """The five constants of a small layer; codes of 7 bits, which no CPU clips."""
    random = torch.Generator().manual_seed(seed)
    rows, columns = 8 + 4 * seed, 32
    codes = torch.randint(-64, 64, (rows, columns), generator=random, dtype=torch.int16).to(torch.int8)
    w_scale = 0.001 + 0.01 * torch.rand(rows, generator=random)
    b_codes = torch.randint(-2000, 2000, (rows,), generator=random, dtype=torch.int32)
    x_scale, x_zero = torch.tensor(0.02 + 0.01 * seed), torch.tensor(100 + 20 * seed, dtype=torch.uint8)
    return x_scale, x_zero, codes, w_scale, b_codes


def _wanted(x, x_scale, x_zero, codes, w_scale, b_codes):
    """The integers, by hand."""
    x_codes = (torch.round(x / x_scale) + x_zero.int()).clamp(0, 255) - x_zero.int()
    sums = x_codes.double() @ codes.double().T + b_codes.double()
    return (sums * x_scale.double() * w_scale.double()).float()


def _file_test(answer) -> str:
    """The learner's own file is written, rewritten by ONNX Runtime, and run."""
    from quantlab.export.engines import PIP, engine_here
    from quantlab.export.onnx import fused, onnx_session

    if not (engine_here("onnx") and engine_here("onnxruntime")):
        return f"But nothing was checked: onnx or onnxruntime is not here (`{PIP}`)."
    for seed in (0, 1):
        material = _material(seed)
        model = answer(*material)
        expect(hasattr(model, "SerializeToString"), "Return the model that helper.make_model gives.")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "yours.onnx"
            path.write_bytes(model.SerializeToString())
            kinds = fused(path)
            expect(
                "QGemm" in kinds,
                f"ONNX Runtime runs {', '.join(kinds)}: no QGemm. It needs Gemm (transB=1), whose inputs all come "
                f"from DequantizeLinear, the bias from int32.",
            )
            x = torch.randn(6, material[2].shape[1], generator=torch.Generator().manual_seed(seed))
            got = as_tensor(onnx_session(path)(x.numpy()))
        y = _wanted(x, *material)
        expect(got.shape == y.shape, f"y must be {tuple(y.shape)}, your file gives {tuple(got.shape)}.")
        apart = (got - y).abs().max().item() / y.abs().max().item()
        expect(apart < 1e-3, f"It fuses, but is off by {apart:.2g} of the largest value. Are scales and axes right?")
    return "It fuses into QGemm, and the integers are right."


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
    "20.3": Exercise(
        "two products in 16 bits",
        hints=(
            "uint8 times int8: take both to int first, or the product wraps around.",
            "Neighbours: products[0::2] + products[1::2].",
            "Clamp each pair to -32768..32767, then add all of them.",
        ),
        solution=pairs_solution,
        cases=_pairs_cases,
        edges=_pairs_edges,
        slips={
            "That is the exact sum: each pair must be clamped to 16 bits before it is added to the others.": (
                ".clamp(-(2**15), 2**15 - 1)", ""
            ),
            "Each pair is clamped, not their sum: the accumulator has 32 bits.": (
                "pairs.clamp(-(2**15), 2**15 - 1).sum()", "pairs.sum().clamp(-(2**15), 2**15 - 1)"
            ),
            "Neighbours make a pair: 0 and 1, 2 and 3; not the first half with the second.": (
                "products[0::2] + products[1::2]",
                "products[: len(products) // 2] + products[len(products) // 2 :]",
            ),
            "It saturates at the end of the range; it does not wrap around.": (
                "pairs.clamp(-(2**15), 2**15 - 1)", "pairs.to(torch.int16).int()"
            ),
            "16 bits with a sign end at 32767.": ("2**15 - 1", "2**16 - 1"),
        },
    ),
    "20.4": Exercise(
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
    "20.5": Exercise(
        "the same range, around zero",
        hints=(
            "Which reals do the codes 0 and 255 stand for?",
            "-scale · zero_point and scale · (255 - zero_point): the farther of the two must have a code.",
            "scale * max(zero_point, 255 - zero_point) / 127",
        ),
        solution=signed_scale_solution,
        cases=_signed_scale_cases,
        edges=_signed_scale_edges,
        slips={
            "The farther end of the range counts: with the nearer one, half of the inputs are clamped.": (
                "max(zero_point, 255 - zero_point)", "min(zero_point, 255 - zero_point)"
            ),
            "The lower end may be the farther one: take the larger of both.": (
                "max(zero_point, 255 - zero_point)", "(255 - zero_point)"
            ),
            "The upper end may be the farther one: take the larger of both.": (
                "max(zero_point, 255 - zero_point)", "zero_point"
            ),
            "The largest code of int8 is 127.": ("/ 127", "/ 255"),
            "128 has no code above zero: the largest is 127.": ("/ 127", "/ 128"),
        },
    ),
    "20.2": Exercise(
        "a file that fuses",
        hints=(
            "Write the five nodes of the table in section 2; weight and bias are constants, x is the input.",
            "Gemm with transB=1 takes the weight as (out, in); the DequantizeLinear of the weight has axis=0, and so "
            "has the bias's, whose scale is x_scale * w_scale.",
            'helper.make_node("DequantizeLinear", ["b_codes", "b_scale"], ["b"], axis=0), then '
            'helper.make_node("Gemm", ["x_grid", "w_grid", "b"], ["y"], transB=1)',
        ),
        solution=file_solution,
        test=_file_test,
    ),
}  # fmt: skip
