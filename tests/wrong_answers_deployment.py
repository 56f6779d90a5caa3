"""Answers that learners really give, and a piece of what the check must say of it: {exercise: [(answer, message)]}."""

import torch

from quantlab.exercises.deployment import file_solution


def clipped(pairs):
    return pairs.clamp(-(2**15), 2**15 - 1)


def float_bias(x_scale, x_zero, codes, w_scale, b_codes):
    """The bias as floats: right, and not fused."""
    model = file_solution(x_scale, x_zero, codes, w_scale, b_codes)
    from onnx import numpy_helper

    del model.graph.node[3]
    b = (b_codes * x_scale * w_scale).float().numpy()
    model.graph.initializer.append(numpy_helper.from_array(b, "b"))
    return model


WRONG = {
    "20.1": [
        (lambda b, x, w: torch.round(b / x).int(), "weight's scale was left out"),
        (lambda b, x, w: torch.round(b / w).int(), "input's scale was left out"),
        (lambda b, x, w: torch.round(b / x * w).int(), "Divide by both scales"),
        (lambda b, x, w: (b / (x * w)).int(), "Round to the nearest"),
    ],
    "20.3": [
        (lambda x, w: (x.int() * w.int()).sum(), "That is the exact sum"),
        (lambda x, w: clipped((x.int() * w.int()).sum()), "Each pair is clamped"),
        (lambda x, w: clipped(x.int() * w.int()).sum(), "That is the exact sum"),
    ],
    "20.4": [
        (lambda c, g: (c[:, 1::2] | c[:, 0::2] << 4).reshape(len(c), -1, g // 2), "low four bits"),
        (lambda c, g: c[:, 0::2] | c[:, 1::2] << 4, "(out, groups, group // 2)"),
    ],
    "20.5": [
        (lambda s, z: s * min(z, 255 - z) / 127, "The farther end"),
        (lambda s, z: s * max(z, 255 - z) / 128, "128 has no code above zero"),
        (lambda s, z: s * 255 / 127 / 2, "was expected"),
    ],
    "20.2": [
        (float_bias, "no QGemm"),
        (lambda s, z, c, w, b: file_solution(s, z, c, 2 * w, b), "It fuses, but"),
        (lambda *_: 1, "Return the model"),
    ],
}
