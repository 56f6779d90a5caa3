"""Exercises of chapter 17: rotations."""

import torch

from quantlab.exercises.material import uniform
from quantlab.hadamard import hadamard, random_orthogonal
from quantlab.judging import Exercise, as_tensor, expect
from quantlab.rotations import rounding_error


def double_solution(base, k):
    """Sylvester's step k times: the matrix beside itself, and below it beside its negative; lengths come to 1 last."""
    matrix = base
    for _ in range(k):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / len(matrix) ** 0.5


def _double_cases(random):
    """Bases of several sizes, their rows shuffled and some turned: a Hadamard matrix stays one."""
    for size, k in ((12, 1), (12, 3), (20, 2), (4, 2), (1, 3), (2, 0)):
        base = (hadamard(size) * size**0.5).round()[torch.randperm(size, generator=random)]
        yield base * (2 * torch.randint(2, (size, 1), generator=random) - 1), k


def _double_edges():
    yield (hadamard(12) * 12**0.5).round(), 2
    yield torch.ones(1, 1), 1
    yield (hadamard(12) * 12**0.5).round(), 0


def _double_rule(matrix, base, k):
    """Any Hadamard matrix of that size will do, in whatever order its rows and columns are."""
    n = len(base) * 2**k
    matrix = as_tensor(matrix)
    expect(matrix is not None, f"Return a matrix ({n}, {n}) of numbers.")
    expect(
        matrix.shape == (n, n),
        f"{len(base)} rows doubled {k} times are {n}: the matrix must be ({n}, {n}), got {tuple(matrix.shape)}.",
    )
    matrix = matrix.double()
    expect(bool(matrix.isfinite().all()), "The matrix holds NaN or infinity.")
    products = matrix @ matrix.T
    length = products.diagonal().mean().item()
    expect(
        abs(length - n) > 1e-3 or n == 1, f"Its rows have length √{n}: divide by the root of the number of rows, once."
    )
    cross = (products - torch.diag(products.diagonal())).abs().max().item()
    expect(
        cross < 1e-4 * max(length, 1e-9),
        "Two of its rows are not orthogonal. Which of the four quarters must have the other sign?",
    )
    expect(abs(length - 1) < 1e-4, f"Its rows have length {abs(length) ** 0.5:.4g}, and a rotation's have length 1.")
    expect(
        bool(((matrix.abs() - n**-0.5).abs() < 1e-5).all()),
        "Orthogonal, but a Hadamard matrix has entries of one size: each is ±1/√n.",
    )


def fold_solution(gain, weights):
    """(x̂ · g) Wᵀ = x̂ (W diag(g))ᵀ: column j of everything that reads the norm is multiplied by g_j."""
    return torch.ones_like(gain), [weight * gain for weight in weights]


def _fold_cases(random):
    for rows, width, count in ((3, 5, 2), (5, 5, 3), (7, 2, 1)):
        gain = 1 + torch.randn(width, generator=random)
        yield gain, [torch.randn(rows + i, width, generator=random) for i in range(count)]


def _fold_edges():
    yield torch.tensor([2.0, -1.0]), [torch.tensor([[1.0, 1.0], [0.0, 3.0]])]


def turn_solution(reader, writer, bias, rotation):
    """What reads x R needs W R; what is to give out y R needs Rᵀ W, and its bias turned like an output."""
    return reader @ rotation, rotation.T @ writer, bias @ rotation


def _turn_cases(random):
    for inside, width, outside in ((6, 4, 3), (4, 4, 4), (5, 8, 7)):
        rotation = random_orthogonal(width, seed=int(torch.randint(10**6, (1,), generator=random)))
        reader = torch.randn(inside, width, generator=random)
        writer = torch.randn(width, outside, generator=random)
        yield reader, writer, torch.randn(width, generator=random), rotation


def _turn_edges():
    quarter = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    yield torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]]), torch.tensor([5.0, 6.0]), quarter


def hurt_solution(inputs, rotation, bits):
    """The error after over the error before, layer by layer; the largest of these is where rotating hurts most."""
    ratios = {
        name: (rounding_error(x @ rotation, bits=bits) / rounding_error(x, bits=bits)).item()
        for name, x in inputs.items()
    }
    worst = max(ratios, key=ratios.get)
    return worst, ratios[worst]


def _hurt_cases(random):
    """Spikes, which a rotation spreads; normal values, to which it does nothing; two values, which it spoils."""
    for bits, width in ((4, 16), (3, 32), (6, 16), (4, 24)):
        spiky = torch.randn(32, width, generator=random)
        spiky[:, int(torch.randint(width, (1,), generator=random))] *= uniform(random, 10.0, 60.0)
        values = {
            "spikes": spiky,
            "normal": uniform(random, 0.1, 5.0) * torch.randn(32, width, generator=random),
            "two values": uniform(random, 0.1, 5.0) * torch.randn(32, width, generator=random).sign()
            + 0.02 * torch.randn(32, width, generator=random),
            "uniform": uniform(random, 0.1, 5.0) * (torch.rand(32, width, generator=random) - 0.5),
        }
        order = torch.randperm(4, generator=random).tolist()
        kept = order if bits != 3 else [i for i in order if i != 2]  # once without the one that is spoilt most
        names = list(values)
        rotation = random_orthogonal(width, seed=int(torch.randint(10**6, (1,), generator=random)))
        yield {f"layer {k}": values[names[i]] for k, i in enumerate(kept)}, rotation, bits


EXERCISES = {
    "17.1": Exercise(
        "a Hadamard matrix of 12 · 2ᵏ",
        hints=(
            "One step makes H of n rows into one of 2n: four quarters, each H or −H.",
            "torch.cat([a, b], 1) puts b to the right of a; torch.cat([top, bottom]) puts one below the other.",
            "[[H, H], [H, −H]], k times; in the end divide by the root of the number of rows.",
        ),
        solution=double_solution,
        cases=_double_cases,
        edges=_double_edges,
        rule=_double_rule,
    ),
    "17.2": Exercise(
        "fold a gain",
        hints=(
            "Layer i computes Σⱼ x̂ⱼ gⱼ Wᵢⱼ. Which factor can take gⱼ in?",
            "The gain belongs to the inputs: to the columns of W, (out, in).",
            "torch.ones_like(gain), and each weight * gain, which multiplies column j by gain[j].",
        ),
        solution=fold_solution,
        cases=_fold_cases,
        edges=_fold_edges,
        slips={
            "The norm must not multiply by the gain any more: it is 1 from now on.": ("torch.ones_like(gain)", "gain"),
            "A gain of 0 would silence the norm; to multiply by nothing is 1.": ("torch.ones_like", "torch.zeros_like"),
            "The weights take the gain in: multiply, do not divide.": ("weight * gain", "weight / gain"),
            "The weights have not changed: who multiplies by the gain now?": ("weight * gain", "weight"),
            "The norm keeps its length, and the weights lose it: the gain is counted twice.": (
                "torch.ones_like(gain)", "gain", "weight * gain", "weight / gain"
            ),
            "Every layer that reads the norm must take the gain in, not only the first.": (
                "[weight * gain for weight in weights]", "[weights[0] * gain, *weights[1:]]"
            ),
        },
    ),
    "17.3": Exercise(
        "turn a reader and a writer",
        hints=(
            "x becomes x R. Which matrix V makes (x R) Vᵀ = x Wᵀ? Remember R Rᵀ = I.",
            "The writer gives out y = z Wᵀ + b, and is to give out y R: multiply the whole right side by R.",
            "reader @ R · R.T @ writer · bias @ R",
        ),
        solution=turn_solution,
        cases=_turn_cases,
        edges=_turn_edges,
        slips={
            "The reader turns the wrong way: (x R)(W R)ᵀ = x R Rᵀ Wᵀ.": ("reader @ rotation", "reader @ rotation.T"),
            "The writer turns the wrong way: its outputs are z Wᵀ, and z (Rᵀ W)ᵀ = z Wᵀ R.": (
                "rotation.T @ writer", "rotation @ writer"
            ),
            "The bias is a part of the output: it turns as well.": ("bias @ rotation", "bias"),
            "The bias turns as the output does, b R.": ("bias @ rotation", "bias @ rotation.T"),
            "Reader and writer are both turned the wrong way round.": (
                "reader @ rotation", "reader @ rotation.T", "rotation.T @ writer", "rotation @ writer"
            ),
            "The reader has not been turned.": ("reader @ rotation", "reader"),
            "The writer has not been turned.": ("rotation.T @ writer", "writer"),
        },
    ),
    "17.4": Exercise(
        "where rotating hurts",
        hints=(
            "Compare two errors for each layer, that of x and that of x @ rotation.",
            "rounding_error(x, bits=bits) is one of them; a quotient tells growth, whatever the size of x.",
            "Collect after / before by name; max(ratios, key=ratios.get) is the name.",
        ),
        solution=hurt_solution,
        cases=_hurt_cases,
        slips={
            "This layer gains most. Where does the error grow?": ("max(ratios", "min(ratios"),
            "This is before over after: a number above 1 would then be a gain.": (
                "(rounding_error(x @ rotation, bits=bits) / rounding_error(x, bits=bits))",
                "(rounding_error(x, bits=bits) / rounding_error(x @ rotation, bits=bits))",
            ),
            "This is the error after the rotation. To say that it hurts, compare it with the error before.": (
                " / rounding_error(x, bits=bits)", ""
            ),
            "A difference favours layers whose errors are large anyway; give after over before.": (
                "bits=bits) / rounding", "bits=bits) - rounding"
            ),
            "Turn the rows of x: x @ rotation, not its transpose.": ("x @ rotation", "x @ rotation.T"),
            "Not always 4 bits: use the argument.": (
                "(x @ rotation, bits=bits) / rounding_error(x, bits=bits)",
                "(x @ rotation, bits=4) / rounding_error(x, bits=4)",
            ),
        },
    ),
}  # fmt: skip
