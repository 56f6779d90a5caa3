"""Answers that learners really give, and a piece of what the check must say of it: {exercise: [(answer, message)]}."""

import torch

from quantlab.exercises.deployment import file_solution, signed_file_solution


def float_bias(x_scale, x_zero, codes, w_scale, b_codes):
    """The bias as floats: right, and not fused."""
    from onnx import numpy_helper

    model = file_solution(x_scale, x_zero, codes, w_scale, b_codes)
    del model.graph.node[3]
    b = (b_codes * x_scale * w_scale).float().numpy()
    model.graph.initializer.append(numpy_helper.from_array(b, "b"))
    return model


def without_zero_points(*material):
    """The weight's DequantizeLinear with two inputs: right, and not fused."""
    model = file_solution(*material)
    del model.graph.node[2].input[2]
    return model


def float_weight(x_scale, x_zero, codes, w_scale, b_codes):
    """The weight as floats: only its bias has codes."""
    from onnx import numpy_helper

    model = file_solution(x_scale, x_zero, codes, w_scale, b_codes)
    del model.graph.node[2]
    model.graph.initializer.append(numpy_helper.from_array((codes * w_scale[:, None]).numpy(), "w_grid"))
    return model


def signed(x_scale, x_zero, codes, w_scale, bias, times):
    """The map around zero, with another step."""
    return signed_file_solution(x_scale * times, x_zero, codes, w_scale, bias)


WRONG = {
    "20.1": [
        (lambda b, x, w: torch.round(b / x).int(), "weight's scale was left out"),
        (lambda b, x, w: torch.round(b / w).int(), "input's scale was left out"),
        (lambda b, x, w: torch.round(b / x * w).int(), "Divide by both scales"),
        (lambda b, x, w: (b / (x * w)).int(), "Round to the nearest"),
        (lambda b, x, w: b / (x * w), "was expected"),
    ],
    "20.2": [
        (float_bias, "The bias must be codes too"),
        (without_zero_points, "names no zero point"),
        (float_weight, "The weight must be codes"),
        (lambda s, z, c, w, b: file_solution(s, z, c, 2 * w, b), "It fuses, but it is off by"),
        (lambda s, z, c, w, b: file_solution(s, z, c[:4], w[:4], b[:4]), "y must be (6, 8), your file gives (6, 4)"),
        (lambda *_: 1, "Return the model"),
    ],
    "20.3": [
        (lambda c, g: (c[:, 1::2] | c[:, 0::2] << 4).reshape(len(c), -1, g // 2), "low four bits"),
        (lambda c, g: c[:, 0::2] | c[:, 1::2] << 4, "(out, groups, group // 2)"),
        (
            lambda c, g: (c.reshape(len(c), -1, 2, g // 2) << torch.tensor([[0], [4]])).sum(2),
            "Neighbours share a byte",
        ),
    ],
    "20.4": [
        (lambda s, z, c, w, b: file_solution(s, z, c, w, (b / (s * w)).round().int()), "TensorRT would refuse it"),
        (lambda *m: signed(*m, times=127 / 128), "inputs are clamped"),
        (lambda *m: signed(*m, times=2), "codes are wasted"),
        (lambda s, z, c, w, b: signed_file_solution(s, z, c, 2 * w, b), "No rule refuses it, but it is off by"),
        (lambda s, z, c, w, b: signed_file_solution(s, z, c, w, 0 * b), "No rule refuses it, but it is off by"),
    ],
}
