"""Exercises of chapter 15: QLoRA."""

import torch
import torch.nn.functional as F

from quantlab.checks import Exercise, expect


def lora_solution(x, W, A, B, alpha):
    """The frozen layer, and beside it the detour through rank numbers, scaled."""
    return x @ W.T + alpha / len(A) * (x @ A.T) @ B.T


def _test_lora(f):
    x, W, A, B = _layer()
    y = f(x, W, A, B, 6.0)
    expect(
        torch.is_tensor(y) and y.shape == (5, 7),
        f"x is (5, 4) and W (7, 4): the output should be (5, 7), got {tuple(y.shape)}.",
    )
    expect(
        torch.allclose(f(x, W, A, torch.zeros_like(B), 6.0), x @ W.T, atol=1e-5),
        "With B = 0 the adapter adds nothing: the output should be the frozen layer's, x Wᵀ.",
    )
    right = lora_solution(x, W, A, B, 6.0)
    expect(
        not torch.allclose(y, x @ W.T + 6.0 * (x @ A.T) @ B.T, atol=1e-4),
        "The adapter is too strong: its scale is alpha / rank, and A has rank rows.",
    )
    expect(
        not torch.allclose(y, x @ W.T + (x @ A.T) @ B.T, atol=1e-4),
        "alpha changes nothing: the detour is multiplied by alpha / rank.",
    )
    expect(
        torch.allclose(f(x, 2 * W, A, B, 6.0) - y, x @ W.T, atol=1e-4),
        "The frozen weight should count exactly once, unscaled.",
    )
    expect(
        torch.allclose(y, right, atol=1e-4),
        "Not x Wᵀ + alpha / rank · (x Aᵀ) Bᵀ. First down to rank numbers with A, then up with B.",
    )


def gradients_solution(x, upstream, A, B, alpha):
    """Each matrix gets the product of what comes in on its one side and comes back on its other."""
    scale = alpha / len(A)
    return scale * (upstream @ B).T @ x, scale * upstream.T @ (x @ A.T)


def _test_gradients(f):
    x, W, A, B = _layer()
    upstream = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    given = f(x, upstream, A, B, 6.0)
    expect(isinstance(given, tuple | list) and len(given) == 2, "Return two gradients: that of A, then that of B.")
    for name, gradient, of in zip("AB", given, (A, B), strict=True):
        expect(
            gradient.shape == of.shape,
            f"The gradient of {name} has the shape of {name}, {tuple(of.shape)}; got {tuple(gradient.shape)}.",
        )
    leaves = [t.clone().requires_grad_() for t in (A, B)]
    (lora_solution(x, W, *leaves, 6.0) * upstream).sum().backward()
    at_zero = f(x, upstream, A, torch.zeros_like(B), 6.0)[0]
    expect(
        bool((at_zero == 0).all()),
        "With B = 0 nothing comes back to A: its gradient should be exactly 0. Does yours go through B?",
    )
    for name, gradient, leaf in zip("AB", given, leaves, strict=True):
        size = (gradient.norm() / leaf.grad.norm()).item()
        expect(
            torch.allclose(gradient, size * leaf.grad, rtol=1e-3, atol=1e-4),
            f"The gradient of {name} points elsewhere. What did {name} read, and what came back to its output?",
        )
        expect(
            abs(size - 1) < 1e-3,
            f"The gradient of {name} is {size:.3g} times too large: the scale alpha / rank belongs in it, once.",
        )


def bytes_solution(packed, floats, trained):
    """NF4 takes 4 bits, 8 for each 64 weights and 32 for each 64 · 256; what is trained has 4 float32 copies."""
    return packed * (4 + 8 / 64 + 32 / (64 * 256)) / 8 + 4 * floats + 16 * trained


def _test_bytes(f):
    packed, floats, trained = 2**24, 10_000, 4_000
    alone = f(packed, 0, 0)
    for bits, why in (
        (4, "The codes alone are not enough: each block of 64 has an absmax."),
        (4.5, "This is NF4 with an absmax of 32 bits a block; double quantization makes it 8."),
        (4.125, "Nearly: 256 absmax of 8 bits share one number of 32 bits."),
    ):
        expect(abs(alone - packed * bits / 8) > 1, why)
    expect(
        abs(alone - packed * (4 + 8 / 64 + 32 / (64 * 256)) / 8) <= 8,
        f"{8 * alone / packed:.4f} bits for each packed weight; 4.1270 was expected. Did you return bytes?",
    )
    rest = f(0, floats, 0)
    expect(rest == 4 * floats, f"{floats:,} frozen floats take 4 bytes each and nothing more; got {rest:,}.")
    each = f(0, 0, trained) / trained
    expect(
        each == 16,
        f"{each:g} bytes for each trained number. Itself, its gradient, and AdamW's two averages: float32 each.",
    )
    whole = f(packed, floats, trained)
    expect(abs(whole - alone - rest - 16 * trained) < 1, "The three parts should simply add up.")


def factors_solution(update, numbers):
    """The best rank-r matrices are the first r singular vectors (Eckart and Young 1936), r as large as is paid for."""
    rank = numbers // sum(update.shape)
    U, S, V = torch.linalg.svd(update, full_matrices=False)
    return V[:rank], U[:, :rank] * S[:rank]


def _test_factors(f):
    update, numbers = practice_update()
    A, B = f(update, numbers)
    rows, columns = update.shape
    expect(
        A.shape[1] == columns and B.shape[0] == rows and len(A) == B.shape[1],
        f"Return A (rank, {columns}) and B ({rows}, rank); got {tuple(A.shape)} and {tuple(B.shape)}.",
    )
    used = A.numel() + B.numel()
    expect(used <= numbers, f"A and B hold {used:,} numbers; {numbers:,} were allowed. What rank is that?")
    error = ((update - B @ A).square().sum() / update.square().sum()).item()
    best_A, best_B = factors_solution(update, numbers)
    best = ((update - best_B @ best_A).square().sum() / update.square().sum()).item()
    expect(
        error <= 1.01 * best,
        f"The error is {error:.4f}; {best:.4f} can be reached with as many numbers. Which rank-r matrix is nearest?",
    )
    return f"Error {error:.4f} with {used:,} of {update.numel():,} numbers."


def practice_update():
    """(update, numbers): what full fine-tuning might add to a layer, (96, 160), and how many numbers may be kept."""
    random = torch.Generator().manual_seed(5)
    left, right = (torch.linalg.qr(torch.randn(n, 96, generator=random)).Q for n in (96, 160))
    update = (left * torch.arange(1, 97) ** -1.2) @ right.T
    return update, 2_100


def _layer():
    """x (5, 4), W (7, 4), A (3, 4), B (7, 3), always the same."""
    random = torch.Generator().manual_seed(0)
    return [F.normalize(torch.randn(s, generator=random), dim=1) for s in ((5, 4), (7, 4), (3, 4), (7, 3))]


EXERCISES = {
    "15.1": Exercise(
        "an adapter",
        _test_lora,
        (
            "Two paths from x to y, added up: the frozen weight, and the adapter.",
            "The adapter goes down to rank numbers, x @ A.T, and up again with B.",
            "The scale is alpha / len(A), on the second path only.",
        ),
        lora_solution,
    ),
    "15.2": Exercise(
        "gradients of an adapter",
        _test_gradients,
        (
            "The adapter is two layers of the kind y = x Mᵀ in a row, and a scale: go back through one at a time.",
            "B reads x @ A.T and upstream comes back to it; A reads x, and upstream @ B comes back to it.",
            "dA = scale * (upstream @ B).T @ x; dB has upstream.T on the left and what B read on the right.",
        ),
        gradients_solution,
    ),
    "15.3": Exercise(
        "bytes of a training",
        _test_bytes,
        (
            "Three kinds of numbers: packed and frozen, float and frozen, trained.",
            "4 bits a code, 8 bits for each 64 codes, 32 bits for each 256 of those.",
            "A trained number is kept four times: itself, its gradient, two averages of AdamW.",
        ),
        bytes_solution,
    ),
    "15.4": Exercise(
        "an adapter on a budget",
        _test_factors,
        (
            "A matrix of rank r in two factors takes r * (rows + columns) numbers.",
            "The nearest matrix of rank r keeps the r largest singular values.",
            "torch.linalg.svd(update, full_matrices=False): some columns of U times their S, some rows of V.",
        ),
        factors_solution,
    ),
}
