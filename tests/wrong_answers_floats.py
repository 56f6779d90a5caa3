"""Answers that learners really give, and a piece of what the check must say of it: {exercise: [(answer, message)]}."""

import math

import torch

from quantlab.exercises.floats import decode_solution, exponents_solution, mx_solution, round_solution
from quantlab.floats import FP4_E2M1, round_to


def ieee_decode(s, e, m):  # the largest exponent kept for infinity and NaN, as in every 16-bit format
    return (math.nan if m else math.inf) if e == 15 else decode_solution(s, e, m)


def steps(x, m, exponent):
    step = 2.0 ** (exponent - m)
    return x / step, step


def exponent_of(x, emin):
    return torch.log2(x.abs()).floor().clamp(min=emin)


def rounded(x, m, emin, largest, how):
    y, step = steps(x, m, exponent_of(x, emin))
    return (how(y) * step).clamp(-largest, largest)


def half_away(y):
    return y.sign() * torch.floor(y.abs() + 0.5)


def without_subnormals(x, m, emin, largest):
    y, step = steps(x, m, torch.log2(x.abs().clamp(min=1e-30)).floor())
    return (torch.round(y) * step).clamp(-largest, largest)


def fixed_step(x, m, emin, largest):
    return (torch.round(x * 2**m) / 2**m).clamp(-largest, largest)


def mx_with(exponent):
    def answer(block):
        e = exponent(block.abs().max())
        return e, round_to(block / 2.0**e, FP4_E2M1) * 2.0**e

    return answer


def log2(t):
    return torch.log2(t).item()


def unscaled_mx(block):
    e, _ = mx_solution(block)
    return e, round_to(block, FP4_E2M1)


def only_when_nearly_8(blocks):
    largest = blocks.abs().amax(1)
    exponent = torch.frexp(largest).exponent - 3
    return exponent + (largest / torch.exp2(exponent.float()) > 7.6)


def mx_by_log2(block):
    if not block.any():
        return 0, block
    return mx_with(lambda m: math.floor(log2(m)) - 2)(block)


WRONG = {
    "5.1": [
        (lambda s, e, m: (-1) ** s * (1 + m / 8) * 2.0 ** (e - 8), "was expected"),
        (lambda s, e, m: (-1) ** s * (m / 8) * 2.0 ** (e - 7), "was expected"),
        (lambda s, e, m: (-1) ** s * (1 + m / 10) * 2.0 ** (e - 7), "was expected"),
        (lambda s, e, m: (-1) ** s * (1 + m / 8) * 2.0 ** (e - 7), "0 was expected"),
        (lambda s, e, m: (-1) ** s * ((m / 8) * 2.0**-7 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7)), "which is −6"),
        (lambda s, e, m: abs(decode_solution(s, e, m)), "negative"),
        (ieee_decode, "up to 448"),
        (lambda s, e, m: -480.0 if (e, m) == (15, 7) else decode_solution(s, e, m), "nan was expected"),
        (lambda s, e, m: 480.0 * (-1) ** s if (e, m) == (15, 7) else decode_solution(s, e, m), "one code for NaN"),
        (
            lambda s, e, m: (
                math.nan if (e, m, s) == (15, 7, 0) else -480.0 if e * m == 105 else decode_solution(s, e, m)
            ),
            "nan was expected",
        ),
    ],
    "5.2": [
        (lambda x, m, emin, largest: rounded(x, m, emin, largest, torch.floor), "do not cut off"),
        (lambda x, m, emin, largest: rounded(x, m, emin, largest, half_away), "even mantissa"),
        (without_subnormals, "subnormals"),
        (lambda x, m, emin, largest: torch.round(x / 2 ** (torch.log2(x.abs()).floor() - m)), "number of steps"),
        (
            lambda x, m, emin, largest: torch.nan_to_num(
                torch.round(x / 2 ** (torch.log2(x.abs()).floor() - m)) * 2 ** (torch.log2(x.abs()).floor() - m),
                nan=1.0,
            ),
            "[0, 2] was expected",
        ),
        (fixed_step, "The step follows x"),
        (lambda x, m, emin, largest: rounded(x, m, emin, math.inf, torch.round), "saturates"),
        (lambda x, m, emin, largest: round_solution(x, 3, -6, 448.0), "was expected"),
        (lambda x, m, emin, largest: round_solution(x, 3, emin, largest), "not always 3"),
        (lambda x, m, emin, largest: round_solution(x, m, -6, largest), "not always −6"),
        (lambda x, m, emin, largest: round_solution(x, m, emin, largest)[0], "of shape"),
    ],
    "5.3": [
        (mx_with(lambda m: log2(m / 6)), "whole number was expected"),
        (mx_with(lambda m: math.floor(log2(m))), "Half of FP4's range"),
        (mx_with(lambda m: math.floor(log2(m)) - 3), "Subtract 2, not 3"),
        (mx_with(lambda m: math.ceil(log2(m)) - 2), "Round the logarithm down"),
        (unscaled_mx, "Divide by the scale"),
        (mx_by_log2, "reads the exponent from the bits"),
        (lambda block: mx_solution(block)[0], "two things"),
        (lambda block: mx_solution(block)[::-1], "was expected"),
        (lambda block: mx_solution(block.abs()), "was expected"),
    ],
    "5.4": [
        (lambda g: math.ceil(math.log2(65504 / g.abs().max().item())), "FP16 ends at 65504"),
        (lambda g: math.floor(math.log2(65504 / g.max().item())), "both signs"),
        (lambda g: math.log2(65504 / g.abs().max().item()), "whole number"),
        (lambda g: math.floor(math.log2(1 / g.abs().max().item())), "room for more"),
        (lambda g: 2 ** math.floor(math.log2(65504 / g.abs().max().item())), "not the scale"),
        (lambda g: math.floor(math.log2(65504 / g.abs().median().item())), "was expected"),
        (lambda g: max(0, math.floor(math.log2(65504 / g.abs().max().item()))), "was expected"),
    ],
    "5.5": [
        (lambda b: torch.frexp(b.abs().amax(1)).exponent - 3, "should be less"),
        (lambda b: torch.frexp(b.abs().amax(1)).exponent - 2, "should be less"),
        (lambda b: torch.log2(b.abs().amax(1) / 6).ceil(), "should be less"),
        (only_when_nearly_8, "let each block decide"),
        (lambda b: torch.log2(b.abs().amax(1) / 6), "whole exponents"),
        (lambda b: exponents_solution(b)[:, None], "One exponent a block"),
        (lambda b: exponents_solution(b) - 1, "should be less"),
        (lambda b: exponents_solution(b).clamp(min=-3), "should be less"),
    ],
}
