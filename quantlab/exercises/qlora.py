"""Exercises of chapter 15: QLoRA."""

import torch

from quantlab.exercises.material import whole
from quantlab.judging import Exercise, as_tensor, expect


def lora_solution(x, W, A, B, alpha):
    """The frozen layer, and beside it the detour through rank numbers, scaled."""
    return x @ W.T + alpha / len(A) * (x @ A.T) @ B.T


def _shapes(random):
    """(tokens, in, out, rank, alpha): alpha / rank is a whole number once, and all sizes differ."""
    for rank, alpha in ((3, 6.0), (4, 6.0), (2, 16.0), (5, 2.0)):
        inside, out, tokens = (8 + torch.randperm(6, generator=random)[:3]).tolist()
        yield tokens, inside, out, rank, alpha


def _lora_cases(random):
    for tokens, inside, out, rank, alpha in _shapes(random):
        sizes = (tokens, inside), (out, inside), (rank, inside), (out, rank)
        yield *(torch.randn(size, generator=random) for size in sizes), alpha


def _lora_edges():
    """B = 0, as at the start of training; then the example of section 2."""
    random = torch.Generator().manual_seed(0)
    x, W, A = (torch.randn(size, generator=random) for size in ((5, 4), (7, 4), (3, 4)))
    yield x, W, A, torch.zeros(7, 3), 6.0
    yield torch.tensor([[1.0, 2.0]]), torch.eye(2), torch.tensor([[3.0, -1.0]]), torch.tensor([[0.5], [0.25]]), 4.0


def gradients_solution(x, upstream, A, B, alpha):
    """Each matrix gets the product of what comes in on its one side and comes back on its other."""
    scale = alpha / len(A)
    return scale * (upstream @ B).T @ x, scale * upstream.T @ (x @ A.T)


def _gradients_cases(random):
    for tokens, inside, out, rank, alpha in _shapes(random):
        sizes = (tokens, inside), (tokens, out), (rank, inside), (out, rank)
        yield *(torch.randn(size, generator=random) for size in sizes), alpha


def bytes_solution(packed, floats, trained):
    """NF4 takes 4 bits, 8 for each 64 weights and 32 for each 64 · 256; what is trained has 4 float32 copies."""
    return packed * (4 + 8 / 64 + 32 / (64 * 256)) / 8 + 4 * floats + 16 * trained


def _bytes_cases(random):
    for _ in range(3):
        blocks, floats, trained = torch.randint(500, 9000, (3,), generator=random).tolist()
        yield blocks * 64 * 256, floats, trained


def _bytes_edges():
    yield 2**24, 0, 0
    yield 0, 10_000, 0
    yield 0, 0, 4_000


def factors_solution(update, numbers):
    """The best rank-r matrices are the first r singular vectors (Eckart and Young 1936), r as large as is paid for."""
    rank = numbers // sum(update.shape)
    U, S, V = torch.linalg.svd(update, full_matrices=False)
    return V[:rank], U[:, :rank] * S[:rank]


def _factors_cases(random):
    """Updates of other shapes and ranks, whose singular values fall slowly; numbers left over for no rank more."""
    for rows, columns, rank in ((48, 80, 8), (90, 40, 5), (30, 30, 3)):
        less = min(rows, columns)
        left, right = (torch.linalg.qr(torch.randn(n, less, generator=random)).Q for n in (rows, columns))
        update = (left * torch.arange(1, less + 1) ** -0.8) @ right.T
        yield update, rank * (rows + columns) + whole(random, 0, rows + columns)


def _factors_rule(found, update, numbers):
    """Error at most 1.01 times the least, with at most so many numbers."""
    expect(isinstance(found, tuple | list) and len(found) == 2, f"Return two matrices, A and B; got {type(found)}.")
    A, B = (as_tensor(t) for t in found)
    rows, columns = update.shape
    expect(A is not None and B is not None and A.ndim == B.ndim == 2, "Return two matrices, A and B.")
    expect(
        A.shape[1] == columns and B.shape[0] == rows and len(A) == B.shape[1],
        f"Return A (rank, {columns}) and B ({rows}, rank); got {tuple(A.shape)} and {tuple(B.shape)}.",
    )
    used = A.numel() + B.numel()
    expect(used <= numbers, f"A and B hold {used:,} numbers; {numbers:,} were allowed. What rank is that?")
    error, best = (_lost(update.double(), b @ a) for a, b in ((A, B), factors_solution(update.double(), numbers)))
    expect(
        error <= 1.01 * best,
        f"The error is {error:.4f}; {best:.4f} can be reached with as many numbers. Which rank-r matrix is nearest, "
        "and how large may r be?",
    )
    return f"Error {error:.4f} with {used:,} of {update.numel():,} numbers."


def _lost(update, product) -> float:
    return ((update - product).square().sum() / update.square().sum()).item()


EXERCISES = {
    "15.1": Exercise(
        "an adapter",
        hints=(
            "Two paths from x to y, added up: the frozen weight, and the adapter.",
            "The adapter goes down to rank numbers, x @ A.T, and up again with B.",
            "The scale is alpha / len(A), on the second path only.",
        ),
        solution=lora_solution,
        cases=_lora_cases,
        edges=_lora_edges,
        slips={
            "The adapter is too strong: its scale is alpha / rank, and A has rank rows.": ("alpha / len(A)", "alpha"),
            "alpha changes nothing: the detour is multiplied by alpha / rank.": ("alpha / len(A)", "1"),
            "The scale is alpha / rank, whatever they are: not always 2.": ("alpha / len(A)", "2"),
            "alpha / rank need not be whole: divide with /, not with //.": ("alpha / len(A)", "alpha // len(A)"),
            "rank is the number of rows of A, not of its columns.": ("len(A)", "A.shape[1]"),
            "Divide alpha by the rank, not by its root (that is rsLoRA).": ("len(A)", "len(A) ** 0.5"),
            "Divide alpha by the rank, do not multiply.": ("alpha / len(A)", "alpha * len(A)"),
            "With B = 0 the adapter adds nothing: the output is x Wᵀ. Where is the frozen weight?": ("x @ W.T + ", ""),
            "Only the frozen layer: where is the adapter?": (" + alpha / len(A) * (x @ A.T) @ B.T", ""),
            "The frozen weight counts once and is not scaled: alpha / rank belongs to the adapter.": (
                "x @ W.T + alpha / len(A) * (x @ A.T) @ B.T", "alpha / len(A) * (x @ W.T + (x @ A.T) @ B.T)"
            ),
            "The adapter is added, not taken away.": ("W.T + alpha", "W.T - alpha"),
        },
    ),
    "15.2": Exercise(
        "gradients of an adapter",
        hints=(
            "The adapter is two layers of the kind y = x Mᵀ in a row, and a scale: go back through one at a time.",
            "B reads x @ A.T and upstream comes back to it; A reads x, and upstream @ B comes back to it.",
            "dA = scale * (upstream @ B).T @ x; dB has upstream.T on the left and what B read on the right.",
        ),
        solution=gradients_solution,
        cases=_gradients_cases,
        slips={
            "The scale alpha / rank belongs in both gradients.": ("alpha / len(A)", "1.0"),
            "The scale is alpha / rank, not alpha.": ("alpha / len(A)", "alpha"),
            "The scale is alpha / rank, whatever they are: not always 2.": ("alpha / len(A)", "2.0"),
            "The scale belongs in each gradient once, not twice.": ("alpha / len(A)", "(alpha / len(A)) ** 2"),
            "alpha / rank need not be whole: divide with /, not with //.": ("alpha / len(A)", "alpha // len(A)"),
            "The scale is missing in the gradient of A.": ("return scale * (upstream", "return (upstream"),
            "The scale is missing in the gradient of B.": (", scale * upstream.T", ", upstream.T"),
            "Return the gradient of A first, then that of B.": (
                "return scale * (upstream @ B).T @ x, scale * upstream.T @ (x @ A.T)",
                "return scale * upstream.T @ (x @ A.T), scale * (upstream @ B).T @ x",
            ),
            "A gradient has the shape of its matrix: yours are turned, rows for columns.": (
                "scale * (upstream @ B).T @ x, scale * upstream.T @ (x @ A.T)",
                "scale * x.T @ (upstream @ B), scale * (x @ A.T).T @ upstream",
            ),
            "These go uphill as well as down: a gradient has no minus of its own; the step has.": (
                "scale = alpha", "scale = -alpha"
            ),
            "The upstream gradient is summed over tokens already: no mean.": ("/ len(A)", "/ len(A) / len(x)"),
        },
    ),
    "15.3": Exercise(
        "bytes of a training",
        hints=(
            "Three kinds of numbers: packed and frozen, float and frozen, trained.",
            "4 bits a code, 8 bits for each 64 codes, 32 bits for each 256 of those.",
            "A trained number is kept four times: itself, its gradient, two averages of AdamW.",
        ),
        solution=bytes_solution,
        cases=_bytes_cases,
        edges=_bytes_edges,
        tolerance=1e-7,
        smallest=8.0,  # so that AdamW's counter of 4 bytes, which the text leaves out, may be in it
        slips={
            "The codes alone are not enough: each block of 64 has an absmax.": ("+ 8 / 64 + 32 / (64 * 256)", ""),
            "This is NF4 with an absmax of 32 bits a block; double quantization makes it 8.": (
                "8 / 64 + 32 / (64 * 256)", "32 / 64"
            ),
            "Nearly: 256 absmax of 8 bits share one number of 32 bits.": (" + 32 / (64 * 256)", ""),
            "256 absmax share a number: that is 64 · 256 weights, not 256.": ("32 / (64 * 256)", "32 / 256"),
            "These are bits: eight of them are a byte.": ("(64 * 256)) / 8", "(64 * 256))"),
            "A trained number has a gradient and two averages beside itself: four float32.": ("16 *", "4 *"),
            "AdamW keeps two averages for each trained number beside its gradient.": ("16 *", "8 *"),
            "That is SGD with momentum; AdamW keeps two averages.": ("16 *", "12 *"),
            "Frozen floats take 4 bytes each: no gradient, no averages.": ("4 * floats", "16 * floats"),
            "The frozen floats are float32, not 16 bits.": ("4 * floats", "2 * floats"),
            "The frozen floats are kept as well.": (" + 4 * floats", ""),
        },
    ),
    "15.4": Exercise(
        "an adapter on a budget",
        hints=(
            "A matrix of rank r in two factors takes r * (rows + columns) numbers.",
            "The nearest matrix of rank r keeps the r largest singular values.",
            "torch.linalg.svd(update, full_matrices=False): some columns of U times their S, some rows of V.",
        ),
        solution=factors_solution,
        cases=_factors_cases,
        rule=_factors_rule,
    ),
}  # fmt: skip
