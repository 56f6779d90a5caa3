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
        (lambda s, e, m: (-1) ** s * (1 + m / 8) * 2.0 ** (e - 8), "bias of 7"),
        (lambda s, e, m: (-1) ** s * (m / 8) * 2.0 ** (e - 7), "1.0"),
        (lambda s, e, m: (-1) ** s * (1 + m / 10) * 2.0 ** (e - 7), "worth a half"),
        (lambda s, e, m: (-1) ** s * (1 + m / 8) * 2.0 ** (e - 7), "All bits 0"),
        (lambda s, e, m: (-1) ** s * ((m / 8) * 2.0**-7 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7)), "which is −6"),
        (lambda s, e, m: abs(decode_solution(s, e, m)), "negative"),
        (ieee_decode, "up to 448"),
        (lambda s, e, m: -480.0 if (e, m) == (15, 7) else decode_solution(s, e, m), "one code for NaN"),
        (lambda s, e, m: decode_solution(s, e, m) + 0.0, "−0.0"),
    ],
    "5.2": [
        (lambda x, m, emin, largest: rounded(x, m, emin, largest, torch.floor), "nearer of two"),
        (lambda x, m, emin, largest: rounded(x, m, emin, largest, half_away), "even mantissa"),
        (without_subnormals, "subnormals"),
        (lambda x, m, emin, largest: torch.round(x / 2 ** (torch.log2(x.abs()).floor() - m)), "should stay"),
        (
            lambda x, m, emin, largest: torch.nan_to_num(
                torch.round(x / 2 ** (torch.log2(x.abs()).floor() - m)) * 2 ** (torch.log2(x.abs()).floor() - m),
                nan=1.0,
            ),
            "log2 of 0",
        ),
        (fixed_step, "the step is 2^(e"),
        (lambda x, m, emin, largest: rounded(x, m, emin, math.inf, torch.round), "saturates"),
        (lambda x, m, emin, largest: round_solution(x, 3, -6, 448.0), "use all the arguments"),
        (lambda x, m, emin, largest: round_solution(x, m, emin, largest).tolist(), "Return a tensor"),
    ],
    "5.3": [
        (mx_with(lambda m: log2(m / 6)), "so it is whole"),
        (mx_with(lambda m: math.floor(log2(m))), "half of FP4's range"),
        (mx_with(lambda m: math.floor(log2(m)) - 3), "at 8 or above"),
        (mx_with(lambda m: math.ceil(log2(m)) - 2), "Round the logarithm down"),
        (unscaled_mx, "divide by the scale"),
        (mx_by_log2, "read the exponent from the bits"),
    ],
    "5.4": [
        (lambda g: math.ceil(math.log2(65504 / g.abs().max().item())), "FP16 ends at 65504"),
        (lambda g: math.floor(math.log2(65504 / g.max().item())), "both signs"),
        (lambda g: math.log2(65504 / g.abs().max().item()), "whole number"),
        (lambda g: math.floor(math.log2(1 / g.abs().max().item())), "room for more"),
        (lambda g: 2 ** math.floor(math.log2(65504 / g.abs().max().item())), "not the scale"),
    ],
    "5.5": [
        (lambda b: torch.frexp(b.abs().amax(1)).exponent - 3, "should be less"),
        (lambda b: torch.frexp(b.abs().amax(1)).exponent - 2, "should be less"),
        (lambda b: torch.log2(b.abs().amax(1) / 6).ceil(), "should be less"),
        (only_when_nearly_8, "let each block decide"),
        (lambda b: torch.log2(b.abs().amax(1) / 6), "whole exponents"),
        (lambda b: exponents_solution(b)[:, None], "One exponent a block"),
    ],
}
