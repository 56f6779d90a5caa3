"""Answers that learners really give, and a piece of what the check must say of it: {exercise: [(answer, message)]}."""

import math
from dataclasses import replace

import torch

from quantlab.capstone import by_part


def codes_only(shapes, bits, group_size):
    return sum(math.ceil(rows * columns * bits / 8) for rows, columns in shapes)


def effective_bits(shapes, bits, group_size):
    """The textbook's bits a weight: right where every group is full."""
    weights = sum(rows * columns for rows, columns in shapes)
    return weights * (bits + (32 + bits) / group_size) / 8


def smallest_and_best(rows):
    return [min(rows, key=lambda name: rows[name][0]), min(rows, key=lambda name: rows[name][1])]


def by_kl(rows):
    return sorted(rows, key=lambda name: rows[name][1])


def half_weights(q):
    return q.dequantize().half()


def half_in_place(q):
    q.qparams.scale.copy_(q.qparams.scale.half())
    return q


def rounded_only(q):
    return replace(q, qparams=replace(q.qparams, scale=q.qparams.scale.half().float()))


def too_large(model, tokens):
    return by_part(model, tokens, method="rtn", embedding=8, attention=8, mlp=8)


def float_embedding(model, tokens):
    from quantlab.lm import quantize_lm

    return quantize_lm(model, tokens, "rtn", bits=4, progress=False)


def few_bits(model, tokens):
    return by_part(model, tokens, method="rtn", embedding=2, attention=2, mlp=2)


def reads_the_exam(model, tokens):
    from quantlab.capstone import hidden_text

    hidden_text("stories")


WRONG = {
    "22.1": [
        (codes_only, "scales and zero points come on top"),
        (effective_bits, "was expected"),
        (lambda shapes, bits, group: 8 * codes_only(shapes, bits, group), "was expected"),
    ],
    "22.2": [
        (smallest_and_best, "expected"),
        (by_kl, "expected"),
        (lambda rows: set(rows), "expected"),
        (lambda rows: sorted(rows, key=lambda name: rows[name]), "This is every row"),
    ],
    "22.3": [
        (too_large, "over the budget"),
        (float_embedding, "over the budget"),
        (few_bits, "4 bits everywhere"),
        (reads_the_exam, "refused: hidden text"),
    ],
    "22.4": [
        (half_weights, "Return a QTensor"),
        (half_in_place, "was expected"),
        (rounded_only, "was expected"),
        (lambda q: replace(q, dtype=torch.float16), "was expected"),
    ],
}
