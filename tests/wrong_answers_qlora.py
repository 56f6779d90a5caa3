"""Answers that learners really give, and a piece of what the check must say of it: {exercise: [(answer, message)]}."""

import torch


def _lora(x, W, A, B, alpha, *, scale=None, frozen=1.0):
    scale = alpha / len(A) if scale is None else scale(alpha, A)
    return frozen * x @ W.T + scale * (x @ A.T) @ B.T


def _lora_in_place(x, W, A, B, alpha):
    W += alpha / len(A) * B @ A
    return x @ W.T


def _gradients(x, upstream, A, B, alpha, *, scale=None, order=1, through_b=True):
    scale = alpha / len(A) if scale is None else scale(alpha, A)
    back = upstream @ B if through_b else upstream[:, : len(A)]
    found = scale * back.T @ x, scale * upstream.T @ (x @ A.T)
    return found[::order]


def _gradients_in_place(x, upstream, A, B, alpha):
    upstream *= alpha / len(A)
    return (upstream @ B).T @ x, upstream.T @ (x @ A.T)


def _cut(update, numbers, *, rank=None, values="first", split=True):
    rank = rank or numbers // sum(update.shape)
    U, S, V = torch.linalg.svd(update, full_matrices=False)
    kept = slice(rank) if values == "first" else slice(-rank, None)
    return V[kept], U[:, kept] * (S[kept] if split else 1)


def _cut_in_place(update, numbers):
    found = _cut(update, numbers)
    update -= found[1] @ found[0]
    return found


WRONG = {
    "15.1": [
        (lambda x, W, A, B, alpha: _lora(x, W, A, B, alpha, scale=lambda a, A: a), "The adapter is too strong"),
        (lambda x, W, A, B, alpha: _lora(x, W, A, B, alpha, scale=lambda a, A: 1.0), "alpha changes nothing"),
        (lambda x, W, A, B, alpha: _lora(x, W, A, B, alpha, scale=lambda a, A: 2.0), "not always 2"),
        (lambda x, W, A, B, alpha: _lora(x, W, A, B, alpha, scale=lambda a, A: a // len(A)), "not with //"),
        (lambda x, W, A, B, alpha: _lora(x, W, A, B, alpha, frozen=0.0), "Where is the frozen weight"),
        (lambda x, W, A, B, alpha: x @ W.T, "where is the adapter"),
        (lambda x, W, A, B, alpha: _lora(x, W, A, B, alpha, scale=lambda a, A: a / A.shape[1]), "rows of A"),
        (lambda x, W, A, B, alpha: _lora(x, W, A, B, alpha)[:, :4], "shape (5, 7) was expected; got (5, 4)"),
        (lambda x, W, A, B, alpha: _lora(x, W, A, B, alpha).T, "shape (5, 7) was expected; got (7, 5)"),
        (_lora_in_place, "W was changed in place"),
    ],
    "15.2": [
        (lambda *a: _gradients(*a, order=-1), "gradient of A first"),
        (lambda *a: _gradients(*a, scale=lambda a, A: 1.0), "belongs in both"),
        (lambda *a: _gradients(*a, scale=lambda a, A: a // len(A)), "not with //"),
        (lambda *a: _gradients(*a, scale=lambda a, A: 2.0), "not always 2"),
        (lambda *a: _gradients(*a, through_b=False), "Result 1 of 2"),
        (lambda *a: _gradients(*a)[0], "results were expected"),
        (lambda x, g, A, B, alpha: (_gradients(x, g, A, B, alpha)[0], g.T @ (x @ A.T)), "missing in the gradient of B"),
        (_gradients_in_place, "upstream was changed in place"),
    ],
    "15.3": [
        (lambda packed, floats, trained: packed / 2 + 4 * floats + 16 * trained, "codes alone"),
        (lambda packed, floats, trained: packed * 4.5 / 8 + 4 * floats + 16 * trained, "absmax of 32 bits"),
        (lambda packed, floats, trained: packed * 4.125 / 8 + 4 * floats + 16 * trained, "share one number"),
        (lambda packed, floats, trained: packed * 4.126953125 + 4 * floats + 16 * trained, "These are bits"),
        (lambda packed, floats, trained: packed * 4.126953125 / 8 + 4 * floats + 8 * trained, "keeps two averages"),
        (lambda packed, floats, trained: packed * 4.126953125 / 8 + 4 * floats + 12 * trained, "SGD with momentum"),
        (lambda packed, floats, trained: packed * 4.126953125 / 8 + 16 * floats + 16 * trained, "Frozen floats"),
        (lambda packed, floats, trained: packed * 4.127 / 8 + 4 * floats + 16 * trained, "was expected"),
    ],
    "15.4": [
        (lambda update, numbers: _cut(update, numbers, rank=16), "were allowed"),
        (lambda update, numbers: _cut(update, numbers, rank=4), "can be reached"),
        (lambda update, numbers: _cut(update, numbers, values="last"), "can be reached"),
        (lambda update, numbers: _cut(update, numbers, split=False), "can be reached"),
        (lambda update, numbers: _cut(update, numbers)[::-1], "Return A"),
        (_cut_in_place, "update was changed in place"),
    ],
}
