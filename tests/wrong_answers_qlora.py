"""Answers that learners really give, and a piece of what the check must say of it: {exercise: [(answer, message)]}."""

import torch


def _lora(x, W, A, B, alpha, *, scale=None, frozen=1.0):
    scale = alpha / len(A) if scale is None else scale(alpha, A)
    return frozen * x @ W.T + scale * (x @ A.T) @ B.T


def _gradients(x, upstream, A, B, alpha, *, scale=None, order=1, through_b=True):
    scale = alpha / len(A) if scale is None else scale
    back = upstream @ B if through_b else upstream[:, : len(A)]
    found = scale * back.T @ x, scale * upstream.T @ (x @ A.T)
    return found[::order]


def _cut(update, numbers, *, rank=None, values="first", split=True):
    rank = rank or numbers // sum(update.shape)
    U, S, V = torch.linalg.svd(update, full_matrices=False)
    kept = slice(rank) if values == "first" else slice(-rank, None)
    return V[kept], U[:, kept] * (S[kept] if split else 1)


WRONG = {
    "15.1": [
        (lambda x, W, A, B, alpha: _lora(x, W, A, B, alpha, scale=lambda a, A: a), "alpha / rank"),
        (lambda x, W, A, B, alpha: _lora(x, W, A, B, alpha, scale=lambda a, A: 1.0), "alpha changes nothing"),
        (lambda x, W, A, B, alpha: _lora(x, W, A, B, alpha, frozen=0.0), "With B = 0"),
        (lambda x, W, A, B, alpha: x @ W.T, "Not x Wᵀ"),
        (lambda x, W, A, B, alpha: _lora(x, W, A, B, alpha, scale=lambda a, A: a / A.shape[1]), "Not x Wᵀ"),
        (lambda x, W, A, B, alpha: _lora(x, W, A, B, alpha)[:, :4], "should be (5, 7)"),
    ],
    "15.2": [
        (lambda *a: _gradients(*a, order=-1), "has the shape of A"),
        (lambda *a: _gradients(*a, scale=1.0), "times too large"),
        (lambda *a: _gradients(*a, through_b=False), "With B = 0 nothing comes back"),
        (lambda *a: _gradients(*a)[0], "Return two gradients"),
        (lambda x, g, A, B, alpha: (_gradients(x, g, A, B, alpha)[0], 2.0 * g.T @ (x @ B.T[:, :4].T)), "of B points"),
    ],
    "15.3": [
        (lambda packed, floats, trained: packed / 2 + 4 * floats + 16 * trained, "codes alone"),
        (lambda packed, floats, trained: packed * 4.5 / 8 + 4 * floats + 16 * trained, "absmax of 32 bits"),
        (lambda packed, floats, trained: packed * 4.125 / 8 + 4 * floats + 16 * trained, "share one number"),
        (lambda packed, floats, trained: packed * 4.126953125 + 4 * floats + 16 * trained, "return bytes"),
        (lambda packed, floats, trained: packed * 4.126953125 / 8 + 4 * floats + 8 * trained, "8 bytes for each"),
        (lambda packed, floats, trained: packed * 4.126953125 / 8 + 16 * floats + 16 * trained, "frozen floats"),
    ],
    "15.4": [
        (lambda update, numbers: _cut(update, numbers, rank=16), "were allowed"),
        (lambda update, numbers: _cut(update, numbers, rank=4), "can be reached"),
        (lambda update, numbers: _cut(update, numbers, values="last"), "can be reached"),
        (lambda update, numbers: _cut(update, numbers, split=False), "can be reached"),
        (lambda update, numbers: _cut(update, numbers)[::-1], "Return A"),
    ],
}
