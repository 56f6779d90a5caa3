"""Exercises of chapter 11: AWQ."""

import torch

from quantlab.awq import awq_search, keep_columns, scale_and_round
from quantlab.exercises.material import layer_with_peaks, planted_layer, whole
from quantlab.granularity import PerGroup, quantize_tensor
from quantlab.hessian import Hessian
from quantlab.judging import Exercise, as_tensor, expect


def keep_solution(weight, rounded, x, share):
    """The columns whose inputs are largest on average, as they were; the others rounded."""
    count = max(1, round(share * weight.shape[1]))
    mixed, loudest = rounded.clone(), x.abs().mean(0).topk(count).indices
    mixed[:, loudest] = weight[:, loudest]
    return mixed


def _keep_cases(random):
    for out, inside, share in ((24, 20, 0.1), (30, 17, 0.28), (26, 25, 0.01), (40, 31, 0.15)):
        yield *_keep_layer(random, out, inside), share


def _keep_layer(random, out, inside):
    """(weight, rounded, x): loud channels, and five channels that are loud by another measure than mean |x|."""
    weight = torch.randn(out, inside, generator=random) * 0.05
    x = torch.randn(out + 70, inside, generator=random) * torch.exp(0.5 * torch.randn(inside, generator=random))
    first, off, peak, rare, silent, heavy = torch.randperm(inside, generator=random)[:6].tolist()
    x[:, first] *= 20.0
    x[:, off] = 2.5 + 0.1 * x[:, off].tanh()  # always of one sign
    x[7, peak] = 900.0
    x[:, rare] = torch.where(torch.arange(len(x)) % 9 == 0, 17.0, 0.0)  # a large mean square
    x[:, silent] = 0.0
    weight[:, heavy] *= 20.0
    rounded = quantize_tensor(weight, bits=3, granularity=PerGroup(inside), symmetric=False).dequantize()
    return weight, rounded, x


def scaling_solution(weight, s, bits, group_size):
    """Multiply the columns, round, divide them back."""
    q = quantize_tensor(weight * s, bits=bits, granularity=PerGroup(group_size), symmetric=False)
    return q.dequantize() / s


def _scaling_cases(random):
    """As many rows as columns, which mix up; then others."""
    for out, inside, bits, group_size in ((16, 16, 4, 8), (16, 16, 6, 16), (24, 24, 3, 6), (10, 32, 2, 16)):
        weight = torch.randn(out, inside, generator=random) * 0.05 + 0.01
        yield weight, (0.7 * torch.randn(inside, generator=random)).exp(), bits, group_size


def search_solution(weight, x, bits, group_size):
    """Twenty-one alphas; the scales of the one with the least output error."""
    hessian, strength = Hessian(x.shape[1]).add(x), x.abs().mean(0).clamp(min=1e-6)

    def error(s):
        return hessian.output_error(weight, scale_and_round(weight, s, bits=bits, group_size=group_size).dequantize())

    return min([strength ** (i / 20) for i in range(21)], key=error)


def _search_cases(random):
    """Layers whose best alpha lies at different places, each with a silent channel, peaks, and channels used rarely."""
    for bits, group_size, spread, loud, size, planted in (
        (3, 32, 1.0, 0, 1, False), (4, 96, 0.1, 3, 100, False), (4, 48, 0.3, 6, 30, False), (4, 96, 0.3, 6, 100, True)
    ):  # fmt: skip
        weight = torch.randn(48, 96, generator=random) * 0.05
        x = torch.randn(240, 96, generator=random) * torch.exp(spread * torch.randn(96, generator=random))
        channels = torch.randperm(96, generator=random)
        x[:, channels[:loud]] *= size
        x[whole(random, 0, 240), channels[10:14]] = 60.0
        x[:, channels[20:40]] *= (torch.rand(240, 20, generator=random) < 0.4) * 2.5
        x[:, channels[50]] = 0.0
        if planted:  # what made the inputs loud has made their weights small
            weight = weight / torch.ones(96).index_fill(0, channels[:loud], float(size))
        yield weight, x, bits, group_size


def _search_rule(s, weight, x, bits, group_size):
    """At most 1.1 times the output error of the best of 21 alphas."""
    s = _checked_scales(s, weight)
    reached = _reached(weight, x, s, bits, group_size)
    plain = _reached(weight, x, torch.ones_like(s), bits, group_size)
    smallest = _reached(weight, x, search_solution(weight, x, bits, group_size), bits, group_size)
    where = f"At {bits} bits, groups of {group_size}, the output error is"
    expect(
        reached <= 1.0001 * plain,
        f"{where} {reached / plain:.2f} times round-to-nearest's. alpha = 0 is among the candidates, so the best one "
        "is never worse.",
    )
    expect(
        reached <= 1.1 * smallest,
        f"{where} {reached / smallest:.3f} times the least of 21 alphas, at most 1.1 was asked for. "
        "Judge each alpha by the error of the output on x, with the bits and groups that you are given.",
    )
    return f"Output error {reached / plain:.2f} times round-to-nearest's in the last case."


def _checked_scales(s, weight):
    s = as_tensor(s)
    expect(
        s is not None and s.shape == weight.shape[1:],
        f"Return the scales s, one for each input channel, ({weight.shape[1]},).",
    )
    expect(
        bool(torch.isfinite(s).all() and (s > 0).all()),
        "s must be finite and above 0 in every channel, also in one that is silent: we multiply and divide by it.",
    )
    return s.float()


def _reached(weight, x, s, bits, group_size):
    """The output error with the input scales s, of that of an output of zeros."""
    rounded = scale_and_round(weight, s, bits=bits, group_size=group_size).dequantize()
    return ((x @ (weight - rounded).T).square().sum() / (x @ weight.T).square().sum()).item()


def columns_solution(weight, x):
    """Size of the input times error of the weight, column by column."""
    lost = weight - keep_columns(weight, [], bits=4).dequantize()
    return (x.square().mean(0) * lost.square().sum(0)).topk(4).indices.tolist()


def _columns_cases(random):
    """Layers whose channels lie elsewhere each time, and fresh inputs of the same kind."""
    for _ in range(2):
        weight, x = layer_with_peaks(whole(random, 0, 1000))
        yield weight, x[:1500], x[1500:]


def _use_columns(answer, weight, x, fresh):
    return answer(weight, x)


def _columns_rule(columns, weight, x, fresh):
    """A third of the error on inputs that were not seen, within the bits."""
    columns = list(columns) if isinstance(columns, range | set) else columns
    numbers = torch.zeros(0) if columns == [] else as_tensor(columns)
    expect(
        numbers is not None and bool((numbers == numbers.round()).all()), "Return a list of columns, whole numbers."
    )
    chosen = sorted({int(c) for c in numbers.flatten().tolist()})
    inside = weight.shape[1]
    expect(all(-1 < c < inside for c in chosen), f"Columns are numbers from 0 to {inside - 1}; got {chosen[-3:]}.")
    mixed, hessian = keep_columns(weight, chosen, bits=4), Hessian(inside).add(fresh)
    plain = hessian.output_error(weight, keep_columns(weight, [], bits=4).dequantize())
    error, bits = hessian.output_error(weight, mixed.dequantize()), mixed.bits_per_element
    expect(
        bits <= 4.55,
        f"{bits:.3f} bits for each weight, at most 4.55 were allowed: {len(chosen)} columns are too many.",
    )
    expect(
        error <= plain / 3,
        f"On fresh inputs the output error is {error / plain:.3f} times that of keeping none; at most a third was "
        "asked for. Is a column worth keeping if its inputs are loud, but its weights lose nothing?",
    )
    return f"Output error {error / plain:.2f} times that of keeping none on fresh inputs, at {bits:.2f} bits."


def better_solution(weight, x, bits, group_size):
    """SmoothQuant's formula has the weights in it; search its alpha as AWQ does."""
    of_x, of_w = x.abs().mean(0).clamp(min=1e-6), weight.abs().mean(0).clamp(min=1e-6)
    hessian = Hessian(x.shape[1]).add(x)

    def error(s):
        return hessian.output_error(weight, scale_and_round(weight, s, bits=bits, group_size=group_size).dequantize())

    return min([of_x ** (i / 20) / of_w ** (1 - i / 20) for i in range(21)], key=error)


def _better_cases(random):
    for bits in (4, 3):
        weight, x = planted_layer(whole(random, 0, 1000))
        yield weight, x[:400], bits, 128, x[400:]


def _use_better(answer, weight, x, bits, group_size, fresh):
    return answer(weight, x, bits, group_size)


def _better_rule(s, weight, x, bits, group_size, fresh):
    """Beside AWQ's search on the same inputs, on inputs that neither has seen."""
    s = _checked_scales(s, weight)
    of_awq = awq_search(weight, x, bits=bits, group_size=group_size)[1].input_scale
    ratio = _reached(weight, fresh, s, bits, group_size) / _reached(weight, fresh, of_awq, bits, group_size)
    expect(
        ratio <= 0.85,
        f"{bits} bits: on fresh inputs the output error is {ratio:.3f} times that of AWQ's search; at most 0.85 was "
        "asked for. Which columns does the rounding hurt: what are their weights like, next to others of their group?",
    )
    return f"Output error {ratio:.2f} times that of AWQ's search at {bits} bits, on fresh inputs."


LOUDNESS, COUNT = "x.abs().mean(0)", "round(share * weight.shape[1])"

EXERCISES = {
    "11.1": Exercise(
        "keep the loudest columns",
        hints=(
            "Three steps: how many columns, which ones, and a copy of `rounded` in which they are replaced.",
            "x.abs().mean(0) is one number a channel; .topk(count).indices are the channels with the largest.",
            "mixed = rounded.clone(); mixed[:, loudest] = weight[:, loudest]; max(1, round(share * columns)) of them.",
        ),
        solution=keep_solution,
        cases=_keep_cases,
        slips={
            "These are the columns with the largest *weights*; their inputs were asked for.": (
                LOUDNESS, "weight.norm(dim=0)"
            ),
            "These are the columns with the largest mean *weights*; their inputs were asked for.": (
                LOUDNESS, "weight.abs().mean(0)"
            ),
            "These are the columns that lose most in rounding; the loudest inputs were asked for.": (
                LOUDNESS, "(weight - rounded).norm(dim=0)"
            ),
            "A channel that swings around 0 is loud as well: take |x| before the mean.": (LOUDNESS, "x.mean(0).abs()"),
            "The mean of x, without |x|, is no loudness.": (LOUDNESS, "x.mean(0)"),
            "One single token made a channel loud: take the mean over the tokens, not the largest.": (
                LOUDNESS, "x.abs().amax(0)"
            ),
            "The mean of |x| was asked for, not of its square.": (LOUDNESS, "x.square().mean(0)"),
            "The mean of |x| was asked for, not its median.": (LOUDNESS, "x.abs().median(0).values"),
            "These are the quietest channels: topk takes the largest, argsort begins with the smallest.": (
                "topk(count)", "topk(count, largest=False)"
            ),
            "An input channel is a whole column of the weight, not a row: all outputs read it.": (
                "mixed[:, loudest] = weight[:, loudest]", "mixed[loudest] = weight[loudest]"
            ),
            "At least one column stays in float.": ("max(1, round(share * weight.shape[1]))", COUNT),
            "The share is one of the columns, not of the rows.": ("weight.shape[1]", "weight.shape[0]"),
            "round(share * in) of them: int() cuts off.": (COUNT, "int(share * weight.shape[1])"),
            "The other way round: the loudest columns stay in float, the others are rounded.": (
                "rounded.clone()", "weight.clone()", "= weight[:, loudest]", "= rounded[:, loudest]"
            ),
            "The columns that are not kept are rounded, not 0.": ("rounded.clone()", "torch.zeros_like(rounded)"),
            "Nothing was kept: this is `rounded`.": ("mixed[:, loudest] = weight[:, loudest]", "pass"),
        },
    ),
    "11.2": Exercise(
        "round a scaled weight",
        hints=(
            "Multiply, round, divide: in this order, and by the same s.",
            "weight * s multiplies column j by s[j], because the last dimension of weight is the input.",
            "quantize_tensor(weight * s, bits=bits, granularity=PerGroup(group_size), symmetric=False), "
            "dequantized, over s.",
        ),
        solution=scaling_solution,
        cases=_scaling_cases,
        slips={
            "This is plain rounding to nearest: s has had no effect. One s for a whole row changes none of its codes: "
            "s belongs to the columns, s[j] multiplies weight[:, j].": ("weight * s", "weight", " / s", ""),
            "Multiplied and rounded, but not divided back: the layer would compute something else.": (" / s", ""),
            "Divided by s, but not multiplied before the rounding.": ("weight * s", "weight"),
            "The wrong way round: multiply before the rounding, so that a large s makes the error smaller.": (
                "q.dequantize() / s", "q.dequantize() * s", "weight * s", "weight / s"
            ),
            "Divided by s twice.": ("/ s", "/ s / s"),
            "Multiplied by s twice, and divided by nothing.": ("/ s", "* s"),
            "One scale for a whole row is too coarse: use groups of group_size.": (
                "PerGroup(group_size)", "PerGroup(weight.shape[1])"
            ),
            "Use the group_size that is given, not always 8.": ("PerGroup(group_size)", "PerGroup(8)"),
            "As `nearest` does: an asymmetric grid, symmetric=False.": ("symmetric=False", "symmetric=True"),
            "Use the bits that are given, not always 4.": ("bits=bits", "bits=4"),
            "The weight was not rounded at all.": ("q.dequantize() / s", "weight"),
        },
    ),
    "11.3": Exercise(
        "search alpha",
        hints=(
            "Write the output error of one s first, with the round trip of 11.2. Then try many.",
            "s = strength**alpha for alpha in torch.linspace(0, 1, 21); what is 0**alpha, and what is 1/0?",
            "Clamp the strength to a tiny number; then min(candidates, key=error), where error rounds with s and "
            "compares x @ w_hat.T with x @ weight.T.",
        ),
        solution=search_solution,
        cases=_search_cases,
        rule=_search_rule,
    ),
    "11.4": Exercise(
        "which columns",
        hints=(
            "What does column j add to the output error when it is rounded? Two things of it multiply.",
            "The size of the input, x.square().mean(0), and what the rounding of the column lost.",
            "keep_columns(weight, [], bits=4).dequantize() is the rounded weight; take the columns with the largest "
            "x.square().mean(0) * (weight - rounded).square().sum(0).",
        ),
        solution=columns_solution,
        cases=_columns_cases,
        rule=_columns_rule,
        use=_use_columns,
    ),
    "11.5": Exercise(
        "better scales",
        hints=(
            "AWQ's s knows the inputs only. Print weight.abs().mean(0): do the columns differ?",
            "A column of small weights can be multiplied far before it reaches the largest of its group. Notebook "
            "09 had a formula with both sides in it.",
            "s = mean|x|**alpha / mean|w|**(1 - alpha), and search alpha as in 11.3.",
        ),
        solution=better_solution,
        cases=_better_cases,
        rule=_better_rule,
        use=_use_better,
        rounds=2,
    ),
}  # fmt: skip
