"""Exercises of chapter 10: GPTQ."""

import torch

from quantlab.exercises.material import layer_with_hessian, off_ties, uniform, whole
from quantlab.gptq import gptq_quantize
from quantlab.granularity import PerAxis, quantize_tensor
from quantlab.judging import Exercise, as_number, expect, shown


def output_error_solution(weight, weight_hat, x):
    """The error that the next layer sees: of the outputs, relative to the outputs."""
    return ((x @ (weight - weight_hat).T).square().sum() / (x @ weight.T).square().sum()).item()


def _output_error_cases(random):
    """Weights and inputs of any size, errors of any size, inputs that are correlated; one of them square."""
    for rows, columns, tokens in ((6, 8, 20), (5, 5, 5), (3, 7, 4)):
        x = torch.randn(tokens, columns, generator=random) @ torch.randn(columns, columns, generator=random)
        weight = uniform(random, 0.1, 10) * torch.randn(rows, columns, generator=random)
        error = uniform(random, 0.05, 1.0) * torch.randn(rows, columns, generator=random)
        yield weight, weight + error, uniform(random, 0.1, 10) * x


def _output_error_edges():
    """Equal weights have no error; and an error that no input sees is none."""
    weight, x = torch.tensor([[1.0, 2.0], [3.0, -4.0]]), torch.tensor([[1.0, 0.0], [2.0, 0.0], [-1.0, 0.0]])
    yield weight, weight.clone(), x + 1
    yield weight, weight + torch.tensor([0.0, 1.0]), x


def compensate_solution(w, H, i, q):
    """The error of weight i, spread over the others so that the output changes least (OBS, eq. 2 of the notebook)."""
    inverse = torch.linalg.inv(H)
    return w - (w[i] - q) / inverse[i, i] * inverse[:, i]


def _correlations(random, count: int, *, alone: float = 1.0):
    """An H of correlated inputs, with an inverse: three things in common, and of each input a part of its own."""
    common = torch.randn(3 * count, 3, generator=random) @ torch.randn(3, count, generator=random)
    return common.T @ common / len(common) + alone * torch.eye(count)


def _compensate_cases(random):
    """q is some point of the grid, not always the nearest one."""
    for count in (3, 5, 4):
        w, i = 4 * torch.rand(count, generator=random), whole(random, 0, count)
        yield w, _correlations(random, count), i, float(torch.randint(6, (1,), generator=random))


def _compensate_edges():
    w, H = torch.tensor([0.4, 1.4, 2.6]), torch.tensor([[4.0, 2.0, 0.0], [2.0, 2.0, 0.5], [0.0, 0.5, 1.0]])
    for i, q in ((0, 0.0), (1, 1.0), (2, 2.0)):
        yield w, H, i, q
    yield w, torch.diag(torch.tensor([1.0, 2.0, 5.0])), 1, 1.0  # independent inputs: nobody can help


def column_solution(W, U, scale):
    """Round column i, then give its error, divided by U_ii, to the columns that are still to come."""
    W, Q = W.clone(), torch.zeros_like(W)
    for i in range(W.shape[1]):
        Q[:, i] = scale * torch.round(W[:, i] / scale)
        error = (W[:, i] - Q[:, i]) / U[i, i]
        W[:, i + 1 :] -= error[:, None] * U[i, i + 1 :]
    return Q


def _column_cases(random):
    """W is made backwards, from moved columns that lie far from ties; one of them is square."""
    for rows, columns in ((6, 4), (5, 5), (2, 8)):
        scale = uniform(random, 0.05, 2)
        U = torch.linalg.cholesky(torch.linalg.inv(_correlations(random, columns, alone=0.1)), upper=True)
        moved = off_ties(random, rows * columns, -7, 7).view(rows, columns)
        errors = (moved - moved.round()) / U.diagonal()
        yield scale * (moved + errors @ U.triu(1)), U, scale


def settings_solution():
    """Groups of 128 stay within the bits, and act-order gives the rest."""
    return {"bits": 4, "group_size": 128, "act_order": True}


def _settings_rule(settings):
    expect(isinstance(settings, dict), f"Return the settings as a dict, like {{'bits': 8}}; got {shown(settings)}.")
    settings = {key: value if as_number(value) is None else as_number(value) for key, value in settings.items()}
    weight, hessian = layer_with_hessian()
    _, fresh = layer_with_hessian(fresh=True)
    q = gptq_quantize(weight, hessian, **settings)
    error, bits = fresh.output_error(weight, q.dequantize()), q.bits_per_element
    plain = quantize_tensor(weight, bits=4, granularity=PerAxis(0), symmetric=False)
    goal = 0.14 * fresh.output_error(weight, plain.dequantize())
    expect(
        bits <= 4.5,
        f"{bits:.2f} bits for each weight, scales included; at most 4.50 were allowed. Larger groups need fewer.",
    )
    expect(
        error <= goal,
        f"Output error {error:.2e} on fresh tokens, at most {goal:.2e} was asked for. What else can GPTQ do at the "
        "same bits?",
    )
    return f"Output error {error:.2e} on fresh tokens, at {bits:.2f} bits."


def babai_solution(W, R, scale):
    """From the last column to the first: to each comes what those after it owe, in units of R_ii."""
    Q = torch.zeros_like(W)
    for i in reversed(range(W.shape[1])):
        owed = (W[:, i + 1 :] - Q[:, i + 1 :]) @ R[i, i + 1 :] / R[i, i]
        Q[:, i] = scale * torch.round((W[:, i] + owed) / scale)
    return Q


def _babai_cases(random):
    """W is made from moved columns that lie far from ties; one of them is square."""
    for rows, columns in ((6, 4), (5, 5), (2, 8)):
        scale = uniform(random, 0.05, 2)
        R = torch.linalg.cholesky(_correlations(random, columns, alone=0.1), upper=True)
        moved = scale * off_ties(random, rows * columns, -7, 7).view(rows, columns)
        W, Q = moved.clone(), scale * torch.round(moved / scale)
        for i in reversed(range(columns)):
            W[:, i] -= (W[:, i + 1 :] - Q[:, i + 1 :]) @ R[i, i + 1 :] / R[i, i]
        yield W, R, scale


EXERCISES = {
    "10.1": Exercise(
        "output error",
        hints=(
            "A layer's output is x @ weight.T.",
            "The error of the output is x @ (weight - weight_hat).T.",
            "(…).square().sum() of the error over (…).square().sum() of the output.",
        ),
        solution=output_error_solution,
        cases=_output_error_cases,
        edges=_output_error_edges,
        slips={
            "This is the error of the weight. The next layer sees the output, x @ weight.T.": (
                "(x @ (weight - weight_hat).T)", "(weight - weight_hat)", "(x @ weight.T)", "weight"
            ),
            "You gave the square root: the error here is a ratio of squares.": (
                "weight.T).square().sum()).item()", "weight.T).square().sum()).sqrt().item()"
            ),
            "Doubling both weights should change nothing: divide by the size of the output.": (
                " / (x @ weight.T).square().sum()", ""
            ),
            "Divide by the size of the right output, x @ weight.T, not of the rounded one.": (
                "(x @ weight.T)", "(x @ weight_hat.T)"
            ),
            "Divide by the size of the output, not of the weight.": ("(x @ weight.T)", "weight"),
            "Divide by the size of the output, not of the input.": ("(x @ weight.T)", "x"),
            "A ratio of sums: not the mean of the ratios of single outputs.": lambda weight, weight_hat, x: (
                ((x @ (weight - weight_hat).T).square() / (x @ weight.T).square()).mean().item()
            ),
            "A ratio of sums over all tokens: not the mean of each token's ratio.": lambda weight, weight_hat, x: (
                ((x @ (weight - weight_hat).T).square().sum(1) / (x @ weight.T).square().sum(1)).mean().item()
            ),
            "Squares were asked for, not absolute values.": (".square()", ".abs()"),
            "Square first, then add: errors of both signs must not cancel.": (".square().sum()", ".sum().square()"),
        },
    ),
    "10.2": Exercise(
        "compensate",
        hints=(
            "Equation (2): w − (w_i − q) / [H⁻¹]_ii · (column i of H⁻¹).",
            "torch.linalg.inv(H) is the inverse; inverse[:, i] is its column i.",
            "w - (w[i] - q) / inverse[i, i] * inverse[:, i]",
        ),
        solution=compensate_solution,
        cases=_compensate_cases,
        edges=_compensate_edges,
        slips={
            "The other weights did not move: nothing has been compensated.": lambda w, H, i, q: (
                torch.where(torch.arange(len(w)) == i, q, w)
            ),
            "Use column i of the inverse of H, not of H.": ("torch.linalg.inv(H)", "H"),
            "Divide by entry (i, i) of the inverse: weight i must land on q.": (" / inverse[i, i]", ""),
            "Is the sign right? Weight i moves by q − w_i.": ("w - (w[i]", "w + (w[i]"),
            "q is given: do not round w[i] yourself.": ("(w[i] - q)", "(w[i] - w[i].round())"),
            "Weight i must land on q; yours returns the move alone.": ("w - (w[i] - q)", "-(w[i] - q)"),
            "Each entry of the inverse, not 1 over each entry of H.": ("torch.linalg.inv(H)", "(1 / H)"),
            "H is exact here: damping is not part of equation (2).": (
                "torch.linalg.inv(H)", "torch.linalg.inv(H + 0.01 * H.diagonal().mean() * torch.eye(len(H)))"
            ),
        },
    ),
    "10.3": Exercise(
        "GPTQ column by column",
        hints=(
            "For each i: round the column, compute its error, move the columns to the right.",
            "error = (W[:, i] - Q[:, i]) / U[i, i], one number for each row.",
            "W[:, i + 1:] -= error[:, None] * U[i, i + 1:]",
        ),
        solution=column_solution,
        cases=_column_cases,
        slips={
            "This is round-to-nearest: no column has heard of the errors before it. (Row i of U, not column i?)": (
                "        W[:, i + 1 :] -= error[:, None] * U[i, i + 1 :]\n", ""
            ),
            "Which sign does the update have? By (4) the columns to the right move by −e·U.": ("-= error", "+= error"),
            "The error is divided by U[i, i] before it is passed on.": (" / U[i, i]", ""),
            "The error is divided by U[i, i] once: (4) has no square of it.": ("/ U[i, i]", "/ U[i, i] ** 2"),
            "Q holds the rounded columns; yours holds moved ones that were not rounded.": ("return Q", "return W"),
            "The error of a column is that of the moved column, not of the one that came in.": (
                "    W, Q = W.clone()", "    given = W\n    W, Q = W.clone()",
                "(W[:, i] - Q[:, i])", "(given[:, i] - Q[:, i])"
            ),
            "The last column was left out: every one of them must be.": (
                "range(W.shape[1])", "range(W.shape[1] - 1)"
            ),
            "Those are codes: multiply them by scale.": (
                "scale * torch.round(W[:, i] / scale)", "torch.round(W[:, i] / scale)"
            ),
            "The grid is the multiples of scale, not the whole numbers.": (
                "scale * torch.round(W[:, i] / scale)", "torch.round(W[:, i])"
            ),
            "The error goes to all columns to the right, not to the next one alone.": ("i + 1 :]", "i + 1 : i + 2]"),
            "Nearest means up as well as down: floor is not round.": ("torch.round", "torch.floor"),
        },
    ),
    "10.4": Exercise(
        "the nearest plane",
        hints=(
            "Line i of R·(w − q) holds columns i and later. Begin where only one is left: at the last.",
            "When the columns after i are done, line i is R_ii (w_i − q_i) plus a number. Which q_i makes it smallest?",
            "q_i = scale · round((w_i + owed) / scale), owed = Σ_{j>i} R_ij (w_j − q_j) / R_ii.",
        ),
        solution=babai_solution,
        cases=_babai_cases,
        slips={
            "Start with the last column: what the later ones owe is w − q, and their q must be known.": (
                "reversed(range(W.shape[1]))", "range(W.shape[1])"
            ),
            "This is round-to-nearest: what the later columns owe is missing. (Row i of R, not column i?)": (
                "(W[:, i] + owed)", "W[:, i]"
            ),
            "Which sign makes line i small? R_ii (w_i − q_i) is to cancel the rest.": ("+ owed", "- owed"),
            "What is owed counts in units of R_ii: divide.": (" / R[i, i]", ""),
            "Q lies on the grid: round to a multiple of scale.": (
                "scale * torch.round((W[:, i] + owed) / scale)", "W[:, i] + owed"
            ),
            "Those are codes: multiply them by scale.": ("scale * torch.round", "torch.round"),
        },
    ),
    "10.5": Exercise(
        "fit the budget",
        hints=(
            "Start from {'bits': 4}: how far is the output error from the goal?",
            "group_size gives finer scales and costs bits; act_order costs an index.",
            "At 4 bits one of the group sizes stays under 4.5 bits; add act_order=True.",
        ),
        solution=settings_solution,
        rule=_settings_rule,
        edges=lambda: [()],
    ),
}  # fmt: skip
