"""Exercises of chapter 11: AWQ."""

import torch

from quantlab.awq import awq_search, keep_columns, scale_and_round
from quantlab.checks import Exercise, expect
from quantlab.exercises.material import layer_with_peaks, planted_layer
from quantlab.granularity import PerAxis, PerGroup, quantize_tensor
from quantlab.hessian import Hessian


def keep_solution(weight, rounded, x, share):
    """The columns whose inputs are largest on average, as they were; the others rounded."""
    count = max(1, round(share * weight.shape[1]))
    mixed, loudest = rounded.clone(), x.abs().mean(0).topk(count).indices
    mixed[:, loudest] = weight[:, loudest]
    return mixed


def _test_keep(f):
    weight, rounded, x = _keep_data()
    before = weight.clone(), rounded.clone()
    mixed = f(weight, rounded, x, 0.1)
    expect(
        torch.equal(weight, before[0]) and torch.equal(rounded, before[1]),
        "weight or rounded was changed in place. Work on rounded.clone().",
    )
    expect(
        torch.is_tensor(mixed) and mixed.shape == weight.shape,
        f"Return the whole weight, (out, in) = {tuple(weight.shape)}.",
    )
    kept = (mixed == weight) & (mixed != rounded)
    expect(bool(((mixed == weight) | (mixed == rounded)).all()), "Some values are neither float nor rounded.")
    columns = kept.any(0).nonzero().flatten().tolist()
    expect(
        all(kept[:, c].all() for c in columns),
        f"Only parts of columns are in float (rows {kept.any(1).nonzero().flatten().tolist()[:3]} ...). An input "
        "channel is a whole column of the weight: all outputs read it.",
    )
    expect(len(columns) == 2, f"10 % of 20 columns are 2; you kept {len(columns)}. Is the share one of the columns?")
    _explain_choice(set(columns))
    small = f(weight, rounded, x, 0.01)
    count = int(((small == weight) & (small != rounded)).any(0).sum())
    expect(count == 1, f"With a share of 0.01, at least one column should stay in float; you kept {count}.")


def _explain_choice(columns):
    """Say by what the wrong columns were chosen; the traps are planted in _keep_data."""
    for trap, words in (
        ({12, 15}, "the columns with the largest *weights*"),
        ({3}, "a channel whose mean is large, where one that swings around 0 is louder: take |x| before the mean"),
        ({9}, "a channel that one single token made loud: take the mean over the tokens, not the largest"),
        ({4}, "the quietest channels: topk takes the largest, argsort begins with the smallest"),
    ):
        expect(not trap <= columns, f"You kept {words}.")
    expect(columns == {6, 17}, f"You kept columns {sorted(columns)}; by mean |x| it should be others.")


def _keep_data():
    random = torch.Generator().manual_seed(2)
    weight = torch.randn(24, 20, generator=random) * 0.05
    weight[:, [12, 15]] *= 20.0
    x = torch.randn(100, 20, generator=random)
    x[:, [6, 17]] *= 8.0
    x[:, 3] += 4.0
    x[50, 9] = 300.0
    x[:, [4, 8]] *= 0.01
    rounded = quantize_tensor(weight, bits=3, granularity=PerAxis(0), symmetric=False).dequantize()
    return weight, rounded, x


def scaling_solution(weight, s, bits, group_size):
    """Multiply the columns, round, divide them back."""
    q = quantize_tensor(weight * s, bits=bits, granularity=PerGroup(group_size), symmetric=False)
    return q.dequantize() / s


def _test_scaling(f):
    random = torch.Generator().manual_seed(4)
    weight = torch.randn(16, 16, generator=random) * 0.05  # as many rows as columns: they mix up
    s = (0.7 * torch.randn(16, generator=random)).exp()
    before = weight.clone(), s.clone()
    got = f(weight, s, 4, 8)
    expect(torch.equal(weight, before[0]) and torch.equal(s, before[1]), "weight or s was changed in place.")
    expect(
        torch.is_tensor(got) and got.shape == weight.shape,
        f"Return the weight that the layer acts with, (out, in) = {tuple(weight.shape)}.",
    )
    plain = quantize_tensor(weight, bits=4, granularity=PerGroup(8), symmetric=False).dequantize()
    right = scaling_solution(weight, s, 4, 8)
    _expect_scaled(got, weight, s, plain, right)
    ones = f(weight, torch.full((16,), 2.0), 4, 8)
    expect(
        torch.allclose(ones, plain, atol=1e-6),
        "With the same s for all columns nothing should change: every step is s times as large, and divided "
        "back. Groups of group_size, symmetric=False?",
    )
    expect(
        torch.allclose(got, right, atol=1e-6),
        f"Off by up to {(got - right).abs().max():.2g}. Is it s itself that multiplies and divides, unrounded?",
    )
    _expect_settings_used(f, weight, s)


def _expect_scaled(got, weight, s, plain, right):
    """Columns multiplied by s before the rounding, and divided by it after."""
    expect(
        not torch.allclose(got, plain),
        "This is plain rounding to nearest: s has had no effect. One s for a whole row changes none of its codes; "
        "s belongs to the columns, s[j] multiplies weight[:, j].",
    )
    expect(
        not torch.allclose(got, right * s),
        "Multiplied and rounded, but not divided back: the layer would compute something else.",
    )
    expect(
        not torch.allclose(got, scaling_solution(weight, 1 / s, 4, 8)),
        "The wrong way round: multiply before the rounding, so that a large s makes the error smaller.",
    )
    off = ((got - weight).norm() / weight.norm()).item()
    expect(off < 0.5, f"The weight is off by {off:.0%} even at 4 bits. Does each column get its own s, twice?")


def _expect_settings_used(f, weight, s):
    for bits, group_size, message in (
        (6, 8, "Right at 4 bits and not at 6: use the bits that are given."),
        (4, 16, "Right in groups of 8 and not in groups of 16: use the group_size that is given."),
    ):
        right = scaling_solution(weight, s, bits, group_size)
        expect(torch.allclose(f(weight, s, bits, group_size), right, atol=1e-6), message)


def search_solution(weight, x, bits, group_size):
    """Twenty-one alphas; the scales of the one with the least output error."""
    strength = x.abs().mean(0).clamp(min=1e-6)
    candidates = [strength ** (i / 20) for i in range(21)]
    return min(candidates, key=lambda s: _reached(weight, x, s, bits, group_size))


def _test_search(f):
    found = []
    for title, (weight, x, bits, group_size) in _search_cases().items():
        s = _checked_scales(f(weight, x, bits, group_size), weight)
        reached = _reached(weight, x, s, bits, group_size)
        plain = _reached(weight, x, torch.ones_like(s), bits, group_size)
        smallest = _reached(weight, x, search_solution(weight, x, bits, group_size), bits, group_size)
        expect(
            reached <= 1.0001 * plain,
            f"{title}: output error {reached / plain:.2f} times round-to-nearest's. alpha = 0 is among the "
            "candidates, so the best one is never worse.",
        )
        expect(
            reached <= 1.05 * smallest,
            f"{title}: output error {reached / smallest:.2f} times the least of 21 alphas, at most 1.05 was asked for. "
            "Judge each alpha by the error of the output on x, with the bits and groups that you are given.",
        )
        found.append(f"{title} {reached / plain:.2f}")
    return "Output error over round-to-nearest's: " + ", ".join(found)


def _checked_scales(s, weight):
    expect(
        torch.is_tensor(s) and s.shape == weight.shape[1:],
        f"Return the scales s, one for each input channel, ({weight.shape[1]},).",
    )
    expect(
        bool(torch.isfinite(s).all() and (s > 0).all()),
        "s must be finite and above 0 in every channel, also in one that is silent: we multiply and divide by it.",
    )
    return s


def _search_cases():
    """Layers whose best alpha lies at different places, one with a silent channel."""
    uneven, loud = _layer(1), _layer(2)
    uneven[1].mul_(torch.randn(96, generator=torch.Generator().manual_seed(8)).exp())
    loud[1][:, [5, 40, 77]] *= 100.0
    loud[1][:, 11] = 0.0
    return {
        "3 bits": (*uneven, 3, 32),
        "4 bits, three outliers, a silent channel": (*loud, 4, 96),
        "4 bits, planted outliers": (*planted_layer(), 4, 128),
    }


def _layer(seed, rows=48, columns=96, tokens=300):
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=random) * 0.05
    return weight, torch.randn(tokens, columns, generator=random)


def _reached(weight, x, s, bits, group_size):
    """The output error with the input scales s."""
    q = scale_and_round(weight, s.detach().float(), bits=bits, group_size=group_size)
    return Hessian(x.shape[1]).add(x).output_error(weight, q.dequantize())


def columns_solution():
    """Size of the input times error of the weight, column by column."""
    weight, x = layer_with_peaks()
    lost = weight - keep_columns(weight, [], bits=4).dequantize()
    return (x.square().mean(0) * lost.square().sum(0)).topk(4).indices.tolist()


def _test_columns(f):
    weight, x = layer_with_peaks()
    hessian = Hessian(x.shape[1]).add(x)
    mixed = keep_columns(weight, f(), bits=4)
    plain = hessian.output_error(weight, keep_columns(weight, [], bits=4).dequantize())
    error, bits = hessian.output_error(weight, mixed.dequantize()), mixed.bits_per_element
    expect(
        bits <= 4.55,
        f"{bits:.2f} bits for each weight, at most 4.55 were allowed: {len(mixed.columns)} columns are too many.",
    )
    expect(
        error <= plain / 3,
        f"Output error {error / plain:.2f} times that of keeping none; at most 0.33 was asked for. Is a column "
        "worth keeping if its inputs are loud, but its weights lose nothing?",
    )
    return f"Output error {error / plain:.2f} times that of keeping none, at {bits:.2f} bits."


def better_solution(weight, x, bits, group_size):
    """SmoothQuant's formula has the weights in it; search its alpha as AWQ does."""
    of_x, of_w = x.abs().mean(0).clamp(min=1e-6), weight.abs().mean(0).clamp(min=1e-6)
    candidates = [of_x ** (i / 20) / of_w ** (1 - i / 20) for i in range(21)]
    return min(candidates, key=lambda s: _reached(weight, x, s, bits, group_size))


def _test_better(f):
    found = []
    for seed, bits in ((12, 4), (13, 3)):
        weight, x = planted_layer(seed)
        s = _checked_scales(f(weight, x, bits, 128), weight)
        awq = min(awq_search(weight, x, bits=bits)[1].errors)
        ratio = _reached(weight, x, s, bits, 128) / awq
        expect(
            ratio <= 0.85,
            f"{bits} bits: output error {ratio:.2f} times that of AWQ's search; at most 0.85 was asked for. Which "
            "columns does the rounding hurt: what are their weights like, next to others of their group?",
        )
        found.append(f"{ratio:.2f} at {bits} bits")
    return "Output error over that of AWQ's search: " + ", ".join(found)


EXERCISES = {
    "11.1": Exercise(
        "keep the loudest columns",
        _test_keep,
        (
            "Three steps: how many columns, which ones, and a copy of `rounded` in which they are replaced.",
            "x.abs().mean(0) is one number a channel; .topk(count).indices are the channels with the largest.",
            "mixed = rounded.clone(); mixed[:, loudest] = weight[:, loudest]; max(1, round(share * columns)) of them.",
        ),
        keep_solution,
    ),
    "11.2": Exercise(
        "round a scaled weight",
        _test_scaling,
        (
            "Multiply, round, divide: in this order, and by the same s.",
            "weight * s multiplies column j by s[j], because the last dimension of weight is the input.",
            "quantize_tensor(weight * s, bits=bits, granularity=PerGroup(group_size), symmetric=False), "
            "dequantized, over s.",
        ),
        scaling_solution,
    ),
    "11.3": Exercise(
        "search alpha",
        _test_search,
        (
            "Write the output error of one s first, with the round trip of 11.2. Then try many.",
            "s = strength**alpha for alpha in torch.linspace(0, 1, 21); what is 0**alpha, and what is 1/0?",
            "Clamp the strength to a tiny number; then min(candidates, key=error), where error rounds with s and "
            "compares x @ w_hat.T with x @ weight.T.",
        ),
        search_solution,
    ),
    "11.4": Exercise(
        "which columns",
        _test_columns,
        (
            "What does column j add to the output error when it is rounded? Two things of it multiply.",
            "The size of the input, x.square().mean(0), and what the rounding of the column lost.",
            "keep_columns(weight, [], bits=4).dequantize() is the rounded weight; take the columns with the largest "
            "x.square().mean(0) * (weight - rounded).square().sum(0).",
        ),
        columns_solution,
    ),
    "11.5": Exercise(
        "better scales",
        _test_better,
        (
            "AWQ's s knows the inputs only. Print weight.abs().mean(0): do the columns differ?",
            "A column of small weights can be multiplied far before it reaches the largest of its group. Notebook "
            "09 had a formula with both sides in it.",
            "s = mean|x|**alpha / mean|w|**(1 - alpha), and search alpha as in 11.3.",
        ),
        better_solution,
    ),
}
