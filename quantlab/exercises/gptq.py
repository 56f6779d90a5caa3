"""Exercises of chapter 10: GPTQ."""

import torch

from quantlab.checks import Exercise, expect
from quantlab.exercises.material import correlated_layer, layer_with_hessian
from quantlab.gptq import gptq_quantize
from quantlab.granularity import PerAxis, quantize_tensor


def output_error_solution(weight, weight_hat, x):
    """The error that the next layer sees: of the outputs, relative to the outputs."""
    return ((x @ (weight - weight_hat).T).square().sum() / (x @ weight.T).square().sum()).item()


def _test_output_error(f):
    weight, x = correlated_layer(6, 8, 200)
    other, same = weight + 0.01, weight.clone()
    expect(
        abs(float(f(weight, same, x))) < 1e-12,
        f"Equal weights have no error; you gave {float(f(weight, same, x)):.3g}.",
    )
    mine, right = float(f(weight, other, x)), output_error_solution(weight, other, x)
    of_weight = ((weight - other).square().sum() / weight.square().sum()).item()
    expect(
        abs(mine - of_weight) > 1e-6 * of_weight,
        "This is the error of the weight. The next layer sees the output, x @ weight.T.",
    )
    expect(abs(mine - right**0.5) > 1e-4 * right, "You gave the square root: the error here is a ratio of squares.")
    expect(
        abs(f(2 * weight, 2 * other, x) - mine) < 1e-5 * abs(mine),
        "Doubling both weights should change nothing: divide by the size of the output.",
    )
    expect(abs(mine - right) < 1e-4 * right, f"Expected {right:.4g}, got {mine:.4g}. Is it ‖x(W − Ŵ)ᵀ‖² / ‖xWᵀ‖²?")


def compensate_solution(w, H, i, q):
    """The error of weight i, spread over the others so that the output changes least (OBS, eq. 2 of the notebook)."""
    inverse = torch.linalg.inv(H)
    return w - (w[i] - q) / inverse[i, i] * inverse[:, i]


def _test_compensate(f):
    H = torch.tensor([[4.0, 2.0, 0.0], [2.0, 2.0, 0.5], [0.0, 0.5, 1.0]])
    w, before = torch.tensor([0.4, 1.4, 2.6]), torch.tensor([0.4, 1.4, 2.6])
    for i, q in ((0, 0.0), (1, 1.0), (2, 3.0)):
        new = f(w, H, i, q)
        expect(torch.equal(w, before), "w itself was changed. Return a new tensor.")
        expect(torch.is_tensor(new) and new.shape == w.shape, "Return all three weights.")
        expect(
            abs(new[i] - q) < 1e-4,
            f"Weight {i} should now be exactly {q}; it is {new[i]:.4f}. Is the sign right, and did you "
            "divide by the diagonal of the inverse?",
        )
        d, right = new - w, compensate_solution(w, H, i, q)
        moved = torch.tensor([j for j in range(3) if j != i])
        expect(bool(d[moved].abs().sum() > 1e-6), "The other weights did not move: nothing has been compensated.")
        expect(
            torch.allclose(new, right, atol=1e-4),
            f"The output error is {d @ H @ d:.4f}, and {(right - w) @ H @ (right - w):.4f} "
            "can be reached. Use column i of the inverse of H, not of H.",
        )


def column_solution(W, U, scale):
    """Round column i, then give its error, divided by U_ii, to the columns that are still to come."""
    W, Q = W.clone(), torch.zeros_like(W)
    for i in range(W.shape[1]):
        Q[:, i] = scale * torch.round(W[:, i] / scale)
        error = (W[:, i] - Q[:, i]) / U[i, i]
        W[:, i + 1 :] -= error[:, None] * U[i, i + 1 :]
    return Q


def _test_column(f):
    weight, x = correlated_layer(6, 8, 200)
    weight, before = weight * 20, weight * 20
    H = 2 * x.T @ x / len(x) + 0.01 * torch.eye(8)
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    Q = f(weight, U, 0.5)
    expect(torch.equal(weight, before), "W itself was changed. Work on a copy: W = W.clone().")
    expect(torch.is_tensor(Q) and Q.shape == weight.shape, "Return Q, a matrix like W.")
    expect(
        bool(((Q / 0.5).round() * 0.5 - Q).abs().max() < 1e-4),
        "Some values are not on the grid of multiples of scale. Collect the rounded columns, not the updated ones.",
    )
    nearest = 0.5 * torch.round(weight / 0.5)
    expect(not torch.equal(Q, nearest), "This is round-to-nearest: no column has heard of the errors before it.")
    expect(torch.equal(Q[:, 0], nearest[:, 0]), "The first column has no errors before it, so it is simply rounded.")

    def error(q):
        return (x @ (weight - q).T).square().sum().item()

    expect(
        error(Q) < error(nearest),
        f"The output error is {error(Q) / error(nearest):.2f} times round-to-nearest's; it should be "
        "less. Which sign does the update have, and is the error divided by U[i, i]?",
    )
    expect(
        torch.allclose(Q, column_solution(weight, U, 0.5), atol=1e-4),
        "Better than round-to-nearest, but not what the formula gives. "
        "Divide the error by U[i, i], and use row i of U, to the right of i.",
    )


def settings_solution():
    """Groups of 128 stay within the bits, and act-order gives the rest."""
    return {"bits": 4, "group_size": 128, "act_order": True}


def _test_settings(settings):
    expect(
        isinstance(settings, dict), f"Return the settings as a dict, like {{'bits': 8}}; got {type(settings).__name__}."
    )
    weight, hessian = layer_with_hessian()
    q = gptq_quantize(weight, hessian, **settings)
    error, bits = hessian.output_error(weight, q.dequantize()), q.bits_per_element
    plain = quantize_tensor(weight, bits=4, granularity=PerAxis(0), symmetric=False)
    goal = 0.125 * hessian.output_error(weight, plain.dequantize())
    expect(
        bits <= 4.5,
        f"{bits:.2f} bits for each weight, scales included; at most 4.50 were allowed. Larger groups need fewer.",
    )
    expect(
        error <= goal,
        f"Output error {error:.2e}, at most {goal:.2e} was asked for. What else can GPTQ do at the same bits?",
    )
    return f"Output error {error:.2e} at {bits:.2f} bits."


EXERCISES = {
    "10.1": Exercise(
        "output error",
        _test_output_error,
        (
            "A layer's output is x @ weight.T.",
            "The error of the output is x @ (weight - weight_hat).T.",
            "(…).square().sum() of the error over (…).square().sum() of the output.",
        ),
        output_error_solution,
    ),
    "10.2": Exercise(
        "compensate",
        _test_compensate,
        (
            "Equation (2): w − (w_i − q) / [H⁻¹]_ii · (column i of H⁻¹).",
            "torch.linalg.inv(H) is the inverse; inverse[:, i] is its column i.",
            "w - (w[i] - q) / inverse[i, i] * inverse[:, i]",
        ),
        compensate_solution,
    ),
    "10.3": Exercise(
        "GPTQ column by column",
        _test_column,
        (
            "For each i: round the column, compute its error, move the columns to the right.",
            "error = (W[:, i] - Q[:, i]) / U[i, i], one number for each row.",
            "W[:, i + 1:] -= error[:, None] * U[i, i + 1:]",
        ),
        column_solution,
    ),
    "10.4": Exercise(
        "fit the budget",
        lambda f: _test_settings(f()),
        (
            "Start from {'bits': 4}: how far is the output error from the goal?",
            "group_size gives finer scales and costs bits; act_order costs an index.",
            "At 4 bits one of the group sizes stays under 4.5 bits; add act_order=True.",
        ),
        settings_solution,
    ),
}
