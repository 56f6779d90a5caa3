"""Exercises of chapter 9: outliers."""

from functools import cache

import torch

from quantlab.affine import choose_qparams, fake_quantize
from quantlab.exercises.material import layer_with_outliers, off_ties, uniform
from quantlab.granularity import PerAxis, quantize_tensor
from quantlab.judging import Exercise, as_number, as_tensor, expect, shown
from quantlab.outliers import LLMInt8Linear


def plant_solution(gain, weights, channels, factor):
    """The channels of the gain up, the same columns of every reader down."""
    stretch = torch.ones_like(gain)
    stretch[channels] = factor
    return gain * stretch, [weight / stretch for weight in weights]


def _plant_cases(random):
    """One reader, two or three; a square one among them, so that rows and columns mix up."""
    for width, rows in ((8, (5, 8, 3)), (6, (6,)), (9, (4, 9))):
        gain = torch.rand(width, generator=random) + 0.5
        channels = torch.randperm(width, generator=random)[:2].tolist()
        weights = [torch.randn(count, width, generator=random) for count in rows]
        yield gain, weights, channels, uniform(random, 2.0, 100.0)


def split_solution(x, weight, threshold):
    """Outlier columns in float; of the others, each token and each row to -127..127 by its own largest magnitude."""
    outliers = (x.abs() >= threshold).any(0)
    ordinary = x.masked_fill(outliers, 0.0)
    x_scale = (ordinary.abs().amax(1, keepdim=True) / 127).clamp(min=1e-30)
    w_scale = (weight.abs().amax(1, keepdim=True) / 127).clamp(min=1e-30)
    sums = torch.round(ordinary / x_scale) @ torch.round(weight / w_scale).T
    return sums * x_scale * w_scale.T + x[:, outliers] @ weight[:, outliers].T


def _off_ties_rows(random, rows: int, columns: int):
    """Rows in units of their scales, no value near a tie, and ±127 in column 0."""
    codes = off_ties(random, rows * columns, -110, 110).view(rows, columns)
    codes[:, 0] = 127.0 * (-1.0) ** torch.randint(2, (rows,), generator=random)
    return codes


def _split_cases(random):
    """Outliers of both signs, in most tokens, and in a single one.

    Column 0, which is no outlier, holds the largest |value| of each row of the weight and of the ordinary part of x:
    so it plays no part whether the scale of a row of weights is read off all columns or the ordinary ones.
    """
    for tokens, outputs, features, threshold in ((20, 7, 12, 6.0), (8, 8, 8, 3.0), (5, 4, 9, 20.0)):
        x = _off_ties_rows(random, tokens, features) * (
            threshold * (0.2 + 0.7 * torch.rand(tokens, 1, generator=random)) / 127
        )
        loud = torch.randperm(features - 1, generator=random)[:3] + 1
        x[:, loud[0]] = -threshold * (1 + 3 * torch.rand(tokens, generator=random))
        x[-1, loud[1]] = 2 * threshold
        x[0, loud[2]] = -1.1 * threshold
        weight = _off_ties_rows(random, outputs, features) * (0.001 + 0.01 * torch.rand(outputs, 1, generator=random))
        yield x, weight, threshold


def _split_edges():
    """An ordinary value; one that reaches the threshold exactly; nothing but outliers; none at all."""
    random = torch.Generator().manual_seed(1)
    weight = _off_ties_rows(random, 4, 5) * 0.01
    x = _off_ties_rows(random, 3, 5) * torch.tensor([[0.04], [0.01], [0.02]])
    x[1, 3] = 6.0
    yield x, weight, 6.0
    yield torch.tensor([[0.0, 9.0, 0.0, 0.0, -7.0], [0.0, 0.0, 0.0, 0.0, 30.0]]), weight, 6.0
    yield x, weight, 1e9


def smoothing_solution(largest_x, largest_w, alpha):
    """Silent channels and unused columns keep their scale."""
    s = largest_x**alpha / largest_w ** (1 - alpha)
    return torch.where((largest_x > 0) & (largest_w > 0), s, torch.ones_like(s))


def _smoothing_cases(random):
    for count, alpha in ((3, 0.5), (5, 0.8), (7, uniform(random, 0.1, 0.9))):
        yield *(10 ** (3 * torch.rand(2, count, generator=random) - 1)), alpha


def _smoothing_edges():
    x, w = torch.tensor([4.0, 64.0, 0.5]), torch.tensor([1.0, 0.25, 2.0])
    yield x, w, 0.5
    yield x, w, 1.0
    yield x, w, 0.0
    yield torch.tensor([0.0, 3.0, 2.0, 0.0]), torch.tensor([1.0, 0.0, 2.0, 0.0]), 0.5


def _any_harmless(answer, largest_x, largest_w, alpha):
    """What the answer gives, with 1 for a channel where one side is 0 and s is finite and above 0: any will do."""
    s = answer(largest_x, largest_w, alpha)
    values = as_tensor(s)
    if values is None or values.shape != largest_x.shape:
        return s
    harmless = ((largest_x == 0) | (largest_w == 0)) & values.isfinite() & (values > 0)
    return torch.where(harmless, 1.0, values)


def threshold_solution():
    """Above the ordinary channels, below the smallest outlier channel: 4 columns in float."""
    return 12.0


def _threshold_rule(answer):
    threshold = as_number(answer)
    expect(threshold is not None and threshold > 0, f"Return a positive number; got {shown(answer)}.")
    layer, x = layer_with_outliers()
    share, error, goal = _split_result(layer, x, float(threshold))
    expect(
        share <= 0.05,
        f"{share:.1%} of the columns go to float, at most 5 % were allowed. Which channels are in there, and how "
        "large are the ones that need not be?",
    )
    expect(
        error <= goal,
        f"Output error {error:.2e}, at most {goal:.2e} was asked for: a column that sets the step of whole tokens is "
        "still in the integers. Look at the largest |x| of each channel.",
    )
    return f"Output error {error:.2e} with {share:.1%} of the columns in float."


def _split_result(layer, x, threshold):
    """(share of columns in float, output error, the goal: a twentieth more than what the paper's 6.0 reaches)."""
    y, errors = x @ layer.weight.T, []
    for t in (threshold, 6.0):
        split = LLMInt8Linear.from_linear(layer, threshold=t)
        errors.append(_relative(split.simulate(x), y))
    share = LLMInt8Linear.from_linear(layer, threshold=threshold).outlier_columns(x).float().mean().item()
    return share, errors[0], 1.05 * errors[1]


def alpha_solution(weight, x, weight_bits, activation_bits):
    """Try 21 of them and keep the one with the least output error."""

    def output_error(alpha):
        s = smoothing_solution(x.abs().amax(0), weight.abs().amax(0), alpha)
        w_hat = quantize_tensor(weight * s, bits=weight_bits, granularity=PerAxis(0)).dequantize()
        qp = choose_qparams(*torch.aminmax(x / s), qmin=0, qmax=2**activation_bits - 1)
        return (fake_quantize(x / s, qp) @ w_hat.T - x @ weight.T).square().sum().item()

    return min(torch.linspace(0, 1, 21).tolist(), key=output_error)


@cache
def _alpha_layers() -> list[tuple]:
    """Layers whose best alpha lies at very different places."""
    random = torch.Generator().manual_seed(5)
    x = torch.randn(200, 64, generator=random)
    weight = torch.randn(48, 64, generator=random) * 0.1
    loud, heavy = x.clone(), weight.clone()
    loud[:, [3, 30, 50]] *= 30.0
    heavy[:, [8, 20]] *= 40.0  # here the weight is the harder side
    return [(weight, loud, 8, 8), (weight, loud, 4, 8), (heavy, x / x.abs().amax(0), 4, 8), (weight, loud, 8, 4)]


@cache
def _least_alpha_error(i: int) -> float:
    layer = _alpha_layers()[i]
    return _alpha_error(*layer, alpha_solution(*layer))


def _alpha_cases(_random):
    """The same layers in every call: what is asked for is reached, or not."""
    yield from _alpha_layers()


def _alpha_rule(answer, weight, x, weight_bits, activation_bits):
    alpha, case = as_number(answer), f"W{weight_bits}A{activation_bits}"
    expect(alpha is not None and 0 <= alpha <= 1, f"Return an alpha in 0..1; got {shown(answer)}.")
    given = (weight, x, weight_bits, activation_bits)
    layer = next(i for i, other in enumerate(_alpha_layers()) if other[2:] == given[2:] and torch.equal(other[1], x))
    ratio = _alpha_error(*given, float(alpha)) / _least_alpha_error(layer)
    expect(
        ratio <= 1.1,
        f"{case}: alpha {alpha:.2f} gives {ratio:.2f} times the least output error; at most 1.10 times "
        "was asked for. Measure the output of the rounded layer, with both sides at the bits you are given.",
    )
    return f"The last of the layers, {case}: alpha {alpha:.2f}."


def _alpha_error(weight, x, weight_bits, activation_bits, alpha):
    """Output error with a scale for each row of the weight and one for the whole input."""
    s = smoothing_solution(x.abs().amax(0), weight.abs().amax(0), alpha)
    w_hat = quantize_tensor(weight * s, bits=weight_bits, granularity=PerAxis(0)).dequantize()
    qp = choose_qparams(*torch.aminmax(x / s), qmin=0, qmax=2**activation_bits - 1)
    return _relative(fake_quantize(x / s, qp) @ w_hat.T, x @ weight.T)


def _relative(y_hat, y):
    return ((y_hat - y).square().sum() / y.square().sum()).item()


EXERCISES = {
    "9.1": Exercise(
        "plant outliers",
        hints=(
            "The input of the readers is (x / rms) · gain. What happens to channel j of it, and what must undo that?",
            "A tensor of ones with `factor` at the channels is all you need: one product, and one quotient a reader.",
            "stretch = torch.ones_like(gain); stretch[channels] = factor; then gain * stretch and weight / stretch.",
        ),
        solution=plant_solution,
        cases=_plant_cases,
        slips={
            "The weights must undo what the gain does: divide by the factor.": ("weight / stretch", "weight * stretch"),
            "The weights must undo what the gain does; yours are as they were.": ("weight / stretch", "weight"),
            "The gain is to grow, and the weights to shrink.": (
                "gain * stretch", "gain / stretch", "weight / stretch", "weight * stretch"
            ),
            "The gain is to grow: yours is as it was.": ("gain * stretch", "gain"),
            "Every layer that reads this norm must be divided, not the first alone.": (
                "[weight / stretch for weight in weights]", "[weights[0] / stretch, *weights[1:]]"
            ),
            "All the readers were asked for; you gave one back.": (
                "[weight / stretch for weight in weights]", "[weights[0] / stretch]"
            ),
            "Column j of the weight meets channel j of the input: yours are rows.": (
                "[weight / stretch for weight in weights]",
                "[weight / torch.cat([stretch, stretch])[: len(weight), None] for weight in weights]",
            ),
            "Only the chosen channels change: the others keep gain and columns.": ("stretch[channels] = factor",
                "stretch[:] = factor"),
            "The gain's other channels keep their size; you have multiplied all of them.": (
                "gain * stretch", "gain * factor"
            ),
            "The weights' other columns keep their size; you have divided all of them.": (
                "weight / stretch", "weight / factor"
            ),
            "The factor is multiplied onto the gain; it does not replace it.": (
                "return gain * stretch", "gain = gain.clone()\n    gain[channels] = factor\n    return gain"
            ),
        },
    ),
    "9.2": Exercise(
        "the LLM.int8() split",
        hints=(
            "First find the columns: (x.abs() >= threshold).any(0). Then two products, one for each kind, and a sum.",
            "x.masked_fill(outliers, 0.0) leaves the ordinary columns; the largest |value| of each row sets its scale.",
            "(round(ordinary / x_scale) @ round(weight / w_scale).T) * x_scale * w_scale.T + x[:, outliers] @ ...; "
            "clamp the scales to a tiny number, lest one is 0.",
        ),
        solution=split_solution,
        cases=_split_cases,
        edges=_split_edges,
        tolerance=2e-5,
        slips={
            "That is the float product: the ordinary columns must go through 8-bit codes.": (
                "return sums * x_scale * w_scale.T + x[:, outliers] @ weight[:, outliers].T", "return x @ weight.T"
            ),
            "Everything goes through 8-bit codes: the outlier columns belong to a second product, of floats.": (
                "outliers = (x.abs() >= threshold).any(0)", "outliers = (x.abs() >= 1e12).any(0)"
            ),
            "The product of the outlier columns is missing.": (
                " + x[:, outliers] @ weight[:, outliers].T", ""
            ),
            "Outliers may be negative: |x| >= threshold.": ("x.abs() >=", "x >="),
            "A value that reaches the threshold counts: >=, not >.": (">= threshold", "> threshold"),
            "A column counts as soon as any token reaches the threshold, not if all do.": (".any(0)", ".all(0)"),
            "A column goes to float as a whole: not single values of it.": (
                "outliers = (x.abs() >= threshold).any(0)", "outliers = x.abs() >= threshold",
                "x[:, outliers] @ weight[:, outliers].T", "(x * outliers) @ weight.T",
            ),
            "Columns go to float, not tokens.": (
                "outliers = (x.abs() >= threshold).any(0)", "outliers = (x.abs() >= threshold).any(1, keepdim=True)",
                "x[:, outliers] @ weight[:, outliers].T", "(x * outliers) @ weight.T",
            ),
            "The outlier columns count twice: they must be gone from the part that is quantized.": (
                "sums = torch.round(ordinary / x_scale)", "sums = torch.round(x / x_scale)"
            ),
            "A token's scale is its largest *ordinary* |value| / 127; with outliers in it the split is for nothing.": (
                "x_scale = (ordinary.abs()", "x_scale = (x.abs()"
            ),
            "Each token needs a scale of its own; yours is one for all.": (
                "ordinary.abs().amax(1, keepdim=True)", "ordinary.abs().max()"
            ),
            "Each row of the weight needs a scale of its own; yours is one for all.": (
                "(weight.abs().amax(1, keepdim=True) / 127).clamp(min=1e-30)",
                "(weight.abs().max() / 127).expand(len(weight), 1)",
            ),
            "The weight must be rounded, too: int8 times int8.": (
                "torch.round(weight / w_scale)", "(weight / w_scale)"
            ),
            "The inputs must be rounded, too: int8 times int8.": (
                "torch.round(ordinary / x_scale)", "(ordinary / x_scale)"
            ),
            "A token without ordinary values has scale 0, and 0/0 is NaN: keep scales above a tiny number.": (
                ".clamp(min=1e-30)", ""
            ),
            "The threshold is given: is 6.0 written in?": (">= threshold", ">= 6.0"),
            "The columns of W that meet outliers must be floats as well.": (
                "weight[:, outliers].T", "(torch.round(weight / w_scale) * w_scale)[:, outliers].T"
            ),
        },
    ),
    "9.3": Exercise(
        "SmoothQuant's scales",
        hints=(
            "Equation (2), channel by channel; tensors do that without a loop.",
            "largest_x**alpha / largest_w ** (1 - alpha). What comes out where one of them is 0?",
            "torch.where((largest_x > 0) & (largest_w > 0), s, torch.ones_like(s))",
        ),
        solution=smoothing_solution,
        cases=_smoothing_cases,
        edges=_smoothing_edges,
        use=_any_harmless,
        slips={
            "That is 1/s. The inputs are divided by s: a loud channel needs a large one.": (
                "largest_x**alpha / largest_w ** (1 - alpha)", "largest_w ** (1 - alpha) / largest_x**alpha"
            ),
            "alpha the wrong way round: at alpha = 1 all the difficulty should leave the inputs.": (
                "largest_x**alpha / largest_w ** (1 - alpha)", "largest_x ** (1 - alpha) / largest_w**alpha"
            ),
            "A large weight needs a small s: divide by its power.": ("/ largest_w", "* largest_w"),
            "The weights have a say as well: equation (2) has alpha above and 1 − alpha below.": (
                " / largest_w ** (1 - alpha)", ""
            ),
            "Equation (2) has alpha above and 1 − alpha below; yours has alpha twice.": ("(1 - alpha)", "alpha"),
            "alpha is given: is 0.5 written in?": ("**alpha", "**0.5", "(1 - alpha)", "0.5"),
            "A silent channel or an unused column gives 0 or infinity. We divide and multiply by s: finite, above 0.": (
                "torch.where((largest_x > 0) & (largest_w > 0), s, torch.ones_like(s))", "s"
            ),
            "An unused column gives infinity (0/0: not a number); a silent channel still gives 0.": (
                "torch.where((largest_x > 0) & (largest_w > 0), s, torch.ones_like(s))",
                "torch.nan_to_num(s, nan=1.0, posinf=1.0)",
            ),
        },
    ),
    "9.4": Exercise(
        "fit the threshold",
        hints=(
            "What is the largest |x| of each channel? x.abs().amax(0).sort().values shows the gap.",
            "6.0 is a number for other models: here ordinary channels reach beyond it.",
            "The ordinary channels end below 10; the smallest outlier channel reaches about 40.",
        ),
        solution=threshold_solution,
        rule=_threshold_rule,
        edges=lambda: [()],
    ),
    "9.5": Exercise(
        "search alpha",
        hints=(
            "Write the output error of one alpha first: smooth, round both sides, multiply, compare with x @ weight.T.",
            "Bits and scales as asked: quantize_tensor(weight * s, ...), fake_quantize(x / s, choose_qparams(...)).",
            "Try torch.linspace(0, 1, 21) and keep the alpha with the least error: min(alphas, key=error).",
        ),
        solution=alpha_solution,
        cases=_alpha_cases,
        rule=_alpha_rule,
        rounds=1,
    ),
}  # fmt: skip
