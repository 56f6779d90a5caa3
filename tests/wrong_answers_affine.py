"""Answers that learners really give, and a piece of what the check must say of it: {exercise: [(answer, message)]}."""

import torch


def clamp_round(x, scale, zero_point, qmin, qmax):
    return torch.clamp(torch.round(x / scale) + zero_point, qmin, qmax)


WRONG = {
    "1.1": [
        (lambda x, s, z, lo, hi: torch.round(x / s) + z, "clamp."),
        (lambda x, s, z, lo, hi: torch.clamp(torch.floor(x / s) + z, lo, hi), "floor is not round"),
        (lambda x, s, z, lo, hi: torch.clamp(x / s + z, lo, hi), "Codes are whole numbers"),
        (lambda x, s, z, lo, hi: torch.clamp(torch.round(x / s) - z, lo, hi), "Real 0 must get the code zero_point"),
        (lambda x, s, z, lo, hi: torch.clamp(torch.round((x - z) / s), lo, hi), "not taken from x"),
        (lambda x, s, z, lo, hi: torch.clamp(torch.round(x / s + z), lo, hi), "Add zero_point after rounding"),
        (lambda x, s, z, lo, hi: torch.clamp(torch.trunc(x / s + 0.5) + z, lo, hi), "was expected"),
        (lambda x, s, z, lo, hi: clamp_round(x, s, z, lo, hi + 1), "qmax itself"),
    ],
    "1.2": [
        (lambda lo, hi, b: ((hi - lo) / 2**b, round(-lo / ((hi - lo) / 2**b))), "steps between"),
        (lambda lo, hi, b: ((hi - lo) / (2**b - 1), -lo / ((hi - lo) / (2**b - 1))), "a whole number"),
        (lambda lo, hi, b: ((hi - lo) / (2**b - 1), round(lo / ((hi - lo) / (2**b - 1)))), "Mind the sign"),
        (lambda lo, hi, b: ((hi - lo) / (2**b - 1), round(-lo / ((hi - lo) / (2**b - 1)))), "Widen the range"),
        (
            lambda lo, hi, b: ((hi - lo) / (2**b - 1), min(max(round(-lo / ((hi - lo) / (2**b - 1))), 0), 2**b - 1)),
            "Clamping the zero point loses",
        ),
        (
            lambda lo, hi, b: ((hi - min(lo, 0)) / (2**b - 1), round(-min(lo, 0) / ((hi - min(lo, 0)) / (2**b - 1)))),
            "Widen upwards too",
        ),
    ],
    "1.3": [
        (lambda q, s, z: (-z, -z), "multiply the zero point by scale"),
        (lambda q, s, z: (s * z, -z), "which sign"),
        (lambda q, s, z: (-s * z, z), "Which sign"),
    ],
    "1.4": [
        (lambda: 5, "below the 30 dB"),
        (lambda: 8, "The least number"),
        (lambda: 5.5, "an int"),
        (lambda: "6", "an int"),
    ],
    "1.5": [
        (lambda x, bits: (x.min(), x.max()), "it should be less"),
        (lambda x, bits: (x.min() * 0.9, x.max() * 0.9), "Try several factors"),
        (lambda x, bits: (-0.05, 0.05), "it should be less"),
        (lambda x, bits: (x.max(), x.min()), "low must lie below high"),
    ],
}
