"""Answers that learners really give, and a piece of what the check must say of it: {exercise: [(answer, message)]}."""

import torch

from quantlab.hadamard import random_orthogonal
from quantlab.rotations import rounding_error


def doubled(base, k, quarter=-1, root=0.5):
    for _ in range(k):
        base = torch.cat([torch.cat([base, base], 1), torch.cat([base, quarter * base], 1)])
    return base / len(base) ** root


def worst(inputs, rotation, bits, measure):
    found = {name: measure(x, x @ rotation, bits) for name, x in inputs.items()}
    name = max(found, key=found.get)
    return name, found[name]


WRONG = {
    "17.1": [
        (lambda base, k: doubled(base, k, root=0), "divide by the root of the number of rows"),
        (lambda base, k: doubled(base, k, quarter=1), "not orthogonal"),
        (lambda base, k: doubled(base, k, root=1), "a rotation's have length 1"),
        (lambda base, k: doubled(base, k + 1), "doubled 2 times"),
        (lambda base, k: random_orthogonal(len(base) * 2**k), "entries of one size"),
        (lambda base, k: doubled(base, k)[0], "the matrix must be (48, 48)"),
    ],
    "17.2": [
        (lambda gain, weights: (gain, [w * gain for w in weights]), "it is 1 from now on"),
        (lambda gain, weights: (torch.ones_like(gain), [w / gain for w in weights]), "do not divide"),
        (lambda gain, weights: (torch.ones_like(gain), weights), "who multiplies by the gain now"),
        (lambda gain, weights: (torch.ones_like(gain), [weights[0] * gain, *weights[1:]]), "not only the first"),
    ],
    "17.3": [
        (lambda r, w, b, R: (r @ R.T, R.T @ w, b @ R), "The reader turns the wrong way"),
        (lambda r, w, b, R: (r @ R, R @ w, b @ R), "The writer turns the wrong way"),
        (lambda r, w, b, R: (r @ R, R.T @ w, b), "it turns as well"),
        (lambda r, w, b, R: (r, R.T @ w, b @ R), "The reader has not been turned"),
    ],
    "17.4": [
        (lambda inputs, R, bits: worst(inputs, R, bits, lambda x, y, b: rounding_error(y, bits=b).item()),
         "compare it with the error before"),
        (lambda inputs, R, bits: worst(
            inputs, R, bits, lambda x, y, b: (rounding_error(x, bits=b) / rounding_error(y, bits=b)).item()),
         "before over after"),
        (lambda inputs, R, bits: worst(
            inputs, R, bits, lambda x, y, b: (rounding_error(y, bits=b) - rounding_error(x, bits=b)).item()),
         "A difference favours"),
        (lambda inputs, R, bits: worst(
            inputs, R, bits, lambda x, y, b: (rounding_error(y, bits=b) / rounding_error(x, bits=b)).item())[0],
         "2 results were expected"),
    ],
}  # fmt: skip
