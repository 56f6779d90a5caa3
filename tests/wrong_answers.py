"""Answers that learners really give, and a piece of what the check must tell them: {exercise: [(answer, message)]}."""

import torch


def clamp_round(x, scale, zero_point, qmin, qmax):
    return torch.clamp(torch.round(x / scale) + zero_point, qmin, qmax)


WRONG = {
    "1.1": [
        (lambda x, s, z, lo, hi: torch.round(x / s) + z, "stay in qmin..qmax"),
        (lambda x, s, z, lo, hi: torch.clamp(torch.floor(x / s) + z, lo, hi), "floor is not round"),
        (lambda x, s, z, lo, hi: torch.clamp(x / s + z, lo, hi), "whole numbers"),
        (lambda x, s, z, lo, hi: torch.clamp(torch.round(x / s) - z, lo, hi), "code zero_point"),
        (lambda x, s, z, lo, hi: torch.clamp(torch.round((x - z) / s), lo, hi), "code zero_point"),
        (lambda x, s, z, lo, hi: torch.clamp(torch.round(x / s + z), lo, hi), "after rounding"),
        (lambda x, s, z, lo, hi: clamp_round(x, s, z, lo, hi).tolist(), "Return a tensor"),
        (lambda x, s, z, lo, hi: clamp_round(x, s, z, lo, hi + 1), "stay in qmin..qmax"),
    ],
    "1.2": [
        (lambda lo, hi, b: ((hi - lo) / 2**b, round(-lo / ((hi - lo) / 2**b))), "steps between"),
        (lambda lo, hi, b: ((hi - lo) / (2**b - 1), -lo / ((hi - lo) / (2**b - 1))), "whole number"),
        (lambda lo, hi, b: ((hi - lo) / (2**b - 1), round(lo / ((hi - lo) / (2**b - 1)))), "Mind the sign"),
        (lambda lo, hi, b: ((hi - lo) / (2**b - 1), round(-lo / ((hi - lo) / (2**b - 1)))), "Widen the range"),
        (lambda lo, hi, b: ((hi - lo) / (2**b - 1), min(max(round(-lo / ((hi - lo) / (2**b - 1))), 0), 2**b - 1)), "Widen"),
        (lambda lo, hi, b: ((hi - min(lo, 0)) / (2**b - 1), round(-min(lo, 0) / ((hi - min(lo, 0)) / (2**b - 1)))),
         "Widen upwards too"),
    ],
    "1.3": [
        (lambda q, s, z: (-z, -z), "multiply by scale"),
        (lambda q, s, z: (s * z, -z), "off by"),
        (lambda q, s, z: (-s * z, z), "Which sign"),
    ],
    "1.4": [(lambda: 5, "below the 30 dB"), (lambda: 8, "the least number"), (lambda: 5.5, "an int"), (lambda: "6", "an int")],
    "1.5": [
        (lambda x, bits: (x.min(), x.max()), "it should be less"),
        (lambda x, bits: (x.min() * 0.9, x.max() * 0.9), "Try several fractions"),
        (lambda x, bits: (-0.05, 0.05), "it should be less"),
        (lambda x, bits: (x.max(), x.min()), "ValueError"),
    ],
}


def _column_rule(sign=-1, divide=True, transposed=False, updates=True, copy=True, unrounded=False):
    """The loop of exercise 10.3 with one slip."""
    def f(W, U, scale):
        W = W.clone() if copy else W
        Q = torch.zeros_like(W)
        for i in range(W.shape[1]):
            Q[:, i] = W[:, i] if unrounded else scale * torch.round(W[:, i] / scale)
            error = (W[:, i] - scale * torch.round(W[:, i] / scale)) / (U[i, i] if divide else 1)
            row = U.T[i, i + 1:] if transposed else U[i, i + 1:]
            if updates:
                W[:, i + 1:] += sign * error[:, None] * row
        return Q
    return f


def _compensate(w, H, i, q, *, inverse=True, divide=True, sign=1.0):
    column = torch.linalg.inv(H) if inverse else H
    return w - sign * (w[i] - q) / (column[i, i] if divide else 1.0) * column[:, i]


def _in_place(w, H, i, q):
    w[i] = q
    return w


WRONG |= {
    "10.1": [
        (lambda w, v, x: ((w - v).square().sum() / w.square().sum()).item(), "error of the weight"),
        (lambda w, v, x: ((x @ (w - v).T).norm() / (x @ w.T).norm()).item(), "square root"),
        (lambda w, v, x: (x @ (w - v).T).square().sum().item(), "Doubling both weights"),
        (lambda w, v, x: ((x @ (w - v).T).square().sum() / (x @ v.T).square().sum()).item(), "Expected"),
    ],
    "10.2": [
        (lambda w, H, i, q: torch.where(torch.arange(3) == i, q, w), "nothing has been compensated"),
        (lambda w, H, i, q: _compensate(w, H, i, q, inverse=False), "not of H"),
        (lambda w, H, i, q: _compensate(w, H, i, q, divide=False), "divide by the diagonal"),
        (lambda w, H, i, q: _compensate(w, H, i, q, sign=-1.0), "Is the sign right"),
        (_in_place, "w itself was changed"),
    ],
    "10.3": [
        (_column_rule(updates=False), "round-to-nearest"),
        (_column_rule(sign=1), "Which sign"),
        (_column_rule(copy=False), "W itself was changed"),
        (_column_rule(unrounded=True), "not on the grid"),
        (_column_rule(transposed=True), "round-to-nearest"),
    ],
    "10.4": [
        (lambda: {"bits": 4}, "What else can GPTQ do"),
        (lambda: {"bits": 8}, "Larger groups need fewer"),
        (lambda: {"bits": 4, "group_size": 32, "act_order": True}, "Larger groups need fewer"),
        (lambda: {"bits": 4, "group_size": 128}, "What else can GPTQ do"),
        (lambda: 4, "as a dict"),
    ],
}
