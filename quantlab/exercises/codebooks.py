"""Exercises of chapter 4: NF4 and other codebooks."""

import math

import torch

from quantlab.checks import Exercise, expect
from quantlab.codebook import kmeans_levels, nearest_level, nf4_levels, normalize_blocks, quantize_codebook
from quantlab.exercises.material import student_t
from quantlab.metrics import sqnr_db


def look_up_solution(x, levels, block_size):
    """Each block over its largest magnitude; then count the midpoints below each value."""
    blocks = x.view(-1, block_size)
    absmax = blocks.abs().amax(1)
    midpoints = (levels[:-1] + levels[1:]) / 2
    return torch.bucketize(blocks / absmax[:, None], midpoints), absmax


def _test_look_up(f):
    x = torch.tensor([0.6, -1.2, 0.1, 0.3, 8.0, 1.0, -2.9, 7.0])
    levels = torch.tensor([-1.0, -0.4, 0.0, 0.3, 1.0])
    answer = f(x.clone(), levels, 4)
    expect(isinstance(answer, tuple) and len(answer) == 2, "Return two things: codes, absmax.")
    codes, absmax = (torch.as_tensor(a) for a in answer)
    expect(
        absmax.numel() == 2,
        f"8 values in blocks of 4 have 2 magnitudes, absmax; got {absmax.numel()}. A block is a row of x.view(-1, 4).",
    )
    absmax = absmax.flatten().tolist()
    expect(
        all(abs(a - b) < 1e-6 for a, b in zip(absmax, (1.2, 8.0), strict=True)),
        f"The largest magnitudes of the two blocks are 1.2 and 8.0; got {[round(a, 3) for a in absmax]}. "
        "Magnitude: the sign does not count.",
    )
    expect(codes.numel() == 8, f"Each of the 8 values has a code; got {codes.numel()}.")
    codes = codes.flatten()
    expect(
        bool((codes == codes.float().round()).all()) and codes.min() >= 0,
        f"A code is the index of a level, a whole number; got {[round(c, 3) for c in codes.tolist()]}.",
    )
    expect(
        codes.max() <= 4,
        f"Five levels have the indices 0 to 4; got {int(codes.max())}. Did you divide by absmax first?",
    )
    right = [3, 0, 2, 3, 4, 2, 1, 4]
    got = [int(c) for c in codes]
    expect(
        got == right,
        f"0.6 / 1.2 is 0.5, nearest to the level 0.3, index 3; and so on: {right}. Got {got}. Nearest means: the "
        "border between two levels is half way.",
    )


def nf4_solution():
    """Normal quantiles on both sides of the middle, the middle itself once, over the largest."""
    delta = 1 - (1 / 30 + 1 / 32) / 2
    quantile = torch.distributions.Normal(0, 1).icdf
    up, down = (quantile(torch.linspace(delta, 0.5, n))[:-1] for n in (9, 8))
    levels = torch.cat([-down, torch.zeros(1), up.flip(0)])
    return levels / levels.max()


def _test_nf4(f):
    levels = torch.as_tensor(f()).double().flatten()
    expect(
        bool(torch.isfinite(levels).all()),
        "A level is infinite: you asked for the quantile of 0 or of 1. The outermost probability is δ, below 1.",
    )
    expect(
        len(levels) == 16,
        f"Four bits have 16 codes; got {len(levels)} levels. Count: 8 positive, 7 negative, and 0 once.",
    )
    expect(bool((levels.diff() > 0).all()), "The levels must ascend, each above the one before.")
    expect(bool((levels == 0).any()), "0.0 itself must be one of the levels, exactly.")
    expect(
        (levels > 0).sum() == 8,
        f"NF4 has 8 positive and 7 negative levels; got {(levels > 0).sum()} and {(levels < 0).sum()}. "
        "Which side gets the nine points of linspace?",
    )
    expect(
        abs(levels.max() - 1) < 1e-6 and abs(levels.min() + 1) < 1e-6,
        f"The outermost levels are -1 and 1; got {levels.min():.4f} and {levels.max():.4f}. Divide by the largest.",
    )
    off = (levels - nf4_levels().double()).abs()
    expect(
        off.max() < 1e-6,
        f"The levels differ from the published ones by up to {off.max():.2g}, at index {int(off.argmax())}; 2e-7 can "
        "be reached. Is δ right, and does linspace run from δ to ½?",
    )
    return f"Largest difference to the published table: {off.max():.0e}."


def bits_solution(block_size, outer):
    """4 bits for the code, 8 bits for a block's absmax, a float32 for `outer` of those."""
    return 4 + 8 / block_size + 32 / (outer * block_size)


def _test_bits(f):
    for block_size, outer in ((64, 256), (32, 256), (128, 16)):
        bits, right = float(f(block_size, outer)), bits_solution(block_size, outer)
        expect(
            bits < 4 + 32 / block_size,
            f"Blocks of {block_size}: {bits:.4f} bits, no less than {4 + 32 / block_size} without double quantization. "
            "The absmax of a block takes 8 bits now, not 32.",
        )
        expect(
            abs(bits - right) < 1e-6,
            f"Blocks of {block_size}, {outer} of them with one float32: {bits:.4f} bits, off by {bits - right:+.4f}. "
            "Which numbers are stored once for each weight, for each block, for each run of blocks?",
        )
    return f"{f(64, 256):.3f} bits a weight."


def entropy_solution(codes):
    """Shares of the codes that occur; minus the mean of their logarithms to base 2."""
    shares = codes.flatten().int().bincount() / codes.numel()
    shares = shares[shares > 0]
    return -(shares * shares.log2()).sum().item()


def _test_entropy(f):
    cases = (
        (torch.arange(16).repeat(10), 4.0, "all 16 codes used alike carry 4 bits"),
        (torch.tensor([0, 3, 3, 3]), 0.8113, "shares of 1/4 and 3/4 carry 0.811 bits"),
        (torch.full((9,), 5), 0.0, "a code that never changes carries no bits"),
        (torch.arange(8, dtype=torch.uint8).view(2, 4), 3.0, "8 codes used alike carry 3 bits"),
    )
    for codes, right, why in cases:
        bits = float(f(codes))
        expect(not math.isnan(bits), "nan: 0 · log 0 counts as 0. Leave codes that do not occur out of the sum.")
        expect(
            abs(bits - right * math.log(2)) > 1e-3 or right == 0,
            f"{bits:.3f}: that is right in nats. Bits need the logarithm to base 2.",
        )
        expect(abs(bits - right) < 1e-3, f"{why}; got {bits:.3f} for {codes.flatten().tolist()[:9]}.")


def lloyd_solution(values, levels):
    """Everybody to the nearest level, each level to the mean of its own; a level without any stays."""
    codes = nearest_level(values, levels).long()
    sums = torch.zeros(len(levels)).index_add(0, codes, values)
    counts = codes.bincount(minlength=len(levels))
    return torch.where(counts > 0, sums / counts.clamp(min=1), levels)


def _test_lloyd(f):
    values, levels = torch.tensor([0.0, 0.1, 0.9, 1.0, 1.1]), torch.tensor([0.2, 0.5])
    new = torch.as_tensor(f(values.clone(), levels.clone())).flatten()
    expect(len(new) == 2, f"Two levels went in, two come out; got {len(new)}.")
    expect(
        torch.allclose(new, torch.tensor([0.05, 1.0]), atol=1e-5),
        f"0.0 and 0.1 are nearest to 0.2, the others to 0.5: the means are 0.05 and 1.0; got "
        f"{[round(v, 3) for v in new.tolist()]}. One step only, and means, not medians.",
    )
    lonely = torch.tensor([0.0, 1.0, 50.0])
    new = torch.as_tensor(f(values.clone(), lonely.clone())).flatten()
    expect(
        bool(torch.isfinite(new).all()),
        f"Nobody is nearest to 50.0, so it has no mean: 0 / 0; got {new.tolist()}. Leave such a level where it is.",
    )
    expect(new[-1] == 50.0, f"Nobody is nearest to 50.0: it should stay there; got {new[-1]:.3f}.")
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    before = torch.linspace(-3, 3, 16)
    errors = [_error(x, level) for level in (before, torch.as_tensor(f(x.clone(), before.clone())))]
    expect(errors[1] < errors[0], f"A step must lower the error; it went from {errors[0]:.5f} to {errors[1]:.5f}.")
    return f"One step took the squared error from {errors[0]:.4f} to {errors[1]:.4f}."


def _error(x, levels):
    return (levels[nearest_level(x, levels).long()] - x).square().mean().item()


def table_solution():
    """Blocks drawn as often as their errors count, by absmax squared; k-means on their scaled values."""
    values, absmax = normalize_blocks(student_t(3, 128_000, seed=1), block_size=32)
    random = torch.Generator().manual_seed(2)
    drawn = torch.multinomial(absmax**2, len(absmax), replacement=True, generator=random)
    return kmeans_levels(values.view(-1, 32)[drawn], 16)


def _test_table(f):
    levels = torch.as_tensor(f()).float().flatten()
    expect(len(levels) <= 16, f"Four bits have 16 codes; got {len(levels)} levels.")
    expect(
        bool(torch.isfinite(levels).all()) and bool((levels.diff() > 0).all()), "The levels must be finite and ascend."
    )
    x = student_t(3, 128_000, seed=0)
    mine, nf4 = (sqnr_db(x, quantize_codebook(x, t, block_size=32).dequantize()) for t in (levels, nf4_levels()))
    both = f"Your table reaches {mine:.2f} dB in blocks of 32, NF4 {nf4:.2f}; 0.6 more is asked."
    expect(
        mine > nf4 - 0.2,
        f"{both} The values to fit are those of ν = 3 after the division by absmax: they fill -1 to 1, most of them "
        "near 0, and one of each block is ±1.",
    )
    expect(
        mine > nf4 + 0.2,
        f"{both} That is where k-means ends when all scaled values count alike. But the error of a scaled value is "
        "multiplied by the absmax of its block: whose errors are large?",
    )
    expect(
        mine > nf4 + 0.6,
        f"{both} Nearly: it is the *squared* error that counts, and k-means may need more steps; 0.8 can be reached.",
    )
    return f"{mine:.2f} dB, {mine - nf4:.2f} more than NF4."


EXERCISES = {
    "4.1": Exercise(
        "look-up",
        _test_look_up,
        (
            "A block is a row of x.view(-1, block_size): its largest magnitude is .abs().amax(1).",
            "Divide every row by its own magnitude: blocks / absmax[:, None].",
            "torch.bucketize(values, borders) counts the borders below each value; the borders lie half way "
            "between neighbouring levels.",
        ),
        look_up_solution,
    ),
    "4.2": Exercise(
        "NF4",
        _test_nf4,
        (
            "torch.distributions.Normal(0, 1).icdf gives quantiles of a tensor of probabilities.",
            "Positive side: the quantiles at torch.linspace(δ, 0.5, 9), without the last, which is 0. Negative side: "
            "the same with 8 points, and a minus.",
            "torch.cat([minus the 7, torch.zeros(1), the 8 turned round with .flip(0)]), divided by its maximum.",
        ),
        nf4_solution,
    ),
    "4.3": Exercise(
        "bits of double quantization",
        _test_bits,
        (
            "Three kinds of numbers are stored: codes, 8-bit magnitudes, float32 magnitudes of magnitudes.",
            "A number that n weights share costs each of them its bits over n.",
            "The float32 is shared by outer blocks, and so by outer * block_size weights.",
        ),
        bits_solution,
    ),
    "4.4": Exercise(
        "entropy of the codes",
        _test_entropy,
        (
            "First the share of each code: codes.flatten().int().bincount() / codes.numel().",
            "The entropy is the sum of −share · log₂(share).",
            "Keep the shares above 0 only: shares[shares > 0]; log2 is a method of tensors.",
        ),
        entropy_solution,
    ),
    "4.5": Exercise(
        "one step of k-means",
        _test_lloyd,
        (
            "nearest_level(values, levels) says who belongs to which level.",
            "The mean of the values of level k is values[codes == k].mean(); a loop over k will do.",
            "Where no code equals k, keep levels[k]: torch.where, or an if inside the loop.",
        ),
        lloyd_solution,
    ),
    "4.6": Exercise(
        "a table for heavy tails",
        _test_table,
        (
            "x - x̂ = absmax · (value - level): the squared error of a scaled value counts absmax² times.",
            "Lloyd's step with weights: a level moves to Σ weight · value / Σ weight over its own values. Repeat it "
            "some 30 times, from NF4 or from kmeans_levels.",
            "values, absmax = normalize_blocks(student_t(3, 128_000, seed=1), block_size=32); a value's weight is "
            "absmax.repeat_interleave(32) ** 2. Or let kmeans_levels see each block as often as it should count: "
            "torch.multinomial draws them.",
        ),
        table_solution,
    ),
}
