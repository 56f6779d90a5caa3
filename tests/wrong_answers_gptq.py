"""Answers that learners really give, and a piece of what the check must say of it: {exercise: [(answer, message)]}."""

import torch


def _column_rule(sign=-1, divide=True, transposed=False, updates=True, copy=True, unrounded=False):
    """The loop of exercise 10.3 with one slip."""

    def f(W, U, scale):
        W = W.clone() if copy else W
        Q = torch.zeros_like(W)
        for i in range(W.shape[1]):
            Q[:, i] = W[:, i] if unrounded else scale * torch.round(W[:, i] / scale)
            error = (W[:, i] - scale * torch.round(W[:, i] / scale)) / (U[i, i] if divide else 1)
            row = U.T[i, i + 1 :] if transposed else U[i, i + 1 :]
            if updates:
                W[:, i + 1 :] += sign * error[:, None] * row
        return Q

    return f


def _compensate(w, H, i, q, *, inverse=True, divide=True, sign=1.0):
    column = torch.linalg.inv(H) if inverse else H
    return w - sign * (w[i] - q) / (column[i, i] if divide else 1.0) * column[:, i]


def _in_place(w, H, i, q):
    w[i] = q
    return w


def _damped_in_place(w, H, i, q):
    H.diagonal().add_(0.01 * H.diagonal().mean())
    return _compensate(w, H, i, q)


def _plane(W, R, scale, *, sign=1, forwards=False):
    Q = torch.zeros_like(W)
    for i in range(W.shape[1]) if forwards else reversed(range(W.shape[1])):
        owed = sign * (W - Q)[:, i + 1 :] @ R[i, i + 1 :] / R[i, i]
        Q[:, i] = scale * torch.round((W[:, i] + owed) / scale)
    return Q


WRONG = {
    "10.1": [
        (lambda w, v, x: ((w - v).square().sum() / w.square().sum()).item(), "error of the weight"),
        (lambda w, v, x: ((x @ (w - v).T).norm() / (x @ w.T).norm()).item(), "square root"),
        (lambda w, v, x: (x @ (w - v).T).square().sum().item(), "Doubling both weights"),
        (lambda w, v, x: ((x @ (w - v).T).square().sum() / (x @ v.T).square().sum()).item(), "not of the rounded one"),
        (lambda w, v, x: ((x @ (w - v).T).square() / (x @ w.T).square()).mean(), "not the mean of the ratios"),
    ],
    "10.2": [
        (lambda w, H, i, q: torch.where(torch.arange(len(w)) == i, q, w), "nothing has been compensated"),
        (lambda w, H, i, q: _compensate(w, H, i, q, inverse=False), "not of H"),
        (lambda w, H, i, q: _compensate(w, H, i, q, divide=False), "Divide by entry (i, i)"),
        (lambda w, H, i, q: _compensate(w, H, i, q, sign=-1.0), "Is the sign right"),
        (_in_place, "w was changed in place"),
        (_damped_in_place, "H was changed in place"),
        (lambda w, H, i, q: _compensate(w, H, i, w[i].round()), "q is given"),
    ],
    "10.3": [
        (_column_rule(updates=False), "round-to-nearest"),
        (_column_rule(sign=1), "Which sign"),
        (_column_rule(copy=False), "W was changed in place"),
        (_column_rule(unrounded=True), "were not rounded"),
        (_column_rule(transposed=True), "round-to-nearest"),
        (_column_rule(divide=False), "divided by U[i, i]"),
    ],
    "10.4": [
        (lambda W, R, scale: scale * torch.round(W / scale), "round-to-nearest"),
        (lambda W, R, scale: _plane(W, R, scale, sign=-1), "Which sign"),
        (lambda W, R, scale: _plane(W, R, scale, forwards=True), "Start with the last column"),
        (lambda W, R, scale: _plane(W, R.T, scale), "was expected"),
    ],
    "10.5": [
        (lambda: {"bits": 4}, "What else can GPTQ do"),
        (lambda: {"bits": 8}, "Larger groups need fewer"),
        (lambda: {"bits": 4, "group_size": 32, "act_order": True}, "Larger groups need fewer"),
        (lambda: {"bits": 4, "group_size": 128}, "What else can GPTQ do"),
        (lambda: 4, "as a dict"),
    ],
}
